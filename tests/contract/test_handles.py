"""The handles that `run`, `fork`, `get` and `ls` return, and their `async with` blocks."""

from __future__ import annotations

import asyncio
import inspect

import pytest

from coppice.client import AsyncForks, AsyncHost, AsyncMachine
from coppice.errors import GuestError, IllegalTransition, NotFound, UsageError
from coppice.model import Progress, State
from coppice.requests import ExecRequest, GetRequest, RmRequest
from fakes.driver import FakeDriver
from fakes.hosting import assert_tidy, boot, make
from fakes.records import MEMORY_BYTES, OVERLAY_BYTES
from fakes.rooms import IMAGE


async def oak(host: AsyncHost, state: State = State.RUNNING) -> AsyncMachine:
    """Return the handle of a machine in that state."""
    return host.machine(await make(host, state))


async def test_a_handle_follows_its_machine(fake_host: AsyncHost) -> None:
    """Every change through the handle updates its record, and each method that changes the state
    returns the handle for chaining.
    """
    vm = await fake_host.run(IMAGE, name="oak", memory_bytes=MEMORY_BYTES, overlay_bytes=OVERLAY_BYTES)
    assert (vm.name, vm.state, vm.id) == ("oak", State.RUNNING, vm.record.id)
    capture = await vm.standby()
    assert (vm.state, capture.total_ms > 0) == (State.STANDBY, True)
    assert await vm.promote() is vm
    assert vm.state == "Template"
    assert (await (await vm.demote()).restore()).state == "Running"
    await vm.stop(grace_s=0)
    assert vm.record.vmm is None
    steps: list[Progress] = []
    await vm.start(progress=steps.append)
    assert [step.stage for step in steps] == ["boot"]
    assert repr(vm) == "<AsyncMachine oak Running>"
    await fake_host.call(RmRequest(instance="oak"))
    assert vm.state == "Running"  # the last known state
    with pytest.raises(NotFound):
        await vm.refresh()


async def test_freeze_makes_a_template_of_a_captured_or_running_machine(fake_host: AsyncHost) -> None:
    """`freeze` accepts a running machine, one in standby and a template.

    It refuses a stopped one and changes nothing.
    """
    vm = await oak(fake_host)
    assert (await vm.freeze()).state is State.TEMPLATE
    assert (await vm.freeze(public=True)).record.public
    await vm.demote()
    assert (await vm.freeze()).state is State.TEMPLATE
    stale = fake_host.machine((await oak_named(fake_host, "elm")).record)
    await fake_host.call(GetRequest(instance="elm"))
    await (await fake_host.get("elm")).stop(grace_s=0)
    with pytest.raises(IllegalTransition):
        await stale.freeze()
    assert stale.state is State.STOPPED


def test_freeze_has_the_parameters_of_promote() -> None:
    """`freeze` ends with a promotion, and takes each of its options."""
    assert inspect.signature(AsyncMachine.freeze) == inspect.signature(AsyncMachine.promote)


async def oak_named(host: AsyncHost, name: str) -> AsyncMachine:
    return host.machine(await boot(host, name))


async def test_forks_are_a_sequence_that_shows_its_failures(fake_host: AsyncHost, driver: FakeDriver) -> None:
    """The sequence has the successful forks in order, `failures` says why the others failed, and
    the block removes all forks.
    """
    template = await oak(fake_host, State.TEMPLATE)
    async with template.fork(3, names=["elm"]) as forks:
        assert isinstance(forks, AsyncForks)
        assert [fork.name for fork in forks] == ["elm-1", "elm-2", "elm-3"]
        assert (forks[-1].name, len(forks[1:]), forks.failures) == ("elm-3", 2, ())
        results = await asyncio.gather(*(fork.exec(["hostname"]) for fork in forks))
        assert [result.stdout.decode().strip() for result in results] == [fork.name for fork in forks]
        await forks[0].rm()  # the block accepts that it is gone
    await assert_tidy(fake_host, "oak")
    driver.faults.fail_at("restore")
    forks = await template.fork(2)
    assert len(forks) + len(forks.failures) == 2
    assert forks.failures[0].error
    assert forks.report.succeeded == len(forks)
    await forks.rm()
    await assert_tidy(fake_host, "oak")


