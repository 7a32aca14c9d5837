"""`coppice doctor`: what of this machine helps or hinders, each finding with what to type.

Each check is in two parts: one that reads the machine, and a pure one that judges what was read.
"""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable
from pathlib import Path

from coppice.doctor import budgets, memory, storage, system, virtualization
from coppice.model import Check

_DEADLINE_S = 20.0


async def run_checks(home: Path) -> list[Check]:
    """Check this machine and the data directory `home`, which need not exist. All checks run at once.

    A check that itself fails, or does not end within 20 seconds, is a warning; nothing is raised. The data directory is
    left as it was.
    """
    where = await asyncio.to_thread(storage.nearest_directory, home)
    probes: list[tuple[str, Callable[[], Awaitable[Check]]]] = [
        ("kvm", _threaded(virtualization.kvm)),
        ("qemu", virtualization.qemu),
        ("kvm.nx_huge_pages", _threaded(virtualization.nx_huge_pages)),
        ("favordynmods", _threaded(system.favordynmods)),
        ("data directory", _threaded(lambda: storage.file_system(home, where))),
        ("database", _threaded(lambda: storage.database(home))),
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
        ("user namespaces", system.user_namespaces),
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
    except Exception as error:  # a diagnosis must go on where one reading is not possible
        return Check(
            name=name,
            status="warn",
            detail=f"could not be checked: {error}",
            cure="see whether this user may read that; the other checks do not depend on it",
        )
