"""Read from a guest's console why its machine ended or did not start.

The VMM exits with status 0 whether the guest powered off, restarted or panicked, and only the
process that started it learns the status. The kernel's last console lines show the difference. The
guest can write anything there, so no code depends on this text alone.
"""

from __future__ import annotations

import re
from pathlib import Path

from coppice.agent.protocol import readable
from coppice.model import MIB, Instance, State

_TAIL = 64 << 10  # a panic is followed by registers and a stack trace
_LONGEST = 160
_TICK_S = 0.01  # times of files are those of the last tick of the kernel, which may be 100 per second
_PANICKED = "its kernel panicked: "
_PANIC = rb"Kernel panic - not syncing: ([^\r\n]+)"
_KERNEL_LINE = rb"^\[ *(\d+\.\d+)\] "
_POWERED_OFF = "the guest powered off"
_HALTED = "the guest halted"
OWN_WILL = frozenset({_POWERED_OFF, _HALTED})
"""The reasons by which a guest wanted to end."""
_ENDS = (
    (rb"reboot: Power down", _POWERED_OFF),
    (rb"reboot: System halted", _HALTED),
    (rb"reboot: Restarting system|sysrq: Resetting", "the guest restarted, which ends a machine"),
)
_OF_MEMORY = r"memory|unpacking failed"


def of_end(console: Path, since: float) -> str | None:
    """Return the kernel's reason for its end, if the console ends with it; otherwise None. Blocks.

    :param since: ignore a console last written before this time (seconds since the epoch)
    """
    try:
        if console.stat().st_mtime < since - _TICK_S:
            return None  # written by an earlier run
    except OSError:
        return None
    later = float("inf")
    for line in reversed(_tail(console).splitlines()):
        match = re.match(_KERNEL_LINE, line)
        # Going backwards, a later time belongs to an earlier run of the machine.
        if match is None or (at := float(match[1])) > later:
            return None
        later = at
        said = line[match.end() :]
        if panic := re.match(_PANIC, said):
            return _PANICKED + readable(panic[1][:_LONGEST])
        for pattern, meaning in _ENDS:
            if re.match(pattern, said):
                return meaning
    return None


def of_start(console: Path) -> str:
    """Return the reason of the kernel's panic, else the last console line, else "". Blocks."""
    tail = _tail(console)
    if panics := re.findall(_PANIC, tail):
        return _PANICKED + readable(panics[-1][:_LONGEST])
    lines = [line for line in (re.sub(_KERNEL_LINE, b"", line) for line in tail.splitlines()) if line.strip()]
    while lines and lines[-1].startswith(b"reboot: "):  # says only that it ended
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
    """Return the hint for a machine that did not start. A new machine's logs are removed."""
    if re.search(_OF_MEMORY, words, re.IGNORECASE):
        return f"it has {instance.machine.memory_bytes // MIB} MiB of memory: give it more with `--memory`"
    if instance.state is not State.CREATED:
        return f"see `coppice logs {instance.name}` and `coppice logs --vmm {instance.name}`"
    return (
        "it was removed; to keep its logs, create it with --no-start and then start it "
        "(a fork: create it with --target standby and then restore it)"
    )
