"""The program around the commands: exit codes, errors for people and for programs, signals, speed."""

from __future__ import annotations

import asyncio
import json
import os
import signal
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from cli_host import PROGRAM, FakeHost, instance
from coppice.cli import main
from coppice.errors import (
    CommandNotFound,
    CommandNotStarted,
    CoppiceError,
    GuestError,
    HostCannot,
    IllegalTransition,
    ImageError,
    InvalidName,
    NoSpace,
    NotFound,
    VmmDied,
)

SOURCE = Path(__file__).parents[2] / "src"


def run(*words: str, host: FakeHost | None = None) -> int:
    """Return the exit status of a command line."""
    return main(words, host_factory=(host or FakeHost()).factory)


def process(*words: str, **options: Any) -> subprocess.CompletedProcess[bytes]:
    """Run the real program in a separate process."""
    env = {**os.environ, "PYTHONPATH": str(SOURCE)}
    return subprocess.run(
        [sys.executable, "-m", "coppice", *words], env=env, capture_output=True, timeout=30, check=False, **options
    )


@pytest.mark.parametrize(
    ("error", "status"),
    [
        (CoppiceError("it failed"), 1),
        (ImageError("corrupt"), 1),
        (VmmDied("it died"), 1),
        (GuestError("no"), 1),
        (CommandNotStarted("not a program"), 126),
        (CommandNotFound("no such program"), 127),
        (InvalidName("bad"), 2),
        (NotFound("gone"), 3),
        (IllegalTransition("not now"), 4),
        (HostCannot("cannot"), 5),
        (NoSpace("full"), 5),
    ],
)
def test_each_error_has_its_exit_code(error: CoppiceError, status: int, capsys: pytest.CaptureFixture[str]) -> None:
    """A script can tell refused, missing and broken apart by the exit status; the message is one
    line on standard error.
    """
    error.hint = "do this"
    assert run("start", "vm", host=FakeHost(start=error)) == status
    shown = capsys.readouterr()
    assert shown.out == ""
    assert shown.err == f"coppice: {error.message}; do this\n"


