"""`coppice exec` behaves like ssh: the real command line in a separate process, over a host whose
guest is this machine.
"""

from __future__ import annotations

import contextlib
import json
import os
import pty
import select
import signal
import subprocess
import termios
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from cli_host import FakeHost
from cli_process import PYTHON, command, environment, run, started
from coppice.cli import main


def test_streams_are_binary_safe_and_separate() -> None:
    """Every byte passes unchanged in both directions, and standard error stays separate."""
    data = bytes(range(256)) * 8192
    ended = run("exec", "vm", "--", "sh", "-c", "tee /dev/stderr", stdin=data)
    assert ended.returncode == 0
    assert ended.stdout == data
    assert ended.stderr == data


@pytest.mark.parametrize(("script", "status"), [("exit 7", 7), ("kill -TERM $$", 143), ("exit 0", 0)])
def test_the_exit_status_is_the_commands(script: str, status: int) -> None:
    """A script sees the exit status of the command in the guest."""
    assert run("exec", "vm", "--", "sh", "-c", script).returncode == status


def test_an_open_standard_input_does_not_delay_the_exit() -> None:
    """exec exits when the command ends, even if its own input is still open."""
    reader, writer = os.pipe()
    try:
        with started("exec", "vm", "--", "echo", "done", stdin=reader, stdout=subprocess.PIPE) as child:
            out, _ = child.communicate(timeout=30)
        assert out == b"done\n"
    finally:
        os.close(reader)
        os.close(writer)


@pytest.mark.parametrize("kind", ["file", "null", "closed", "none"])
def test_every_kind_of_standard_input(kind: str, tmp_path: Path) -> None:
    """A file, /dev/null and a closed descriptor give end of file; with -n the input is not read."""
    (tmp_path / "input").write_bytes(b"from a file")
    path = os.devnull if kind == "null" else str(tmp_path / "input")
    flags = ["-n"] if kind == "none" else []
    words = command("exec", *flags, "vm", "--", "cat")
    with Path(path).open("rb") as stdin:
        if kind == "closed":
            words = ["sh", "-c", 'exec "$@" <&-', "sh", *words]
        ended = subprocess.run(words, stdin=stdin, env=environment(), capture_output=True, timeout=30, check=False)
        left = os.read(stdin.fileno(), 100)
    assert ended.returncode == 0
    assert ended.stderr == b""
    assert ended.stdout == (b"from a file" if kind == "file" else b"")
    assert left == (b"from a file" if kind in ("none", "closed") else b"")


_TRAP = 'trap "echo told; exit 9" INT TERM; echo ready; while :; do sleep 0.05; done'


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_signals_are_forwarded(number: int) -> None:
    """Ctrl-C goes to the command: it can clean up, and exec has its exit status."""
    with started("exec", "-n", "vm", "--", "sh", "-c", _TRAP, stdout=subprocess.PIPE) as child:
        assert child.stdout is not None
        assert child.stdout.readline() == b"ready\n"
        child.send_signal(number)
        assert child.stdout.read() == b"told\n"
        assert child.wait(30) == 9


def test_a_third_signal_ends_the_session() -> None:
    """A command that ignores signals cannot keep the user in the session."""
    script = "import signal; signal.signal(2, lambda *_: print('no', flush=True)); print('ready', flush=True)\nwhile 1: signal.pause()"
    options = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE}
    with started("exec", "-n", "vm", "--", PYTHON, "-c", script, **options) as child:
        assert child.stdout is not None
        assert child.stderr is not None
        assert child.stdout.readline() == b"ready\n"
        for _ in range(2):
            child.send_signal(signal.SIGINT)
            assert child.stdout.readline() == b"no\n"
        assert b"another one ends the session" in child.stderr.readline()
        child.send_signal(signal.SIGINT)
        assert child.wait(30) == 130


@pytest.mark.parametrize("script", ["exec yes", "echo y; exec sleep 60"])
def test_a_closed_pipe_ends_the_session(script: str) -> None:
    """`coppice exec vm -- ... | head -1` exits without a message, whether or not the command prints
    again.
    """
    options = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "stdin": subprocess.DEVNULL}
    with started("exec", "vm", "--", "sh", "-c", script, **options) as child:
        assert child.stdout is not None
        assert child.stderr is not None
        assert child.stdout.readline() == b"y\n"
        child.stdout.close()
        assert child.wait(30) == 141
        assert child.stderr.read() == b""


def test_a_timeout_has_exit_status_124() -> None:
    """The status is that of timeout(1), which differs from the usual statuses of commands."""
    ended = run("exec", "--timeout", "0.2", "vm", "--", "sleep", "60")
    assert ended.returncode == 124
    assert ended.stderr == b"coppice: the command did not end within 0.2 s, and was killed\n"


def test_json_holds_the_output_and_the_status_is_the_commands() -> None:
    """Bytes that are not text are replaced in the JSON; the exit status is the command's with and
    without --json.
    """
    ended = run("--json", "exec", "vm", "--", "sh", "-c", "printf 'a\\377'; echo err >&2; exit 3")
    found = json.loads(ended.stdout)
    assert found.pop("duration_ms") > 0
    assert found == {"exit_code": 3, "timed_out": False, "out_of_memory": False, "stdout": "a�", "stderr": "err\n"}
    assert ended.returncode == 3
    assert ended.stderr == b""


