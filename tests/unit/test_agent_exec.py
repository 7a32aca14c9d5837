"""EXEC, against the real agent: what a command reads, writes and answers arrives as it was, and nothing else does."""

from __future__ import annotations

import asyncio
import errno
import hashlib
import os
import re
import signal
from collections.abc import AsyncIterator

import pytest

from agent_process import BUILDS, agent_session
from coppice.errors import CommandNotFound, CommandNotStarted, GuestError, GuestRefused, GuestTimeout, UsageError
from coppice.guest.session import Session


@pytest.fixture(params=BUILDS)
async def session(request: pytest.FixtureRequest) -> AsyncIterator[Session]:
    async with agent_session(request.param) as session:
        yield session


def shell(script: str) -> list[str]:
    return ["/bin/sh", "-c", script]


async def test_streams_are_separate_and_complete(session: Session) -> None:
    """Standard output and error arrive whole and apart, with the exit code."""
    result = await session.exec(shell("echo out; echo err >&2; exit 7"))
    assert (result.exit_code, result.stdout, result.stderr) == (7, b"out\n", b"err\n")


async def test_large_binary_data_goes_through_unchanged(session: Session) -> None:
    """8 MiB of every byte there is go in and come out: no window is lost, no byte is special."""
    block = bytes(range(256)) * 256
    data = b"".join(hashlib.sha256(block + bytes([n])).digest() * 2048 for n in range(128))
    result = await session.exec(["cat"], stdin=data)
    assert result.exit_code == 0
    assert hashlib.sha256(result.stdout).digest() == hashlib.sha256(data).digest()


async def test_stdin_may_be_a_stream(session: Session) -> None:
    """Chunks of a stream arrive in order, and its end is the end of standard input."""

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


async def test_a_command_that_does_not_read_does_not_hang_us(session: Session) -> None:
    """What a command does not read is dropped when it ends, however much it is."""
    result = await session.exec(["true"], stdin=bytes(1 << 20))
    assert result.exit_code == 0


async def test_without_stdin_it_is_empty(session: Session) -> None:
    """A command without input sees the end of it at once."""
    assert (await session.exec(["cat"])).stdout == b""


@pytest.mark.parametrize("number", [signal.SIGKILL, signal.SIGTERM, signal.SIGUSR1])
async def test_exit_by_signal_is_128_plus(session: Session, number: int) -> None:
    """A command that a signal ended has the exit code that a shell gives it."""
    assert (await session.exec(shell(f"kill -{int(number)} $$"))).exit_code == 128 + number


async def test_a_signal_reaches_the_whole_group(session: Session) -> None:
    """The command's children get the signal too."""
    async with session.exec_stream(shell("sh -c 'echo ready; sleep 100' & wait")) as running:
        async for _stream, data in running:
            assert data == b"ready\n"
            await running.signal(signal.SIGTERM)
        assert (await running.wait()).exit_code == 128 + signal.SIGTERM


async def test_no_such_signal(session: Session) -> None:
    """A number that is no signal is refused before it is sent."""
    async with session.exec_stream(["cat"]) as running:
        with pytest.raises(UsageError):
            await running.signal(0)


async def test_the_timeout_ends_a_command(session: Session) -> None:
    """A command that runs too long is ended, also where it ignores SIGTERM."""
    with pytest.raises(GuestTimeout):
        await session.exec(shell("trap '' TERM; while :; do sleep 0.05; done"), timeout_s=0.2)
    assert (await session.exec(["echo", "next"])).stdout == b"next\n"


async def test_the_timeout_does_not_touch_who_is_in_time(session: Session) -> None:
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
async def test_what_cannot_start_says_why(
    session: Session, argv: list[str], options: dict[str, str], number: int
) -> None:
    """A program, directory or user that is not there is refused with the errno of the guest's kernel."""
    kind = CommandNotFound if number == errno.ENOENT else CommandNotStarted
    what = f"user {options['user']}" if "user" in options else "working directory" if "cwd" in options else argv[0]
    with pytest.raises(kind, match=re.escape(f"cannot be started: {what}: {os.strerror(number)}; ")) as caught:
        await session.exec(argv, cwd=options.get("cwd"), user=options.get("user"))
    assert type(caught.value) is kind
    assert caught.value.errno == number
    assert (await session.exec(["true"])).exit_code == 0


