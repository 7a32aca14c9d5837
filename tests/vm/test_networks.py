"""A machine without a network: neither the guest nor its forks have a NIC, even after a boot."""

from __future__ import annotations

from coppice.client import AsyncHost
from coppice.model import Instance, State
from coppice.names import new_name
from coppice.requests import (
    ExecRequest,
    ForkRequest,
    RestoreRequest,
    RmRequest,
    RunRequest,
    SnapshotForkRequest,
    SnapshotRequest,
    StandbyRequest,
    StartRequest,
)
from machines import GUEST_MEMORY

CARDS = ["sh", "-c", "ls /sys/class/net; cat /sys/class/net/lo/operstate; cat /proc/net/route | wc -l"]


async def cards(host: AsyncHost, vm: Instance) -> list[str]:
    """Return the guest's network cards, the state of `lo`, and the number of routing lines."""
    result = await host.call(ExecRequest(instance=vm.id, argv=CARDS, timeout_s=60))
    assert result.exit_code == 0, result.stderr
    return result.stdout.decode().split()


async def test_a_machine_without_a_network_never_gets_one(host: AsyncHost, image: str) -> None:
    """It has only loopback when booted, restored, forked, forked while running, forked from a
    snapshot, and booted from a copy of its disk.
    """
    name = new_name("alone")
    made = [
        await host.call(
            RunRequest(image=image, command=["sleep", "infinity"], name=name, memory_bytes=GUEST_MEMORY, network="none")
        )
    ]
    try:
        (vm,) = made
        assert await cards(host, vm) == ["lo", "unknown", "1"]
        made += (await host.call(ForkRequest(instance=vm.id, from_running=True, atomic=True))).instances
        await host.call(SnapshotRequest(instance=vm.id, name=name))
        await host.call(StandbyRequest(instance=vm.id))
        made += (await host.call(ForkRequest(instance=vm.id, count=2, atomic=True))).instances
        made += (await host.call(SnapshotForkRequest(snapshot=name, atomic=True))).instances
        made += (await host.call(ForkRequest(instance=vm.id, target=State.STOPPED, atomic=True))).instances
        await host.call(StartRequest(instance=made[-1].id))
        await host.call(RestoreRequest(instance=vm.id))
        for each in made:
            assert await cards(host, each) == ["lo", "unknown", "1"]
    finally:
        for each in reversed(made):
            await host.call(RmRequest(instance=each.id))
        await host.snapshots.rm(name)
