"""Why a machine did not come up, as far as its console tells."""

from __future__ import annotations

import re
from pathlib import Path

from coppice.guest.protocol import readable
from coppice.model import MIB, Instance, State

_TAIL = 64 << 10  # a panic comes with a trace behind it
_LONGEST = 160
_PANIC = re.compile(rb"Kernel panic - not syncing: ([^\r\n]+)")
_TIME = re.compile(rb"^\[ *[0-9]+\.[0-9]+\] ")
_OF_MEMORY = re.compile(r"memory|unpacking failed", re.IGNORECASE)


def console_words(log: Path) -> str:
    """What the guest's kernel panicked of, else the last line of its console; empty where it said nothing. Blocks.

    A guest writes what it likes: the text is cut, and fit for a message.
    """
    try:
        with log.open("rb") as stream:
            stream.seek(max(0, log.stat().st_size - _TAIL))
            tail = stream.read(_TAIL)
    except OSError:
        return ""
    if panics := _PANIC.findall(tail):
        return f"its kernel panicked: {readable(panics[-1][:_LONGEST])}"
    lines = [line for line in (_TIME.sub(b"", line) for line in tail.splitlines()) if line.strip()]
    while lines and lines[-1].startswith(b"reboot: "):  # that it ended is known
        lines.pop()
    return f"its console ended with {readable(lines[-1][:_LONGEST])!r}" if lines else ""


def cure(instance: Instance, words: str) -> str:
    """What to do about a machine that did not come up. One that was new is removed then, and its logs with it."""
    if _OF_MEMORY.search(words):
        return f"it has {instance.machine.memory_bytes // MIB} MiB of memory: give it more"
    if instance.state is not State.CREATED:
        return f"see `coppice logs {instance.name}` and `coppice logs --vmm {instance.name}`"
    return "it was removed; to keep its logs, make it with --no-start (a fork: with --target standby), and then start or restore it"