@pytest.mark.parametrize("words", [["start", "vm"], ["ls"], ["fork", "vm"], ["inspect", "vm"], ["cp", "a", "vm:b"]])
def test_an_error_is_one_json_document(words: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    """With --json an error is also a document on standard output, and nothing else is printed
    there.
    """
    error = NotFound("there is no instance 'vm'", hint="look")
    host = FakeHost(start=error, ls=error, fork=error, inspect=error, cp_in=error)
    assert run("--json", *words, host=host) == 3
    shown = capsys.readouterr()
    assert json.loads(shown.out) == {"error": {"code": "not_found", "message": error.message, "hint": "look"}}
    assert shown.err == ""


def test_an_error_about_an_undecodable_name_is_valid_json(capsys: pytest.CaptureFixture[str]) -> None:
    """File names are bytes, and JSON is text: undecodable bytes are replaced, and the error is
    still reported.
    """
    error = NotFound(f"there is no {os.fsdecode(bytes([0x2F, 0xFF]))}", hint="look")
    assert run("--json", "start", "vm", host=FakeHost(start=error)) == 3
    assert json.loads(capsys.readouterr().out)["error"]["message"] == "there is no /?"


@pytest.mark.parametrize(
    ("words", "part"),
    [
        (["nonsense"], "no such command 'nonsense'"),
        (["sart", "vm"], "'start'"),
        (["start"], "missing argument"),
        (["completion"], "Choose from: bash, zsh, fish"),
        (["ls", "--nope"], "no such option"),
        (["run", "img", "--cpus", "x"], "--cpus"),
        (["fork", "vm", "--target", "asleep"], "--target"),
        (["--accel", "xen", "ls"], "--accel"),
        (["image"], "missing command"),
        (["run", "img", "--memory", "lots"], "not a size"),
        (["rm"], "rm needs names, a tag or --all"),
        (["rm", "--all"], "--yes"),
        (["rm", "a", "--all", "--yes"], "rm needs names, a tag or --all"),
        (["run", "img", "--modules", "/lib"], "--kernel"),
        (["exec", "vm", "-e", "A=1", "ls"], "before NAME"),
        (["exec", "vm", "--"], "command"),
        (["--json", "exec", "-t", "vm", "ls"], "-t or --json"),
        (["--json", "logs", "-f", "vm"], "-f or --json"),
        (["logs", "vm", "extra"], "extra"),
    ],
)
def test_wrong_usage_exits_with_2_and_prints_one_line(
    words: list[str], part: str, capsys: pytest.CaptureFixture[str]
) -> None:
    """The parser's errors look like all others: no usage block, no traceback, and no request to the
    host.
    """
    host = FakeHost()
    assert run(*words, host=host) == 2
    shown = capsys.readouterr()
    text = json.loads(shown.out)["error"] if words[0] == "--json" else {"message": shown.err, "hint": ""}
    assert part in text["message"] + text["hint"]
    assert "Value error" not in text["message"]  # the parser's own prefix
    assert shown.err.count("\n") == (0 if words[0] == "--json" else 1)
    assert host.calls == []


@pytest.mark.parametrize("before", [("--home", "/tmp"), ("--accel", "tcg"), ("--owner", "alice")])
def test_wrong_usage_is_json_too(capsys: pytest.CaptureFixture[str], before: tuple[str, str]) -> None:
    """A program with a wrong command line gets a document, even if the line cannot be parsed."""
    assert run(*before, "--json", "start") == 2
    assert json.loads(capsys.readouterr().out)["error"]["code"] == "invalid_request"


def test_a_misplaced_global_option_is_explained(capsys: pytest.CaptureFixture[str]) -> None:
    """`coppice ls --json` answers with the right place of --json."""
    for option in ("--json", "--owner"):
        assert run("ls", option) == 2
        assert f"before the command: `coppice {option}" in capsys.readouterr().err


def test_an_option_of_the_guests_command_is_not_parsed(capsys: pytest.CaptureFixture[str]) -> None:
    """`--json` among the words of the guest's command does not turn Coppice's errors into JSON."""
    assert run("exec", "nobody", "--", "tool", "--json") == 3
    shown = capsys.readouterr()
    assert shown.out == ""
    assert "there is no instance" in shown.err


def test_an_unexpected_error_is_one_line(capsys: pytest.CaptureFixture[str]) -> None:
    """A bug in Coppice shows no traceback unless one is requested."""
    assert run("start", "vm", host=FakeHost(start=ZeroDivisionError("by\nzero"))) == 1
    assert capsys.readouterr().err == "coppice: internal error: ZeroDivisionError: by zero; run again with --debug\n"
    assert run("--debug", "start", "vm", host=FakeHost(start=ZeroDivisionError("by zero"))) == 1
    assert "Traceback" in capsys.readouterr().err


def test_an_os_error_is_not_an_internal_error(capsys: pytest.CaptureFixture[str]) -> None:
    """A full disk or a missing permission is not an internal error, and a broken pipe inside the
    host is not one of standard output.
    """
    assert run("start", "vm", host=FakeHost(start=OSError(28, "No space left", "/data"))) == 5
    assert run("start", "vm", host=FakeHost(start=PermissionError(13, "Permission denied", "/data"))) == 5
    assert run("start", "vm", host=FakeHost(start=BrokenPipeError(32, "Broken pipe"))) == 5
    err = capsys.readouterr().err
    assert "no disk space is left: /data" in err
    assert "Permission denied: /data" in err
    assert "Broken pipe" in err


def test_global_options_reach_the_host(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """--home, --accel and --owner, or their variables, select the data directory, the accelerator
    and the owner.
    """
    host = FakeHost(ls=[])
    assert run("--home", str(tmp_path), "--accel", "tcg", "--owner", "alice", "ls", host=host) == 0
    assert host.options is not None
    assert (host.options.home, host.options.accel, host.options.owner) == (tmp_path, "tcg", "alice")
    monkeypatch.setenv("COPPICE_HOME", "/elsewhere")
    monkeypatch.setenv("COPPICE_ACCEL", "kvm")
    monkeypatch.setenv("COPPICE_OWNER", "bob")
    assert run("ls", host=host) == 0
    assert (host.options.home, host.options.accel, host.options.owner) == (Path("/elsewhere"), "kvm", "bob")


def test_the_host_is_opened_and_closed() -> None:
    """Each command opens the data directory and closes it, even if the command fails."""
    for host in (FakeHost(start=instance("vm")), FakeHost(start=NotFound("gone"))):
        run("start", "vm", host=host)
        assert host.opened
        assert host.closed


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM, signal.SIGHUP])
def test_a_signal_cancels_the_work_and_waits_for_its_cleanup(number: int, capsys: pytest.CaptureFixture[str]) -> None:
    """Ctrl-C leaves nothing half-made: the operation's cleanup has finished, and the exit status
    shows the signal.
    """
    cleaned: list[str] = []

    async def forever(*_: object, **__: object) -> None:
        try:
            os.kill(os.getpid(), number)
            await asyncio.Event().wait()
        finally:
            await asyncio.sleep(0)
            cleaned.append("yes")

    before = signal.getsignal(number)
    assert run("start", "vm", host=FakeHost(start=forever)) == 128 + number
    assert cleaned == ["yes"]
    assert capsys.readouterr().err == ""
    assert signal.getsignal(number) == before


