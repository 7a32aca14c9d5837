"""VMMs of the driver's own code, on a double of Firecracker: every release, own users, own files."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from coppice.client import AsyncHost
from coppice.errors import CoppiceError
from coppice.model import Instance, State
from coppice.requests import ForkRequest, RestoreRequest, StandbyRequest
from coppice.vmm import driver as files
from coppice.vmm.confinement import own_user
from coppice.vmm.firecracker.metrics import METRICS, fatal
from fakes.doubled import VERSION
from fakes.hosting import ask, boot, make
from statuses import status_of

pytestmark = pytest.mark.parametrize("personality", ["firecracker"], indirect=True)
RELEASES = ("1.10.1", "1.11.0", "1.12.1", "1.13.1", "1.14.0", "1.15.2", "1.16.1")
as_root = pytest.mark.skipif(os.geteuid() != 0, reason="only root can start a VMM as another user")


@pytest.mark.parametrize("version", RELEASES)
async def test_every_release_is_asked_for_what_it_knows(
    fake_host: AsyncHost, version: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Booted, captured, restored, forked at rest and while it runs. The double refuses fields that
    its release lacks, and its vsock device is dead where the release's would be.
    """
    monkeypatch.setenv(VERSION, version)
    await boot(fake_host)
    live = await fake_host.call(ForkRequest(instance="oak", from_running=True, atomic=True, names=["elm"]))
    assert live.succeeded == 1
    await fake_host.call(StandbyRequest(instance="oak"))
    forks = await fake_host.call(ForkRequest(instance="oak", count=2, atomic=True, names=["ash"]))
    await fake_host.call(RestoreRequest(instance="oak"))
    for name in ("oak", "elm", *(fork.name for fork in forks.instances)):
        assert await ask(fake_host, name, "hostname") == name


def process_of(vm: Instance) -> int:
    """The pid of an instance's VMM."""
    assert vm.vmm is not None
    return vm.vmm.pid


@as_root
async def test_each_vmm_has_its_own_user_and_nothing_of_root(fake_host: AsyncHost) -> None:
    """A first boot, and each fork."""
    template = await make(fake_host, State.TEMPLATE)
    forks = (await fake_host.call(ForkRequest(instance=template.id, count=3, atomic=True))).instances
    forks += (await boot(fake_host, "elm"),)
    for fork in forks:
        status = status_of(process_of(fork))
        assert status["Uid"].split() == status["Gid"].split() == [str(fork.vmm_user)] * 4
        assert {int(status[f"Cap{name}"], 16) for name in ("Inh", "Prm", "Eff", "Bnd", "Amb")} == {0}
        assert status["NoNewPrivs"] == "1"
    assert len({fork.vmm_user for fork in forks}) == len(forks)
    assert own_user(None) is not None


@as_root
async def test_a_vmm_cannot_change_what_the_host_relies_on(fake_host: AsyncHost) -> None:
    """It owns neither its directory nor any file in it but the sockets it made: it can replace and
    chmod none of them, nor those of its capture. Only its own disk is its to write.
    """
    await make(fake_host, State.STANDBY)
    fork = (await fake_host.call(ForkRequest(instance="oak", atomic=True))).instances[0]
    directory = fake_host.local.rooms.directory(fork.id)
    for path in (directory, *directory.iterdir()):
        found = path.lstat()
        if path.suffix != ".sock":
            assert found.st_uid == 0, path
        if path.name in (files.MEMORY, files.VMSTATE, files.ROOT_DISK):
            assert found.st_mode & 0o222 == 0, path
    assert directory.stat().st_mode & 0o7777 == 0o1730
    captured = (await fake_host.call(StandbyRequest(instance=fork.id))).instance
    again = await fake_host.call(ForkRequest(instance=captured.id, atomic=True))
    own = fake_host.local.rooms.directory(captured.id)
    for name in (files.MEMORY, files.VMSTATE):
        assert (own / name).stat().st_uid == 0
        assert (own / name).stat().st_mode & 0o222 == 0
    assert again.succeeded == 1


async def test_the_end_of_a_vmm_is_told_with_its_counters(fake_host: AsyncHost) -> None:
    """The log has the error; the metrics have what was counted last."""
    await make(fake_host, State.STANDBY)
    directory = fake_host.local.rooms.directory((await fake_host.get("oak")).record.id)
    (directory / files.VMSTATE).chmod(0o644)
    (directory / files.VMSTATE).write_text("damaged")
    with pytest.raises(CoppiceError, match=r"Failed to deserialize.*; it counted failures of a vCPU \(1\)"):
        await fake_host.call(RestoreRequest(instance="oak"))


def test_counters_that_end_a_vmm(tmp_path: Path, personality: str) -> None:
    """Only those of the last line; a file that is missing, empty or damaged has none."""
    del personality
    path = tmp_path / METRICS
    assert fatal(path) == ""
    for text, words in (
        ("", ""),
        ("{", ""),
        ("[1]", ""),
        ('{"seccomp":{"num_faults":2}}\n{"seccomp":{"num_faults":0}}\n', ""),
        ('{"vmm":{}}\n{"seccomp":{"num_faults":2},"signals":{"sigbus":1}}\n', "refused (2), SIGBUS"),
    ):
        path.write_text(text)
        assert words in fatal(path)
        assert bool(words) == bool(fatal(path))
