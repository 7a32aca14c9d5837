"""Why a machine ended by itself, or did not come up, in the words of its guest's kernel.

A VMM whose guest powered off, restarted or panicked ends alike, with status 0, and a host process that did not start it does not even learn the status. What
the kernel wrote last on the console tells them apart. The console is the guest's to write: these are words for people, cut and fit for a message, and
nothing is decided by them.
"""

from __future__ import annotations

import re
from pathlib import Path

from coppice.guest.protocol import readable
from coppice.model import MIB, Instance, State

_TAIL = 64 << 10  # a panic comes with its registers and a trace behind it
_LONGEST = 160
_PANICKED = "its kernel panicked: "
_PANIC = re.compile(rb"Kernel panic - not syncing: ([^\r\n]+)")
_KERNEL_LINE = re.compile(rb"^\[ *(\d+\.\d+)\] ")
_ENDS = (
    (re.compile(rb"reboot: Power down"), "the guest powered off"),
    (re.compile(rb"reboot: Restarting system|sysrq: Resetting"), "the guest restarted, which ends a machine"),
)
_OF_MEMORY = re.compile(r"memory|unpacking failed", re.IGNORECASE)


def of_end(console: Path, since: float) -> str | None:
    """What the kernel said of its end, if that is the last thing on the console, and was written after `since` (seconds since the epoch). Blocks."""
    try:
        if console.stat().st_mtime < since:
            return None  # of an earlier life
    except OSError:
        return None
    later = float("inf")
    for line in reversed(_tail(console).splitlines()):
        match = _KERNEL_LINE.match(line)
        # Backwards through the last lines of one kernel: another life before it would have a later time.
        if match is None or (at := float(match[1])) > later:
            return None
        later = at
        said = line[match.end() :]
        if panic := _PANIC.match(said):
            return _PANICKED + readable(panic[1][:_LONGEST])
        for pattern, meaning in _ENDS:
            if pattern.match(said):
                return meaning
    return None


def of_start(console: Path) -> str:
    """What the guest's kernel panicked of, else the last line of its console; empty where it said nothing. Blocks."""
    tail = _tail(console)
    if panics := _PANIC.findall(tail):
        return _PANICKED + readable(panics[-1][:_LONGEST])
    lines = [line for line in (_KERNEL_LINE.sub(b"", line) for line in tail.splitlines()) if line.strip()]
    while lines and lines[-1].startswith(b"reboot: "):  # that it ended is known
        lines.pop()
    return f"its console ended with {readable(lines[-1][:_LONGEST])!r}" if lines else ""


def _tail(console: Path) -> bytes:
    try:
        with console.open("rb") as stream:
            stream.seek(max(0, console.stat().st_size - _TAIL))
            return stream.read(_TAIL)
    except OSError:
        return b""


def cure(instance: Instance, words: str) -> str:
    """What to do about a machine that did not come up. One that was new is removed then, and its logs with it."""
    if _OF_MEMORY.search(words):
        return f"it has {instance.machine.memory_bytes // MIB} MiB of memory: give it more"
    if instance.state is not State.CREATED:
        return f"see `coppice logs {instance.name}` and `coppice logs --vmm {instance.name}`"
    return "it was removed; to keep its logs, make it with --no-start (a fork: with --target standby), and then start or restore it"
