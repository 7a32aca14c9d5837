"""Records and journal: a committed change is complete, and an invalid one is refused within the
transaction.
"""

from __future__ import annotations

import contextlib
import random
import sqlite3
import subprocess
import sys
import threading
from collections.abc import Callable, Iterator
from pathlib import Path

import msgspec
import pytest

from coppice.errors import InUse, NameTaken, NotFound
from coppice.model import Instance, State
from coppice.state.journal import JournalOperation
from coppice.state.load import LOAD, Load
from coppice.state.store import Store
from coppice.vmm.process import own_process
from fakes.records import make_instance


@pytest.fixture
def store(tmp_path: Path) -> Iterator[Store]:
    """Return a new store."""
    store = Store(tmp_path / "coppice.db", own_process())
    yield store
    store.close()


def recorded(store: Store, name: str = "oak", state: State = State.STOPPED, **changes: object) -> Instance:
    """Return an instance in the store without an operation in progress."""
    (instance,) = store.create([make_instance(name, state, **changes)], JournalOperation.RUN)
    store.save(instance, done=True)
    return instance


def test_a_record_is_read_back_unchanged(store: Store) -> None:
    """A record is read by id and by name, with every field."""
    instance = recorded(store, tags={"a": "b"}, parent="x" * 24, public=True)
    assert store.get(instance.id) == instance
    assert store.get("oak") == instance
    assert store.instances() == [instance]


def test_a_list_is_read_again_when_any_process_has_written(store: Store) -> None:
    """By this store or another one, also by a raw connection. Until then the records are the same objects."""
    with contextlib.closing(Store(store.path, own_process())) as other:
        recorded(store)
        (oak,) = store.instances()
        assert store.instances()[0] is oak
        store.instances().clear()
        assert len(store.instances()) == 1
        for writer in (store, other):
            changed = msgspec.structs.replace(oak, tags={"by": str(id(writer))})
            writer.save(changed)
            assert store.instances() == other.instances() == [changed]
        recorded(other, "elm")
        assert [each.name for each in store.instances()] == ["oak", "elm"]
        with contextlib.closing(sqlite3.connect(store.path)) as connection, connection:
            connection.execute("DELETE FROM instances WHERE name = 'elm'")
        assert [each.name for each in store.instances()] == ["oak"]


def test_an_id_takes_precedence_over_a_name(store: Store) -> None:
    """An instance whose name is another's id cannot stand in for it."""
    victim = recorded(store, "victim")
    impostor = recorded(store, victim.id)
    assert store.get(victim.id) == victim
    assert store.get(impostor.id) == impostor


def test_an_unknown_reference_is_not_found(store: Store) -> None:
    """The message contains the requested name."""
    with pytest.raises(NotFound, match="elm"):
        store.get("elm")


def test_a_fan_out_takes_all_names_or_none(store: Store) -> None:
    """A fan-out with one used name records neither a child nor a journal row."""
    recorded(store, "b")
    with pytest.raises(NameTaken, match="'b'"):
        store.create([make_instance("a"), make_instance("b"), make_instance("c")], JournalOperation.FORK)
    assert [instance.name for instance in store.instances()] == ["b"]
    assert store.journal() == []


def test_a_check_in_the_transaction_can_refuse(store: Store) -> None:
    """An error in the check undoes the records."""

    def refuse() -> None:
        raise InUse("no")

    with pytest.raises(InUse):
        store.create([make_instance()], JournalOperation.RUN, check=refuse)
    assert store.instances() == []


def test_forks_are_counted_from_the_records(store: Store) -> None:
    """The fork count is derived from the records, so nothing else has to be updated."""
    parent = recorded(store, "oak", State.TEMPLATE)
    forks = [recorded(store, f"oak-{n}", parent=parent.id) for n in range(3)]
    assert store.children(parent.id) == forks
    assert store.fork_counts() == {parent.id: 3}
    store.forget(forks[0].id)
    assert store.fork_counts() == {parent.id: 2}


@pytest.mark.parametrize("operation", ["demote", "rm"])
def test_a_template_with_forks_cannot_be_demoted_or_removed(store: Store, operation: str) -> None:
    """Demotion and removal are refused within their transaction; the error names the first forks
    and counts the rest.
    """
    template = recorded(store, "oak", State.TEMPLATE)
    for number in range(10):
        recorded(store, f"fork-{number}", parent=template.id)
    calls: dict[str, Callable[[], object]] = {
        "demote": lambda: store.promote(template, State.STANDBY),
        "rm": lambda: store.begin(template, JournalOperation.REMOVE),
    }
    with pytest.raises(InUse) as refusal:
        calls[operation]()
    assert "10 forks" in refusal.value.message
    assert "fork-0, fork-1" in refusal.value.message
    assert "and 2 more" in refusal.value.message
    assert store.get("oak") == template
    assert store.journal() == []


