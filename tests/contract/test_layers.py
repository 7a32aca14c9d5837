"""Layered memory in the life of machines: a generation stores what it wrote, shares everything else, and is as whole as any other."""

from __future__ import annotations

import errno
import hashlib
import os
from pathlib import Path

import msgspec
import pytest

from conftest import HostFactory
from coppice.client import AsyncHost
from coppice.errors import HostCannot, IntegrityError
from coppice.host.lifecycle import Lifecycle
from coppice.linux import tracing
from coppice.machine import directory as directories
from coppice.memory import layers
from coppice.model import Instance, Sharing, State
from coppice.requests import (
    ForkRequest,
    GetRequest,
    InspectRequest,
    PromoteRequest,
    RestoreRequest,
    RmRequest,
    SnapshotForkRequest,
    SnapshotInspectRequest,
    SnapshotRequest,
    SnapshotRestoreRequest,
    StandbyRequest,
    StartAheadRequest,
)
from fakes.driver import CAPABILITIES, FakeDriver
from fakes.hosting import ask, assert_tidy, boot, make, memory_of, newest_memory_of
from fakes.records import MEMORY_BYTES
from fakes.rooms import DEADLINES, open_rooms


async def generation(host: AsyncHost, number: int) -> Instance:
    """Fork the latest machine, have the fork remember its number, and capture it."""
    name = f"tree-{number}"
    await host.call(ForkRequest(instance=f"tree-{number - 1}", names=[name], atomic=True))
    await ask(host, name, "remember", f"level-{number}", f"of {number}")
    return (await host.call(StandbyRequest(instance=name))).instance


async def root(host: AsyncHost) -> Instance:
    """The first generation: a machine that was booted and captured."""
    await boot(host, "tree-0")
    await ask(host, "tree-0", "remember", "level-0", "of 0")
    return (await host.call(StandbyRequest(instance="tree-0"))).instance


async def layered(host: AsyncHost, *, template: bool = False) -> Instance:
    """A captured machine with two layers."""
    await root(host)
    await generation(host, 1)
    made = await generation(host, 2)
    return await host.call(PromoteRequest(instance=made.id)) if template else made


def count(instance: Instance) -> int:
    return len(instance.capture.layers) if instance.capture else -1


def sum_of(path: Path) -> str:
    return hashlib.sha256(path.read_bytes()).hexdigest()


async def test_every_generation_knows_all_before_it(fake_host: AsyncHost) -> None:
    """Beyond the largest number of layers; all share one base, which never changes, also when the generations above are gone."""
    first = await root(fake_host)
    base = sum_of(memory_of(fake_host, first))
    known = []
    for number in range(1, layers.MOST + 3):
        made = await generation(fake_host, number)
        known.append(count(made))
        assert memory_of(fake_host, made).samefile(memory_of(fake_host, first))
        assert newest_memory_of(fake_host, made).stat().st_nlink == 1
        assert newest_memory_of(fake_host, made).stat().st_mode & 0o777 == 0o444
    assert known == [*range(1, layers.MOST + 1), 1, 2]
    last = f"tree-{number}"
    assert (await fake_host.verify()).differences == ()
    assert sum_of(memory_of(fake_host, first)) == base
    for older in range(number):
        await fake_host.call(RmRequest(instance=f"tree-{older}"))
    await fake_host.call(RestoreRequest(instance=last))
    for older in range(number + 1):
        assert await ask(fake_host, last, "recall", f"level-{older}") == f"of {older}"
    await assert_tidy(fake_host, last)
    assert sum_of(memory_of(fake_host, made)) == base


async def test_a_capture_writes_what_was_dirtied(fake_host: AsyncHost) -> None:
    """At each level as much as at the first; the report of memory says how many layers there are."""
    await root(fake_host)
    for number in range(1, 4):
        name = f"tree-{number}"
        await fake_host.call(ForkRequest(instance=f"tree-{number - 1}", names=[name], atomic=True))
        await ask(fake_host, name, "dirty", "200")
        memory = (await fake_host.call(InspectRequest(instance=name))).memory
        assert memory is not None
        assert (memory.layers, memory.sharing, memory.mapped_bytes) == (number - 1, Sharing.HARDLINK, MEMORY_BYTES)
        done = await fake_host.call(StandbyRequest(instance=name))
        assert (
            200 * 4096 <= done.capture.dirty_bytes <= done.capture.ram_bytes_written <= 1.2 * done.capture.dirty_bytes
        )
        assert newest_memory_of(fake_host, done.instance).stat().st_blocks * 512 <= 1.2 * done.capture.dirty_bytes


