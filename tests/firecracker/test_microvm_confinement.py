"""What a real Firecracker may do."""

from __future__ import annotations

import os
from pathlib import Path

from coppice.client import AsyncHost
from coppice.model import Instance
from coppice.vmm import confinement
from coppice.vmm.firecracker import host as firecracker
from statuses import status_of


async def test_a_vmm_has_given_up_what_it_does_not_need(host: AsyncHost, vm: Instance) -> None:
    """Its own user if every device that it opens can be opened by one; no capability in any set;
    seccomp filters.
    """
    assert vm.vmm is not None
    status = status_of(vm.vmm.pid)
    user = os.geteuid()
    if user == 0 and confinement.groups_for(firecracker.program(), (confinement.KVM,)) is not None:
        assert vm.vmm_user is not None
        user = vm.vmm_user
    assert status["Uid"].split() == [str(user)] * 4
    assert {int(status[f"Cap{name}"], 16) for name in ("Inh", "Prm", "Eff", "Bnd", "Amb")} == {0}
    # A glibc build loads filters too, but they allow everything: the mode does not tell.
    assert (status["NoNewPrivs"], status["Seccomp"]) == ("1", "2")
    held = {os.readlink(entry) for entry in Path(f"/proc/{vm.vmm.pid}/fd").iterdir()}  # noqa: PTH115
    own, home = host.local.rooms.directory(vm.id), str(host.local.rooms.layout.home)
    for path in held:
        assert not path.startswith(home) or Path(path.removesuffix(" (deleted)")).parent == own, path