def test_an_interruption_prints_a_json_document(capsys: pytest.CaptureFixture[str]) -> None:
    """--json prints its one document even after an interruption."""

    async def forever(*_: object, **__: object) -> None:
        os.kill(os.getpid(), signal.SIGTERM)
        await asyncio.Event().wait()

    assert run("--json", "start", "vm", host=FakeHost(start=forever)) == 143
    assert json.loads(capsys.readouterr().out)["error"]["code"] == "interrupted"


def test_a_closed_standard_output_is_quiet() -> None:
    """`coppice ... | head -0` prints no traceback."""
    reader, writer = os.pipe()
    os.close(reader)
    env = {**os.environ, "PYTHONPATH": str(SOURCE)}
    command = [sys.executable, "-m", "coppice", "--version"]
    ended = subprocess.run(command, env=env, stdout=writer, stderr=subprocess.PIPE, timeout=30, check=False)
    os.close(writer)
    assert ended.stderr == b""
    assert ended.returncode == 141


@pytest.mark.parametrize("lines", [1, 100_000])
def test_a_closed_standard_output_ends_following_a_log(lines: int) -> None:
    """`coppice logs -f vm | grep -m1 ready` ends with grep, even if the guest never prints another
    line.
    """
    program = (
        f"import sys; sys.path[:0] = [{str(PROGRAM.parent)!r}]; from cli_host import *; "
        f"sys.exit(main(host_factory=FakeHost(logs=[b'x'] * {lines}).factory))"
    )
    reader, writer = os.pipe()
    env = {**os.environ, "PYTHONPATH": str(SOURCE)}
    with subprocess.Popen(
        [sys.executable, "-c", program, "logs", "-f", "vm"], env=env, stdout=writer, stderr=subprocess.PIPE
    ) as child:
        os.close(writer)
        assert os.read(reader, 2) == b"x\n"
        os.close(reader)
        _, err = child.communicate(timeout=30)
    assert err == b""
    assert child.returncode == 0


def test_tracebacks_of_asyncio_are_for_debug() -> None:
    """Users do not see complaints of the event loop."""
    program = (
        f"import sys; sys.path[:0] = [{str(PROGRAM.parent)!r}]; from cli_host import *\n"
        "async def fail(): raise LookupError('lost')\n"
        "async def start(request, progress):\n"
        "    asyncio.ensure_future(fail()); await asyncio.sleep(0)\n"
        "    return instance(request.instance)\n"
        "sys.exit(main(host_factory=FakeHost(start=start).factory))"
    )
    env = {**os.environ, "PYTHONPATH": str(SOURCE)}

    def told(*words: str) -> bytes:
        command = [sys.executable, "-c", program, *words, "start", "vm"]
        return subprocess.run(command, env=env, capture_output=True, check=True, timeout=30).stderr

    assert told() == b""
    assert b"LookupError: lost" in told("--debug")