def test_options_reach_the_host() -> None:
    """Environment, directory, user and deadline reach the host; all words after NAME are the
    command, dashes included.
    """
    host = FakeHost()
    words = ["exec", "-n", "-e", "A=1", "-w", "/srv", "-u", "web", "--timeout", "5"]
    words += ["--memory-limit", "64M", "--pids-limit", "9", "vm", "true", "--json", "-t"]
    assert main(words, host_factory=host.factory) == 0
    assert host.asked("open_exec") == {
        "instance": "vm",
        "argv": ("true", "--json", "-t"),
        "env": {"A": "1"},
        "workdir": "/srv",
        "user": "web",
        "tty": False,
        "size": None,
        "term": None,
        "stdin": False,
        "timeout_s": 5.0,
        "memory_limit_bytes": 64 << 20,
        "pids_limit": 9,
        "command": None,
    }


# On a terminal


class Terminal:
    """A terminal with the command line in its foreground."""

    def __init__(self, *words: str) -> None:
        self.shown = b""
        self.ours, theirs = pty.openpty()
        termios.tcsetwinsize(theirs, (40, 100))
        self.before = termios.tcgetattr(theirs)
        self.theirs = theirs
        # A new session leader, so that the terminal is its controlling one.
        program = "import fcntl, os, sys, termios; os.setsid(); fcntl.ioctl(0, termios.TIOCSCTTY, 0); os.execv(sys.argv[1], sys.argv[1:])"
        self.child = subprocess.Popen(
            [PYTHON, "-c", program, *command(*words)],
            stdin=theirs,
            stdout=theirs,
            stderr=theirs,
            env=environment(TERM="xterm-test"),
        )

    def type(self, keys: bytes) -> None:
        """Press keys."""
        os.write(self.ours, keys)

    def see(self, text: bytes) -> None:
        """Wait until the text is on the screen."""
        end = time.monotonic() + 30
        while text not in self.shown:
            assert time.monotonic() < end, self.shown
            if select.select([self.ours], [], [], 1)[0]:
                self.shown += os.read(self.ours, 4096)

    def status(self) -> int:
        """Wait for the end and return the exit status."""
        return self.child.wait(30)

    def modes(self) -> list[Any]:
        """Return the result of tcgetattr."""
        return termios.tcgetattr(self.theirs)


@contextlib.contextmanager
def terminal(*words: str) -> Iterator[Terminal]:
    """Open a terminal for the length of a block, and check at its end that the modes are restored."""
    screen = Terminal(*words)
    try:
        yield screen
        assert screen.modes() == screen.before
    finally:
        screen.child.kill()
        screen.child.wait()
        os.close(screen.ours)
        os.close(screen.theirs)


def test_a_command_gets_the_users_terminal() -> None:
    """With -t the command has a terminal of the local size and type and gets every key; the local
    terminal is restored at the end.
    """
    with terminal(
        "exec", "-t", "vm", "--", "sh", "-c", 'stty size; echo "$TERM"; read a; echo "got $a"; exit 5'
    ) as screen:
        screen.see(b"40 100")
        assert screen.modes() != screen.before
        screen.type(b"hello\r")
        screen.see(b"got hello")
        assert screen.status() == 5


def test_ctrl_c_is_sent_as_a_key_to_a_terminal() -> None:
    """On a terminal Ctrl-C is sent as a key, and the guest's terminal turns it into a signal."""
    with terminal("exec", "-t", "vm", "--", "sh", "-c", _TRAP) as screen:
        screen.see(b"ready")
        screen.type(b"\x03")
        screen.see(b"told")
        assert screen.status() == 9


def test_a_change_of_the_windows_size_reaches_the_guest() -> None:
    """An editor in the guest sees each new size."""
    script = 'trap "stty size; exit 0" WINCH; echo ready; while :; do sleep 0.05; done'
    with terminal("exec", "-t", "vm", "--", "sh", "-c", script) as screen:
        screen.see(b"ready")
        termios.tcsetwinsize(screen.theirs, (50, 120))
        screen.see(b"50 120")
        assert screen.status() == 0


@pytest.mark.parametrize("how", ["escape", "SIGTERM", "SIGHUP"])
def test_the_terminal_is_restored_however_the_session_ends(how: str) -> None:
    """The terminal is never left in raw mode: not after `~.`, not after a signal."""
    with terminal("exec", "-t", "vm", "--", "sh", "-c", "echo ready; exec sleep 60") as screen:
        screen.see(b"ready")
        if how == "escape":
            screen.type(b"\r~.")
        else:
            screen.child.send_signal(signal.Signals[how])
        assert screen.status() == (143 if how == "SIGTERM" else 129)


def test_keys_are_not_read_without_i_or_t() -> None:
    """Keys typed while a command runs are left for the shell that started it."""
    with terminal("exec", "vm", "--", "sh", "-c", "echo ready; cat; echo end") as screen:
        screen.see(b"ready")
        screen.see(b"end")
        assert screen.status() == 0
    with terminal("exec", "-i", "vm", "--", "sh", "-c", "echo ready; cat; echo end") as screen:
        screen.see(b"ready")
        screen.type(b"typed\n\x04")
        screen.see(b"end")
        assert screen.shown.count(b"typed") == 2  # the terminal's echo, and cat's output
        assert screen.status() == 0


def test_an_error_leaves_the_terminal_alone() -> None:
    """If a session cannot be opened, the error appears on a terminal in its normal mode."""
    with terminal("exec", "-t", "nobody", "--", "sh") as screen:
        screen.see(b"there is no instance")
        assert screen.status() == 3
