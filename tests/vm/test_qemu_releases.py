"""Capture, fork, restore and live fork on the installed QEMU and that of bookworm-backports."""

from __future__ import annotations

import asyncio
import sys
from collections.abc import AsyncIterator
from pathlib import Path

import pytest

from coppice.client import AsyncHost
from coppice.errors import CoppiceError
from coppice.host.lifecycle import Lifecycle
from coppice.machine import disks
from coppice.model import MIB, Instance, Sharing
from coppice.requests import (
    ForkRequest,
    GetRequest,
    InspectRequest,
    PromoteRequest,
    ReadFileRequest,
    RestoreRequest,
    RmRequest,
    RunRequest,
    StandbyRequest,
    WriteFileRequest,
)
from coppice.vmm import driver as files
from coppice.vmm import program as programs
from coppice.vmm.qemu import host as qemu_host
from coppice.vmm.qemu.releases import INCOMING_FILE

NEWER = Path(sys.prefix) / "newer-qemu" / qemu_host.PROGRAM


@pytest.fixture(params=["installed", "newer"])
def release(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> str:
    """Choose a release for the test. A missing one is an error of the setup, never a skip."""
    if request.param == "newer":
        assert NEWER.is_file(), f"there is no {NEWER}: run `tools/setup dev`"
        monkeypatch.setenv(qemu_host.PROGRAM_VARIABLE, str(NEWER))
    return str(request.param)


@pytest.fixture
async def booted(host: AsyncHost, image: str, release: str) -> AsyncIterator[Instance]:
    """A machine of that release, with a state in its memory alone."""
    version = await qemu_host.version()
    assert (programs.release(version) >= INCOMING_FILE) is (release == "newer"), version
    vm = await host.call(RunRequest(image=image, command=["sleep", "infinity"], memory_bytes=256 * MIB))
    await host.call(WriteFileRequest(instance=vm.id, path="/run/state", data=b"expensive"))
    yield vm
    await host.call(RmRequest(instance=vm.id))


async def checked(host: AsyncHost, vm: Instance) -> None:
    """Check the memory of the source, a VMM without root, an empty log of QEMU, and its disk."""
    assert await host.call(ReadFileRequest(instance=vm.id, path="/run/state")) == b"expensive"
    assert vm.vmm is not None
    log = host.local.rooms.directory(vm.id) / files.VMM_LOG
    assert await asyncio.to_thread(log.read_text) == ""
    status = await asyncio.to_thread(Path(f"/proc/{vm.vmm.pid}/status").read_text)
    (users,) = (line.split()[1:] for line in status.splitlines() if line.startswith("Uid:"))
    assert "0" not in users
    vm = await host.call(GetRequest(instance=vm.id))
    rooms = host.local.rooms
    overlay, _ = await rooms.driver(vm).disks_in_use(rooms.directory(vm.id))
    assert [overlay] == [tuple(each.files) for each in disks.of(vm)]


@pytest.mark.timeout(180)
async def test_a_machine_is_captured_forked_and_restored(host: AsyncHost, booted: Instance) -> None:
    """Forks of a running machine and of a template work with options that this release takes
    without a warning.
    """
    await checked(host, booted)
    live = await host.call(ForkRequest(instance=booted.id, from_running=True, atomic=True))
    await host.call(StandbyRequest(instance=booted.id))
    restored = await host.call(RestoreRequest(instance=booted.id))
    await checked(host, restored)
    await host.call(StandbyRequest(instance=restored.id))
    template = await host.call(PromoteRequest(instance=restored.id))
    forks = await host.call(ForkRequest(instance=template.id, count=2, atomic=True))
    again = await host.call(ForkRequest(instance=live.instances[0].id, from_running=True, atomic=True))
    try:
        (twice,) = live.instances
        now = await host.call(GetRequest(instance=twice.id))
        assert len(now.disk_layers["overlay"]) > len(twice.disk_layers["overlay"])
        for result in (*live.results, *forks.results, *again.results):
            assert result.sharing is Sharing.HARDLINK
            assert result.instance is not None
            await checked(host, result.instance)
    finally:
        for fork in (*again.instances, *live.instances, *forks.instances):
            await host.call(RmRequest(instance=fork.id))


async def test_a_template_of_another_release_is_refused(
    host: AsyncHost, template: Instance, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The fork is refused before a VMM starts, and the message has both versions."""
    monkeypatch.setenv(qemu_host.PROGRAM_VARIABLE, str(NEWER))
    version = await qemu_host.version()
    await host.local.group(Lifecycle)._spare().drop(template.id)  # they run, and are of the right release
    with pytest.raises(CoppiceError) as refused:
        await host.call(ForkRequest(instance=template.id, atomic=True))
    assert version.split()[0] in str(refused.value)
    assert (await host.call(InspectRequest(instance=template.id))).fork_count == 0
