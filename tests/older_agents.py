"""Conversations of a host with an agent: recorded from one, and replayed to today's host.

A recording keeps the agent of a release honest when its sources are gone: `tests/data/agent-2.json` is
one of the first agent of protocol 2. `python tests/older_agents.py OUTPUT [CHECKOUT]` records one, from
the agent of this checkout or of another, such as one of a tag.
"""

from __future__ import annotations

import asyncio
import contextlib
import json
import socket
import struct
import subprocess
import sys
from collections.abc import AsyncIterator, Awaitable, Callable
from pathlib import Path
from typing import Any

from agent_requests import read_range
from coppice.agent.channel import Channel
from coppice.agent.control import Control, Identity, encode_identity
from coppice.agent.protocol import END_BYTE, MAGIC, NONCE_SIZE, Fields, FrameType
from coppice.agent.session import Session
from coppice.errors import CoppiceError

Conversation = Callable[[Channel], Awaitable[object]]
Line = tuple[str, str, int, str]  # "host" or "guest", type, stream, payload in hex

_HEADER = struct.Struct("<BHH")
_FILE = "/tmp/coppice-recorded"
_UNPLANNED = {FrameType.PING, FrameType.PONG, FrameType.WINDOW, FrameType.FORGET, FrameType.STDIN, FrameType.DATA}
"""Frames of the host whose number and time are not the same in each run."""


# ---- the conversations ----


async def _health(channel: Channel) -> object:
    health = await Control(channel).health()
    return [channel.protocol, health.agent_version, health.identity_serial, health.uptime_ms, health.process_pid]


async def _identity(channel: Channel) -> object:
    return sorted((await Control(channel).identity(IDENTITY)).steps_ms)


async def _exec(channel: Channel) -> object:
    command = ["/bin/sh", "-c", "cat; echo err >&2; exit 3"]
    done = await Session(channel).exec(command, env={"A": "b"}, cwd="/", stdin=b"given\n", timeout_s=20)
    return [done.exit_code, done.stdout.decode(), done.stderr.decode()]


async def _exec_refused(channel: Channel) -> object:
    return await Session(channel).exec(["/nothing"])


async def _attach(channel: Channel) -> object:
    session = Session(channel)
    async with session.exec_stream(["cat"], command_id="recorded", detached=True):
        pass
    async with session.attach("recorded", stdin=True) as first:
        await first.send_stdin(b"typed\n")
        await first.eof()
        told = [data.decode() async for _, data in first]
    async with session.attach("recorded", offset=2) as again:
        replayed = [data.decode() async for _, data in again]
    listed = [
        [each.id, each.argv, each.started_at, each.output_bytes, each.exit_code] for each in await session.commands()
    ]
    return ["".join(told), "".join(replayed), (await again.wait()).exit_code, listed]


async def _attach_unknown(channel: Channel) -> object:
    async with Session(channel).attach("unknown"):
        return None


async def _signalled(channel: Channel) -> object:
    async with Session(channel).exec_stream(["sleep", "100"], command_id="asleep", has_stdin=False) as running:
        return (await running.terminate()).exit_code


async def _files(channel: Channel) -> object:
    session = Session(channel)
    await session.write_file(_FILE, b"contents", mode=0o640)
    status = await session.stat(_FILE)
    return [
        (await read_range(session, _FILE, 2)).decode(),
        status.kind,
        status.size_bytes,
        status.mode,
        status.mtime,
    ]


async def _file_missing(channel: Channel) -> object:
    return await Session(channel).read_file("/nothing")


async def _connect_refused(channel: Channel) -> object:
    async with Session(channel).connect("unix:/nothing"):
        return None


IDENTITY = Identity(
    serial=7, entropy=bytes(32), hostname="oak", machine_id="0" * 32, payload=b"given", new_machine=True
)
CONVERSATIONS: dict[str, Conversation] = {
    "health": _health, "identity": _identity, "exec": _exec, "exec-refused": _exec_refused, "attach": _attach,
    "attach-unknown": _attach_unknown, "signalled": _signalled, "files": _files, "file-missing": _file_missing,
    "connect-refused": _connect_refused,
}  # fmt: skip


async def outcome(conversation: Conversation, channel: Channel) -> Any:
    """Return the result of a conversation as JSON, or its error."""
    try:
        async with asyncio.timeout(30):
            result = await conversation(channel)
    except CoppiceError as error:
        result = f"{type(error).__name__}: {error.message}"
    return json.loads(json.dumps(result))


# ---- frames ----


class _Frames:
    """Splits one direction of a connection into frames, from the handshake on."""

    def __init__(self) -> None:
        self._buffer = bytearray()
        self._open = False

    def feed(self, data: bytes) -> list[tuple[int, int, bytes]]:
        self._buffer += data
        at = self._buffer.find(MAGIC)
        if not self._open and at < _HEADER.size:
            return []
        if not self._open:
            del self._buffer[: at - _HEADER.size]
            self._open = True
        frames = []
        while len(self._buffer) >= _HEADER.size:
            kind, stream, size = _HEADER.unpack_from(self._buffer)
            if len(self._buffer) < _HEADER.size + size + 1:
                break
            frames.append((kind, stream, bytes(self._buffer[_HEADER.size : _HEADER.size + size])))
            del self._buffer[: _HEADER.size + size + 1]
        return frames


def _encoded(kind: int, stream: int, payload: bytes) -> bytes:
    return _HEADER.pack(kind, stream, len(payload)) + payload + bytes((END_BYTE,))


# ---- recording ----


