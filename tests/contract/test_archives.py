"""Export and import: a template goes to another data directory whole or not at all, and nothing of a
hostile archive does.
"""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from pathlib import Path

import msgspec
import pytest

from coppice.client import AsyncHost
from coppice.errors import (
    CoppiceError,
    HostCannot,
    IllegalTransition,
    NameTaken,
    NoSpace,
    NotSupported,
    UsageError,
)
from coppice.linux.files import allocated_bytes
from coppice.machine import activate, disk, disks, portable
from coppice.machine import directory as directories
from coppice.model import State
from coppice.requests import (
    DemoteRequest,
    ForkRequest,
    GetRequest,
    OpenExportRequest,
    OpenImportRequest,
    PromoteRequest,
    RestoreRequest,
    RmRequest,
)
from coppice.state import locks
from fakes.driver import FakeDriver
from fakes.hosting import ask, assert_tidy, boot, make
from template_archives import fingerprints, rewritten, template


@pytest.mark.parametrize("layered", [False, True])
async def test_a_template_goes_to_another_data_directory(
    fake_host: AsyncHost, elsewhere: AsyncHost, tmp_path: Path, layered: bool
) -> None:
    """The files have the same content and the same holes, and a fork there has the memory and the disk."""
    source = await template(fake_host, layered=layered)
    archive = tmp_path / "oak.coppice"
    size = await (await fake_host.get("oak")).export(archive)
    assert size == archive.stat().st_size
    assert archive.stat().st_mode & 0o077 == 0
    made = await elsewhere.import_template(archive)
    assert (made.name, made.state, made.record.driver) == ("oak", State.TEMPLATE, source.driver)
    here, there = fake_host.local.rooms.directory(source.id), elsewhere.local.rooms.directory(made.id)
    assert fingerprints(portable.paths(there, made.record)) == fingerprints(portable.paths(here, source))
    assert allocated_bytes(there) < size
    assert made.record.capture is not None
    assert len(made.record.capture.layers) == (len(source.capture.layers) if source.capture else -1)
    assert all(file.sha256 for file in made.record.capture.memory)
    (fork,) = (await elsewhere.call(ForkRequest(instance="oak", names=["elm"], atomic=True))).instances
    assert await ask(elsewhere, fork, "recall", "own") == "rings"
    assert await ask(elsewhere, fork, "load") == "bark"
    if layered:
        assert await ask(elsewhere, fork, "recall", "more") == "leaves"
    assert await ask(elsewhere, fork, "hostname") == "elm"
    assert (await elsewhere.verify()).differences == ()
    await assert_tidy(fake_host, "oak")
    await assert_tidy(elsewhere, "elm", "oak")