async def test_fork_one_raises_the_error_of_its_fork(fake_host: AsyncHost, driver: FakeDriver) -> None:
    """The fork's own error is raised instead of a report, and nothing is left."""
    template = await oak(fake_host, State.TEMPLATE)
    elm = await template.fork_one(name="elm", payload=b"{}")
    assert (elm.name, elm.record.parent) == ("elm", template.id)
    await elm.rm()
    driver.faults.fail_at("restore")
    with pytest.raises(Exception, match="restore"):
        await template.fork_one(name="ash")
    await assert_tidy(fake_host, "oak")


@pytest.mark.parametrize("awaited", [False, True])
async def test_a_block_removes_its_machine(fake_host: AsyncHost, awaited: bool) -> None:
    """The block removes its machine with and without `await`, when the block fails, and when the
    machine is already gone.
    """

    async def fail() -> None:
        if awaited:
            async with await fake_host.run(IMAGE, name="oak", memory_bytes=MEMORY_BYTES, overlay_bytes=OVERLAY_BYTES):
                raise ZeroDivisionError
        async with fake_host.run(IMAGE, name="oak", memory_bytes=MEMORY_BYTES, overlay_bytes=OVERLAY_BYTES):
            raise ZeroDivisionError

    with pytest.raises(ZeroDivisionError):
        await fail()
    await assert_tidy(fake_host)
    async with fake_host.run(IMAGE, name="oak", memory_bytes=MEMORY_BYTES, overlay_bytes=OVERLAY_BYTES) as vm:
        await vm.rm()
    await assert_tidy(fake_host)


async def test_a_handle_that_can_open_a_block_is_a_coroutine_too(fake_host: AsyncHost) -> None:
    """`create_task`, `gather` and `wait_for` accept it.

    An invalid value is refused at the call, before the await.
    """
    template = await oak(fake_host, State.TEMPLATE)
    forks = await asyncio.gather(asyncio.create_task(template.fork(2)), asyncio.wait_for(template.fork(1), 30))
    assert [len(each) for each in forks] == [2, 1]
    await asyncio.gather(*(each.rm() for each in forks))
    with pytest.raises(UsageError):
        template.fork(0)
    opening = template.fork(1)
    opening.close()
    await assert_tidy(fake_host, "oak")


async def test_files_and_text(fake_host: AsyncHost) -> None:
    """A handle's methods behave as the operations do, and pass on their errors."""
    vm = await oak(fake_host)
    assert (await vm.exec(["echo", "on"])).stdout == b"on\n"
    with pytest.raises(GuestError):
        await vm.read_text("/nowhere")
    async with vm.open_exec(["cat"]) as session:
        await session.send_stdin(b"data")
        await session.eof()
        assert b"".join([data async for _, data in session]) == b"data"
    assert [line async for line in vm.logs(tail=1)] == [b"the fake guest boots"]


async def test_handles_of_one_machine_are_equal(fake_host: AsyncHost) -> None:
    """Handles of one machine compare equal and work in sets, even if their records
    differ in age.
    """
    vm = await oak(fake_host)
    await vm.standby()
    (listed,) = await fake_host.ls(state=State.STANDBY)
    assert {vm, listed, await fake_host.get("oak")} == {vm}
    assert vm != await oak_named(fake_host, "elm")
    assert (await vm.stats()) is not None
    assert [node.instance.name for node in await vm.tree()] == ["oak"]
    assert (await vm.inspect()).instance == vm.record


async def test_a_request_works_without_a_handle(fake_host: AsyncHost) -> None:
    """A caller that has a record but no handle, such as a server, can call the host
    with a request.
    """
    await make(fake_host, State.RUNNING)
    done = await fake_host.call(ExecRequest(instance="oak", argv=["echo", "on"]))
    assert done.stdout == b"on\n"
