"""A warm process takes the notice of each fork on a socket, before the fork is Running."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path

import pytest

from agent_process import agent_binary
from coppice.client import AsyncHost
from coppice.errors import GuestRefused, GuestTimeout, UsageError
from coppice.machine import notice
from coppice.model import State
from coppice.requests import (
    ForkRequest,
    InspectRequest,
    PromoteRequest,
    RestoreRequest,
    RunRequest,
    SnapshotForkRequest,
    SnapshotRequest,
    StandbyRequest,
)
from fakes.hosting import assert_tidy, boot, make
from fakes.relay import files_below, listening

OK = b"HTTP/1.1 200 fine\r\ncontent-length: 3\r\n\r\nyes"


class Process:
    """The warm process: it keeps what it was told, and answers."""

    def __init__(self, host: AsyncHost) -> None:
        self.host = host
        self.answers: list[bytes | None] = []  # of the next notices, OK when there are no more; None: silence
        self.heads: list[dict[str, str]] = []
        self.bodies: list[bytes] = []
        self.states: list[State] = []  # of the fork at that time

    async def serve(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        first, *lines = (await reader.readuntil(b"\r\n\r\n")).decode().rstrip().split("\r\n")
        assert first == "POST /coppice/fork HTTP/1.1"
        head = {name.lower(): value for name, _, value in (line.partition(": ") for line in lines)}
        self.bodies.append(await reader.readexactly(int(head["content-length"])))
        self.heads.append(head)
        self.states.append(self.host.local.rooms.store.get(head["coppice-id"]).state)
        answer = self.answers.pop(0) if self.answers else OK
        if answer is None:
            await reader.read()
        writer.write(answer or b"")
        writer.close()


@pytest.fixture
async def process(fake_host: AsyncHost, tmp_path: Path) -> AsyncIterator[Process]:
    """A process that listens on `app.sock` in the test's directory, as all fake guests see it."""
    await asyncio.to_thread(agent_binary, "static")
    process = Process(fake_host)
    server = await asyncio.start_unix_server(process.serve, tmp_path / "app.sock")
    async with server:
        with files_below(tmp_path):
            yield process


@asynccontextmanager
async def on_a_port(process: Process) -> AsyncIterator[int]:
    """Let the process listen on a port too."""
    server = await asyncio.start_server(process.serve, "127.0.0.1", 0)
    async with server:
        port = server.sockets[0].getsockname()[1]
        with listening(port):
            yield port


def at(tmp_path: Path) -> str:
    return f"unix:{tmp_path}/app.sock"


async def test_each_fork_sends_its_own(fake_host: AsyncHost, process: Process, tmp_path: Path) -> None:
    """Its name, id, serial and payload, when it is not Running yet. The source sends none."""
    await make(fake_host, State.TEMPLATE, notify=at(tmp_path))
    report = await fake_host.call(ForkRequest(instance="oak", names=["a", "b"], count=2, payloads=[b"one", b"\0two"]))
    assert report.succeeded == 2
    told = {
        head["coppice-name"]: (head["coppice-id"], body)
        for head, body in zip(process.heads, process.bodies, strict=True)
    }
    a, b = report.instances
    assert told == {"a": (a.id, b"one"), "b": (b.id, b"\0two")}
    assert {head["coppice-serial"] for head in process.heads} == {str(a.identity_serial)}
    assert process.states == [State.INITIALIZING] * 2
    assert all("notice" in result.stages for result in report.results)
    inspected = await fake_host.call(InspectRequest(instance="oak"))
    assert inspected.instance.process.notify == at(tmp_path)


async def test_the_record_decides_for_every_kind_of_fork(
    fake_host: AsyncHost, process: Process, tmp_path: Path
) -> None:
    """Of a running machine, of a template that was promoted with it, of a snapshot, and of a fork."""
    await boot(fake_host, "oak", notify=at(tmp_path))
    await fake_host.call(ForkRequest(instance="oak", from_running=True, names=["live"], atomic=True))
    await fake_host.call(SnapshotRequest(instance="live", name="saved"))
    await fake_host.call(SnapshotForkRequest(snapshot="saved", names=["snapped"], atomic=True))
    await fake_host.call(StandbyRequest(instance="live"))
    await fake_host.call(ForkRequest(instance="live", names=["second"], atomic=True))
    assert [head["coppice-name"] for head in process.heads] == ["live", "snapped", "second"]
    assert process.bodies == [b""] * 3


