"""The DNS filter: a caller that needs it gets one that serves, whatever happened to the last one."""

from __future__ import annotations

import asyncio
import fcntl
import os
import signal
import socket
import threading
from pathlib import Path

import msgspec
import pytest

from coppice.errors import HostCannot
from coppice.model import Egress, Instance
from coppice.network.nat import key_of, names
from coppice.network.nat.filtering import start_names
from coppice.network.nat.pool import Pool
from coppice.network.nat.provider import NatNetwork
from fakes.records import MACHINE, make_instance
from slots import ended, filters, resolve
from worlds import WORLD4, World, guest

pytestmark = pytest.mark.usefixtures("name_server")
WAITS_S = 0.5


def named() -> Instance:
    """A record whose guest may reach one name."""
    policy = Egress(mode="allow", names=("in.example",))
    return make_instance(machine=msgspec.structs.replace(MACHINE, network="nat"), egress=policy)


def start(provider: NatNetwork) -> None:
    """Start the filter of a provider, unless it serves."""
    pool = provider.slots.pool
    start_names(pool.root, pool.key, pool.host, pool.root.parent.parent / "resolv.conf")


def locked(pool: Pool) -> int:
    """The lock of the filter, taken by the test."""
    lock = os.open(pool.root / "names.lock", os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
    fcntl.flock(lock, fcntl.LOCK_EX)
    return lock


async def test_a_killed_filter_of_names_is_started_again(world: World, provider: NatNetwork, name_server: None) -> None:
    """The next process that opens the data directory starts it again."""
    policy = Egress(mode="allow", names=("in.example",))
    instance = make_instance(machine=msgspec.structs.replace(MACHINE, network="nat"), egress=policy)
    (nic,) = await provider.attach(instance)
    with guest(nic, provider.guest(instance)) as own:
        assert resolve(own, "in.example") == WORLD4
        for process in filters(provider):
            os.kill(process, signal.SIGKILL)
        await ended(provider)
        provider.leftovers(lambda: {instance.id})
        assert resolve(own, "in.example") == WORLD4
    await provider.detach(instance.id)
    await ended(provider)


async def test_a_lock_without_a_filter_is_waited_for(provider: NatNetwork) -> None:
    """The kernel closes the files of a killed process after its memory, and one by one."""
    instance = named()
    (nic,) = await provider.attach(instance)
    for process in filters(provider):
        os.kill(process, signal.SIGKILL)
    await ended(provider)
    lock = locked(provider.slots.pool)
    starting = asyncio.create_task(asyncio.to_thread(start, provider))
    done, _ = await asyncio.wait({starting}, timeout=WAITS_S)
    os.close(lock)
    assert not done
    await starting
    with guest(nic, provider.guest(instance)) as own:
        assert resolve(own, "in.example") == WORLD4
    await provider.detach(instance.id)
    await ended(provider)


async def test_a_filter_that_is_ending_serves_nobody(
    world: World, provider: NatNetwork, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A slot asks for the filter in the instant after the filter has found that none needs it."""
    instance = named()
    (nic,) = await provider.attach(instance)
    pool = provider.slots.pool
    for process in filters(provider):
        os.kill(process, signal.SIGKILL)
    await ended(provider)
    lock = locked(pool)
    (pool.root / "names.sock").unlink()
    asked = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
    directory = os.open(pool.root, os.O_PATH)
    asked.bind(f"/proc/self/fd/{directory}/names.sock")
    os.close(directory)
    asked.listen(1)
    starting = threading.Thread(target=start, args=(provider,))

    def none_needs_it(file: Path) -> bool:
        if not starting.ident:
            starting.start()
            starting.join(WAITS_S)
            assert starting.is_alive()
        return False

    monkeypatch.setattr(names, "needs_names", none_needs_it)
    ending = names.Names(pool.root, pool.key, pool.root.parent.parent / "resolv.conf")
    await asyncio.to_thread(world.host.run, lambda: asyncio.run(ending.serve(lock, asked)))
    os.close(lock)
    await asyncio.to_thread(starting.join)
    assert len(filters(provider)) == 1
    with guest(nic, provider.guest(instance)) as own:
        assert resolve(own, "in.example") == WORLD4
    await provider.detach(instance.id)
    await ended(provider)


async def test_many_callers_start_one_filter(provider: NatNetwork) -> None:
    """All of them return when it serves."""
    first, *rest = (named() for _ in range(9))
    await provider.attach(first)
    for process in filters(provider):
        os.kill(process, signal.SIGKILL)
    await asyncio.gather(*(provider.attach(each) for each in rest))
    assert len(filters(provider)) == 1
    for each in (first, *rest):
        await provider.detach(each.id)
    await ended(provider)


async def test_a_filter_that_cannot_serve_is_an_error(provider: NatNetwork, monkeypatch: pytest.MonkeyPatch) -> None:
    """A guest with names in its policy would resolve nothing."""
    monkeypatch.setattr("sys.executable", "/bin/false")
    instance = named()
    with pytest.raises(HostCannot, match=r"names\.log"):
        await provider.attach(instance)
    await provider.detach(instance.id)


async def test_a_pool_that_is_opened_again_has_a_filter_of_its_own(provider: NatNetwork) -> None:
    """The filter of the closed one looks only now and then whether it is needed."""
    for _ in range(3):
        instance = named()
        (nic,) = await provider.attach(instance)
        with guest(nic, provider.guest(instance)) as own:
            assert resolve(own, "in.example") == WORLD4
            assert resolve(own, "in.example", tcp=True) == WORLD4
        await provider.detach(instance.id)
    await ended(provider)


async def test_two_data_directories_have_a_filter_each(
    world: World, provider: NatNetwork, tmp_path: Path, resolv_conf: Path
) -> None:
    """This host has one address for the slots of both."""
    root = provider.slots.pool.root.parent
    key = key_of(tmp_path / "other")
    other = NatNetwork(tmp_path / "other", Pool(key, world.host.path, root, resolv_conf))
    for each in (provider, other):
        instance = named()
        (nic,) = await each.attach(instance)
        with guest(nic, each.guest(instance)) as own:
            assert resolve(own, "in.example") == WORLD4
            assert resolve(own, "in.example", tcp=True) == WORLD4
        if each is other:
            await each.detach(instance.id)
        else:
            first = instance
    await provider.detach(first.id)
    await ended(provider)
    await ended(other)
