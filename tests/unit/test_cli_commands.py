"""Commands that go on without their client, on the command line: exec -d, commands, attach, kill, wait."""

from __future__ import annotations

import contextlib
import json
import os
import pty
import signal
import subprocess
import sys
from collections.abc import AsyncIterator, Iterator
from pathlib import Path
from typing import Any

import pytest
from click.shell_completion import ShellComplete

from cli_host import FakeHost, LocalSession, instance
from cli_lines import document, output_of, run
from coppice.cli import main
from coppice.cli.app import app
from coppice.errors import InUse, NotFound
from coppice.model import ProcessEnd, State
from coppice.model.guest import Exit, GuestCommand, StartedCommand
from coppice.requests import CommandAttachRequest, CommandKillRequest, CommandLsRequest, GetRequest, OpenExecRequest

SOURCE = Path(__file__).parents[2] / "src"
PYTHON = sys.executable
DEADLINE_S = 60


def listed(command: str, **more: Any) -> GuestCommand:
    """Return a command as a host lists it."""
    fields: dict[str, Any] = {
        "argv": ("sh", "-c", "echo it\x1b"),
        "pid": 7,
        "user": None,
        "tty": False,
        "stdin": False,
        "started_at": 1_700_000_000.0,
        "attached": False,
        "output_bytes": 0,
        "dropped_bytes": 0,
        "exit_code": None,
        "timed_out": False,
        "out_of_memory": False,
        "ended_at": None,
    }
    return GuestCommand(id=command, **(fields | more))


# What the commands of the host print and do, by id.
SCRIPTS = {
    "prints": "echo out; echo err >&2; exit 3",
    "reads": "cat; exit 4",
    "traps": 'trap "echo told; exit 9" INT; echo ready; while :; do sleep 0.05; done',
    "terminal": 'stty size; read a; echo "got $a"; exit 5',
}


class AttachHost(FakeHost):
    """A host with the commands of SCRIPTS. `terminal` has a terminal; `prints` has lost output."""

    async def call(self, request: Any, progress: Any = None) -> Any:
        if isinstance(request, CommandLsRequest):
            return [listed(each, tty=each == "terminal", stdin=each in ("reads", "terminal")) for each in SCRIPTS]
        return await super().call(request, progress)

    @contextlib.asynccontextmanager
    async def stream(self, request: Any) -> AsyncIterator[Any]:
        assert isinstance(request, CommandAttachRequest)
        self.calls.append(request)
        session = await LocalSession.start(
            OpenExecRequest(
                instance="vm",
                argv=["sh", "-c", SCRIPTS[request.command]],
                tty=request.command == "terminal",
                stdin=request.stdin,
            )
        )
        session.dropped_bytes = 42 if request.command == "prints" else 0
        try:
            yield session
        finally:
            await session.close()


def environment() -> dict[str, str]:
    """Return the environment of the program."""
    return {**os.environ, "PYTHONPATH": f"{SOURCE}{os.pathsep}{Path(__file__).parents[1]}"}


@contextlib.contextmanager
def attached(*words: str, **options: Any) -> Iterator[subprocess.Popen[bytes]]:
    """Start `coppice attach` over an AttachHost, and end it at the end of the block."""
    with subprocess.Popen([PYTHON, __file__, "attach", *words], env=environment(), **options) as child:
        try:
            yield child
        finally:
            child.kill()


def test_exec_detached_prints_the_id(capsys: pytest.CaptureFixture[str]) -> None:
    """All options reach the host. The input stays open only if asked for."""
    host = FakeHost(command_start=StartedCommand(id="job", pid=8))
    words = ["-d", "--id", "job", "--keep", "1M", "-e", "A=1", "--timeout", "5", "--memory-limit", "64M"]
    assert output_of(capsys, host, "exec", *words, "vm", "--", "make", "-j") == "job\n"
    asked = host.asked("command_start")
    assert (asked["argv"], asked["command"], asked["keep_bytes"], asked["stdin"]) == (
        ("make", "-j"),
        "job",
        1 << 20,
        False,
    )
    assert (asked["env"], asked["timeout_s"], asked["memory_limit_bytes"]) == ({"A": "1"}, 5.0, 64 << 20)
    assert document(capsys, host, "exec", "-d", "-i", "vm", "cat") == {"id": "job", "pid": 8}
    assert host.calls[-1].stdin  # type: ignore[attr-defined]
    assert run(host, "exec", "--id", "job", "vm", "true") == 2
    assert "add -d" in capsys.readouterr().err


