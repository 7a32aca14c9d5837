"""A fork is a machine of its own: it inherits nothing that must be unique."""

from __future__ import annotations

import asyncio
import time

from coppice.client import AsyncHost, AsyncMachine
from coppice.model import MIB, Instance
from coppice.requests import (
    ExecRequest,
    ForkRequest,
    RestoreRequest,
    RmRequest,
    RunRequest,
    StandbyRequest,
    WriteFileRequest,
)
from machines import ask

READ_RANDOM = "open('/dev/urandom', 'rb').read(32).hex() + ' ' + os.getrandom(32).hex()"


async def told(host: AsyncHost, vm: Instance | AsyncMachine, *argv: str) -> str:
    result = await host.call(ExecRequest(instance=vm.id, argv=argv, timeout_s=60))
    assert result.exit_code == 0, result.stderr
    return result.stdout.decode().strip()


async def test_random_numbers_differ(host: AsyncHost, template: Instance) -> None:
    """Siblings share no kernel CRNG state: the first random bytes of 16 forks are all different."""
    async with (await host.get(template.id)).fork(16, atomic=True) as forks:
        lines = await asyncio.gather(*(ask(host, fork, READ_RANDOM) for fork in forks))
    words = [word for line in lines for word in line.strip("'").split()]
    assert len(words) == len(set(words)) == 32
    assert {len(word) for word in words} == {64}


async def test_no_page_is_wiped_by_fork(host: AsyncHost, vm: Instance) -> None:
    """BoringSSL then asks the kernel for each number. All other advice is taken."""
    program = "import mmap; page = mmap.mmap(-1, 4096); page.madvise(mmap.MADV_DONTFORK); page.madvise(18)"
    wiped = await host.call(ExecRequest(instance=vm.id, argv=["python3", "-c", program], timeout_s=60))
    assert wiped.exit_code == 1
    assert wiped.stderr.decode().endswith("OSError: [Errno 22] Invalid argument\n")


async def test_names_and_ids_differ(host: AsyncHost, template: Instance) -> None:
    """8 forks have their names as hostnames, and different machine-ids and boot_ids."""
    script = "cat /proc/sys/kernel/hostname /etc/machine-id /proc/sys/kernel/random/boot_id"
    async with (await host.get(template.id)).fork(8, atomic=True) as forks:
        lines = [
            line.split() for line in await asyncio.gather(*(told(host, fork, "sh", "-c", script) for fork in forks))
        ]
        assert [line[0] for line in lines] == [fork.name for fork in forks]
    for column in range(3):
        assert len({line[column] for line in lines}) == 8


async def test_mac_addresses_differ(host: AsyncHost, template: Instance) -> None:
    """Each fork has its own MAC address before its first command."""
    async with (await host.get(template.id)).fork(4, atomic=True) as forks:
        macs = await asyncio.gather(*(told(host, fork, "sh", "-c", "cat /sys/class/net/e*/address") for fork in forks))
    assert len(set(macs)) == 4


async def test_nothing_is_sent_in_the_name_of_the_source(host: AsyncHost, vm: Instance) -> None:
    """Before its first command a fork sends no packet, so it never announces the source's MAC.

    By default QEMU asks a restored guest to announce itself, which would raise the counter.
    """
    sent = "cat /sys/class/net/e*/statistics/tx_packets"
    before = await told(host, vm, "sh", "-c", sent)
    await host.call(StandbyRequest(instance=vm.id))
    async with (await host.get(vm.id)).fork(1, atomic=True) as (fork,):
        assert await told(host, fork, "sh", "-c", sent) == before


async def test_the_clock_is_stepped(host: AsyncHost, vm: Instance) -> None:
    """A fork has the host's time before its first command; its source's clock was an hour late."""
    await told(host, vm, "date", "-s", f"@{int(time.time()) - 3600}")
    await host.call(StandbyRequest(instance=vm.id))
    async with (await host.get(vm.id)).fork(1, atomic=True) as (fork,):
        before = time.time()
        guest = float(await told(host, fork, "date", "+%s.%N"))
        assert before - 1 < guest < time.time() + 1


async def test_the_clocks_of_many_forks_at_once_are_right(host: AsyncHost, template: Instance) -> None:
    """Forks that wait for the CPU read their identity late, and still have the right time.

    The guest's time is read between two times of the host, which bound the error.
    """
    async with (await host.get(template.id)).fork(8, atomic=True) as forks:
        for fork in forks:
            before = time.time()
            guest = float(await told(host, fork, "date", "+%s.%N"))
            assert before - 0.05 < guest < time.time() + 0.01


