"""An idle machine is put into standby, and the first connection to a published port wakes it."""

from __future__ import annotations

import asyncio
import os
import socket
import time
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager

import msgspec
import pytest

from coppice.client import AsyncHost
from coppice.errors import InStandby
from coppice.host.upkeep import Upkeep
from coppice.model import Instance, Publish, State
from coppice.model.automation import AutoStandbyStatus
from coppice.requests import (
    AutoStandbyHoldRequest,
    AutoStandbyRequest,
    CommandStartRequest,
    CommandWaitRequest,
    ExecRequest,
    GetRequest,
    OpenExecRequest,
    PromoteRequest,
    RestoreRequest,
    RmRequest,
    StandbyRequest,
    StopRequest,
    UpdateRequest,
)
from fakes.clock import FakeClock
from fakes.driver import FakeDriver
from fakes.hosting import ask, boot
from fakes.supervising import SOON_S, supervised, until_state

IDLE_S = 60.0


def free_port() -> int:
    """Return a port that no program uses."""
    with socket.create_server(("127.0.0.1", 0)) as probe:
        return int(probe.getsockname()[1])


async def service(port: int) -> asyncio.Server:
    """Serve on the port of a machine, in place of its VMM, which fake machines do not do."""

    async def answer(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        writer.write(b"got " + await reader.readline())
        await writer.drain()
        await reader.read()
        writer.close()

    return await asyncio.start_server(answer, "127.0.0.1", port)


async def connect(port: int) -> tuple[asyncio.StreamReader, asyncio.StreamWriter]:
    """Connect as soon as something listens: nothing tells when."""
    async with asyncio.timeout(SOON_S):
        while True:
            try:
                return await asyncio.open_connection("127.0.0.1", port)
            except ConnectionRefusedError:
                await asyncio.sleep(0.01)


async def published(host: AsyncHost, port: int) -> Instance:
    """Return a Running machine in automatic standby that publishes a port."""
    return await boot(
        host,
        network="user",
        publish=[Publish(host_port=port, guest_port=80)],
        auto_standby_s=IDLE_S,
    )


@asynccontextmanager
async def sleeping(host: AsyncHost, clock: FakeClock) -> AsyncIterator[int]:
    """A supervised machine that was put into standby. Yield its port."""
    port = free_port()
    async with supervised(host, clock):
        await published(host, port)
        clock.forward(IDLE_S + 5)
        await until_state(host, "oak", State.STANDBY)
        yield port


async def test_sessions_keep_a_machine_awake(fake_host: AsyncHost, other: AsyncHost, clock: FakeClock) -> None:
    """Of any process, as long as they last. Then the time begins again."""
    async with supervised(fake_host, clock):
        oak = await boot(fake_host, "oak", auto_standby_s=IDLE_S)
        elm = await boot(fake_host, "elm", auto_standby_s=IDLE_S)
        async with other.stream(OpenExecRequest(instance="oak", argv=["sleep"])):
            clock.forward(IDLE_S + 5)
            await until_state(fake_host, "elm", State.STANDBY)
            clock.forward(IDLE_S + 5)
            found = await fake_host.call(GetRequest(instance="oak"))
            assert (found.state, found.started_at) == (State.RUNNING, oak.started_at)
        clock.forward(IDLE_S * 2)
        await until_state(fake_host, "oak", State.STANDBY)
        await fake_host.call(RestoreRequest(instance=elm.id))
        assert await ask(fake_host, "elm", "echo", "on") == "on"


async def test_a_clock_that_is_set_back_delays_no_standby(fake_host: AsyncHost, clock: FakeClock) -> None:
    """The machine was started in the future then. Its idle time begins at the new time."""
    async with supervised(fake_host, clock):
        await boot(fake_host, "oak", auto_standby_s=IDLE_S)
        clock.back(100_000)
        async with asyncio.timeout(SOON_S):
            while (observed := (await fake_host.call(GetRequest(instance="oak"))).observed) is None or (
                observed.active_at != clock.now()
            ):
                pass
        clock.forward(IDLE_S + 5)
        await until_state(fake_host, "oak", State.STANDBY)


async def test_a_clock_that_is_set_back_during_a_look_delays_no_standby(
    fake_host: AsyncHost, clock: FakeClock, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A look that is under way ends with a deadline of the clock as it was: another one follows."""
    oak = await boot(fake_host, "oak", auto_standby_s=IDLE_S)
    networks, begun, ended = fake_host.local.rooms.networks.of(oak.machine), asyncio.Event(), asyncio.Event()

    async def connections(instance: Instance) -> int:
        if instance.name == "oak":
            begun.set()
            await ended.wait()
        return 0

    monkeypatch.setattr(networks, "connections", connections)
    async with supervised(fake_host, clock), asyncio.timeout(SOON_S):
        await begun.wait()
        await boot(fake_host, "elm", auto_standby_s=IDLE_S)
        clock.back(100_000)
        for name in ("elm", "oak"):
            while (seen := (await fake_host.call(GetRequest(instance=name))).observed) is None or (
                seen.active_at != clock.now()
            ):
                pass
            ended.set()


async def test_connections_keep_a_machine_awake(fake_host: AsyncHost, clock: FakeClock) -> None:
    """Open ones, also silent ones."""
    port = free_port()
    async with supervised(fake_host, clock):
        await boot(fake_host, "oak", network="user", auto_standby_s=IDLE_S)
        await boot(fake_host, "elm", auto_standby_s=IDLE_S)
        store = fake_host.local.rooms.store
        async with await service(port):
            reader, writer = await connect(port)
            store.save(msgspec.structs.replace(store.get("oak"), publish=(Publish(host_port=port, guest_port=80),)))
            await fake_host.call(UpdateRequest(instance="oak", auto_standby_s=IDLE_S + 1))
            clock.forward(IDLE_S + 5)
            await until_state(fake_host, "elm", State.STANDBY)
            clock.forward(IDLE_S + 5)
            async with asyncio.timeout(SOON_S):
                while (await fake_host.call(GetRequest(instance="oak"))).observed.active_at is None:  # type: ignore[union-attr]
                    pass
            assert (await fake_host.call(GetRequest(instance="oak"))).state is State.RUNNING
            writer.close()
            await reader.read()
        clock.forward(IDLE_S * 3)
        await until_state(fake_host, "oak", State.STANDBY)


async def test_the_first_connection_wakes_a_machine(fake_host: AsyncHost, clock: FakeClock, driver: FakeDriver) -> None:
    """It is kept until the machine runs, and passed on in both directions; so are further ones."""
    async with sleeping(fake_host, clock) as port:
        gate = driver.faults.hold_at("restored")
        first = await connect(port)
        first[1].write(b"one\n")
        async with asyncio.timeout(SOON_S):
            await gate.reached.wait()
        async with await service(port):
            gate.release.set()
            await until_state(fake_host, "oak", State.RUNNING)
            second = await connect(port)
            second[1].write(b"two\n")
            async with asyncio.timeout(SOON_S):
                for (reader, writer), said in ((first, b"got one\n"), (second, b"got two\n")):
                    assert await reader.readline() == said
                    writer.write_eof()
                    assert await reader.read() == b""
                    writer.close()


async def test_a_command_of_another_process_gets_the_ports(
    fake_host: AsyncHost, other: AsyncHost, clock: FakeClock
) -> None:
    """A restore and a removal by hand: the supervisor releases the ports."""
    async with sleeping(fake_host, clock) as port:
        (await connect(port))[1].close()  # it listens, and this wakes the machine too
        await other.call(RestoreRequest(instance="oak"))
        await other.call(StandbyRequest(instance="oak"))
        restored = await other.call(RestoreRequest(instance="oak"))
        assert restored.state is State.RUNNING
        await other.call(StandbyRequest(instance="oak"))
        await other.call(PromoteRequest(instance="oak"))
        await other.call(RmRequest(instance="oak"))
        async with asyncio.timeout(SOON_S):
            while True:
                try:
                    socket.create_server(("127.0.0.1", port)).close()
                except OSError:
                    await asyncio.sleep(0.01)
                else:
                    break


async def test_a_command_without_a_client_keeps_a_machine_awake(
    fake_host: AsyncHost, other: AsyncHost, clock: FakeClock, driver: FakeDriver
) -> None:
    """Until it has ended; then a whole idle time passes. The machine's process does not count."""
    async with supervised(fake_host, clock):
        await boot(fake_host, "oak", auto_standby_s=IDLE_S)
        fifo = fake_host.local.rooms.layout.home / "fifo"
        os.mkfifo(fifo)
        argv = ["/bin/sh", "-c", f"read -r line <{fifo}"]
        await other.call(CommandStartRequest(instance="oak", argv=argv, command="job"))
        idle_at = await looked_again(fake_host, clock)
        assert (await fake_host.call(GetRequest(instance="oak"))).state is State.RUNNING
        await asyncio.to_thread(fifo.write_text, "done\n")
        await other.call(CommandWaitRequest(instance="oak", command="job", deadline_s=SOON_S))
        assert clock.now() < idle_at + IDLE_S
        clock.forward(IDLE_S + 5)
        await until_state(fake_host, "oak", State.STANDBY)


async def looked_again(host: AsyncHost, clock: FakeClock) -> float:
    """Let the idle time pass, and wait until the supervisor has seen activity. Return that time."""
    clock.forward(20 * IDLE_S)  # also since the end of the last session, which has the time of the host
    async with asyncio.timeout(SOON_S):
        while True:
            seen = (await host.call(GetRequest(instance="oak"))).observed
            if seen is not None and seen.active_at is not None and seen.active_at >= clock.now() - 1:
                return seen.active_at


async def test_the_next_supervisor_holds_the_ports(
    fake_host: AsyncHost, other: AsyncHost, clock: FakeClock, driver: FakeDriver
) -> None:
    """Without one the ports are free, and the machine is restored by hand."""
    async with sleeping(fake_host, clock) as port:
        pass
    with pytest.raises(ConnectionRefusedError):
        await asyncio.open_connection("127.0.0.1", port)
    await other.call(RestoreRequest(instance="oak"))
    await other.call(StandbyRequest(instance="oak"))
    async with supervised(other, clock):
        gate = driver.faults.hold_at("restored")
        _, writer = await connect(port)
        async with asyncio.timeout(SOON_S):
            await gate.reached.wait()
        gate.release.set()
        await until_state(fake_host, "oak", State.RUNNING)
        writer.close()


async def test_a_machine_that_cannot_wake(fake_host: AsyncHost, clock: FakeClock, driver: FakeDriver) -> None:
    """The connection is closed, and the next one tries again."""
    async with sleeping(fake_host, clock) as port:
        driver.faults.fail_at("restore")
        reader, writer = await connect(port)
        async with asyncio.timeout(SOON_S):
            assert await reader.read() == b""
        writer.close()
        _, writer = await connect(port)
        await until_state(fake_host, "oak", State.RUNNING)
        writer.close()


async def test_a_session_during_the_standby_finds_it_at_rest(
    fake_host: AsyncHost, other: AsyncHost, clock: FakeClock, driver: FakeDriver
) -> None:
    """It waits for the end of the capture, and is then refused instead of cut off."""
    async with supervised(fake_host, clock):
        await boot(fake_host, "oak", auto_standby_s=IDLE_S)
        gate = driver.faults.hold_at("save")
        clock.forward(IDLE_S + 5)
        async with asyncio.timeout(SOON_S):
            await gate.reached.wait()
        late = asyncio.ensure_future(other.call(ExecRequest(instance="oak", argv=["echo"])))
        gate.release.set()
        async with asyncio.timeout(SOON_S):
            with pytest.raises(Exception, match="Standby"):
                await late


async def status(host: AsyncHost) -> AutoStandbyStatus:
    """Return the status of oak's automatic standby."""
    return await host.call(AutoStandbyRequest(instance="oak"))


async def test_the_status_says_what_keeps_a_machine_awake(
    fake_host: AsyncHost, other: AsyncHost, clock: FakeClock
) -> None:
    """A session, a connection, or only that its time is not over; without asking the guest."""
    port = free_port()
    await boot(fake_host, "oak", network="user")
    assert await status(fake_host) == AutoStandbyStatus(status="disabled")
    await fake_host.call(UpdateRequest(instance="oak", auto_standby_s=IDLE_S))
    async with other.stream(OpenExecRequest(instance="oak", argv=["sleep"])):
        found = await status(fake_host)
        assert (found.status, found.in_use, found.idle_since, found.standby_at) == ("active", True, None, None)
    found = await status(fake_host)
    assert (found.status, found.in_use, found.connections) == ("idle_countdown", False, 0)
    assert found.idle_since is not None
    assert found.standby_at == pytest.approx(found.idle_since + IDLE_S)
    assert found.hold_until is None
    store = fake_host.local.rooms.store
    async with await service(port):
        reader, writer = await connect(port)
        store.save(msgspec.structs.replace(store.get("oak"), publish=(Publish(host_port=port, guest_port=80),)))
        found = await status(fake_host)
        assert (found.status, found.in_use, found.connections) == ("active", False, 1)
        writer.close()
        await reader.read()
    await fake_host.call(StandbyRequest(instance="oak"))
    assert await status(fake_host) == AutoStandbyStatus(status="ineligible", idle_timeout_s=IDLE_S)


async def test_the_status_of_a_machine_whose_time_is_over(fake_host: AsyncHost) -> None:
    """Without a supervisor nothing happens to it."""
    oak = await boot(fake_host, "oak", auto_standby_s=IDLE_S)
    store = fake_host.local.rooms.store
    store.save(msgspec.structs.replace(oak, started_at=(oak.started_at or 0.0) - 2 * IDLE_S))
    assert (await status(fake_host)).status == "ready_for_standby"


async def test_a_hold_keeps_a_machine_awake(fake_host: AsyncHost, other: AsyncHost, clock: FakeClock) -> None:
    """For its idle time, also if that is shortened meanwhile; the next hold counts then."""
    async with supervised(fake_host, clock):
        await boot(fake_host, "oak", auto_standby_s=100 * IDLE_S)
        await boot(fake_host, "elm", auto_standby_s=IDLE_S)
        held = await other.call(AutoStandbyHoldRequest(instance="oak"))
        assert held.status == "idle_countdown"
        assert held.hold_until == pytest.approx(clock.now() + 100 * IDLE_S, abs=10)
        await other.call(UpdateRequest(instance="oak", auto_standby_s=IDLE_S))
        clock.forward(50 * IDLE_S)
        await until_state(fake_host, "elm", State.STANDBY)
        found = await status(fake_host)
        assert (found.hold_until, found.standby_at) == (held.hold_until, held.hold_until)
        assert (await fake_host.call(GetRequest(instance="oak"))).state is State.RUNNING
        again = await other.call(AutoStandbyHoldRequest(instance="oak"))
        assert again.hold_until == pytest.approx(again.idle_since + IDLE_S, abs=5)  # type: ignore[operator]
        clock.forward(60)
        await until_state(fake_host, "oak", State.STANDBY)


async def test_a_hold_that_comes_during_the_standby_is_refused(
    fake_host: AsyncHost, other: AsyncHost, clock: FakeClock, driver: FakeDriver
) -> None:
    """It waits for the end of the capture: nobody connects to a machine that is about to rest."""
    async with supervised(fake_host, clock):
        await boot(fake_host, "oak", auto_standby_s=IDLE_S)
        gate = driver.faults.hold_at("save")
        clock.forward(IDLE_S + 5)
        async with asyncio.timeout(SOON_S):
            await gate.reached.wait()
            late = asyncio.ensure_future(other.call(AutoStandbyHoldRequest(instance="oak")))
            gate.release.set()
            with pytest.raises(InStandby):
                await late
        with pytest.raises(InStandby, match="restore"):
            await other.call(AutoStandbyHoldRequest(instance="oak"))


async def test_a_hold_without_effect(fake_host: AsyncHost) -> None:
    """Of a machine that has no such policy, or that is stopped: nothing puts it into standby."""
    await boot(fake_host, "oak")
    assert await fake_host.call(AutoStandbyHoldRequest(instance="oak")) == AutoStandbyStatus(status="disabled")
    await fake_host.call(UpdateRequest(instance="oak", auto_standby_s=IDLE_S))
    await fake_host.call(StopRequest(instance="oak"))
    held = await fake_host.call(AutoStandbyHoldRequest(instance="oak"))
    assert (held.status, held.hold_until) == ("ineligible", None)


async def test_a_hold_counts_for_a_supervisor_that_waited(fake_host: AsyncHost) -> None:
    """For the machine's lock, or for a health check: its time is from before the hold."""
    oak = await boot(fake_host, auto_standby_s=IDLE_S)
    await fake_host.call(AutoStandbyHoldRequest(instance="oak"))
    assert not await fake_host.local.group(Upkeep)._rest(oak, time.time() - 30)
    assert (await fake_host.call(GetRequest(instance="oak"))).state is State.RUNNING


async def test_a_hold_of_the_future_does_not_count(fake_host: AsyncHost, clock: FakeClock) -> None:
    """The clock was set back since."""
    async with supervised(fake_host, clock):
        oak = await boot(fake_host, "oak", auto_standby_s=IDLE_S)
        fake_host.local.rooms.store.supervised.hold(oak.id, clock.now() + 9000, clock.now() + 9000 + IDLE_S)
        assert (await status(fake_host)).hold_until is None
        clock.forward(IDLE_S + 5)
        await until_state(fake_host, "oak", State.STANDBY)
