"""The fuzz of the guest agent: record sessions of real hosts as its corpus, and run
`tests/agent_fuzz.c` in a sandbox.

`record` is the one place that lists the requests of the corpus.
"""

from __future__ import annotations

import asyncio
import contextlib
import functools
import os
import socket
import struct
import subprocess
import tempfile
from collections.abc import AsyncIterator, Awaitable, Callable
from pathlib import Path

from agent_process import compile_agent, running_agent
from agent_requests import APPEND, read_range, write_with
from coppice.agent.channel import Channel
from coppice.agent.control import Control, Identity, Mount
from coppice.agent.copy import copy_in, copy_out
from coppice.agent.protocol import FrameType, encode_fields
from coppice.agent.session import Session
from coppice.errors import GuestError

_HERE = Path(__file__).parent
_PORT = 8080  # of the server in the sandbox
_FUZZ_FLAGS = ("-O1", "-g", "-fsanitize=address,undefined", "-fno-sanitize-recover=all", "-fno-omit-frame-pointer",
               "-Wl,--wrap=spawn,--wrap=group_kill")  # fmt: skip
_SETUP = """set -e
root=$1; programs=$2; shift 2
mount -t tmpfs -o size=64m,nr_inodes=20k tmpfs "$root"
mkdir -p "$root"/bin "$root"/dev/pts "$root"/proc "$root"/etc/ssl/certs "$root"/tmp "$root"/run/coppice "$root"/root
cp "$programs" "$root"/bin/cat
for name in echo yes sleep sh true; do ln "$root"/bin/cat "$root"/bin/$name; done
printf 'root:x:0:0:root:/root:/bin/sh\\nuser:x:1000:1000::/tmp:/bin/sh\\n' > "$root"/etc/passwd
printf 'root:x:0:\\nuser:x:1000:\\nother:x:7:user,root\\n' > "$root"/etc/group
mount -t proc proc "$root"/proc
mount -t devpts -o newinstance,ptmxmode=0666 devpts "$root"/dev/pts
ln -s pts/ptmx "$root"/dev/ptmx
for name in null zero; do : > "$root"/dev/$name; mount --bind /dev/$name "$root"/dev/$name; done
mount --bind "$root"/bin "$root"/bin
mount -o remount,bind,ro "$root"/bin
"$@"
exit $?
"""

Host = Callable[[Channel, Path], Awaitable[object]]


# ---- the corpus ----


async def _commands(channel: Channel, directory: Path) -> None:
    session = Session(channel)
    await session.exec(["echo", "out"], env={"A": "b"}, cwd="/tmp", user="root")
    await session.exec(["cat"], stdin=bytes(90_000), timeout_s=20)
    async with session.exec_stream(["sh", "-c", "echo out; echo err >&2; exit 3"], command_id="first") as running:
        await running.wait()
    async with session.exec_stream(["cat"], tty=True, command_id="terminal", size=(30, 90)) as running:
        await running.send_stdin(b"typed\n")
        await running.resize(20, 70)
        await running.eof()
        await running.wait()
    await session.commands()


async def _attached(channel: Channel, directory: Path) -> None:
    session = Session(channel)
    async with session.exec_stream(["cat"], command_id="kept", detached=True, keep_bytes=5000, timeout_s=30):
        pass
    async with session.attach("kept", stdin=True) as first:
        await first.send_stdin(bytes(20_000))
        async for _ in first:
            break
    async with session.attach("kept", offset=3000, stdin=True) as second:
        await second.signal(15)
        await second.wait()
    async with session.attach("kept", output=False) as third:
        await third.terminate()
    session.forget("kept")
    await session.commands()


async def _endless(channel: Channel, directory: Path) -> None:
    session = Session(channel)
    async with session.exec_stream(["yes"], has_stdin=False, command_id="endless") as running:
        async for _ in running:
            if running.offset > 600_000:
                break
    async with session.exec_stream(["sleep", "100"], command_id="asleep", timeout_s=0.1) as running:
        await running.wait()


