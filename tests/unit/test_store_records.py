"""Records and journal: what is committed is whole, and what must not be is refused inside of the same transaction."""

from __future__ import annotations

import subprocess
import sys
import threading
from collections.abc import Callable, Iterator
from pathlib import Path

import msgspec
import pytest

from coppice.errors import InUse, NameTaken, NotFound
from coppice.model import Instance, State
from coppice.store.store import Store
from coppice.vmm.process import own_process
from fakes.records import make_instance


@pytest.fixture
def store(tmp_path: Path) -> Iterator[Store]:
    """A new store."""
    store = Store(tmp_path / "coppice.db", own_process())
    yield store
    store.close()


def recorded(store: Store, name: str = "oak", state: State = State.STOPPED, **changes: object) -> Instance:
    """An instance in the store, with no operation under way."""
    instance = make_instance(name, state, **changes)
    store.create([instance], "run")
    store.save(instance, done=True)
    return instance


def test_a_record_comes_back_as_it_was(store: Store) -> None:
    """By id and by name, to the last field."""
    instance = recorded(store, tags={"a": "b"}, parent="x" * 24, public=True)
    assert store.get(instance.id) == instance
    assert store.get("oak") == instance
    assert store.instances() == [instance]


def test_an_id_goes_before_a_name(store: Store) -> None:
    """An instance that is called by another's id cannot stand in for it."""
    victim = recorded(store, "victim")
    impostor = recorded(store, victim.id)
    assert store.get(victim.id) == victim
    assert store.get(impostor.id) == impostor


def test_an_unknown_reference_is_not_found(store: Store) -> None:
    """With what was asked for in the message."""
    with pytest.raises(NotFound, match="elm"):
        store.get("elm")


def test_names_are_taken_for_all_or_none(store: Store) -> None:
    """A fan-out with one name that is in use records no child at all, and no journal row."""
    recorded(store, "b")
    with pytest.raises(NameTaken, match="'b'"):
        store.create([make_instance("a"), make_instance("b"), make_instance("c")], "fork")
    assert [instance.name for instance in store.instances()] == ["b"]
    assert store.journal() == []


def test_a_check_inside_of_the_transaction_can_refuse(store: Store) -> None:
    """What the check raises undoes the records."""

    def refuse() -> None:
        raise InUse("no")

    with pytest.raises(InUse):
        store.create([make_instance()], "run", check=refuse)
    assert store.instances() == []


def test_forks_are_counted_when_read(store: Store) -> None:
    """The fork count follows the records: nothing else has to be kept in step."""
    parent = recorded(store, "oak", State.TEMPLATE)
    forks = [recorded(store, f"oak-{n}", parent=parent.id) for n in range(3)]
    assert store.children(parent.id) == forks
    assert store.fork_counts() == {parent.id: 3}
    store.forget(forks[0].id)
    assert store.fork_counts() == {parent.id: 2}


@pytest.mark.parametrize("operation", ["demote", "rm"])
def test_a_template_with_forks_is_kept_and_they_are_named(store: Store, operation: str) -> None:
    """Demote and removal are refused in the transaction that would do them; the first names are listed, the rest counted."""
    template = recorded(store, "oak", State.TEMPLATE)
    for number in range(10):
        recorded(store, f"fork-{number}", parent=template.id)
    calls: dict[str, Callable[[], object]] = {
        "demote": lambda: store.promote(template, State.STANDBY),
        "rm": lambda: store.begin(template, "rm"),
    }
    with pytest.raises(InUse) as refusal:
        calls[operation]()
    assert "10 forks" in refusal.value.message
    assert "fork-0, fork-1" in refusal.value.message
    assert "and 2 more" in refusal.value.message
    assert store.get("oak") == template
    assert store.journal() == []


def test_a_standby_with_forks_may_go(store: Store) -> None:
    """Only a template is protected: forks of a standby own what they share with it."""
    parent = recorded(store, "oak", State.STANDBY)
    recorded(store, "fork", parent=parent.id)
    store.begin(parent, "rm")
    assert store.journal_entry(parent.id) is not None


def test_the_journal_names_operation_and_process(store: Store) -> None:
    """One row per instance, with who is at work; the commit of the outcome removes it."""
    instance = recorded(store)
    assert store.journal_entry(instance.id) is None
    store.begin(instance, "stop")
    store.begin(instance, "standby")
    entry = store.journal_entry(instance.id)
    assert entry is not None
    assert (entry.operation, (entry.owner_pid, entry.owner_ticks)) == ("standby", own_process())
    assert store.journal() == [entry]
    store.save(msgspec.structs.replace(instance, state=State.STANDBY), done=True)
    assert store.journal() == []
    assert store.get("oak").state is State.STANDBY


def test_nothing_is_saved_for_an_instance_that_is_gone(store: Store) -> None:
    """A record that another process removed does not come back to life."""
    instance = recorded(store)
    store.forget(instance.id)
    store.forget(instance.id)
    with pytest.raises(NotFound):
        store.save(instance)
    assert store.instances() == []


def test_users_of_an_image_are_named(store: Store) -> None:
    """`image rm` asks here."""
    image = make_instance().image
    recorded(store, "b")
    recorded(store, "a")
    recorded(store, "c", image="sha256:" + "1" * 64)
    assert store.users_of_image(image) == ["a", "b"]


def test_threads_and_stores_write_at_once(tmp_path: Path) -> None:
    """Two stores with four threads each: every record arrives, one of all takers gets a contended name, nobody sees a locked database."""
    path = tmp_path / "coppice.db"
    stores = [Store(path, own_process()) for _ in range(2)]
    outcomes: list[str] = []
    begin = threading.Barrier(8)

    def work(store: Store, number: int) -> None:
        begin.wait()
        for step in range(10):
            recorded(store, f"own-{number}-{step}")
        try:
            store.create([make_instance("contended")], "run")
            outcomes.append("mine")
        except NameTaken:
            outcomes.append("taken")

    threads = [threading.Thread(target=work, args=(stores[n % 2], n)) for n in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert sorted(outcomes) == ["mine"] + ["taken"] * 7
    assert len(stores[0].instances()) == 81
    for store in stores:
        store.close()


def test_a_commit_is_whole_after_a_crash(tmp_path: Path, store: Store) -> None:
    """A process that dies inside of a transaction leaves the state before it: SQLite's own promise, with our settings."""
    instance = recorded(store)
    program = (
        "import os, sqlite3, sys; db = sqlite3.connect(sys.argv[1], isolation_level=None); "
        "db.execute('BEGIN IMMEDIATE'); db.execute('DELETE FROM instances'); os.kill(os.getpid(), 9)"
    )
    killed = subprocess.run([sys.executable, "-c", program, str(tmp_path / "coppice.db")], check=False, timeout=30)
    assert killed.returncode == -9
    assert store.get("oak") == instance