def test_commands_are_listed(capsys: pytest.CaptureFixture[str]) -> None:
    """With their state, what was dropped if any was, and words from the guest made harmless."""
    found = [
        listed("old", exit_code=0, output_bytes=3 << 20, dropped_bytes=1 << 20),
        listed("late", exit_code=137, timed_out=True),
        listed("big", exit_code=137, out_of_memory=True),
        listed("now", attached=True),
    ]
    host = FakeHost(command_ls=found)
    lines = output_of(capsys, host, "commands", "vm").splitlines()
    assert lines[0].split() == ["ID", "STATE", "AGE", "OUTPUT", "DROPPED", "COMMAND"]
    assert ["Exited (0)" in lines[1], "3.0 MiB" in lines[1], "1.0 MiB" in lines[1]] == [True] * 3
    assert "Exited (137, timed out)" in lines[2]
    assert "Exited (137, out of memory)" in lines[3]
    assert "Running (attached)" in lines[4]
    assert lines[1].endswith("sh -c 'echo it\\x1b'")
    assert output_of(capsys, host, "commands", "-q", "vm") == "old\nlate\nbig\nnow\n"
    assert [each["id"] for each in document(capsys, host, "commands", "vm")] == ["old", "late", "big", "now"]
    few = FakeHost(command_ls=[listed("now")])
    assert "DROPPED" not in output_of(capsys, few, "commands", "vm")


def test_attach_passes_the_output_and_the_status_on() -> None:
    """A marker says what was dropped; the offset reaches the host."""
    with attached("vm", "prints", stdout=subprocess.PIPE, stderr=subprocess.PIPE, stdin=subprocess.DEVNULL) as child:
        out, err = child.communicate(timeout=DEADLINE_S)
    assert (child.returncode, out) == (3, b"out\n")
    assert b"42 bytes of output before this are no longer kept\n" in err
    assert err.count(b"coppice:") == 1


def test_attach_as_json_and_from_an_offset(capsys: pytest.CaptureFixture[str]) -> None:
    """The document has both streams and the status."""
    host = AttachHost()
    assert run(host, "--json", "attach", "--offset", "5", "vm", "prints") == 3
    shown = capsys.readouterr()
    found = json.loads(shown.out)
    assert (found["exit_code"], found["stdout"], found["stderr"]) == (3, "out\n", "err\n")
    assert host.asked("command_attach") == {"instance": "vm", "command": "prints", "offset": 5, "stdin": False}
    assert run(AttachHost(), "attach", "vm", "nothing") == 3
    assert "`coppice commands vm` lists them" in capsys.readouterr().err


@pytest.mark.parametrize("flags", [[], ["-n"]])
def test_input_is_passed_on_unless_only_watching(flags: list[str]) -> None:
    """With its end, as by exec. The command of this test ends at the end of its input, which -n does not give."""
    with attached(*flags, "vm", "reads", stdin=subprocess.PIPE, stdout=subprocess.PIPE) as child:
        out, _ = child.communicate(b"words", timeout=DEADLINE_S)
    assert (child.returncode, out) == (4, b"" if flags else b"words")


@pytest.mark.parametrize(("flags", "out", "status"), [([], b"told\n", 9), (["-n"], b"", 130)])
def test_an_interrupt_is_for_the_command_unless_only_watching(flags: list[str], out: bytes, status: int) -> None:
    """Ctrl-C goes to the command; with -n it leaves the command."""
    with attached(*flags, "vm", "traps", stdout=subprocess.PIPE, stdin=subprocess.DEVNULL) as child:
        assert child.stdout is not None
        assert child.stdout.readline() == b"ready\n"
        child.send_signal(signal.SIGINT)
        assert child.stdout.read() == out
        assert child.wait(DEADLINE_S) == status


@pytest.mark.parametrize("leaves", [True, False])
def test_attach_on_a_terminal(leaves: bool) -> None:
    """The terminal of the command gets this one's size and keys. `~.` leaves, and says how to come back."""
    ours, theirs = pty.openpty()
    os.set_blocking(ours, True)
    with attached(
        "vm", "terminal", stdin=theirs, stdout=theirs, stderr=subprocess.PIPE, start_new_session=True
    ) as child:
        os.close(theirs)
        shown = b""
        while not shown.endswith(b"\r\n"):
            shown += os.read(ours, 1000)
        assert shown == b"24 80\r\n"
        os.write(ours, b"~." if leaves else b"word\r")
        _, err = child.communicate(timeout=DEADLINE_S)
        assert child.returncode == (0 if leaves else 5)
        assert (b"left command terminal, which goes on: `coppice attach vm terminal`" in err) is leaves
    os.close(ours)


def test_kill_ends_each_or_sends_a_signal(capsys: pytest.CaptureFixture[str]) -> None:
    """Signals have names and numbers. One failure does not stop the others."""
    host = FakeHost(command_kill=None)
    assert output_of(capsys, host, "kill", "vm", "a", "b") == "a\nb\n"
    assert host.calls == [CommandKillRequest(instance="vm", command=each) for each in ("a", "b")]
    for word in ("INT", "sigint", "2"):
        host = FakeHost(command_kill=None)
        assert document(capsys, host, "kill", "-s", word, "vm", "a") == {"killed": ["a"], "failed": []}
        assert host.calls == [CommandKillRequest(instance="vm", command="a", signal=2)]
    for word in ("NONSENSE", "65"):
        assert run(FakeHost(command_kill=None), "kill", "--signal", word, "vm", "a") == 2
        assert "there is no signal" in capsys.readouterr().err

    def killed(request: CommandKillRequest) -> None:
        if request.command == "a":
            raise NotFound("the machine has no command a", hint="look")

    assert run(FakeHost(command_kill=killed), "kill", "vm", "a", "b") == 3
    assert capsys.readouterr().out == "b\n"