async def _refused(channel: Channel, directory: Path) -> None:
    session = Session(channel)
    for call in [
        session.exec(["/nothing"]), session.exec(["echo"], user="nobody-here"), session.exec(["echo"], cwd="/nothing"),
        session.exec(["echo"], memory_bytes=1 << 24, processes=9), session.read_file("/nothing"),
    ]:  # fmt: skip
        with contextlib.suppress(GuestError):
            await call


async def _files(channel: Channel, directory: Path) -> None:
    session, path = Session(channel), str(directory / "file")
    await session.write_file(path, bytes(100_000), mode=0o600)
    await write_with(session, path, b"more", APPEND)
    await write_with(session, f"{directory}/a/b/file", b"", owner=(os.getuid(), os.getgid()))
    await read_range(session, path, 10, 70_000)
    await session.stat(path, follow=True)


async def _trees(channel: Channel, directory: Path) -> None:
    session = Session(channel)
    (directory / "tree/deeper").mkdir(parents=True)
    (directory / "tree/deeper/file").write_bytes(b"contents" * 1000)
    (directory / "tree/link").symlink_to("deeper/file")
    await copy_in(session, directory / "tree", str(directory / "copied"), keep_owners=True)
    await copy_out(session, str(directory / "copied"), directory / "back")
    await session.make_directory(f"{directory}/made/deeper", parents=True)
    async with contextlib.aclosing(session.watching(str(directory / "made"), recursive=True)) as events:
        await anext(events)
        await session.move(f"{directory}/made/deeper", f"{directory}/made/moved", keep_existing=True)
        await anext(events)
    assert [Path(found.path).name async for found in session.listing(str(directory / "made"))] == ["moved"]
    await session.remove(str(directory / "made"), recursive=True)