def test_help_imports_nothing_heavy() -> None:
    """Help stays fast because it imports neither the host nor rich nor msgspec."""
    program = (
        "import sys; from coppice.cli import main; main(['--help']); "
        "print(sorted({'coppice.host', 'coppice.model', 'asyncio', 'rich', 'msgspec', 'sqlite3'} & set(sys.modules)))"
    )
    env = {**os.environ, "PYTHONPATH": str(SOURCE)}
    shown = subprocess.run([sys.executable, "-c", program], env=env, capture_output=True, timeout=30, check=True)
    assert shown.stdout.splitlines()[-1] == b"[]"


def test_coppice_without_a_command_shows_the_help(capsys: pytest.CaptureFixture[str]) -> None:
    """`coppice` alone lists the commands, in the order of a machine's life."""
    assert run() == 0
    shown = capsys.readouterr().out
    for command in (
        "doctor",
        "image",
        "kernel",
        "run",
        "ls",
        "inspect",
        "exec",
        "cp",
        "logs",
        "standby",
        "restore",
        "start",
    ):
        assert f"  {command} " in shown
    for command in ("stop", "promote", "demote", "fork", "tree", "stats", "rm", "gc"):
        assert f"  {command} " in shown


def test_the_program_catches_ctrl_c_before_it_imports_anything() -> None:
    """Before its first statement Python has imported only these small modules for it."""
    program = "import sys; before = {*sys.modules}; import coppice.cli; print(*sorted({*sys.modules} - before))"
    env = {**os.environ, "PYTHONPATH": str(SOURCE)}
    shown = subprocess.run([sys.executable, "-c", program], env=env, capture_output=True, timeout=30, check=True)
    assert shown.stdout.split() == [b"__future__", b"coppice", b"coppice.cli", b"coppice.lazily"]


@pytest.mark.parametrize("module", ["coppice.cli.start", "typing", "click", "asyncio"])
def test_ctrl_c_during_the_start_is_quiet(module: str) -> None:
    """An early Ctrl-C prints no traceback and no error either, also while a command is imported."""
    program = (
        "import builtins, signal, sys; original = builtins.__import__\n"
        "def importing(name, *rest):\n"
        f"    if name == {module!r}: signal.raise_signal(signal.SIGINT)\n"
        "    return original(name, *rest)\n"
        "builtins.__import__ = importing\n"
        "sys.argv[1:] = ['ls']\n"
        "from coppice.cli import entry; entry()"
    )
    env = {**os.environ, "PYTHONPATH": str(SOURCE)}
    ended = subprocess.run([sys.executable, "-c", program], env=env, capture_output=True, timeout=30, check=False)
    assert (ended.returncode, ended.stderr.strip()) == (130, b"")


def coppice(home: Path, *words: str, closing: str = "", **streams: Any) -> subprocess.CompletedProcess[str]:
    """Run the program over an empty data directory; `closing` are redirections of the shell that
    starts it.
    """
    line = ["sh", "-c", f'exec "$@" {closing}', "sh", sys.executable, "-m", "coppice", "--home", str(home), *words]
    return subprocess.run(line, text=True, timeout=30, check=False, stderr=subprocess.PIPE, **streams)


@pytest.mark.parametrize(
    "words", [("ls",), ("--json", "ls"), ("--help",), ("image", "--help"), ("--json", "inspect", "x")]
)
def test_output_to_a_full_disk_is_a_plain_failure(tmp_path: Path, words: tuple[str, ...]) -> None:
    """A full disk under standard output is one line, neither an internal error nor a lack of space
    in the data directory.
    """
    with Path("/dev/full").open("w") as full:
        ended = coppice(tmp_path, *words, stdout=full)
    assert ended.returncode == 1
    assert ended.stderr.startswith("coppice: cannot write to standard output: No space left on device")
    assert ended.stderr.count("\n") == 1


@pytest.mark.parametrize("closing", [">&-", "2>&-", "<&-", "<&- >&- 2>&-"])
def test_closed_standard_streams_are_opened_on_dev_null(tmp_path: Path, closing: str) -> None:
    """The next opened file would get the number of a closed stream and receive its output, so each
    closed stream is opened on /dev/null.
    """
    assert coppice(tmp_path, "ls", closing=closing, stdout=subprocess.PIPE).returncode == 0
    assert coppice(tmp_path, "start", "none", closing=closing, stdout=subprocess.PIPE).returncode == 3
    assert coppice(tmp_path, "--help", closing=closing, stdout=subprocess.PIPE).returncode == 0
