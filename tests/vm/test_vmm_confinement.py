"""What a real QEMU may do: its own user, no capabilities, system calls filtered, no other files."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from coppice.client import AsyncHost
from coppice.model import Instance
from coppice.vmm import starting
from statuses import status_of


async def test_a_vmm_has_given_up_what_it_does_not_need(host: AsyncHost, vm: Instance) -> None:
    """As the kernel shows it. Its limits were there from the start."""
    assert vm.vmm is not None
    status = status_of(vm.vmm.pid)
    user = vm.vmm_user if os.geteuid() == 0 else os.geteuid()
    assert status["Uid"].split() == [str(user)] * 4
    assert {int(status[f"Cap{name}"], 16) for name in ("Inh", "Prm", "Eff", "Amb")} == {0}
    assert (status["NoNewPrivs"], status["Seccomp"]) == ("1", "2")
    if os.geteuid() == 0:
        assert int(status["CapBnd"], 16) == 1 << 1 | 1 << 6 | 1 << 7 | 1 << 10
    limits = Path(f"/proc/{vm.vmm.pid}/limits").read_text()
    assert "Max core file size        0                    0" in limits
    assert host.local.rooms.directory(vm.id) == Path(f"/proc/{vm.vmm.pid}/cwd").readlink()


async def test_a_vmm_holds_only_files_of_its_own_instance(host: AsyncHost, vm: Instance) -> None:
    """Open files and mappings: its directory, devices, programs and libraries."""
    assert vm.vmm is not None
    own = host.local.rooms.directory(vm.id)
    held = {os.readlink(entry) for entry in Path(f"/proc/{vm.vmm.pid}/fd").iterdir()}  # noqa: PTH115
    mapped = {
        line.split(None, 5)[5] for line in Path(f"/proc/{vm.vmm.pid}/maps").read_text().splitlines() if "/" in line
    }
    home = str(host.local.rooms.layout.home)
    for path in held | mapped:
        assert not path.startswith(home) or Path(path.removesuffix(" (deleted)").strip()).parent == own, path


async def test_a_process_with_a_vmms_rights_opens_no_file_of_another_instance(
    host: AsyncHost, vm: Instance, template: Instance, tmp_path: Path
) -> None:
    """A shell that is started as that VMM was: in its directory, with its user and its rules."""
    if not starting.landlock_version() and os.geteuid() != 0:
        pytest.skip("this kernel has no Landlock, and this user no other users")
    from coppice.machine import activate
    from coppice.vmm import confinement
    from coppice.vmm.process import wait_exit

    rooms = host.local.rooms
    launch = await activate.launch(rooms, vm)
    rights = confinement.rights(launch, "/bin/sh")
    if os.geteuid() == 0:
        rights = starting.Rights(
            **{field: getattr(rights, field) for field in rights.__struct_fields__}
            | {"user": vm.vmm_user, "capabilities": 0}
        )
    other = rooms.directory(template.id)
    tmp_path.chmod(0o700)
    (tmp_path / "secret").write_text("secret")
    script = f"for file in {other}/* {rooms.layout.home}/coppice.db {tmp_path}/secret ../*/vmm.log; do cat $file && echo opened; done; : > {other}/made"
    process = starting.spawn(["sh", "-c", script], cwd=launch.directory, log=tmp_path / "said", rights=rights)
    await wait_exit(process)
    said = (tmp_path / "said").read_text(errors="replace")
    assert "opened" not in said
    assert "ermission denied" in said
    assert not (other / "made").exists()