async def test_a_machine_that_is_parked_again_and_again(fake_host: AsyncHost) -> None:
    """Its own older layers go on beneath the new one, until they are merged; no file is left of those."""
    await root(fake_host)
    for number in range(2 * layers.MOST + 1):
        await fake_host.call(RestoreRequest(instance="tree-0"))
        await ask(fake_host, "tree-0", "remember", f"turn-{number}", f"{number}")
        made = (await fake_host.call(StandbyRequest(instance="tree-0"))).instance
        assert count(made) == number % layers.MOST + 1
        await assert_tidy(fake_host, "tree-0")
    await fake_host.call(RestoreRequest(instance="tree-0"))
    for number in range(2 * layers.MOST + 1):
        assert await ask(fake_host, "tree-0", "recall", f"turn-{number}") == f"{number}"


async def test_a_running_machine_on_layers_is_forked(fake_host: AsyncHost, driver: FakeDriver) -> None:
    """The forks get its layers and one of what it wrote since; it goes on over its own, and is captured as ever."""
    made = await layered(fake_host)
    source = await fake_host.call(RestoreRequest(instance=made.id))
    await ask(fake_host, source.name, "remember", "now", "before")
    (elm,) = (await fake_host.call(ForkRequest(instance=source.id, names=["elm"], from_running=True))).instances
    await ask(fake_host, source.name, "remember", "now", "after")
    assert (count(elm), count(await fake_host.call(GetRequest(instance=source.id)))) == (3, 2)
    assert await ask(fake_host, "elm", "recall", "now") == "before"
    assert await ask(fake_host, "elm", "recall", "level-2") == "of 2"
    parked = (await fake_host.call(StandbyRequest(instance=source.id))).instance
    assert count(parked) == 3
    await fake_host.call(RestoreRequest(instance=source.id))
    assert await ask(fake_host, source.name, "recall", "now") == "after"
    await assert_tidy(fake_host, "tree-0", "tree-1", "tree-2", "elm")


async def test_a_restore_in_place_has_the_layers_of_the_snapshot(fake_host: AsyncHost) -> None:
    """Fewer than the machine had, more, or none: no other is left, and forks of the snapshot have them too."""
    await layered(fake_host)
    await fake_host.call(RestoreRequest(instance="tree-1"))
    await ask(fake_host, "tree-1", "remember", "now", "second")
    made = (await fake_host.call(StandbyRequest(instance="tree-1"))).instance
    await fake_host.call(SnapshotRequest(instance=made.id, name="two"))
    await fake_host.call(RestoreRequest(instance=made.id))
    await ask(fake_host, made.name, "remember", "now", "third")
    await fake_host.call(SnapshotRequest(instance=made.id, name="three"))
    await fake_host.call(StandbyRequest(instance=made.id))
    for kept, layer_count, now in (("two", 2, "second"), ("three", 3, "third"), ("two", 2, "second")):
        restored = await fake_host.call(SnapshotRestoreRequest(snapshot=kept, start=True))
        assert count(restored) == layer_count
        assert await ask(fake_host, made.name, "recall", "now") == now
        assert await ask(fake_host, made.name, "recall", "level-1") == "of 1"
        await assert_tidy(fake_host, "tree-0", "tree-1", "tree-2")
    (elm,) = (await fake_host.call(SnapshotForkRequest(snapshot="three", names=["elm"]))).instances
    assert await ask(fake_host, "elm", "recall", "now") == "third"
    inspected = await fake_host.call(SnapshotInspectRequest(snapshot="three"))
    assert elm.capture is not None
    *below, _ = directories.memory_paths(fake_host.local.rooms.directory(elm.id), elm.capture)
    assert inspected.memory_bytes > sum(path.stat().st_blocks for path in below) * 512