async def test_a_restored_machine_keeps_what_its_owner_changed(host: AsyncHost, vm: Instance) -> None:
    """A restore keeps the hostname and the name servers that were set in the guest.

    A fork has its own hostname and the same name servers.
    """
    await told(
        host, vm, "sh", "-c", "hostname mine; echo mine > /etc/hostname; echo nameserver 9.9.9.9 > /etc/resolv.conf"
    )
    script = "hostname; cat /etc/hostname /etc/resolv.conf"
    await host.call(StandbyRequest(instance=vm.id))
    async with (await host.get(vm.id)).fork(1, atomic=True) as (fork,):
        assert await told(host, fork, "sh", "-c", script) == f"{fork.name}\n{fork.name}\nnameserver 9.9.9.9"
    await host.call(RestoreRequest(instance=vm.id))
    assert await told(host, vm, "sh", "-c", script) == "mine\nmine\nnameserver 9.9.9.9"


async def test_a_fork_of_a_read_only_root_with_a_seed_says_what_to_do(host: AsyncHost, vm: Instance) -> None:
    """The random seed cannot be removed, so the fork fails.

    The error names the file and the cure, and after the cure a fork works.
    """
    seed = "/var/lib/systemd/random-seed"
    await host.call(WriteFileRequest(instance=vm.id, path=seed, data=b"the source's"))
    await told(host, vm, "mount", "-o", "remount,ro", "/")
    await host.call(StandbyRequest(instance=vm.id))
    (result,) = (await host.call(ForkRequest(instance=vm.id))).results
    assert f"{seed}: Read-only file system" in (result.error or "")
    assert "mount -o remount,rw /" in (result.error or "")
    await host.call(RestoreRequest(instance=vm.id))
    await told(host, vm, "mount", "-o", "remount,rw", "/")
    await host.call(StandbyRequest(instance=vm.id))
    async with (await host.get(vm.id)).fork(1, atomic=True) as (fork,):
        assert await told(host, fork, "sh", "-c", f"test -e {seed} || echo gone") == "gone"
    await host.call(RestoreRequest(instance=vm.id))


async def test_the_clock_of_a_boot_is_right(host: AsyncHost, image: str) -> None:
    """A booted machine gets the time when it answers, not that of its VMM's start."""
    vm = await host.call(RunRequest(image=image, command=["sleep", "infinity"], memory_bytes=256 * MIB))
    try:
        before = time.time()
        guest = float(await told(host, vm, "date", "+%s.%N"))
        assert before - 1 < guest < time.time() + 1
    finally:
        await host.call(RmRequest(instance=vm.id))


async def test_keys_and_seeds_on_the_disk_are_not_inherited(host: AsyncHost, vm: Instance) -> None:
    """Forks lose the source's ssh host keys and random seed; the source keeps them."""
    inherited = ["/etc/ssh/ssh_host_ed25519_key", "/etc/ssh/ssh_host_ed25519_key.pub", "/var/lib/systemd/random-seed"]
    for path in inherited:
        await host.call(WriteFileRequest(instance=vm.id, path=path, data=b"the source's"))
    await host.call(WriteFileRequest(instance=vm.id, path="/etc/ssh/ssh_config", data=b"not a key"))
    await host.call(StandbyRequest(instance=vm.id))
    async with (await host.get(vm.id)).fork(1, atomic=True) as (fork,):
        assert await told(
            host, fork, "sh", "-c", f"ls {' '.join(inherited)} /etc/ssh/ssh_config 2>/dev/null; true"
        ) == ("/etc/ssh/ssh_config")
    await host.call(RestoreRequest(instance=vm.id))
    assert (await told(host, vm, "sh", "-c", f"ls {' '.join(inherited)}")).split() == sorted(inherited)


async def test_a_restored_machine_keeps_its_ids(host: AsyncHost, vm: Instance) -> None:
    """Standby and restore change neither the machine-id nor the boot_id."""
    script = "cat /etc/machine-id /proc/sys/kernel/random/boot_id"
    before = await told(host, vm, "sh", "-c", script)
    await host.call(StandbyRequest(instance=vm.id))
    await host.call(RestoreRequest(instance=vm.id))
    assert await told(host, vm, "sh", "-c", script) == before
