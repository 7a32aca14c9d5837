"""Why a guest ended or did not come up, read from the end of its console: the reason, short and harmless, whatever the guest writes."""

from __future__ import annotations

from pathlib import Path

import msgspec
import pytest

from cli_host import instance
from coppice.instance.last_words import cure, of_end, of_start
from coppice.model import MIB, State

PANIC = b"[   25.1] Kernel panic - not syncing: sysrq triggered crash\r\n[   25.2] CPU: 0 PID: 7\r\n[   25.3] Call Trace:\r\n"
DEADLOCK = b"[    2.27] Kernel panic - not syncing: System is deadlocked on memory\r\n[    2.28] Call Trace:\r\n"


@pytest.mark.parametrize(
    ("console", "said"),
    [
        (b"hello\r\n" + PANIC, "its kernel panicked: sysrq triggered crash"),
        (b"[   24.0] sysrq: Power Off\r\n[   25.5] reboot: Power down\r\n", "the guest powered off"),
        (b"[   25.5] reboot: Restarting system\n", "the guest restarted, which ends a machine"),
        (b"[   25.5] sysrq: Resetting\r\n", "the guest restarted, which ends a machine"),
        (PANIC + b"hello\r\n", None),  # it went on, or came back
        (PANIC + b"[    0.1] Linux version 6.1\r\n", None),  # another life
        (b"Kernel panic - not syncing: a program says so\n", None),
        (b"[    1.0] eth0: link up\n", None),
        (b"", None),
        (b"[   25.1] Kernel panic - not syncing: \x1b[31m\x07" + b"x" * 1000 + b"\n", "its kernel panicked: [31m" + "x" * 154),
        (bytes(range(256)) * 1000, None),
    ],
)  # fmt: skip
def test_the_words_of_an_end(tmp_path: Path, console: bytes, said: str | None) -> None:
    """Only what its kernel said last, in this life: a short line of printable text, or nothing."""
    log = tmp_path / "console.log"
    log.write_bytes(console)
    assert of_end(log, 0.0) == said


def test_words_of_an_earlier_life(tmp_path: Path) -> None:
    """A machine that wrote nothing since it was started has said nothing."""
    log = tmp_path / "console.log"
    log.write_bytes(PANIC)
    assert of_end(log, log.stat().st_mtime + 1) is None
    assert of_end(tmp_path / "none.log", 0.0) is None


@pytest.mark.parametrize(
    ("console", "words"),
    [
        (b"", ""),
        (b"\r\n \r\n", ""),
        (b"[    0.1] booting\r\n[    0.2] at the \x1b[31mend\r\n\r\n", "its console ended with 'at the [31mend'"),
        (b"[    0.1] the reason\r\n[    0.2] reboot: Restarting system\r\n", "its console ended with 'the reason'"),
        (b"no line end", "its console ended with 'no line end'"),
        (b"before\r\n" + DEADLOCK, "its kernel panicked: System is deadlocked on memory"),
        (b"x" * (1 << 20) + DEADLOCK + b"trace\r\n" * 1000, "its kernel panicked: System is deadlocked on memory"),
        (b"\xff\x00" * (1 << 20), "its console ended with " + repr("\ufffd" * 80)),
    ],
)
def test_the_words_of_a_start_that_failed(tmp_path: Path, console: bytes, words: str) -> None:
    """A panic counts for more than what came behind it; else the last line does; never more than a message can hold."""
    log = tmp_path / "console.log"
    log.write_bytes(console)
    assert of_start(log) == words


def test_a_machine_that_said_nothing(tmp_path: Path) -> None:
    """It may have ended before there was a console."""
    assert of_start(tmp_path / "console.log") == ""


def test_the_cure() -> None:
    """More memory where that is the matter; else the logs, and how to have them where they went with a new machine."""
    new = instance("oak", State.CREATED)
    assert (
        cure(new, "its kernel panicked: Out of memory")
        == f"it has {new.machine.memory_bytes // MIB} MiB of memory: give it more"
    )
    assert "--no-start" in cure(new, "")
    assert "coppice logs oak" in cure(msgspec.structs.replace(new, state=State.STANDBY), "")
