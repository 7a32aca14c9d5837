"""Human-readable sizes, durations, ages and lists."""

from __future__ import annotations

import time
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING

from coppice.cli.output import printable

if TYPE_CHECKING:
    from coppice.model import Egress, Instance, Limits, Publish, Supervision

_UNITS = ("B", "KiB", "MiB", "GiB", "TiB", "PiB")
_WITH_PROCESS = ("Running", "Paused", "Standby", "Template")  # the end of a stopped machine's process is no news
_AGES = ((86400 * 365, "y"), (86400, "d"), (3600, "h"), (60, "min"), (1, "s"))


def size(count: int) -> str:
    """Format bytes in the largest unit that leaves a number of at least 1: `1.2 MiB`."""
    value = float(count)
    for unit in _UNITS:
        if abs(value) < 1023.95 or unit == _UNITS[-1]:
            break
        value /= 1024
    return f"{count} B" if unit == "B" else f"{value:.1f} {unit}"


def duration(milliseconds: float) -> str:
    """Format a duration: `0.4 ms`, `12 ms`, `1.24 s`, `3 min 05 s`."""
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
    """Format the time since `since` (seconds since the epoch) in its largest unit: `5 min`."""
    seconds = max(0.0, (time.time() if now is None else now) - since)
    for length, unit in _AGES:
        if seconds >= length:
            return f"{int(seconds // length)} {unit}"
    return "0 s"


def policies(supervision: Supervision | None) -> str:
    """Format what a server does with a machine by itself: `expires at ... (stop), restart always`."""
    if supervision is None:
        return ""
    restart, check = supervision.restart, supervision.health_check
    found = []
    if supervision.expires_at is not None:
        found.append(f"expires at {moment(supervision.expires_at)} ({supervision.on_expiry})")
    if restart.when != "never":
        most = f", {restart.max_attempts} times in a row at most" if restart.max_attempts else ""
        found.append(f"restart {restart.when}{most}")
    if check.kind == "exec":
        found.append(f"health check {printable(' '.join(check.command))!r} every {check.interval_s:g} s")
    elif check.kind == "log":
        found.append(f"health check log:{printable(check.text)} every {check.interval_s:g} s")
    elif check.kind != "none":
        path = printable(check.path) if check.kind == "http" else ""
        found.append(f"health check {check.kind}:{check.port}{path} every {check.interval_s:g} s")
    if supervision.auto_standby_s:
        found.append(f"standby when idle for {supervision.auto_standby_s:g} s")
    return ", ".join(found)


def state(instance: Instance) -> str:
    """Format the state of a machine, with the end of its process: `Running (exited 1)`."""
    end = instance.process_end
    if end is None or instance.state not in _WITH_PROCESS:
        return str(instance.state)
    return f"{instance.state} ({f'exited {end.exit_code}' if end.signal is None else f'killed by signal {end.signal}'})"


def moment(at: float) -> str:
    """Format a date and time, local, to the second."""
    return time.strftime("%Y-%m-%d %H:%M:%S %z", time.localtime(at))


def count(number: int, noun: str) -> str:
    """Format a number with its noun: `1 fork`, `2 forks`."""
    return f"{number} {noun}" if number == 1 else f"{number} {noun}s"


def digest(sha256: str | None) -> str:
    """Return a SHA-256, or a note that it is not computed yet."""
    return sha256 or "pending: computed in the background, or by `coppice verify`"


def tags(pairs: Mapping[str, str]) -> str:
    """Format tags: `team=a, env=test`. Another owner may have set them, so escape control
    characters.
    """
    return printable(", ".join(f"{key}={value}" for key, value in pairs.items())) or "-"


def ports(published: Sequence[Publish]) -> str:
    """Format published ports: `127.0.0.1:8080->80/tcp`."""
    return ", ".join(_port(port) for port in published) or "-"


def limits(given: Limits) -> str:
    """Format the limits of a VMM; "" if there are none."""
    words = [
        f"{size(given.memory_bytes)} of memory" if given.memory_bytes is not None else "",
        f"{given.cpus:g} CPUs" if given.cpus is not None else "",
        f"{given.pids} threads" if given.pids is not None else "",
        f"{size(given.io_bytes_per_s)}/s of I/O" if given.io_bytes_per_s is not None else "",
    ]
    return ", ".join(filter(None, words))


def egress(policy: Egress) -> str:
    """Format a policy in the syntax of `--egress`."""
    return f"allow={','.join((*policy.networks, *policy.names))}" if policy.mode == "allow" else policy.mode


def _port(port: Publish) -> str:
    address = f"[{port.host_address}]" if ":" in port.host_address else port.host_address
    return f"{address}:{port.host_port or 'auto'}->{port.guest_port}/{port.protocol}"
