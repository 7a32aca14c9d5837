"""`coppice doctor`: check this host, with a command to type for each finding.

Each check has two parts: a function that reads the host, and a pure `judge_` function.
"""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable
from pathlib import Path

from coppice.doctor import budgets, captures, confinement, firecracker, memory, network, storage, system, virtualization
from coppice.model import Check
from coppice.vmm.qemu.host import program
from coppice.vmm.registry import Drivers

_DEADLINE_S = 20.0


async def run_checks(home: Path, drivers: Drivers) -> list[Check]:
    """Check this host and the data directory `home`, which need not exist. All checks run at once.

    A check that fails itself, or does not end within 20 seconds, becomes a warning; nothing is
    raised. The data directory is not changed.
    """
    where = await asyncio.to_thread(storage.nearest_directory, home)
    probes: list[tuple[str, Callable[[], Awaitable[Check]]]] = [
        ("kvm", _threaded(virtualization.kvm)),
        ("qemu", virtualization.qemu),
        ("firecracker", firecracker.firecracker),
        ("kvm.nx_huge_pages", _threaded(virtualization.nx_huge_pages)),
        ("favordynmods", _threaded(system.favordynmods)),
        ("data directory", _threaded(lambda: storage.file_system(home, where))),
        ("database", _threaded(lambda: storage.database(home))),
        ("captures", lambda: captures.loadable(home, drivers)),
        ("VMM updates", lambda: captures.update(home, program)),
        ("hard links", _threaded(lambda: storage.hard_links(where))),
        ("reflinks", _threaded(lambda: storage.reflinks(where))),
        ("free space", _threaded(lambda: storage.free_space(where))),
        ("budgets", _threaded(lambda: budgets.budgets(home, where))),
        ("memory", _threaded(memory.available)),
        ("vm.overcommit_memory", _threaded(memory.overcommit)),
        ("vm.max_map_count", _threaded(memory.max_map_count)),
        ("PAGEMAP_SCAN", _threaded(memory.pagemap_scan)),
        ("smaps", _threaded(memory.smaps)),
        ("ptrace", _threaded(memory.ptrace)),
        ("kernel image", _threaded(lambda: system.kernel_image(home))),
        *((name, _threaded(check)) for name, check in system.tools()),
        ("open files", _threaded(system.open_files)),
        ("processes", _threaded(system.processes)),
        ("locked memory", _threaded(system.locked_memory)),
        ("mounts", _threaded(system.mount_count)),
        ("default network", _threaded(lambda: network.default_network(home, drivers))),
        ("network slots", _threaded(network.slots)),
        ("forwarding", _threaded(network.forwarding)),
        ("slot addresses", _threaded(network.slot_addresses)),
        ("user namespaces", system.user_namespaces),
        ("control groups", _threaded(confinement.control_groups)),
        ("Landlock", _threaded(confinement.landlock)),
        ("VMM users", _threaded(confinement.vmm_users)),
    ]
    return list(await asyncio.gather(*(_guarded(name, probe) for name, probe in probes)))


def _threaded(check: Callable[[], Check]) -> Callable[[], Awaitable[Check]]:
    return lambda: asyncio.to_thread(check)


async def _guarded(name: str, probe: Callable[[], Awaitable[Check]]) -> Check:
    try:
        return await asyncio.wait_for(probe(), _DEADLINE_S)
    except TimeoutError:
        return Check(
            name=name,
            status="warn",
            detail=f"no answer within {_DEADLINE_S:.0f} s",
            cure="try again when this machine is less busy",
        )
    except Exception as error:  # one failed check must not stop the others
        return Check(
            name=name,
            status="warn",
            detail=f"could not be checked: {error}",
            cure="check whether this user may read it; the other checks do not depend on it",
        )
