"""Records of volumes: who has one is derived from those who do, and the rule is kept in the transaction that makes a holder."""

from __future__ import annotations

import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import msgspec
import pytest

from coppice.errors import InUse, NameTaken, NotFound
from coppice.instance.snapshot import new_snapshot
from coppice.model import MIB, Instance, State, Volume, VolumeDisk
from coppice.names import new_id
from coppice.store.store import Store
from coppice.vmm.process import own_process
from fakes.records import MACHINE, make_instance


@pytest.fixture
def store(tmp_path: Path) -> Iterator[Store]:
    """A new store."""
    store = Store(tmp_path / "coppice.db", own_process())
    yield store
    store.close()


def made(store: Store, name: str = "data", **more: Any) -> Volume:
    """A volume that is whole."""
    volume = Volume(id=new_id(), name=name, size_bytes=16 * MIB, created_at=time.time(), **more)
    store.volumes.create(volume, "volume", lambda: None)
    store.volumes.finish(volume)
    return volume


def holder(name: str, *volumes: Volume, readonly: bool) -> Instance:
    """An instance's record with these volumes."""
    disks = tuple(
        VolumeDisk(
            volume_id=volume.id,
            volume_name=volume.name,
            size_bytes=volume.size_bytes,
            mount_path=f"/{volume.name}",
            readonly=readonly,
        )
        for volume in volumes
    )
    return make_instance(name, State.STOPPED, machine=msgspec.structs.replace(MACHINE, volumes=disks))


def test_a_record_comes_back_as_it_was(store: Store) -> None:
    """By id and by name, to the last field; until it is whole it is not found."""
    volume = made(store, owner="alice", tags={"a": "b"})
    assert store.volumes.get("data") == store.volumes.get(volume.id) == volume
    half = msgspec.structs.replace(volume, id=new_id(), name="half")
    store.volumes.create(half, "volume", lambda: None)
    with pytest.raises(NotFound, match="no volume 'half'"):
        store.volumes.get("half")
    assert store.volumes.all() == [volume]
    assert store.volumes.ids() == {volume.id, half.id}


def test_a_name_is_taken_once(store: Store) -> None:
    """And what was refused leaves no journal row."""
    made(store)
    with pytest.raises(NameTaken, match="data"):
        made(store)
    assert store.journal() == []


def test_what_the_check_refuses_is_not_recorded(store: Store) -> None:
    """The budget is looked at in the same transaction."""

    def refuse() -> None:
        raise NotFound("no room")

    volume = Volume(id=new_id(), name="data", size_bytes=16 * MIB, created_at=0)
    with pytest.raises(NotFound):
        store.volumes.create(volume, "volume", refuse)
    assert store.volumes.ids() == set()


def test_who_has_a_volume_is_derived(store: Store) -> None:
    """Holders come and go with their records, and are never part of what is stored."""
    data, other = made(store), made(store, "other")
    store.create([holder("oak", data, other, readonly=True), holder("elm", data, readonly=True)], "run")
    assert [each.name for each in store.volumes.get("data").attachments] == ["oak", "elm"]
    assert [(each.name, len(each.attachments)) for each in store.volumes.all()] == [("data", 2), ("other", 1)]
    store.forget(store.get("oak").id)
    assert [each.name for each in store.volumes.get("data").attachments] == ["elm"]
    assert store.volumes.get("other") == other


@pytest.mark.parametrize("first", [True, False], ids=["reader", "writer"])
@pytest.mark.parametrize("second", [True, False], ids=["reader", "writer"])
def test_one_writes_or_any_number_reads(store: Store, first: bool, second: bool) -> None:
    """Two in one call or one after the other: two readers, or one of them is refused and nothing of its call is recorded."""
    data = made(store)
    pair = [holder("oak", data, readonly=first), holder("elm", data, readonly=second)]
    allowed = first and second
    if not allowed:
        with pytest.raises(InUse, match="data"):
            store.create(pair, "run")
        assert store.instances() == []
    store.create(pair[:1], "run")
    if allowed:
        store.create(pair[1:], "run")
        return
    with pytest.raises(InUse, match="oak has it"):
        store.create(pair[1:], "run")
    with pytest.raises(InUse, match="oak has it"):
        store.volumes.require_free(pair[1].machine.volumes)
    assert [each.name for each in store.instances()] == ["oak"]


def test_a_volume_that_is_had_is_not_removed_and_one_that_goes_is_not_had(store: Store) -> None:
    """The two are decided in one order, whoever comes first."""
    data = made(store)
    oak = holder("oak", data, readonly=True)
    store.create([oak], "run")
    with pytest.raises(InUse, match="oak has it"):
        store.volumes.begin_removal(data, "volume-rm")
    store.forget(oak.id)
    store.volumes.begin_removal(data, "volume-rm")
    with pytest.raises(NotFound, match="no volume 'data'"):
        store.create([oak], "run")
    with pytest.raises(NotFound, match="no volume 'data'"):
        store.volumes.require_free(oak.machine.volumes)
    store.volumes.forget(data.id)
    assert store.journal() == []


def test_a_snapshot_is_a_holder_too(store: Store) -> None:
    """It keeps writers out, and is not recorded beside one."""
    data = made(store)
    source = holder("oak", data, readonly=True)
    kept = new_snapshot(source, "noon", None, {})
    store.create([holder("writer", data, readonly=False)], "run")
    with pytest.raises(InUse, match="writer has it for writing"):
        store.snapshots.create(kept, "snapshot")
    store.forget(store.get("writer").id)
    store.snapshots.create(kept, "snapshot")
    with pytest.raises(InUse, match="the snapshot noon has it"):
        store.create([holder("writer", data, readonly=False)], "run")


def test_many_holders_are_named_in_one_line(store: Store) -> None:
    """Eight, and how many more."""
    data = made(store)
    store.create([holder(f"vm-{number:02}", data, readonly=True) for number in range(12)], "run")
    with pytest.raises(InUse, match=r"vm-00, .*vm-07 and 4 more have it;"):
        store.volumes.begin_removal(data, "volume-rm")
