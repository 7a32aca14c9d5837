"""Fixtures for slots in a network of the test's own."""

from __future__ import annotations

import os
from collections.abc import AsyncIterator, Iterator
from pathlib import Path

import pytest

from coppice.client import AsyncHost
from coppice.model import Instance
from coppice.network.nat import key_of
from coppice.network.nat.pool import Pool
from coppice.network.nat.provider import NatNetwork
from coppice.requests import ExecRequest, PromoteRequest, RunRequest, StandbyRequest
from machines import GUEST_MEMORY, IMAGE, link_caches, remove_all
from name_server import answering
from remains import machines_ended
from slots import leftovers, rooms_with_slots
from worlds import WORLD4, World


@pytest.fixture
def world() -> Iterator[World]:
    """A host and the world outside it, for one test."""
    world = World()
    yield world
    world.close()


@pytest.fixture
def resolv_conf(tmp_path: Path) -> Path:
    """The path of the test host's resolv.conf."""
    return tmp_path / "resolv.conf"


@pytest.fixture
def provider(world: World, tmp_path: Path, resolv_conf: Path) -> Iterator[NatNetwork]:
    """A provider on the test's host. When the test ends, nothing of it is left there."""
    (tmp_path / "home").mkdir()
    key = key_of(tmp_path / "home")
    provider = NatNetwork(tmp_path / "home", Pool(key, world.host.path, tmp_path / "run", resolv_conf))
    yield provider
    for left in provider.leftovers(set):  # left by a failed test
        provider.slots.pool.release(left)
    provider.leftovers(set)
    assert leftovers(key, world) == []


@pytest.fixture
def name_server(world: World, resolv_conf: Path) -> Iterator[None]:
    """A name server in the world, which is the host's."""
    resolv_conf.write_text(f"nameserver {WORLD4}\n")
    with answering(world.world, WORLD4):
        yield


@pytest.fixture(scope="session")
def open_world() -> Iterator[World]:
    """A host and the world outside it, with a name server, for the real machines of all tests."""
    world = World()
    with answering(world.world, WORLD4):
        yield world
    world.close()


@pytest.fixture(scope="session")
async def nat_host(
    common_home: Path, open_world: World, tmp_path_factory: pytest.TempPathFactory
) -> AsyncIterator[AsyncHost]:
    """A host with real machines whose slots are in the tests' world; it leaves nothing there."""
    home = common_home / "workers" / f"nat-{os.environ.get('PYTEST_XDIST_WORKER', 'alone')}"
    link_caches(common_home, home)
    runtime = tmp_path_factory.mktemp("slots")
    (runtime / "resolv.conf").write_text(f"nameserver {WORLD4}\n")
    with machines_ended(home):
        async with AsyncHost(home, open_rooms=rooms_with_slots(home, open_world.host.path, runtime)) as opened:
            await remove_all(opened)
            yield opened
            await remove_all(opened)
    assert leftovers(key_of(home), open_world) == []


@pytest.fixture(scope="session")
async def nat_template(nat_host: AsyncHost) -> Instance:
    """A template in a slot that has already run Python."""
    vm = await nat_host.call(
        RunRequest(image=IMAGE, command=["sleep", "infinity"], name="stump", memory_bytes=GUEST_MEMORY, network="nat")
    )
    await nat_host.call(ExecRequest(instance=vm.id, argv=["python3", "-c", "import socket"], timeout_s=60))
    await nat_host.call(StandbyRequest(instance=vm.id))
    return await nat_host.call(PromoteRequest(instance=vm.id))