async def test_a_request_decides_otherwise(fake_host: AsyncHost, process: Process, tmp_path: Path) -> None:
    """`promote` and `fork` set it, a port too, and `none` takes it away."""
    await make(fake_host, State.STANDBY)
    await fake_host.call(ForkRequest(instance="oak", names=["silent"], atomic=True))
    async with on_a_port(process) as port:
        await fake_host.call(ForkRequest(instance="oak", names=["ported"], notify=port, atomic=True))
    promoted = await fake_host.call(PromoteRequest(instance="oak", notify=at(tmp_path)))
    assert (promoted.state, promoted.process.notify) == (State.TEMPLATE, at(tmp_path))
    await fake_host.call(ForkRequest(instance="oak", names=["told"], atomic=True))
    (quiet,) = (
        await fake_host.call(ForkRequest(instance="oak", names=["quiet"], notify="none", atomic=True))
    ).instances
    assert quiet.process.notify is None
    assert [head["coppice-name"] for head in process.heads] == ["ported", "told"]
    public = await fake_host.call(PromoteRequest(instance="oak", public=True))
    assert (await fake_host.call(PromoteRequest(instance="oak", notify="none"))).public is public.public is True


async def test_only_a_new_machine_sends_one(fake_host: AsyncHost, process: Process, tmp_path: Path) -> None:
    """Not one that boots, whose process has just started, nor the same machine when it is restored. A fork that
    was made at rest sends it when it first runs.
    """
    await make(fake_host, State.STANDBY, notify=at(tmp_path))
    await fake_host.call(RestoreRequest(instance="oak"))
    await fake_host.call(StandbyRequest(instance="oak"))
    await fake_host.call(ForkRequest(instance="oak", names=["booted"], target=State.STOPPED, atomic=True))
    assert process.heads == []
    await fake_host.call(ForkRequest(instance="oak", names=["late"], target=State.STANDBY, atomic=True))
    for _ in range(2):
        await fake_host.call(RestoreRequest(instance="late"))
        await fake_host.call(StandbyRequest(instance="late"))
    assert [head["coppice-name"] for head in process.heads] == ["late"]


@pytest.mark.parametrize(
    ("answer", "said"),
    [
        (
            b"HTTP/1.0 500 x\r\n\r\nno model for \x1b[31mbob",
            "answered the fork's notice with HTTP status 500: no model for",
        ),
        (b"nonsense\r\n\r\n", "sent no answer of HTTP"),
        (b"", "sent no answer of HTTP"),
    ],
)
async def test_a_refusal_fails_the_fork_alone(
    fake_host: AsyncHost, process: Process, tmp_path: Path, answer: bytes, said: str
) -> None:
    """As a hook does: the report has the reason, nothing of it is left, and its sibling runs."""
    await make(fake_host, State.TEMPLATE, notify=at(tmp_path))
    process.answers = [answer]
    report = await fake_host.call(ForkRequest(instance="oak", count=2))
    (failed,) = [result for result in report.results if not result.ok]
    assert said in (failed.error or "")
    assert "\x1b" not in (failed.error or "")
    assert "--notify none" in (failed.error or "")
    await assert_tidy(fake_host, "oak", *(fork.name for fork in report.instances))


async def test_nobody_listens(fake_host: AsyncHost, process: Process, tmp_path: Path) -> None:
    """The error names the socket."""
    await make(fake_host, State.TEMPLATE, notify=f"unix:{tmp_path}/other.sock")
    with pytest.raises(GuestRefused, match=r"notice of the fork: cannot connect to unix:.*other\.sock"):
        await fake_host.call(ForkRequest(instance="oak", atomic=True))
    await assert_tidy(fake_host, "oak")


async def test_a_silent_process_has_a_deadline(
    fake_host: AsyncHost, process: Process, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """And the fork is undone."""
    monkeypatch.setattr(notice, "_DEADLINE_S", 0.5)
    await make(fake_host, State.TEMPLATE, notify=at(tmp_path))
    process.answers = [None]
    with pytest.raises(GuestTimeout, match=r"did not take the fork's notice within 0\.5 s"):
        await fake_host.call(ForkRequest(instance="oak", atomic=True))
    await assert_tidy(fake_host, "oak")


@pytest.mark.parametrize("wrong", [0, 70000, "8000", "unix:app.sock", "tcp:80", ""])
async def test_an_invalid_endpoint(wrong: int | str) -> None:
    """It is refused before anything is recorded."""
    with pytest.raises(UsageError):
        RunRequest(image="tiny", notify=wrong)
    with pytest.raises(UsageError):
        ForkRequest(instance="oak", notify=wrong)
    with pytest.raises(UsageError):
        PromoteRequest(instance="oak", notify=wrong)
