"""What an error takes from a console: the reason, cut and harmless, whatever the guest writes."""

from __future__ import annotations

from pathlib import Path

import msgspec
import pytest

from cli_host import instance
from coppice.instance.last_words import console_words, cure
from coppice.model import MIB, State

PANIC = b"[    2.27] Kernel panic - not syncing: System is deadlocked on memory\r\n[    2.28] Call Trace:\r\n"


@pytest.mark.parametrize(
    ("console", "words"),
    [
        (b"", ""),
        (b"\r\n \r\n", ""),
        (b"[    0.1] booting\r\n[    0.2] at the \x1b[31mend\r\n\r\n", "its console ended with 'at the [31mend'"),
        (b"[    0.1] the reason\r\n[    0.2] reboot: Restarting system\r\n", "its console ended with 'the reason'"),
        (b"no line end", "its console ended with 'no line end'"),
        (b"before\r\n" + PANIC, "its kernel panicked: System is deadlocked on memory"),
        (b"x" * (1 << 20) + PANIC + b"trace\r\n" * 1000, "its kernel panicked: System is deadlocked on memory"),
        (b"\xff\x00" * (1 << 20), "its console ended with " + repr("\ufffd" * 80)),
    ],
)
def test_words_of_a_console(tmp_path: Path, console: bytes, words: str) -> None:
    """A panic counts for more than what came behind it; else the last line does; never more than a message can hold."""
    log = tmp_path / "console.log"
    log.write_bytes(console)
    assert console_words(log) == words


def test_a_machine_that_said_nothing(tmp_path: Path) -> None:
    """It may have ended before there was a console."""
    assert console_words(tmp_path / "console.log") == ""


def test_the_cure() -> None:
    """More memory where that is the matter; else the logs, and how to have them where they went with a new machine."""
    new = instance("oak", State.CREATED)
    assert (
        cure(new, "its kernel panicked: Out of memory")
        == f"it has {new.machine.memory_bytes // MIB} MiB of memory: give it more"
    )
    assert "--no-start" in cure(new, "")
    assert "coppice logs oak" in cure(msgspec.structs.replace(new, state=State.STANDBY), "")