async def _connections(channel: Channel, directory: Path) -> None:
    session, address = Session(channel), ("127.0.0.1", _PORT)

    async def echo(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        while data := await reader.read(1 << 16):
            writer.write(data)
        writer.close()

    async with await asyncio.start_server(echo, address[0], 0) as server:
        port = server.sockets[0].getsockname()[1]
        async with session.connect(port) as connection:
            await connection.send(bytes(50_000))
            await connection.eof()
            while await connection.receive():
                pass
        _ports.add(port)
    for to in ("unix:/run/server", "unix:@nobody"):
        with contextlib.suppress(GuestError):
            async with session.connect(to) as connection:
                await connection.send(b"x")


async def _machine(channel: Channel, directory: Path) -> None:
    control = Control(channel)
    await control.health()
    await control.shared_random()
    named = Identity(
        serial=1, entropy=bytes(64), hostname="oak", machine_id="0" * 32, boot_id="0" * 36, new_machine=True, thaw=True,
        mac="02:00:00:00:00:01", address="10.0.2.15/24", gateway="10.0.2.2", dns=("10.0.2.3",), mtu=1400,
        address6="fd00::2/126", gateway6="fd00::1", payload=b"payload", end_sessions=True,
    )  # fmt: skip
    booted = Identity(
        serial=2, entropy=bytes(64), clock_ns=1, argv=("sleep", "9"), env={"A": "b"}, cwd="/tmp/work", user="user",
        start_process=True, mounts=(Mount(number=0, path="/mnt", readonly=True),), certificates=("-----BEGIN",),
    )  # fmt: skip
    process = Identity(serial=3, entropy=bytes(64), argv=("sleep", "9"), env={"A": "b"}, start_process=True)
    names = Identity(
        serial=4, entropy=bytes(64), hostname="elm", machine_id="1" * 32, payload=b"x" * 9000, certificates=("x",)
    )
    for identity in (named, booted, process, names):
        with contextlib.suppress(GuestError):  # an agent of a test refuses what concerns its machine
            await control.identity(identity)
    for call in (control.freeze(1), control.thaw(), control.poweroff(0), control.acknowledged(1)):
        with contextlib.suppress(GuestError):
            await call
    await channel.open(FrameType.CLOCK, encode_fields([(1, 1)]))
    await channel.open(FrameType.SYNC)


HOSTS: dict[str, Host] = {
    "commands": _commands, "attached": _attached, "endless": _endless, "refused": _refused, "files": _files,
    "trees": _trees, "connections": _connections, "machine": _machine,
}  # fmt: skip
_ports: set[int] = set()


async def record(corpus: Path) -> None:
    """Write one file for each host: the bytes that it sent to a real agent."""
    for name, host in HOSTS.items():
        async with _recording(corpus / name) as channel:
            with tempfile.TemporaryDirectory(prefix="coppice-fuzz-") as directory:
                async with asyncio.timeout(30):
                    await host(channel, Path(directory))


@contextlib.asynccontextmanager
async def _recording(path: Path) -> AsyncIterator[Channel]:
    """Open a channel to an agent through a relay that keeps what the host sends."""
    sent = bytearray()
    async with running_agent() as agent:
        ours, theirs = socket.socketpair()
        theirs.setblocking(False)
        agent.sock.setblocking(False)
        tasks = [
            asyncio.create_task(_relay(theirs, agent.sock, sent)),
            asyncio.create_task(_relay(agent.sock, theirs, None)),
        ]
        channel = await Channel.over(ours, 20.0)
        try:
            yield channel
        finally:
            await channel.close()
            await asyncio.wait(tasks[:1], timeout=20)  # what the host sent last has arrived
            for task in tasks:
                task.cancel()
            await asyncio.gather(*tasks, return_exceptions=True)
            theirs.close()
    for port in _ports:
        sent = sent.replace(struct.pack("<BIQ", 1, 8, port), struct.pack("<BIQ", 1, 8, _PORT))
    path.write_bytes(sent)


async def _relay(source: socket.socket, target: socket.socket, kept: bytearray | None) -> None:
    loop = asyncio.get_running_loop()
    while data := await loop.sock_recv(source, 1 << 16):
        if kept is not None:
            kept += data
        await loop.sock_sendall(target, data)


# ---- the sandbox ----


@functools.cache
def _programs() -> Path:
    binary = fuzzer().with_name("agent-fuzz-program")
    subprocess.run(
        ["gcc", "-O1", "-static", "-Wall", "-Wextra", "-Werror", "-o", binary, _HERE / "agent_fuzz_program.c"],
        check=True,
    )
    return binary


@functools.cache
def fuzzer() -> Path:
    """Compile the fuzz, with the agent's sources but its main program and its loop, which the fuzz includes."""
    return compile_agent("fuzz", _HERE / "agent_fuzz.c", _FUZZ_FLAGS, without=("control.c",))


def fuzz_agent(corpus: Path, inputs: int, seed: int, timeout_s: float) -> None:
    """Play inputs in a sandbox: namespaces of their own, and a root in memory.

    :raises AssertionError: an input crashed the agent, hung it, or left something
    """
    with tempfile.TemporaryDirectory(prefix="coppice-fuzz-") as root:
        done = subprocess.run(
            ["unshare", "--map-root-user", "--mount", "--net", "--uts", "--pid", "--ipc", "--fork", "--kill-child",
             "sh", "-c", _SETUP, "sh", root, _programs(), fuzzer(), root, corpus, str(seed), str(inputs)],
            env={**os.environ, "ASAN_OPTIONS": "abort_on_error=1:detect_leaks=0:quarantine_size_mb=4", "UBSAN_OPTIONS": "abort_on_error=1:print_stacktrace=1"},
            capture_output=True, text=True, errors="replace", timeout=timeout_s, check=False,
        )  # fmt: skip
    how = f"python tests/fuzz.py agent --corpus {corpus} --inputs 1 --seed N"
    assert done.returncode == 0, f"repeat it with `{how}`:\n{done.stdout}{done.stderr}"
    assert f"{inputs} inputs" in done.stderr