async def test_environment(session: Session) -> None:
    """The request's variables are there, the usual ones have defaults, and PATH is searched as the request has it."""
    result = await session.exec(["/usr/bin/env"], env={"ONE": "1=2", "HOME": "/nowhere"})
    lines = result.stdout.decode().splitlines()
    assert "ONE=1=2" in lines
    assert "HOME=/nowhere" in lines
    assert {"USER=root", "LOGNAME=root"} <= set(lines)
    assert any(line.startswith("PATH=/usr/local/sbin:") for line in lines)
    with pytest.raises(GuestRefused):
        await session.exec(["env"], env={"PATH": "/nowhere"})


@pytest.mark.skipif(os.geteuid() != 0, reason="only root can become somebody else")
@pytest.mark.parametrize(
    ("user", "expected"), [("daemon", "1:1"), ("1", "1:1"), ("1:5", "1:5"), ("daemon:tty", "1:5"), ("54321", "54321:0")]
)
async def test_users(session: Session, user: str, expected: str) -> None:
    """A user is found by name or number; a number that nobody has is a user all the same."""
    result = await session.exec(shell("echo $(id -u):$(id -g)"), user=user)
    assert result.stdout.decode().strip() == expected


@pytest.mark.skipif(os.geteuid() != 0, reason="only root can become somebody else")
async def test_another_user_may_open_its_streams_anew(session: Session) -> None:
    """Programs that are told to write to /dev/stdout, or to read /dev/stdin, can, also when they are not root."""
    result = await session.exec(
        shell("cat /dev/stdin > /dev/stdout; echo err > /dev/stderr"), user="daemon", stdin=b"x"
    )
    assert (result.stdout, result.stderr) == (b"x", b"err\n")


async def test_working_directory(session: Session) -> None:
    """The command starts where it was asked to."""
    assert (await session.exec(["pwd"], cwd="/usr/lib")).stdout == b"/usr/lib\n"


async def test_a_long_command_line(session: Session) -> None:
    """Arguments of more than one frame arrive whole."""
    script = "echo " + "x" * 100_000
    assert len((await session.exec(shell(script))).stdout) == 100_001


async def test_terminal(session: Session) -> None:
    """With a terminal the command has one of the wanted size and type, and learns when the size changes."""
    script = "stty size; echo $TERM; tty -s && echo tty; trap 'stty size; exit 5' WINCH; echo ready; while :; do sleep 0.01; done"
    said = b""
    async with session.exec_stream(shell(script), tty=True, size=(31, 97), term="vt100") as running:
        async for _stream, data in running:
            said += data
            if said.endswith(b"ready\r\n"):
                await running.resize(50, 120)
        assert (await running.wait()).exit_code == 5
    assert said.split() == [b"31", b"97", b"vt100", b"tty", b"ready", b"50", b"120"]


async def test_terminal_input_ends(session: Session) -> None:
    """The end of standard input is the end-of-file character on a terminal."""
    async with session.exec_stream(["cat"], tty=True) as running:
        result = await running.collect(b"line\n")
    assert result.exit_code == 0
    assert result.stdout.count(b"line") == 2  # the echo and the copy


async def test_interactive(session: Session) -> None:
    """Input is answered before more input is sent: nothing waits for a buffer to fill."""
    async with session.exec_stream(["cat"]) as running:
        output = aiter(running)
        for word in (b"one", b"two", b"three"):
            await running.send_stdin(word)
            assert await anext(output) == ("stdout", word)
        await running.eof()
        assert (await running.wait()).exit_code == 0


async def test_a_daemon_that_stays_does_not_hold_the_result(session: Session) -> None:
    """A command whose child keeps its output open ends when it ends, with all that was written by then."""
    begin = asyncio.get_running_loop().time()
    result = await session.exec(shell("sleep 30 & echo $!"))
    assert asyncio.get_running_loop().time() - begin < 10
    os.kill(int(result.stdout), signal.SIGKILL)


async def test_too_much_output_is_an_error(session: Session) -> None:
    """Output beyond the bound ends the collection, and the session can be used again."""
    with pytest.raises(GuestError):
        await session.exec(["yes"], max_output_bytes=100_000)
    assert (await session.exec(["echo", "next"])).stdout == b"next\n"


async def test_sinks_take_the_output(session: Session) -> None:
    """What has a sink is not collected; a sink that waits holds the command up."""
    taken = bytearray()

    async def slow(data: bytes) -> None:
        await asyncio.sleep(0)
        taken.extend(data)

    result = await session.exec(shell("seq 100000; echo end >&2"), on_stdout=slow)
    assert (result.stdout, result.stderr) == (b"", b"end\n")
    assert taken == b"".join(b"%d\n" % n for n in range(1, 100_001))


async def test_an_empty_command_is_refused(session: Session) -> None:
    """There is nothing to run."""
    with pytest.raises(UsageError):
        await session.exec([])