@pytest.mark.parametrize("personality", ["file"], indirect=True)
async def test_a_template_whose_layers_were_merged_goes_to_another_data_directory(
    fake_host: AsyncHost, elsewhere: AsyncHost, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The merged layer of a running machine has a higher number than the one above it."""
    monkeypatch.setattr(disk, "MOST", 3)
    monkeypatch.setattr(disk, "reflink_file", lambda *_, **__: False)
    await boot(fake_host, "oak")
    for number in range(5):
        await ask(fake_host, "oak", "save", f"turn {number}")
        request = ForkRequest(
            instance="oak", names=[f"f{number}"], target=State.STANDBY, from_running=True, atomic=True
        )
        await fake_host.call(request)
    source = await fake_host.call(PromoteRequest(instance="f4"))
    assert list(source.disk_layers["overlay"]) != sorted(source.disk_layers["overlay"])
    await fake_host.call(RmRequest(instance="oak"))
    await (await fake_host.get("f4")).export(tmp_path / "archive")
    made = await elsewhere.import_template(tmp_path / "archive")
    assert made.record.disk_layers == source.disk_layers
    (fork,) = (await elsewhere.call(ForkRequest(instance="f4", names=["elm"], atomic=True))).instances
    assert await ask(elsewhere, fork, "load") == "turn 4"


@pytest.mark.parametrize("personality", ["file", "firecracker"], indirect=True)
async def test_an_imported_disk_is_still_that_of_its_capture_before_it_is_recorded(
    fake_host: AsyncHost, elsewhere: AsyncHost, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A process that is killed after it gave the machine a disk of its own, and before it recorded that, loses no memory."""
    await template(fake_host)
    await (await fake_host.get("oak")).export(tmp_path / "oak")
    await elsewhere.import_template(tmp_path / "oak")
    oak, rooms = await elsewhere.call(DemoteRequest(instance="oak")), elsewhere.local.rooms
    directory = rooms.directory(oak.id)
    assert disk.is_frozen(directory, disks.of(oak)[0])

    class Killed(BaseException):
        pass

    def kill(*_: object, **__: object) -> None:
        raise Killed

    with monkeypatch.context() as patch:
        patch.setattr(rooms.store, "save", kill)
        with pytest.raises(Killed):
            activate._own_disks(rooms, oak)
    assert directories.capture_is_current(directory, oak)
    oak = await elsewhere.call(RestoreRequest(instance="oak"))
    assert await ask(elsewhere, oak, "recall", "own") == "rings"
    assert await ask(elsewhere, oak, "load") == "bark"


@pytest.mark.parametrize("personality", ["file", "firecracker"], indirect=True)
async def test_an_archive_of_the_first_format_is_imported(
    fake_host: AsyncHost, elsewhere: AsyncHost, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Before other disks had layers, a record had a list of them without a name."""
    monkeypatch.setattr(disk, "reflink_file", lambda *_, **__: False)
    source = await template(fake_host, layered=True)
    archive = tmp_path / "oak"
    await (await fake_host.get("oak")).export(archive)
    layers = list(source.disk_layers.get("overlay", ()))
    old = rewritten(archive, tmp_path / "old", template={"disk_layers": layers}, format=1)
    made = await elsewhere.import_template(old)
    assert made.record.disk_layers == source.disk_layers
    (fork,) = (await elsewhere.call(ForkRequest(instance="oak", names=["elm"], atomic=True))).instances
    assert await ask(elsewhere, fork, "load") == "bark"


async def test_an_archive_is_named_anew_and_can_be_bare(
    fake_host: AsyncHost, elsewhere: AsyncHost, tmp_path: Path
) -> None:
    """A host that has the image and the kernel needs no archive of them. A second import needs another name."""
    await template(fake_host)
    vm = await fake_host.get("oak")
    whole = await vm.export(tmp_path / "whole")
    assert await vm.export(tmp_path / "bare", bare=True) < whole
    assert (await elsewhere.import_template(tmp_path / "bare", name="elm")).name == "elm"
    assert (await elsewhere.import_template(tmp_path / "whole")).name == "oak"
    with pytest.raises(NameTaken, match="'oak' is taken"):
        await elsewhere.import_template(tmp_path / "bare")
    async with (await elsewhere.get("elm")).fork(2, atomic=True) as forks:
        assert [await ask(elsewhere, fork.record, "recall", "own") for fork in forks] == ["rings", "rings"]
    await assert_tidy(elsewhere, "elm", "oak")


async def test_what_cannot_be_exported(fake_host: AsyncHost, tmp_path: Path) -> None:
    """A running machine is refused, and a file that cannot be made; an existing file stays."""
    vm = await boot(fake_host, "elm")
    with pytest.raises(IllegalTransition, match="elm is Running: export is not possible"):
        await (await fake_host.get(vm.id)).export(tmp_path / "elm")
    await template(fake_host)
    for path in (tmp_path, tmp_path / "nowhere" / "oak"):
        with pytest.raises(UsageError, match="cannot write"):
            await (await fake_host.get("oak")).export(path)
    assert [path.name for path in tmp_path.iterdir() if not path.name.endswith(".sock")] == []


async def test_a_template_stays_while_it_is_exported(fake_host: AsyncHost) -> None:
    """The lock is shared, so forks go on, and it is free when the reader has gone away.

    The backend is asked itself: a server may have sent all of so small an archive.
    """
    source = await template(fake_host)
    lock = fake_host.local.rooms.layout.lock(source.id)
    async with fake_host.local.stream(OpenExportRequest(instance="oak")) as session:
        pieces = aiter(session)
        assert (await anext(pieces)).startswith(b"coppice-template.json\0")
        assert locks.try_lock(lock) is None
        async with (await fake_host.get("oak")).fork(1, atomic=True):
            pass
    await fake_host.call(RmRequest(instance="oak"))
    await assert_tidy(fake_host)


async def test_a_changed_file_is_not_exported(fake_host: AsyncHost, tmp_path: Path) -> None:
    """The recorded digest of the memory is compared while the file is read. No half archive is left."""
    source = await template(fake_host)
    rooms = fake_host.local.rooms
    await fake_host.verify()  # records the digest
    memory = rooms.directory(source.id) / "memory"
    memory.chmod(0o600)
    with memory.open("r+b") as file:
        file.seek(4096)
        file.write(b"moss")
    memory.chmod(0o444)
    with pytest.raises(CoppiceError):
        await (await fake_host.get("oak")).export(tmp_path / "oak")
    assert not (tmp_path / "oak").exists()


async def test_a_host_refuses_what_it_cannot_load(
    fake_host: AsyncHost, elsewhere: AsyncHost, driver: FakeDriver, tmp_path: Path
) -> None:
    """Another VMM, another format, no space and a missing image: each with its reason, and nothing is left."""
    await template(fake_host)
    archive, bare = tmp_path / "oak", tmp_path / "bare"
    await (await fake_host.get("oak")).export(archive)
    await (await fake_host.get("oak")).export(bare, bare=True)
    driver.vmm_version = "2"
    with pytest.raises(HostCannot, match="vmm version was 1, is 2"):
        await elsewhere.import_template(archive)
    driver.vmm_version = "1"
    with pytest.raises(NotSupported, match="the archive has format 3"):
        await elsewhere.import_template(rewritten(archive, tmp_path / "later", format=3))
    with pytest.raises(NotSupported, match="xen"):
        await elsewhere.import_template(
            rewritten(archive, tmp_path / "vmm", template={"driver": "xen", "capture.manifest.driver": "xen"})
        )
    budgets = elsewhere.local.budgets
    elsewhere.local._budgets = msgspec.structs.replace(budgets, max_instances=0)
    with pytest.raises(NoSpace, match="the limit is 0"):
        await elsewhere.import_template(archive)
    elsewhere.local._budgets = budgets
    await elsewhere.images.rm("tiny")
    with pytest.raises(HostCannot, match="does not contain its image sha256:"):
        await elsewhere.import_template(bare)
    await assert_tidy(elsewhere)
    assert await elsewhere.images.ls() == []
    await elsewhere.import_template(archive)
    assert [image.name for image in await elsewhere.images.ls()] == ["tiny"]
    await assert_tidy(elsewhere, "oak")


async def test_an_import_is_not_visible_before_its_end(
    fake_host: AsyncHost, elsewhere: AsyncHost, tmp_path: Path
) -> None:
    """Until all digests are compared it is Created, in which nothing can be done with it."""
    await template(fake_host)
    await (await fake_host.get("oak")).export(tmp_path / "oak")
    content, seen = (tmp_path / "oak").read_bytes(), list[State]()

    async def pieces() -> AsyncIterator[bytes]:
        yield content[: 1 << 19]  # the record is made when the manifest has arrived
        yield content[1 << 19 : -1024]
        async with asyncio.timeout(30):
            while not (found := await elsewhere.ls()):
                pass
        seen.append(found[0].state)
        yield content[-1024:]

    async with elsewhere.stream(OpenImportRequest()) as session:
        made = await session.receive(pieces())
    assert (seen, made.state) == ([State.CREATED], State.TEMPLATE)
    assert (await elsewhere.call(GetRequest(instance="oak"))).state is State.TEMPLATE
    await assert_tidy(elsewhere, "oak")


async def test_a_host_can_be_asked_for_a_template_that_only_stands_by(
    fake_host: AsyncHost, elsewhere: AsyncHost, tmp_path: Path
) -> None:
    """An instance in standby is exported as it is, and becomes a template."""
    vm = await make(fake_host, State.STANDBY)
    await (await fake_host.get(vm.id)).export(tmp_path / "oak")
    made = await elsewhere.import_template(tmp_path / "oak")
    assert made.state is State.TEMPLATE
    assert (await fake_host.get("oak")).state is State.STANDBY
