"""Servers that are killed during the operations of the crash tests. The client repeats its request at
the next server, and gets the result as if nothing had happened.
"""

from __future__ import annotations

import asyncio
import random
import signal
from pathlib import Path

import pytest

from conftest import HostFactory
from coppice.client.connecting import connect_async
from coppice.model import State
from coppice.requests import SnapshotRequest
from crash.fake_kind import FakeKind
from crash.operations import OPERATIONS, SEED, Operation
from crash.plan import SEED as RANDOM_SEED
from crash.states import OAK, STUMP
from fakes.driver import FakeDriver
from fakes.hosting import make
from servers import SERVER_START_S, Servers

KILLED_IN = (
    *("fork", "fan-out", "fork-to-standby", "fork-from-running", "standby", "restore", "promote", "demote", "stop"),
    *("rm", "snapshot-create", "snapshot-restore", "snapshot-fork", "snapshot-rm", "volume-create", "volume-rm", "run"),
)
ENDS: dict[str, State | None] = {
    "standby": State.STANDBY,
    "restore": State.RUNNING,
    "promote": State.TEMPLATE,
    "demote": State.STANDBY,
    "stop": State.STOPPED,
    "rm": None,
    "snapshot-restore": State.STANDBY,
    "fork-to-standby": State.STANDBY,
}
"""The state of the oak in the end. Default: Running, or whatever the only allowed state is."""


@pytest.mark.timeout(1200)
async def test_a_client_of_a_killed_server_gets_its_result(
    servers: Servers, make_host: HostFactory, fake_vmm: Path, driver: FakeDriver
) -> None:
    """Each operation is killed once, at a random instant. Afterwards it has been carried out, once."""
    rng = random.Random(RANDOM_SEED)
    kind = FakeKind(fake_vmm, driver, -1)
    async with make_host() as local:
        await make(local, State.TEMPLATE, STUMP)
        await local.call(SnapshotRequest(instance=STUMP, name=SEED))
        address = await servers.start()
        for operation in (OPERATIONS[name] for name in KILLED_IN):
            await operation.prepare(local, kind)
            before = {vm.name for vm in await local.ls()}
            async with connect_async(address) as host:
                acting = asyncio.ensure_future(operation.act(host, kind))
                await asyncio.sleep(rng.uniform(0, operation.seconds))
                await servers.end(signal.SIGKILL)
                await servers.start()
                async with asyncio.timeout(SERVER_START_S):
                    await acting
            found = {vm.name: vm.state for vm in await local.ls()}
            assert_done(operation, before, found)
            assert not local.local.rooms.store.journal(), operation.name
            made = {each.name for each in await local.snapshots.ls()} | {each.name for each in await local.volumes.ls()}
            removes = operation.name.endswith("-rm")
            wanted = operation.snapshots | operation.volumes | operation.may_have | operation.may_have_volumes
            assert made - {SEED} == (set() if removes else wanted), operation.name
            for name in found.keys() - {STUMP}:
                await (await local.get(name)).rm()
            for snapshot in await local.snapshots.ls():
                if snapshot.name != SEED:
                    await local.snapshots.rm(snapshot.name)
            for volume in await local.volumes.ls():
                await local.volumes.rm(volume.name)


def assert_done(operation: Operation, before: set[str], found: dict[str, State]) -> None:
    """Require that an operation was carried out completely, and nothing else was made."""
    wanted: dict[str, State | None] = {}
    for name, states in operation.after.items():
        wanted[name] = next(iter(states - {None})) if len(states - {None}) == 1 else ENDS.get(operation.name)
    if operation.name in ENDS:
        wanted[OAK] = ENDS[operation.name]
    expected = {name: state for name, state in wanted.items() if state is not None}
    for name, state in expected.items():
        assert found.get(name) is state, (operation.name, name, found)
    gone = {name for name, state in wanted.items() if state is None}
    assert found.keys() == (before | expected.keys()) - gone | {STUMP}, (operation.name, found)
