"""User ids of VMMs: no two instances of a data directory have the same, even if their ids hash
alike.
"""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest

from coppice.errors import NameTaken, NoSpace
from coppice.state import users
from coppice.state.journal import JournalOperation
from coppice.state.store import Store
from coppice.vmm.process import own_process
from fakes.records import make_instance


@pytest.fixture
def store(tmp_path: Path) -> Iterator[Store]:
    """Return a new store."""
    store = Store(tmp_path / "coppice.db", own_process())
    yield store
    store.close()


def record(store: Store, *names: str) -> list[int]:
    """Record instances; return their user ids."""
    made = store.create([make_instance(name) for name in names], JournalOperation.RUN)
    found = [instance.vmm_user for instance in made]
    assert [store.get(name).vmm_user for name in names] == found
    return [user for user in found if user is not None]


def test_all_user_ids_differ_even_in_a_full_range(store: Store, monkeypatch: pytest.MonkeyPatch) -> None:
    """Eight random choices out of eight would collide, but all ids differ. A ninth instance is
    refused, and nothing of it is recorded.
    """
    monkeypatch.setattr(users, "COUNT", 8)
    first, second = record(store, "a", "b", "c"), record(store, "d", "e", "f", "g", "h")
    assert sorted(first + second) == list(range(users.FIRST, users.FIRST + 8))
    with pytest.raises(NoSpace) as refusal:
        record(store, "i")
    assert refusal.value.hint
    assert len(store.instances()) == 8
    store.forget(store.get("c").id)
    assert record(store, "j") == [first[2]]


def test_a_refused_record_takes_no_user_id(store: Store, monkeypatch: pytest.MonkeyPatch) -> None:
    """An id of an undone transaction is free again."""
    monkeypatch.setattr(users, "COUNT", 2)
    record(store, "a")
    with pytest.raises(NameTaken):
        record(store, "a")
    assert len(record(store, "b")) == 1


def test_a_vmm_started_ahead_keeps_its_user_id(store: Store) -> None:
    """A VMM cannot change its user, so the instance that it becomes is recorded with the reserved
    id. An unused reservation is released.
    """
    instance = make_instance("oak")
    reserved = store.reserve_user(instance.id)
    assert store.reserve_user(instance.id) == reserved
    (made,) = store.create([instance], JournalOperation.FORK)
    assert made.vmm_user == reserved
    other = make_instance("elm")
    store.reserve_user(other.id)
    store.release_user(other.id)
    store.release_user(other.id)
    with store._db.read() as connection:
        assert connection.execute("SELECT instance FROM vmm_users").fetchall() == [(instance.id,)]


def test_the_range_avoids_other_user_ids() -> None:
    """The range lies above the ids of people, containers and services, and within the range that
    every program accepts.
    """
    assert users.FIRST > 1 << 30
    assert users.FIRST + users.COUNT <= 1 << 31