@contextlib.asynccontextmanager
async def _recording(agent: Path, lines: list[Line]) -> AsyncIterator[Channel]:
    """Open a channel to an agent, through a relay that keeps the frames of both."""
    host, relay_host = socket.socketpair()
    relay_agent, theirs = socket.socketpair()
    process = await asyncio.create_subprocess_exec(agent, "--serve", str(theirs.fileno()), pass_fds=[theirs.fileno()])
    theirs.close()

    async def relay(source: socket.socket, target: socket.socket, name: str) -> None:
        frames, loop = _Frames(), asyncio.get_running_loop()
        while data := await loop.sock_recv(source, 1 << 16):
            for kind, stream, payload in frames.feed(data):
                if name == "guest" or kind not in _UNPLANNED:
                    lines.append((name, FrameType(kind).name, stream, payload.hex()))
            await loop.sock_sendall(target, data)
        target.shutdown(socket.SHUT_WR)

    for sock in (relay_host, relay_agent):
        sock.setblocking(False)
    tasks = [
        asyncio.create_task(relay(relay_host, relay_agent, "host")),
        asyncio.create_task(relay(relay_agent, relay_host, "guest")),
    ]
    channel = await Channel.over(host, 20.0)
    try:
        yield channel
    finally:
        await channel.close()
        await asyncio.gather(*tasks, return_exceptions=True)
        await process.wait()
        relay_host.close()
        relay_agent.close()


def _identified(parts: Path) -> list[Line]:
    """Return an identity and its answer, from the agent's own code in namespaces of its own: an agent of
    a test refuses it."""
    message = encode_identity(IDENTITY)
    script = 'for at in /etc /run /var/lib; do mount -t tmpfs tmpfs $at; done; mkdir /run/coppice; exec "$@"'
    command = ["unshare", "--map-root-user", "--mount", "--net", "--uts", "sh", "-c", script, "sh", str(parts)]
    answer = bytes.fromhex(
        subprocess.run([*command, f"identity={message.hex()}"], capture_output=True, text=True, check=True).stdout
    )
    return [("host", "IDENTITY", 1, message.hex()), ("guest", FrameType(answer[0]).name, 1, answer[1:].hex())]


async def record(agent: Path, parts: Path) -> dict[str, Any]:
    """Have all conversations with an agent; return them with their results.

    :param parts: the agent's parts without a machine, of `tests/agent_parts.c`
    """
    conversations: dict[str, Any] = {}
    for name, conversation in CONVERSATIONS.items():
        lines: list[Line] = []
        if name != "identity":
            async with _recording(agent, lines) as channel:
                result = await outcome(conversation, channel)
            hello = next(line for line in lines if line[1] == "HELLO_ACK")
        else:
            lines = [hello, *_identified(parts)]
            async with replaying(lines) as channel:
                result = await outcome(conversation, channel)
        conversations[name] = {"frames": lines, "result": result}
    return conversations


# ---- replaying ----


@contextlib.asynccontextmanager
async def replaying(lines: list[Line]) -> AsyncIterator[Channel]:
    """Open a channel to an agent that says what was recorded, when the host has said what it said then."""
    ours, theirs = socket.socketpair()
    theirs.setblocking(False)
    serving = asyncio.create_task(_serve(theirs, lines))
    channel = await Channel.over(ours, 5.0)
    try:
        yield channel
    finally:
        await channel.close()
        await asyncio.gather(serving)
        theirs.close()


async def _serve(sock: socket.socket, lines: list[Line]) -> None:
    loop, frames = asyncio.get_running_loop(), _Frames()
    planned: list[tuple[int, int, bytes]] = []
    streams: dict[int, int] = {0: 0}  # by those of the recording
    nonce = b""
    for name, kind, stream, payload in lines:
        if kind == "HELLO":
            continue  # each host makes its own
        while (name == "host" and not planned) or not nonce:
            if not (data := await loop.sock_recv(sock, 1 << 16)):
                raise AssertionError(f"the host has not sent a {kind}")
            for each in frames.feed(data):
                if each[0] == FrameType.HELLO:
                    nonce = each[2][len(MAGIC) : len(MAGIC) + NONCE_SIZE]
                elif each[0] not in _UNPLANNED:
                    planned.append(each)
        if name == "host":
            streams[stream] = _same(planned.pop(0), kind, bytes.fromhex(payload))
        else:
            said = bytes.fromhex(payload)
            if kind == "HELLO_ACK":
                said = MAGIC + nonce + said[len(MAGIC) + NONCE_SIZE :]
            await loop.sock_sendall(sock, _encoded(FrameType[kind], streams[stream], said))
    while await loop.sock_recv(sock, 1 << 16):
        pass


def _same(sent: tuple[int, int, bytes], kind: str, recorded: bytes) -> int:
    """Check that today's host sends what the older agent needs; return the stream."""
    assert FrameType(sent[0]).name == kind, f"the host sent {FrameType(sent[0]).name} instead of {kind}"
    if kind not in ("SIGNAL", "RESIZE"):
        missing = Fields(recorded)._values.keys() - Fields(sent[2])._values.keys()
        assert not missing, f"the host no longer sends the fields {sorted(missing)} of {kind}"
    return sent[1]


def _main() -> None:
    from agent_process import compile_agent

    checkout = Path(sys.argv[2]) if len(sys.argv) > 2 else Path(__file__).parents[1]
    sources = checkout / "src/coppice/agent/c"
    agent = compile_agent("recorded", sources / "main.c", sources=sources)
    parts = compile_agent("recorded-parts", checkout / "tests/agent_parts.c", sources=sources)
    conversations = asyncio.run(record(agent, parts))
    Path(sys.argv[1]).write_text(json.dumps(conversations, indent=1) + "\n", encoding="ascii")


if __name__ == "__main__":
    sys.path[:0] = [str(Path(__file__).parent)]
    _main()
