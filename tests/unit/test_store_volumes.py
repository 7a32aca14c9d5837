"""Records of volumes: holders are derived from their own records, and the rule for holders is
checked in the transaction that adds one.
"""

from __future__ import annotations

import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import msgspec
import pytest

from coppice.errors import InUse, NameTaken, NotFound
from coppice.model import MIB, Instance, State, Volume, VolumeDisk
from coppice.names import new_id
from coppice.snapshots.snapshot import new_snapshot
from coppice.state.journal import JournalOperation
from coppice.state.store import Store
from coppice.vmm.process import own_process
from fakes.records import MACHINE, make_instance


@pytest.fixture
def store(tmp_path: Path) -> Iterator[Store]:
    """Return a new store."""
    store = Store(tmp_path / "coppice.db", own_process())
    yield store
    store.close()


def made(store: Store, name: str = "data", **more: Any) -> Volume:
    """Return a finished volume."""
    volume = Volume(id=new_id(), name=name, size_bytes=16 * MIB, created_at=time.time(), **more)
    store.volumes.create(volume, JournalOperation.VOLUME, lambda: None)
    store.volumes.finish(volume)
    return volume


def holder(name: str, *volumes: Volume, readonly: bool) -> Instance:
    """Return an instance's record with these volumes."""
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


def test_a_record_is_read_back_unchanged(store: Store) -> None:
    """A record is read by id and by name, with every field; an unfinished volume is not found."""
    volume = made(store, owner="alice", tags={"a": "b"})
    assert store.volumes.get("data") == store.volumes.get(volume.id) == volume
    half = msgspec.structs.replace(volume, id=new_id(), name="half")
    store.volumes.create(half, JournalOperation.VOLUME, lambda: None)
    with pytest.raises(NotFound, match="no volume 'half'"):
        store.volumes.get("half")
    assert store.volumes.all() == [volume]
    assert store.volumes.ids() == {volume.id, half.id}


def test_a_name_is_taken_once(store: Store) -> None:
    """A refused record leaves no journal row."""
    made(store)
    with pytest.raises(NameTaken, match="data"):
        made(store)
    assert store.journal() == []


def test_a_volume_refused_by_the_check_is_not_recorded(store: Store) -> None:
    """The budget is checked in the same transaction."""

    def refuse() -> None:
        raise NotFound("no space")

    volume = Volume(id=new_id(), name="data", size_bytes=16 * MIB, created_at=0)
    with pytest.raises(NotFound):
        store.volumes.create(volume, JournalOperation.VOLUME, refuse)
    assert store.volumes.ids() == set()


def test_the_holders_of_a_volume_are_derived(store: Store) -> None:
    """Holders appear and disappear with their records, and are never stored with the volume."""
    data, other = made(store), made(store, "other")
    store.create([holder("oak", data, other, readonly=True), holder("elm", data, readonly=True)], JournalOperation.RUN)
    assert [each.name for each in store.volumes.get("data").attachments] == ["oak", "elm"]
    assert [(each.name, len(each.attachments)) for each in store.volumes.all()] == [("data", 2), ("other", 1)]
    store.forget(store.get("oak").id)
    assert [each.name for each in store.volumes.get("data").attachments] == ["elm"]
    assert store.volumes.get("other") == other


@pytest.mark.parametrize("first", [True, False], ids=["reader", "writer"])
@pytest.mark.parametrize("second", [True, False], ids=["reader", "writer"])
def test_a_volume_has_one_writer_or_any_number_of_readers(store: Store, first: bool, second: bool) -> None:
    """Two readers are accepted, in one call or in two. With a writer among them one is refused, and
    nothing of its call is recorded.
    """
    data = made(store)
    pair = [holder("oak", data, readonly=first), holder("elm", data, readonly=second)]
    allowed = first and second
    if not allowed:
        with pytest.raises(InUse, match="data"):
            store.create(pair, JournalOperation.RUN)
        assert store.instances() == []
    store.create(pair[:1], JournalOperation.RUN)
    if allowed:
        store.create(pair[1:], JournalOperation.RUN)
        return
    with pytest.raises(InUse, match="oak has it"):
        store.create(pair[1:], JournalOperation.RUN)
    with pytest.raises(InUse, match="oak has it"):
        store.volumes.require_free(pair[1].machine.volumes)
    assert [each.name for each in store.instances()] == ["oak"]


def test_attaching_and_removing_a_volume_exclude_each_other(store: Store) -> None:
    """Attachment and removal are serialised: the first one wins."""
    data = made(store)
    oak = holder("oak", data, readonly=True)
    store.create([oak], JournalOperation.RUN)
    with pytest.raises(InUse, match="oak has it"):
        store.volumes.begin_removal(data, JournalOperation.VOLUME_REMOVE)
    store.forget(oak.id)
    store.volumes.begin_removal(data, JournalOperation.VOLUME_REMOVE)
    with pytest.raises(NotFound, match="no volume 'data'"):
        store.create([oak], JournalOperation.RUN)
    with pytest.raises(NotFound, match="no volume 'data'"):
        store.volumes.require_free(oak.machine.volumes)
    store.volumes.forget(data.id)
    assert store.journal() == []


def test_a_snapshot_is_a_holder_too(store: Store) -> None:
    """A snapshot excludes writers, and is not recorded while there is one."""
    data = made(store)
    source = holder("oak", data, readonly=True)
    kept = new_snapshot(source, "noon", None, {})
    store.create([holder("writer", data, readonly=False)], JournalOperation.RUN)
    with pytest.raises(InUse, match="writer has it for writing"):
        store.snapshots.create(kept, JournalOperation.SNAPSHOT)
    store.forget(store.get("writer").id)
    store.snapshots.create(kept, JournalOperation.SNAPSHOT)
    with pytest.raises(InUse, match="the snapshot noon has it"):
        store.create([holder("writer", data, readonly=False)], JournalOperation.RUN)


def test_a_long_list_of_holders_is_shortened(store: Store) -> None:
    """Eight holders are named, and the others are counted."""
    data = made(store)
    store.create([holder(f"vm-{number:02}", data, readonly=True) for number in range(12)], JournalOperation.RUN)
    with pytest.raises(InUse, match=r"vm-00, .*vm-07 and 4 more have it;"):
        store.volumes.begin_removal(data, JournalOperation.VOLUME_REMOVE)
