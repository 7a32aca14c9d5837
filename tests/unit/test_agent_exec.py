"""EXEC against the real agent: input, output and results arrive unchanged, and nothing else does."""

from __future__ import annotations

import asyncio
import errno
import hashlib
import os
import re
import signal
from collections.abc import AsyncIterator
from pathlib import Path

import pytest

from agent_process import BUILDS, agent_session
from coppice.agent.session import Session
from coppice.errors import CommandNotFound, CommandNotStarted, GuestError, GuestRefused, GuestTimeout, UsageError


@pytest.fixture(params=BUILDS)
async def session(request: pytest.FixtureRequest) -> AsyncIterator[Session]:
    async with agent_session(request.param) as session:
        yield session


def shell(script: str) -> list[str]:
    return ["/bin/sh", "-c", script]


async def test_streams_are_separate_and_complete(session: Session) -> None:
    """Standard output and standard error arrive complete and separate, with the exit code."""
    result = await session.exec(shell("echo out; echo err >&2; exit 7"))
    assert (result.exit_code, result.stdout, result.stderr) == (7, b"out\n", b"err\n")


async def test_large_binary_data_goes_through_unchanged(session: Session) -> None:
    """8 MiB of every byte value go in and come out: no window is lost, and no byte is special."""
    block = bytes(range(256)) * 256
    data = b"".join(hashlib.sha256(block + bytes([n])).digest() * 2048 for n in range(128))
    result = await session.exec(["cat"], stdin=data)
    assert result.exit_code == 0
    assert hashlib.sha256(result.stdout).digest() == hashlib.sha256(data).digest()


async def test_stdin_may_be_a_stream(session: Session) -> None:
    """Chunks of a stream arrive in order, and the end of the stream is the end of standard input."""

    async def numbers() -> AsyncIterator[bytes]:
        for n in range(1000):
            yield b"%d\n" % n

    result = await session.exec(["sort", "-n"], stdin=numbers())
    assert result.stdout == b"".join(b"%d\n" % n for n in range(1000))


async def test_a_failing_stdin_stream_is_not_taken_for_its_end(session: Session) -> None:
    """The command is killed, and the stream's own error is raised."""

    async def broken() -> AsyncIterator[bytes]:
        yield b"half"
        raise LookupError("the source broke")

    with pytest.raises(LookupError):
        await session.exec(shell("cat >/dev/null; sleep 100"), stdin=broken())


async def test_unread_input_does_not_block(session: Session) -> None:
    """Input that a command does not read is dropped when the command ends, whatever its size."""
    result = await session.exec(["true"], stdin=bytes(1 << 20))
    assert result.exit_code == 0


async def test_a_command_without_input_has_an_empty_stdin(session: Session) -> None:
    """A command without input sees end of file at once."""
    assert (await session.exec(["cat"])).stdout == b""


@pytest.mark.parametrize("number", [signal.SIGKILL, signal.SIGTERM, signal.SIGUSR1])
async def test_exit_by_signal_is_128_plus(session: Session, number: int) -> None:
    """A command killed by a signal has the exit code that a shell reports."""
    assert (await session.exec(shell(f"kill -{int(number)} $$"))).exit_code == 128 + number


async def test_a_signal_reaches_the_whole_group(session: Session) -> None:
    """The command's children receive the signal too."""
    async with session.exec_stream(shell("sh -c 'echo ready; sleep 100' & wait")) as running:
        async for _stream, data in running:
            assert data == b"ready\n"
            await running.signal(signal.SIGTERM)
        assert (await running.wait()).exit_code == 128 + signal.SIGTERM


async def test_an_invalid_signal_is_refused(session: Session) -> None:
    """An invalid signal number is refused before it is sent."""
    async with session.exec_stream(["cat"]) as running:
        with pytest.raises(UsageError):
            await running.signal(0)


async def test_the_timeout_ends_a_command(session: Session) -> None:
    """A command that runs too long is ended, even if it ignores SIGTERM."""
    with pytest.raises(GuestTimeout):
        await session.exec(shell("trap '' TERM; while :; do sleep 0.05; done"), timeout_s=0.2)
    assert (await session.exec(["echo", "next"])).stdout == b"next\n"


async def test_the_timeout_does_not_affect_a_command_that_ends_in_time(session: Session) -> None:
    """A command that ends in time has its own exit code."""
    assert (await session.exec(shell("exit 3"), timeout_s=30)).exit_code == 3