def test_a_standby_with_forks_can_be_removed(store: Store) -> None:
    """Only a template is protected: forks of a standby own the files that they share with it."""
    parent = recorded(store, "oak", State.STANDBY)
    recorded(store, "fork", parent=parent.id)
    store.begin(parent, JournalOperation.REMOVE)
    assert store.journal_entry(parent.id) is not None


def test_the_journal_names_the_operation_and_the_process(store: Store) -> None:
    """Each instance has one row with the working process; the commit of the outcome removes it."""
    instance = recorded(store)
    assert store.journal_entry(instance.id) is None
    store.begin(instance, JournalOperation.STOP)
    store.begin(instance, JournalOperation.STANDBY)
    entry = store.journal_entry(instance.id)
    assert entry is not None
    assert (entry.operation, (entry.owner_pid, entry.owner_ticks)) == ("standby", own_process())
    assert store.journal() == [entry]
    store.save(msgspec.structs.replace(instance, state=State.STANDBY), done=True)
    assert store.journal() == []
    assert store.get("oak").state is State.STANDBY


def test_nothing_is_saved_for_a_removed_instance(store: Store) -> None:
    """A record that another process removed does not reappear."""
    instance = recorded(store)
    store.forget(instance.id)
    store.forget(instance.id)
    with pytest.raises(NotFound):
        store.save(instance)
    assert store.instances() == []


def test_threads_and_stores_write_concurrently(tmp_path: Path) -> None:
    """Two stores with four threads each write every record, one of them gets a contested name, and
    none finds the database locked.
    """
    path = tmp_path / "coppice.db"
    stores = [Store(path, own_process()) for _ in range(2)]
    outcomes: list[str] = []
    begin = threading.Barrier(8)

    def work(store: Store, number: int) -> None:
        begin.wait()
        for step in range(10):
            recorded(store, f"own-{number}-{step}")
        try:
            store.create([make_instance("contended")], JournalOperation.RUN)
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
    """A process that dies in a transaction leaves the previous state: SQLite guarantees this with
    Coppice's settings.
    """
    instance = recorded(store)
    program = (
        "import os, sqlite3, sys; db = sqlite3.connect(sys.argv[1], isolation_level=None); "
        "db.execute('BEGIN IMMEDIATE'); db.execute('DELETE FROM instances'); os.kill(os.getpid(), 9)"
    )
    killed = subprocess.run([sys.executable, "-c", program, str(tmp_path / "coppice.db")], check=False, timeout=30)
    assert killed.returncode == -9
    assert store.get("oak") == instance


def test_a_count_looks_at_no_instance_but_those_that_start(tmp_path: Path) -> None:
    """Each fork counts the running instances, while it holds the database. Triggers keep the sums."""
    path = tmp_path / "coppice.db"
    Store(path, own_process()).close()
    with contextlib.closing(sqlite3.connect(path)) as connection:
        plan = [row[3] for row in connection.execute(f"EXPLAIN QUERY PLAN {LOAD}")]
    assert {"SCAN kept", "SCAN journal"} <= set(plan), plan
    assert all(step.startswith("SEARCH") for step in plan if "instances" in step), plan


def test_the_sums_follow_each_change(store: Store) -> None:
    """Whatever happens to instances, the kept sums are those of the records."""
    rng = random.Random(7)
    alive: list[Instance] = []
    for step in range(200):
        what = rng.choice(("make", "make", "change", "change", "change", "remove"))
        if what == "make" or not alive:
            made = make_instance(f"i{step}", rng.choice(list(State)), vmm_bytes=rng.randrange(100) << 20)
            alive += store.create([made], JournalOperation.RUN)
        elif what == "change":
            at = rng.randrange(len(alive))
            machine = msgspec.structs.replace(alive[at].machine, memory_bytes=rng.randrange(1, 100) << 20)
            alive[at] = msgspec.structs.replace(
                alive[at], state=rng.choice(list(State)), machine=rng.choice((machine, alive[at].machine))
            )
            store.save(alive[at], done=rng.random() < 0.5)
        else:
            store.forget(alive.pop(rng.randrange(len(alive))).id)
        running = [each for each in alive if each.state not in (State.STOPPED, State.STANDBY, State.TEMPLATE)]
        assert store.load() == Load(
            instances=len(alive),
            running=len(running),
            ram_bytes=sum(each.machine.memory_bytes for each in running),
            vmm_bytes=sum(each.vmm_bytes for each in running),
        )
