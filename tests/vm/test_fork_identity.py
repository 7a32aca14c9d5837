"""A fork is a machine of its own: nothing that must be unique is inherited."""

from __future__ import annotations

import asyncio
import time

from coppice.host import AsyncHost
from coppice.model import MIB, Instance
from machines import ask

READ_RANDOM = "open('/dev/urandom', 'rb').read(32).hex() + ' ' + os.getrandom(32).hex()"


async def told(host: AsyncHost, vm: Instance, *argv: str) -> str:
    result = await host.exec(vm, argv, timeout_s=60)
    assert result.exit_code == 0, result.stderr
    return result.stdout.decode().strip()


async def test_random_numbers_differ(host: AsyncHost, template: Instance) -> None:
    """Siblings share no kernel CRNG state: the first random bytes that 16 forks read are all different."""
    async with host.forks(template, 16) as forks:
        lines = await asyncio.gather(*(ask(host, fork, READ_RANDOM) for fork in forks))
    words = [word for line in lines for word in line.strip("'").split()]
    assert len(words) == len(set(words)) == 32
    assert {len(word) for word in words} == {64}


async def test_names_and_ids_differ(host: AsyncHost, template: Instance) -> None:
    """Hostname, machine-id and boot_id are pairwise different in 8 forks, and the hostname is the instance's name."""
    script = "cat /proc/sys/kernel/hostname /etc/machine-id /proc/sys/kernel/random/boot_id"
    async with host.forks(template, 8) as forks:
        lines = [
            line.split() for line in await asyncio.gather(*(told(host, fork, "sh", "-c", script) for fork in forks))
        ]
        assert [line[0] for line in lines] == [fork.name for fork in forks]
    for column in range(3):
        assert len({line[column] for line in lines}) == 8


async def test_mac_addresses_differ(host: AsyncHost, template: Instance) -> None:
    """Each fork has its own MAC address before its first command."""
    async with host.forks(template, 4) as forks:
        macs = await asyncio.gather(*(told(host, fork, "sh", "-c", "cat /sys/class/net/e*/address") for fork in forks))
    assert len(set(macs)) == 4


async def test_nothing_is_sent_in_the_name_of_the_source(host: AsyncHost, vm: Instance) -> None:
    """Between the capture and a fork's first command its card sends no packet: the source's MAC and address are not announced once more.

    With the announcements that QEMU asks of a guest after a restore, the counter would have moved.
    """
    sent = "cat /sys/class/net/e*/statistics/tx_packets"
    before = await told(host, vm, "sh", "-c", sent)
    await host.standby(vm)
    async with host.forks(vm, 1) as (fork,):
        assert await told(host, fork, "sh", "-c", sent) == before


async def test_the_clock_is_stepped(host: AsyncHost, vm: Instance) -> None:
    """The wall clock of a fork is the host's before its first command, however long ago its source was captured: here an hour."""
    await told(host, vm, "date", "-s", f"@{int(time.time()) - 3600}")
    await host.standby(vm)
    async with host.forks(vm, 1) as (fork,):
        before = time.time()
        guest = float(await told(host, fork, "date", "+%s.%N"))
        assert before - 1 < guest < time.time() + 1


async def test_the_clock_of_a_boot_is_right(host: AsyncHost, image: str) -> None:
    """The time that a machine is told when it has booted is that of the moment, and not of when its VMM was started, seconds before."""
    vm = await host.run(image, ["sleep", "infinity"], memory_bytes=256 * MIB)
    try:
        before = time.time()
        guest = float(await told(host, vm, "date", "+%s.%N"))
        assert before - 1 < guest < time.time() + 1
    finally:
        await host.rm(vm)


async def test_keys_and_seeds_on_the_disk_are_not_inherited(host: AsyncHost, vm: Instance) -> None:
    """ssh host keys and the saved random seed of the source are gone in its forks; they stay where they are in the source."""
    inherited = ["/etc/ssh/ssh_host_ed25519_key", "/etc/ssh/ssh_host_ed25519_key.pub", "/var/lib/systemd/random-seed"]
    for path in inherited:
        await host.write_file(vm, path, b"the source's")
    await host.write_file(vm, "/etc/ssh/ssh_config", b"not a key")
    await host.standby(vm)
    async with host.forks(vm, 1) as (fork,):
        assert await told(
            host, fork, "sh", "-c", f"ls {' '.join(inherited)} /etc/ssh/ssh_config 2>/dev/null; true"
        ) == ("/etc/ssh/ssh_config")
    await host.restore(vm)
    assert (await told(host, vm, "sh", "-c", f"ls {' '.join(inherited)}")).split() == sorted(inherited)


async def test_a_restored_machine_stays_itself(host: AsyncHost, vm: Instance) -> None:
    """Standby and restore of the same machine changes neither its machine-id nor its boot_id."""
    script = "cat /etc/machine-id /proc/sys/kernel/random/boot_id"
    before = await told(host, vm, "sh", "-c", script)
    await host.standby(vm)
    await host.restore(vm)
    assert await told(host, vm, "sh", "-c", script) == before