@pytest.mark.parametrize(
    ("argv", "options", "number"),
    [
        (["no-such-program"], {}, errno.ENOENT),
        (["/no/such/program"], {}, errno.ENOENT),
        (["/etc/passwd"], {}, errno.EACCES),
        ([""], {}, errno.ENOENT),
        (["true"], {"cwd": "/no/such/directory"}, errno.ENOENT),
        (["true"], {"user": "no-such-user"}, errno.ENOENT),
        (["true"], {"user": "0:no-such-group"}, errno.ENOENT),
    ],
)
async def test_a_command_that_cannot_start_has_the_guests_errno(
    session: Session, argv: list[str], options: dict[str, str], number: int
) -> None:
    """A missing program, directory or user is refused with the errno of the guest's kernel."""
    kind = CommandNotFound if number == errno.ENOENT else CommandNotStarted
    what = f"user {options['user']}" if "user" in options else "working directory" if "cwd" in options else argv[0]
    with pytest.raises(kind, match=re.escape(f"cannot start {argv[0]}: {what}: {os.strerror(number)}; ")) as caught:
        await session.exec(argv, cwd=options.get("cwd"), user=options.get("user"))
    assert type(caught.value) is kind
    assert caught.value.errno == number
    assert (await session.exec(["true"])).exit_code == 0


async def test_the_environment_is_the_requests_with_defaults(session: Session) -> None:
    """A command has the request's variables and defaults for the usual ones; PATH of the request
    finds the program.
    """
    result = await session.exec(["/usr/bin/env"], env={"ONE": "1=2", "HOME": "/nowhere"})
    lines = result.stdout.decode().splitlines()
    assert "ONE=1=2" in lines
    assert "HOME=/nowhere" in lines
    assert {"USER=root", "LOGNAME=root"} <= set(lines)
    assert any(line.startswith("PATH=/usr/local/sbin:") for line in lines)
    with pytest.raises(GuestRefused):
        await session.exec(["env"], env={"PATH": "/nowhere"})


@pytest.mark.skipif(os.geteuid() != 0, reason="only root can become another user")
@pytest.mark.parametrize(
    ("user", "expected"), [("daemon", "1:1"), ("1", "1:1"), ("1:5", "1:5"), ("daemon:tty", "1:5"), ("54321", "54321:0")]
)
async def test_a_user_is_given_by_name_or_number(session: Session, user: str, expected: str) -> None:
    """A user is found by name or number; a number without an account is accepted."""
    result = await session.exec(shell("echo $(id -u):$(id -g)"), user=user)
    assert result.stdout.decode().strip() == expected


@pytest.mark.skipif(os.geteuid() != 0, reason="only root can become another user")
async def test_another_user_may_reopen_its_streams(session: Session) -> None:
    """A program that opens /dev/stdout or /dev/stdin by path can do so even if it is not root."""
    result = await session.exec(
        shell("cat /dev/stdin > /dev/stdout; echo err > /dev/stderr"), user="daemon", stdin=b"x"
    )
    assert (result.stdout, result.stderr) == (b"x", b"err\n")


async def test_the_command_starts_in_the_requested_directory(session: Session) -> None:
    """The working directory is the requested one."""
    assert (await session.exec(["pwd"], cwd="/usr/lib")).stdout == b"/usr/lib\n"


async def test_a_long_command_line(session: Session) -> None:
    """Arguments longer than one frame arrive complete."""
    script = "echo " + "x" * 100_000
    assert len((await session.exec(shell(script))).stdout) == 100_001


async def test_a_terminal_has_the_requested_size_and_type(session: Session) -> None:
    """A command on a terminal sees the requested size and type, and is notified when the size
    changes.
    """
    script = "stty size; echo $TERM; tty -s && echo tty; trap 'stty size; exit 5' WINCH; echo ready; while :; do sleep 0.01; done"
    said = b""
    async with session.exec_stream(shell(script), tty=True, size=(31, 97), term="vt100") as running:
        async for _stream, data in running:
            said += data
            if said.endswith(b"ready\r\n"):
                await running.resize(50, 120)
        assert (await running.wait()).exit_code == 5
    assert said.split() == [b"31", b"97", b"vt100", b"tty", b"ready", b"50", b"120"]


async def test_end_of_input_ends_a_terminals_input(session: Session) -> None:
    """On a terminal, the end of standard input is sent as the end-of-file character."""
    async with session.exec_stream(["cat"], tty=True) as running:
        result = await running.collect(b"line\n")
    assert result.exit_code == 0
    assert result.stdout.count(b"line") == 2  # the echo and the copy


async def test_input_is_answered_without_buffering(session: Session) -> None:
    """A command answers each input before more is sent: no buffer has to fill first."""
    async with session.exec_stream(["cat"]) as running:
        output = aiter(running)
        for word in (b"one", b"two", b"three"):
            await running.send_stdin(word)
            assert await anext(output) == ("stdout", word)
        await running.eof()
        assert (await running.wait()).exit_code == 0


