"""A host behaves alike, whether this process or a server carries out its requests."""

from __future__ import annotations

import asyncio

import pytest

from coppice.client import AsyncHost
from coppice.errors import (
    CommandNotFound,
    IllegalTransition,
    InUse,
    InvalidName,
    NameTaken,
    NotFound,
)
from coppice.model import Progress, State
from fakes.records import MEMORY_BYTES, OVERLAY_BYTES
from fakes.rooms import IMAGE

SMALL = {"memory_bytes": MEMORY_BYTES, "overlay_bytes": OVERLAY_BYTES}


async def test_a_machine_from_run_to_rm(any_host: AsyncHost) -> None:
    """Each method changes the machine and returns its new record."""
    steps: list[Progress] = []
    vm = await any_host.run(IMAGE, name="oak", tags={"a": "b"}, progress=steps.append, **SMALL)  # type: ignore[arg-type]
    assert (vm.name, vm.state) == ("oak", State.RUNNING)
    assert steps
    assert (await vm.exec(["hostname"])).stdout == b"oak\n"
    report = await vm.standby()
    assert report.total_ms > 0
    assert (await vm.restore()).state is State.RUNNING
    await vm.stop(grace_s=0)
    assert (await any_host.get("oak")).state is State.STOPPED
    await vm.rm()
    with pytest.raises(NotFound) as caught:
        await any_host.get("oak")
    assert caught.value.hint == "list the instances with `coppice ls`"
    assert await any_host.ls() == []


async def test_a_template_and_its_forks(any_host: AsyncHost) -> None:
    """Forks share the template's memory, have their own names, and keep the template in use."""
    vm = await any_host.run(IMAGE, name="oak", **SMALL)  # type: ignore[arg-type]
    template = await vm.freeze()
    async with template.fork(3, names=["elm"]) as forks:
        assert [fork.name for fork in forks] == ["elm-1", "elm-2", "elm-3"]
        names = await asyncio.gather(*(fork.exec(["hostname"]) for fork in forks))
        assert [each.stdout for each in names] == [b"elm-1\n", b"elm-2\n", b"elm-3\n"]
        with pytest.raises(InUse, match="elm-1"):
            await template.demote()
        tree = await any_host.tree()
        assert [(node.instance.name, node.depth) for node in tree] == [
            ("oak", 0),
            ("elm-1", 1),
            ("elm-2", 1),
            ("elm-3", 1),
        ]
    assert [each.name for each in await any_host.ls()] == ["oak"]


async def test_errors_have_the_same_types(any_host: AsyncHost) -> None:
    """The type, the message and the hint of an error do not depend on who carries out the request."""
    vm = await any_host.run(IMAGE, name="oak", **SMALL)  # type: ignore[arg-type]
    with pytest.raises(NameTaken):
        await any_host.run(IMAGE, name="oak", **SMALL)  # type: ignore[arg-type]
    with pytest.raises(IllegalTransition):
        await vm.promote()
    with pytest.raises(CommandNotFound, match="nonsense"):
        await vm.exec(["nonsense"])
    with pytest.raises(InvalidName):
        await any_host.get("NO/SUCH")


async def test_a_command_has_its_streams(any_host: AsyncHost) -> None:
    """Input reaches the command, and output comes back as it is written."""
    vm = await any_host.run(IMAGE, name="oak", **SMALL)  # type: ignore[arg-type]
    async with vm.open_exec(["cat"]) as session:
        await session.send_stdin(b"one\n")
        output = aiter(session)
        assert await anext(output) == ("stdout", b"one\n")
        await session.send_stdin(b"two\n")
        assert await anext(output) == ("stdout", b"two\n")
        await session.eof()
        assert (await session.wait()).exit_code == 0
    assert [line async for line in vm.logs(source="vmm", tail=1)]