@pytest.mark.parametrize(
    ("ended", "status"), [(Exit(exit_code=7, timed_out=False), 7), (Exit(exit_code=137, timed_out=True), 124)]
)
def test_wait_has_the_status_of_the_command(capsys: pytest.CaptureFixture[str], ended: Exit, status: int) -> None:
    """As exec has."""
    host = FakeHost(command_wait=ended)
    assert run(host, "wait", "--timeout", "3", "vm", "a") == status
    assert host.asked("command_wait") == {"instance": "vm", "command": "a", "deadline_s": 3.0}
    assert document(capsys, host, "wait", "vm", "a", status=status)["timed_out"] is ended.timed_out
    assert run(FakeHost(command_wait=InUse("no", hint="no")), "wait", "vm", "a") == 4


@pytest.mark.parametrize(
    ("fields", "status", "complaint"),
    [
        ({"process_end": ProcessEnd(exit_code=3, at=1.0)}, 3, ""),
        ({"process_end": ProcessEnd(exit_code=137, signal=9, at=1.0), "state": State.STOPPED}, 137, ""),
        ({"state": State.STOPPED, "ending": "failed", "exit_reason": "the VMM\x1b ended"}, 1, "vm has ended: the VMM"),
        ({"state": State.STOPPED, "ending": "asked"}, 0, "vm has ended: it was stopped"),
    ],
)
def test_wait_for_a_machine_prints_the_status_of_its_process(
    capsys: pytest.CaptureFixture[str], fields: dict[str, Any], status: int, complaint: str
) -> None:
    """As `docker wait` does. A machine that ended without one is a success or a failure."""
    host = FakeHost(wait_process=instance("vm", **fields))
    assert run(host, "wait", "vm") == status
    printed = capsys.readouterr()
    assert printed.out == f"{status}\n"
    assert complaint in printed.err
    assert "\x1b" not in printed.err
    assert host.asked("wait_process") == {"instance": "vm", "deadline_s": None}
    assert document(capsys, host, "wait", "vm", status=status)["exit_code"] == status


def test_forget(capsys: pytest.CaptureFixture[str]) -> None:
    """By id, or all that have ended, but never the machine's process."""
    found = [listed("a", exit_code=0), listed("b"), listed("main", exit_code=1), listed("c", exit_code=2)]
    host = FakeHost(command_ls=found, command_forget=None)
    assert document(capsys, host, "forget", "vm", "x", "y")["forgotten"] == ["x", "y"]
    assert output_of(capsys, host, "forget", "vm", "--all") == "a\nc\n"
    assert run(FakeHost(command_ls=[]), "forget", "vm", "--all") == 0
    assert run(host, "forget", "vm") == 2
    assert run(host, "forget", "vm", "a", "--all") == 2
    assert run(FakeHost(command_forget=InUse("no", hint="no")), "forget", "vm", "a") == 4


def _completed(host: FakeHost, *words: str) -> list[str]:
    """Return what a shell would offer for the last word."""
    found = ShellComplete(app, {"obj": host.factory}, "coppice", "_COPPICE_COMPLETE")
    return [each.value for each in found.get_completions(list(words[:-1]), words[-1])]


def test_ids_are_completed(tmp_path: Path) -> None:
    """The agent of a running machine is asked; a machine that does not run, and an error, offer nothing."""
    server = ("--host", "unix:/run/coppice.sock")
    host = FakeHost(command_ls=[listed("build"), listed("browser"), listed("other")])
    for command in ("attach", "kill", "wait", "forget"):
        assert _completed(host, *server, command, "vm", "b") == ["build", "browser"]
    assert _completed(FakeHost(command_ls=NotFound("no", hint="no")), *server, "attach", "vm", "") == []
    assert _completed(host, "--home", str(tmp_path), "attach", "vm", "") == []


if __name__ == "__main__":
    sys.exit(main(host_factory=AttachHost().factory))


def test_waiting_for_two_machines_is_explained(capsys: pytest.CaptureFixture[str]) -> None:
    """`docker wait a b` waits for two containers. Here the second word is a command's id, and the hint says
    so if it is a machine; else the guest's answer is kept.
    """

    def get(request: GetRequest) -> Any:
        if request.instance != "b":
            raise NotFound(f"there is no {request.instance!r}", hint="`coppice ls`")
        return instance("b")

    missing = NotFound("the machine has no command", hint="it may have ended long ago")
    assert run(FakeHost(command_wait=missing, get=get), "wait", "a", "b") == 3
    assert "`coppice wait a`, then `coppice wait b`, waits for both machines" in capsys.readouterr().err
    missing = NotFound("the machine has no command", hint="it may have ended long ago")
    assert run(FakeHost(command_wait=missing, get=get), "wait", "a", "c1") == 3
    assert "it may have ended long ago" in capsys.readouterr().err