async def test_a_daemon_that_holds_the_output_does_not_delay_the_result(session: Session) -> None:
    """A command whose child keeps the output open ends when the command itself ends, with all
    output written by then.
    """
    begin = asyncio.get_running_loop().time()
    result = await session.exec(shell("sleep 30 & echo $!"))
    assert asyncio.get_running_loop().time() - begin < 10
    os.kill(int(result.stdout), signal.SIGKILL)


async def test_too_much_output_is_an_error(session: Session) -> None:
    """Output beyond the bound stops the collection, and the session stays usable."""
    with pytest.raises(GuestError):
        await session.exec(["yes"], max_output_bytes=100_000)
    assert (await session.exec(["echo", "next"])).stdout == b"next\n"


async def test_a_sink_receives_the_output(session: Session) -> None:
    """Output with a sink is not collected; a slow sink holds up the command."""
    taken = bytearray()

    async def slow(data: bytes) -> None:
        await asyncio.sleep(0)
        taken.extend(data)

    async with session.exec_stream(shell("seq 100000; echo end >&2")) as running:
        result = await running.collect(on_stdout=slow)
    assert (result.stdout, result.stderr) == (b"", b"end\n")
    assert taken == b"".join(b"%d\n" % n for n in range(1, 100_001))


async def test_an_empty_command_is_refused(session: Session) -> None:
    """An empty argument list is a usage error."""
    with pytest.raises(UsageError):
        await session.exec([])


@pytest.mark.parametrize(
    "text", [b"abc", b"line\nabc", b"abc\r", b"abc\n", b"", b"x" * 3000, b"line\n" * 20_000 + b"abc"]
)
async def test_a_terminal_reader_sees_the_end_after_any_input(session: Session, text: bytes) -> None:
    """A reader sees the end of input even after an unfinished line, with the whole line before it
    and no byte that was not sent.
    """
    script = "stty -echo; echo ready; cat | sha256sum"
    async with session.exec_stream(shell(script), tty=True, timeout_s=20) as running:
        output = bytearray()
        async for _, data in running:
            if not output:
                await running.send_stdin(text)
                await running.eof()
            output += data
        assert not (await running.wait()).timed_out
    assert hashlib.sha256(text.replace(b"\r", b"\n")).hexdigest().encode() in output


async def test_a_terminal_in_raw_mode_gets_no_end_of_input_character(session: Session) -> None:
    """No end-of-file character is sent, because a program that reads raw bytes would take it for
    data.
    """
    script = "stty raw -echo; echo ready; dd bs=1 count=4 2>/dev/null | od -An -tx1; timeout 0.3 dd bs=1 count=1 2>/dev/null | od -An -tx1"
    async with session.exec_stream(shell(script), tty=True, timeout_s=20) as running:
        output = bytearray()
        async for _, data in running:
            if not output:
                await running.send_stdin(b"abcd")
                await running.eof()
            output += data
    assert output.split() == [b"ready", b"61", b"62", b"63", b"64"]


async def test_a_long_terminal_type_is_kept_whole(session: Session) -> None:
    """No variable that the agent adds is truncated."""
    async with session.exec_stream(shell("printf %s $TERM"), term="t" * 5000) as running:
        assert (await running.collect()).stdout == b"t" * 5000


@pytest.mark.skipif(os.geteuid() != 0, reason="only root can become another user")
async def test_a_large_account_is_used_completely(tmp_path: Path) -> None:
    """A long home directory, a long shell and hundreds of groups arrive complete."""
    home, long_shell = "h" * 1000, "s" * 1000
    (tmp_path / "passwd").write_text(f"root:x:0:0::/root:/bin/sh\nmany:x:4242:4242::/{home}:/{long_shell}\n")
    (tmp_path / "group").write_text("".join(f"group{gid}:x:{gid}:root,many\n" for gid in range(5000, 5300)))
    over = [
        arg for name in ("passwd", "group") for arg in ("mount", "--bind", str(tmp_path / name), f"/etc/{name}", "&&")
    ]
    async with agent_session(
        "sanitized", under=("unshare", "--mount", "sh", "-c", f'{" ".join(over)} exec "$@"', "sh")
    ) as session:
        result = await session.exec(shell('echo "$HOME" "$SHELL"; id -G'), user="many")
    told, groups = result.stdout.decode().splitlines()
    assert told == f"/{home} /{long_shell}"
    assert groups.split() == ["4242", *map(str, range(5000, 5300))]