async def test_a_machine_is_started_ahead_on_layers(fake_home: Path, driver: FakeDriver) -> None:
    """The spare has mapped them, and has no link to any; the fork has all, and knows what each layer has."""
    async with AsyncHost(fake_home, driver=driver, deadlines=DEADLINES, open_rooms=open_rooms, spares=1) as host:
        template = await layered(host, template=True)
        newest = newest_memory_of(host, template)
        await host.call(StartAheadRequest(instance=template.id, count=1))
        await host.local.group(Lifecycle)._spare().settled()
        assert newest.stat().st_nlink == 1
        (result,) = (await host.call(ForkRequest(instance=template.id, names=["elm"], atomic=True))).results
        assert result.started_ahead
        assert newest.stat().st_nlink == 2
        for number in range(3):
            assert await ask(host, "elm", "recall", f"level-{number}") == f"of {number}"
        await host.call(StandbyRequest(instance="elm"))


@pytest.fixture
def unable(fake_vmm: Path, personality: str) -> FakeDriver:
    """A driver that cannot map layers."""
    return FakeDriver(fake_vmm, capabilities=msgspec.structs.replace(CAPABILITIES, maps_layers=False))


async def test_a_driver_that_cannot_map_layers_makes_none(fake_home: Path, unable: FakeDriver) -> None:
    """Each of its captures is a whole mem-file."""
    async with AsyncHost(fake_home, driver=unable, deadlines=DEADLINES, open_rooms=open_rooms, spares=0) as host:
        made = await layered(host)
        assert count(made) == 0
        assert not memory_of(host, made).samefile(memory_of(host, await host.call(GetRequest(instance="tree-1"))))
        await host.call(RestoreRequest(instance=made.id))
        assert await ask(host, made.name, "recall", "level-1") == "of 1"
    await unable.end(fake_home / "instances")


async def test_a_driver_that_can_no_longer_map_layers_gets_copies(
    fake_host: AsyncHost, fake_home: Path, unable: FakeDriver
) -> None:
    """A fork gets one file, and its report says why; the machine itself is refused, with what can be done."""
    made = await layered(fake_host)
    async with AsyncHost(fake_home, driver=unable, deadlines=DEADLINES, open_rooms=open_rooms, spares=0) as host:
        with pytest.raises(HostCannot, match="layers") as caught:
            await host.call(RestoreRequest(instance=made.id))
        assert f"coppice fork {made.name}" in str(caught.value.hint)
        (result,) = (await host.call(ForkRequest(instance=made.id, names=["elm"]))).results
        assert result.sharing is Sharing.COPY
        assert "layers" in result.sharing_reason
        assert result.instance is not None
        assert count(result.instance) == 0
        for number in range(3):
            assert await ask(host, "elm", "recall", f"level-{number}") == f"of {number}"
        await assert_tidy(host, "tree-0", "tree-1", "tree-2", "elm")
    await unable.end(fake_home / "instances")


async def test_a_layer_that_cannot_be_linked_is_copied(fake_host: AsyncHost, monkeypatch: pytest.MonkeyPatch) -> None:
    """And is said to be; the fork works, and can be captured."""
    made = await layered(fake_host)
    real = os.link

    def refuse(src: Path, dst: Path, **options: bool) -> None:
        if Path(src).name == directories.LAYERS[1]:
            raise OSError(errno.EMLINK, os.strerror(errno.EMLINK))
        real(src, dst, **options)

    monkeypatch.setattr(os, "link", refuse)
    (result,) = (await fake_host.call(ForkRequest(instance=made.id, names=["elm"]))).results
    assert result.sharing is Sharing.COPY
    assert "hard links" in result.sharing_reason
    assert await ask(fake_host, "elm", "recall", "level-2") == "of 2"
    await fake_host.call(StandbyRequest(instance="elm"))
    await fake_host.call(RestoreRequest(instance="elm"))
    assert await ask(fake_host, "elm", "recall", "level-2") == "of 2"
    assert (await fake_host.verify()).differences == ()


