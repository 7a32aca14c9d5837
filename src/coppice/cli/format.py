"""Sizes, durations and ages, as people read them."""

from __future__ import annotations

import time
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING

from coppice.cli.output import printable

if TYPE_CHECKING:
    from coppice.model import Publish

_UNITS = ("B", "KiB", "MiB", "GiB", "TiB", "PiB")
_AGES = ((86400 * 365, "y"), (86400, "d"), (3600, "h"), (60, "min"), (1, "s"))


def size(count: int) -> str:
    """Bytes in the largest unit that leaves a number of at least 1: `1.2 MiB`."""
    value = float(count)
    for unit in _UNITS:
        if abs(value) < 1023.95 or unit == _UNITS[-1]:
            break
        value /= 1024
    return f"{count} B" if unit == "B" else f"{value:.1f} {unit}"


def duration(milliseconds: float) -> str:
    """`0.4 ms`, `12 ms`, `1.24 s`, `3 min 05 s`."""
    if milliseconds < 9.95:
        return f"{milliseconds:.1f} ms"
    if milliseconds < 999.5:
        return f"{milliseconds:.0f} ms"
    seconds = milliseconds / 1000
    if seconds < 59.95:
        return f"{seconds:.2f} s" if seconds < 9.995 else f"{seconds:.1f} s"
    minutes, rest = divmod(round(seconds), 60)
    return f"{minutes} min {rest:02d} s"


def age(since: float, now: float | None = None) -> str:
    """How long ago a time (seconds since the epoch) was, in its largest unit: `5 min`."""
    seconds = max(0.0, (time.time() if now is None else now) - since)
    for length, unit in _AGES:
        if seconds >= length:
            return f"{int(seconds // length)} {unit}"
    return "0 s"


def moment(at: float) -> str:
    """A time of day, local, to the second."""
    return time.strftime("%Y-%m-%d %H:%M:%S %z", time.localtime(at))


def count(number: int, noun: str) -> str:
    """`1 fork`, `2 forks`."""
    return f"{number} {noun}" if number == 1 else f"{number} {noun}s"


def digest(sha256: str | None) -> str:
    """A SHA-256, or that there is none yet."""
    return sha256 or "pending: computed in the background, or by `coppice verify`"


def tags(pairs: Mapping[str, str]) -> str:
    """`team=a, env=test`. They may be another owner's: what a terminal would obey is made visible."""
    return printable(", ".join(f"{key}={value}" for key, value in pairs.items())) or "-"


def ports(published: Sequence[Publish]) -> str:
    """Forwarded ports: `127.0.0.1:8080->80/tcp`."""
    return ", ".join(_port(port) for port in published) or "-"


def _port(port: Publish) -> str:
    address = f"[{port.host_address}]" if ":" in port.host_address else port.host_address
    return f"{address}:{port.host_port or 'auto'}->{port.guest_port}/{port.protocol}"
