"""A warm template of real machines goes to another data directory, and its forks there remember everything."""

from __future__ import annotations

import shutil
import tempfile
from collections.abc import AsyncIterator
from pathlib import Path

import pytest

from coppice.client import AsyncHost
from coppice.linux.files import allocated_bytes
from coppice.machine import portable
from coppice.model import Instance, State
from coppice.requests import ForkRequest, PromoteRequest, RmRequest, StandbyRequest
from machines import ask
from platforms import Platform
from remains import machines_ended
from template_archives import fingerprints

ROOM = "os.__dict__.setdefault('held', {number}) + 1"


@pytest.fixture
async def elsewhere(home: Path, platform: Platform) -> AsyncIterator[AsyncHost]:
    """Return a host over an empty data directory: it has neither the image nor the kernel."""
    other = Path(tempfile.mkdtemp(prefix="elsewhere-", dir=home.parent))
    try:
        with machines_ended(other):
            async with platform.host(other) as host:
                yield host
    finally:
        shutil.rmtree(other)


@pytest.mark.timeout(400)
async def test_a_warm_process_goes_to_another_data_directory(
    host: AsyncHost, elsewhere: AsyncHost, template: Instance, tmp_path: Path
) -> None:
    """The archive has the image, the kernel and a layer of memory, and no holes. A fork has the value that
    the warm process held, and can be stopped and booted, which needs the whole kernel.
    """
    (vm,) = (await host.call(ForkRequest(instance=template.id, names=["sap"], atomic=True))).instances
    try:
        assert await ask(host, vm, ROOM.format(number=41)) == "42"
        await host.call(StandbyRequest(instance=vm.id))
        source = await host.call(PromoteRequest(instance=vm.id))
        size = await (await host.get("sap")).export(tmp_path / "sap")
        memory = source.machine.memory_bytes
        made = await elsewhere.import_template(tmp_path / "sap")
        assert made.state is State.TEMPLATE
        here, there = host.local.rooms.directory(source.id), elsewhere.local.rooms.directory(made.id)
        assert fingerprints(portable.paths(there, made.record)) == fingerprints(portable.paths(here, source))
        assert allocated_bytes(there / "memory") < memory / 2
        assert size < memory / 2 + allocated_bytes(elsewhere.local.home)
        async with made.fork(1, atomic=True) as (fork,):
            assert await ask(elsewhere, fork, ROOM.format(number=0)) == "42"
            await fork.stop(grace_s=0)
            await fork.start()
            assert (await fork.exec(["echo", "up"])).stdout == b"up\n"
        await made.rm()
    finally:
        await host.call(RmRequest(instance=vm.id))