def flip(path: Path) -> None:
    """One bit of the last byte: of the map."""
    path.chmod(0o644)
    with path.open("r+b") as file:
        file.seek(-1, os.SEEK_END)
        (byte,) = file.read(1)
        file.seek(-1, os.SEEK_END)
        file.write(bytes([byte ^ 1]))
    path.chmod(0o444)


async def test_verify_knows_each_layer(fake_host: AsyncHost) -> None:
    """A bit that is flipped in one is named for every holder of it, and for nobody else; the base is sound."""
    made = await layered(fake_host)
    await fake_host.call(SnapshotRequest(instance=made.id, name="kept"))
    first = await fake_host.verify()
    assert (first.mem_files, first.differences) == (3, ())
    assert (await fake_host.verify()).recorded == 0
    stored = await fake_host.call(GetRequest(instance=made.id))
    assert stored.capture
    assert all(file.sha256 for file in stored.capture.memory)
    flip(fake_host.local.rooms.directory(made.id) / directories.LAYERS[0])
    found = {(each.name, each.file) for each in (await fake_host.verify()).differences}
    assert found == {("tree-1", "memory.1"), ("tree-2", "memory.1"), ("kept", "memory.1")}


@pytest.mark.parametrize("damage", ["missing", "truncated", "replaced", "map"])
async def test_a_damaged_layer_is_refused(fake_host: AsyncHost, damage: str) -> None:
    """Neither restored nor forked; verify names it."""
    made = await layered(fake_host)
    layer = newest_memory_of(fake_host, made)
    await fake_host.verify()
    if damage == "missing":
        layer.unlink()
    elif damage == "truncated":
        os.truncate(layer, MEMORY_BYTES)
    elif damage == "replaced":
        contents = layer.read_bytes()
        layer.unlink()
        layer.write_bytes(contents)
        layer.chmod(0o444)
    else:
        flip(layer)
    found = {(each.name, each.file) for each in (await fake_host.verify()).differences}
    assert (made.name, layer.name) in found
    report = await fake_host.call(ForkRequest(instance=made.id, names=["elm"]))
    assert report.succeeded == 0
    with pytest.raises(IntegrityError):
        await fake_host.call(RestoreRequest(instance=made.id))
    await fake_host.call(RmRequest(instance=made.id))
    await assert_tidy(fake_host, "tree-0", "tree-1")


@pytest.fixture
def refused(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """The kernel refuses to trace. How often it was asked."""
    asked: list[int] = []

    def refuse(request: int, *_: object) -> None:
        asked.append(request)
        raise HostCannot("the VMM cannot be traced: no", hint="run as root")

    monkeypatch.setattr(tracing, "ptrace", refuse)
    return asked


async def test_no_guest_runs_without_its_layers(fake_host: AsyncHost, refused: list[int]) -> None:
    """Where they cannot be mapped, the VMM is ended, and nothing is left of the fork; the machine stays at rest."""
    first = await root(fake_host)
    await fake_host.call(ForkRequest(instance=first.id, names=["tree-1"]))
    made = (await fake_host.call(StandbyRequest(instance="tree-1"))).instance
    assert count(made) == 1
    report = await fake_host.call(ForkRequest(instance=made.id, names=["elm"]))
    assert "cannot be traced" in (report.results[0].error or "")
    with pytest.raises(HostCannot, match="cannot be traced"):
        await fake_host.call(RestoreRequest(instance=made.id))
    assert refused
    assert (await fake_host.call(GetRequest(instance=made.id))).state is State.STANDBY
    await assert_tidy(fake_host, "tree-0", "tree-1")


async def test_another_process_goes_on_with_layers(fake_host: AsyncHost, make_host: HostFactory) -> None:
    """What one host has made, another captures further."""
    made = await layered(fake_host)
    await fake_host.call(RestoreRequest(instance=made.id))
    async with make_host() as other:
        await ask(other, made.name, "remember", "now", "third")
        assert count((await other.call(StandbyRequest(instance=made.id))).instance) == 3
        await other.call(RestoreRequest(instance=made.id))
        assert await ask(other, made.name, "recall", "now") == "third"
        await make(other, State.STOPPED, "fir")
        await assert_tidy(other, "tree-0", "tree-1", "tree-2", "fir")
