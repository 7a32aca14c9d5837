"""The reason why a guest ended or did not start, read from the end of its console: short and
harmless, whatever the guest writes.
"""

from __future__ import annotations

from pathlib import Path

import msgspec
import pytest

from cli_host import instance
from coppice.machine.last_words import cure, of_end, of_start
from coppice.model import MIB, State

PANIC = b"[   25.1] Kernel panic - not syncing: sysrq triggered crash\r\n[   25.2] CPU: 0 PID: 7\r\n[   25.3] Call Trace:\r\n"
DEADLOCK = b"[    2.27] Kernel panic - not syncing: System is deadlocked on memory\r\n[    2.28] Call Trace:\r\n"


@pytest.mark.parametrize(
    ("console", "said"),
    [
        (b"hello\r\n" + PANIC, "its kernel panicked: sysrq triggered crash"),
        (b"[   24.0] sysrq: Power Off\r\n[   25.5] reboot: Power down\r\n", "the guest powered off"),
        (b"[   25.5] reboot: Restarting system\n", "the guest restarted, which ends a machine"),
        (b"[   25.5] reboot: System halted\n", "the guest halted"),
        (b"[   25.5] sysrq: Resetting\r\n", "the guest restarted, which ends a machine"),
        (PANIC + b"hello\r\n", None),  # the guest continued, or came back
        (PANIC + b"[    0.1] Linux version 6.1\r\n", None),  # a later boot
        (b"Kernel panic - not syncing: a program says so\n", None),
        (b"[    1.0] eth0: link up\n", None),
        (b"", None),
        (b"[   25.1] Kernel panic - not syncing: \x1b[31m\x07" + b"x" * 1000 + b"\n", "its kernel panicked: [31m" + "x" * 154),
        (bytes(range(256)) * 1000, None),
    ],
)  # fmt: skip
def test_the_reason_of_an_end_is_the_kernels_last_message(tmp_path: Path, console: bytes, said: str | None) -> None:
    """Only the kernel's last message of this boot counts: a short line of printable text, or
    nothing.
    """
    log = tmp_path / "console.log"
    log.write_bytes(console)
    assert of_end(log, 0.0) == said


def test_messages_of_an_earlier_start_do_not_count(tmp_path: Path) -> None:
    """A machine that wrote nothing since its start gives no reason."""
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
def test_the_reason_of_a_failed_start_is_a_panic_or_the_last_line(tmp_path: Path, console: bytes, words: str) -> None:
    """A panic takes precedence over later lines; without one the last line counts. The length is
    bounded.
    """
    log = tmp_path / "console.log"
    log.write_bytes(console)
    assert of_start(log) == words


def test_a_machine_without_output_gives_no_reason(tmp_path: Path) -> None:
    """The machine may have ended before it had a console."""
    assert of_start(tmp_path / "console.log") == ""


def test_the_hint_fits_the_reason() -> None:
    """The hint is more memory if memory ran out. Otherwise it names the logs. A new machine is
    removed after a failed start, so its hint says how to keep the logs.
    """
    new = instance("oak", State.CREATED)
    assert (
        cure(new, "its kernel panicked: Out of memory")
        == f"it has {new.machine.memory_bytes // MIB} MiB of memory: give it more with `--memory`"
    )
    assert "--no-start" in cure(new, "")
    assert "coppice logs oak" in cure(msgspec.structs.replace(new, state=State.STANDBY), "")
