"""The supervisor checks the health of machines, and says when it changes."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager

import msgspec
import pytest

from agent_process import agent_binary
from coppice.client import AsyncHost
from coppice.errors import UsageError
from coppice.model import HealthCheck, Observed, RestartPolicy, State
from coppice.model.events import Event
from coppice.requests import EventsRequest, GetRequest, StandbyRequest, UpdateRequest
from fakes.clock import FakeClock
from fakes.hosting import boot
from fakes.relay import listening
from fakes.supervising import SOON_S, event_of, scheduled, supervised, until_state

GOOD = ("echo", "fine")
BAD = ("exit", "7")


async def health(host: AsyncHost, wanted: str, after: int = 0) -> Event:
    """Return the event of a change to that health."""
    return await event_of(host, lambda event: event.kind == "health" and event.detail.startswith(wanted), after)


async def seen(host: AsyncHost, name: str = "oak") -> Observed:
    """Return what the supervisor has seen."""
    found = (await host.call(GetRequest(instance=name))).observed
    assert found is not None
    return found


async def checked(host: AsyncHost, clock: FakeClock) -> Observed:
    """Wait for the next check, and return what was seen."""
    before = (await seen(host)).checked_at
    clock.forward(10)
    async with asyncio.timeout(SOON_S):
        while (found := await seen(host)).checked_at == before:
            pass
    return found


def by(*command: str, **options: object) -> HealthCheck:
    """Return a check by a command, every 10 seconds."""
    return HealthCheck(kind="exec", command=command, interval_s=10, **options)  # type: ignore[arg-type]


async def test_a_healthy_machine(fake_host: AsyncHost, clock: FakeClock) -> None:
    """It starts, and is healthy after as many successes as are asked for."""
    async with supervised(fake_host, clock):
        await boot(fake_host, "oak", health_check=by(*GOOD, successes=2))
        await health(fake_host, "starting")
        found = await checked(fake_host, clock) if (await seen(fake_host)).successes < 2 else await seen(fake_host)
        await health(fake_host, "healthy")
        assert found.failures == 0


async def test_an_unhealthy_machine(fake_host: AsyncHost, clock: FakeClock) -> None:
    """It is unhealthy after failures in a row, with the reason, and healthy again after a success."""
    async with supervised(fake_host, clock):
        await boot(fake_host, "oak", health_check=by(*BAD, failures=3))
        await health(fake_host, "starting")
        for _ in range(3):
            if (await seen(fake_host)).health == "starting":
                await checked(fake_host, clock)
        event = await health(fake_host, "unhealthy: exit status 7")
        assert (await seen(fake_host)).failures >= 3
        await fake_host.call(UpdateRequest(instance="oak", health_check=by(*GOOD)))
        clock.forward(10)
        await health(fake_host, "healthy", event.id)
        assert (await seen(fake_host)).failures == 0


async def test_early_failures_do_not_count(fake_host: AsyncHost, clock: FakeClock) -> None:
    """In the start period a machine stays `starting`."""
    async with supervised(fake_host, clock):
        await boot(fake_host, "oak", health_check=by(*BAD, failures=1, start_period_s=25))
        await health(fake_host, "starting")
        found = await checked(fake_host, clock)
        assert (found.health, found.failures, found.health_error) == ("starting", 0, "exit status 7")
        clock.forward(20)
        await health(fake_host, "unhealthy")


async def test_a_run_has_its_own_health(fake_host: AsyncHost, clock: FakeClock) -> None:
    """A machine at rest is not checked. A restored one starts anew."""
    async with supervised(fake_host, clock):
        await boot(fake_host, "oak", health_check=by(*GOOD))
        first = await health(fake_host, "healthy")
        await fake_host.call(StandbyRequest(instance="oak"))
        clock.forward(100)
        restored = await (await fake_host.get("oak")).restore()
        await health(fake_host, "starting", first.id)
        await health(fake_host, "healthy", first.id)
        assert (await seen(fake_host)).health_of == restored.record.started_at


async def test_a_clock_that_is_set_back_delays_no_check(fake_host: AsyncHost, clock: FakeClock) -> None:
    """The time of the last check is in the future then."""
    async with supervised(fake_host, clock):
        await boot(fake_host, "oak", health_check=by(*GOOD))
        await health(fake_host, "healthy")
        clock.back(100_000)
        async with asyncio.timeout(SOON_S):
            while (await seen(fake_host)).checked_at != clock.now():
                pass


async def test_an_unhealthy_machine_is_started_again(fake_host: AsyncHost, clock: FakeClock) -> None:
    """If its check says so."""
    restart = RestartPolicy(when="on-failure", backoff_s=10)
    async with supervised(fake_host, clock):
        oak = await boot(fake_host, "oak", restart=restart, health_check=by(*BAD, failures=1, restart=True))
        found = await until_state(fake_host, "oak", State.STOPPED)
        assert found.exit_reason == "unhealthy: exit status 7"
        await fake_host.call(UpdateRequest(instance="oak", health_check=by(*GOOD)))
        await scheduled(fake_host, "oak")
        clock.forward(10)
        started = await until_state(fake_host, "oak", State.RUNNING)
        assert started.started_at != oak.started_at
        await boot(fake_host, "elm", restart=restart, health_check=by(*BAD, failures=1))
        await event_of(fake_host, lambda event: event.name == "elm" and event.detail.startswith("unhealthy"))
        assert (await fake_host.call(GetRequest(instance="elm"))).state is State.RUNNING


@asynccontextmanager
async def service(answer: bytes | None) -> AsyncIterator[int]:
    """A server on the guest's loopback that gives each request this answer. None: it stays silent."""

    async def serve(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        await (reader.read() if answer is None else reader.readuntil(b"\r\n\r\n"))
        writer.write(answer or b"")
        writer.close()

    server = await asyncio.start_server(serve, "127.0.0.1", 0)
    async with server:
        port = server.sockets[0].getsockname()[1]
        with listening(port):
            yield port


@pytest.mark.parametrize(
    ("answer", "check", "expected"),
    [
        (None, HealthCheck(kind="tcp"), "healthy"),
        (b"HTTP/1.1 204 x\r\ncontent-length: 0\r\n\r\n", HealthCheck(kind="http"), "healthy"),
        (b"HTTP/1.1 302 x\r\ncontent-length: 0\r\n\r\n", HealthCheck(kind="http", path="/a?b"), "healthy"),
        (b"HTTP/1.1 204 x\r\n\r\n", HealthCheck(kind="http", expected_status=200), "unhealthy: HTTP status 204"),
        (b"HTTP/1.1 500 x\r\n\r\n", HealthCheck(kind="http"), "unhealthy: HTTP status 500"),
        (b"nonsense\r\n\r\n", HealthCheck(kind="http"), "unhealthy: the server in the guest sent no answer of HTTP"),
        (b"HTTP/1.1 200", HealthCheck(kind="http"), "unhealthy: the server in the guest sent no answer of HTTP"),
        (bytes(100_000), HealthCheck(kind="http"), "unhealthy: the server in the guest sent no answer of HTTP"),
        (None, HealthCheck(kind="http", timeout_s=0.5), "unhealthy: no answer within 0.5 s"),
        (None, HealthCheck(kind="tcp", port=1), "unhealthy: cannot connect to port 1 in the guest: Connection refused"),
    ],
)
async def test_checks_of_a_port(
    fake_host: AsyncHost, clock: FakeClock, answer: bytes | None, check: HealthCheck, expected: str
) -> None:
    """By a connection or by a request, through the agent: the port is not published, and there is no network."""
    await asyncio.to_thread(agent_binary, "static")  # the first call compiles it, which takes longer than a check
    async with service(answer) as port, supervised(fake_host, clock):
        await boot(fake_host, "oak", network="none")
        once = msgspec.structs.replace(check, port=check.port or port, failures=1)
        await fake_host.call(UpdateRequest(instance="oak", health_check=once))
        await health(fake_host, expected)


@pytest.mark.parametrize(
    "wrong",
    [
        {"kind": "exec"},
        {"kind": "tcp", "port": 0},
        {"kind": "http", "port": 80, "path": "health"},
        {"kind": "http", "port": 80, "path": "/a\r\nX: b"},
        {"kind": "http", "port": 80, "expected_status": 20},
        {"kind": "tcp", "port": 80, "interval_s": 0},
        {"kind": "tcp", "port": 80, "timeout_s": 1e9},
        {"kind": "tcp", "port": 80, "failures": 0},
    ],
)
def test_a_check_is_validated(wrong: dict[str, object]) -> None:
    """Before it is recorded."""
    with pytest.raises(UsageError):
        UpdateRequest(instance="oak", health_check=HealthCheck(**wrong))  # type: ignore[arg-type]


async def test_events_end_with_a_filter(fake_host: AsyncHost) -> None:
    """Events of an instance without policies are as before."""
    await boot(fake_host, "oak")
    async with fake_host.stream(EventsRequest(after=0)) as events:
        kinds = [event.kind async for event in events]
    assert set(kinds) == {"made", "state"}
