"""Why a guest ended, read from the end of its console: only what its kernel said last, in this life, and nothing that is not text."""

from __future__ import annotations

from pathlib import Path

import pytest

from coppice.instance.last_words import of_guest

PANIC = b"[   25.1] Kernel panic - not syncing: sysrq triggered crash\r\n[   25.2] CPU: 0 PID: 7\r\n[   25.3] Call Trace:\r\n"


@pytest.mark.parametrize(
    ("console", "said"),
    [
        (b"hello\r\n" + PANIC, "the guest's kernel panicked: sysrq triggered crash"),
        (b"[   24.0] sysrq: Power Off\r\n[   25.5] reboot: Power down\r\n", "the guest powered off"),
        (b"[   25.5] reboot: Restarting system\n", "the guest restarted, which ends a machine"),
        (b"[   25.5] sysrq: Resetting\r\n", "the guest restarted, which ends a machine"),
        (PANIC + b"hello\r\n", None),  # it went on, or came back
        (PANIC + b"[    0.1] Linux version 6.1\r\n", None),  # another life
        (b"Kernel panic - not syncing: a program says so\n", None),
        (b"[    1.0] eth0: link up\n", None),
        (b"", None),
        (b"[   25.1] Kernel panic - not syncing: \x1b[31m\x07" + b"x" * 1000 + b"\n", "the guest's kernel panicked: [31m" + "x" * 116),
        (bytes(range(256)) * 1000, None),
    ],
)  # fmt: skip
def test_the_last_words(tmp_path: Path, console: bytes, said: str | None) -> None:
    """The console is the guest's to write: whatever is there, it is a short line of printable text, or nothing."""
    log = tmp_path / "console.log"
    log.write_bytes(console)
    assert of_guest(log, 0.0) == said


def test_words_of_an_earlier_life(tmp_path: Path) -> None:
    """A machine that wrote nothing since it was started has said nothing."""
    log = tmp_path / "console.log"
    log.write_bytes(PANIC)
    assert of_guest(log, log.stat().st_mtime + 1) is None
    assert of_guest(tmp_path / "none.log", 0.0) is None
