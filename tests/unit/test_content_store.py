"""The content store: entries are complete, read-only and never removed while used; killed processes
leave nothing permanent.
"""

from __future__ import annotations

import os
import signal
import stat
import subprocess
import sys
import threading
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

from coppice.content.store import STAGING, ContentStore
from coppice.errors import InUse, NotFound
from coppice.linux.files import sync
from coppice.state import locks
from coppice.stopping import WorkStopped, run


@pytest.fixture
def store(tmp_path: Path) -> ContentStore:
    """Return a store whose directory does not exist yet."""
    return ContentStore(tmp_path / "store")


def names(store: ContentStore) -> list[str]:
    """Return all names in the directory."""
    return sorted(path.name for path in store.root.iterdir())


def at_once(act: Callable[[], None]) -> None:
    """A guard that allows every removal."""
    act()


def a_tree(path: Path) -> None:
    """Make a directory as an entry."""
    (path / "below").mkdir(parents=True)
    (path / "below" / "file").write_text("content")
    (path / "link").symlink_to("/etc/passwd")


def test_a_missing_store_is_empty(store: ContentStore) -> None:
    """A look at a missing store does not make it."""
    assert (store.find("a"), store.entries(), store.sweep()) == (None, [], [])
    assert not store.root.exists()


def test_an_entry_is_made_once_and_read_only(store: ContentStore) -> None:
    """An entry is a file or a directory, and its links do not lead out of it."""
    file = store.make("file", lambda path: path.write_text("content"))
    tree = store.make("tree", a_tree)
    again = store.make("tree", lambda _: pytest.fail("the entry exists"))
    assert (again, store.find("file"), store.entries()) == (tree, file, [file, tree])
    assert names(store) == ["file", "tree"]
    modes = {path.name: stat.S_IMODE(path.lstat().st_mode) for path in (file, tree, *tree.rglob("*"))}
    assert modes == {"file": 0o444, "tree": 0o755, "below": 0o755}
    assert not (tree / "link").is_symlink()


@pytest.mark.parametrize("fill", [lambda path: path.write_text("content"), a_tree], ids=["file", "directory"])
def test_concurrent_makers_all_get_the_entry(store: ContentStore, fill: Callable[[Path], object]) -> None:
    """The last maker finds the entry of the first."""
    begin = threading.Barrier(6)

    def make(_: int) -> Path:
        def together(path: Path) -> None:
            fill(path)
            begin.wait(10)

        return store.make("entry", together)

    with ThreadPoolExecutor(6) as pool:
        assert len(set(pool.map(make, range(6)))) == 1
    assert names(store) == ["entry"]


@pytest.mark.parametrize("error", [OSError, WorkStopped])
def test_a_maker_that_fails_leaves_nothing(store: ContentStore, error: type[BaseException]) -> None:
    """The staging directory is removed, whatever ends the maker."""

    def fails(path: Path) -> None:
        a_tree(path)
        raise error

    with pytest.raises(error):
        store.make("tree", fails)
    assert names(store) == []


@pytest.mark.parametrize("key", ["", ".", "..", ".hidden", "a/b", "../a", "a" * 300, "a\n"])
def test_a_key_never_leads_out_of_the_store(store: ContentStore, key: str) -> None:
    """A key may come from outside, so it must not become a path."""
    store.make("a", a_tree)
    assert store.find(key) is None
    with pytest.raises(NotFound):
        store.remove(key, at_once)


def test_a_used_entry_is_not_removed(store: ContentStore) -> None:
    """The guard decides, and an entry that it releases is removed at once."""
    entry = store.make("tree", a_tree)

    def used(_: Callable[[], None]) -> None:
        raise InUse("the entry is used", hint="")

    with pytest.raises(InUse):
        store.remove("tree", used)
    assert names(store) == ["tree"]
    assert store.remove("tree", used, dry_run=True).path == entry
    assert store.remove("tree", at_once).size_bytes > 0
    assert names(store) == []


def test_the_record_and_the_name_appear_together(store: ContentStore) -> None:
    """A guard that refuses keeps the entry from appearing."""

    def taken(_: Callable[[], None]) -> None:
        assert names(store) != ["tree"]
        raise InUse("the name is taken", hint="")

    with store.staging() as stage:
        a_tree(stage / "new")
        with pytest.raises(InUse):
            store.publish(stage / "new", "tree", taken)
    assert names(store) == []


KILLED = """
import os, signal, sys
from pathlib import Path
from coppice.content.store import ContentStore
store = ContentStore(Path(sys.argv[1]))
def fill(path):
    path.mkdir()
    (path / "half").write_text("half")
    if sys.argv[2] == "making":
        print("ready", flush=True); sys.stdin.read()
store.make("entry", fill)
def guard(act):
    act()
    print("ready", flush=True); sys.stdin.read()
store.remove("entry", guard)
"""


@pytest.mark.parametrize("when", ["making", "removing"])
def test_leftovers_of_a_killed_process_are_swept(store: ContentStore, when: str) -> None:
    """The lock decides, not the age: a staging directory stays while its process lives, and is
    swept after the process is killed.
    """
    argv = [sys.executable, "-c", KILLED, str(store.root), when]
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(sys.path)}
    with subprocess.Popen(argv, stdin=subprocess.PIPE, stdout=subprocess.PIPE, env=environment) as process:
        assert process.stdout is not None
        assert process.stdout.readline() == b"ready\n"
        assert store.sweep() == []
        assert [name[: len(STAGING)] for name in names(store)] == [STAGING]
        process.send_signal(signal.SIGKILL)
        process.wait(20)
    (would,) = store.sweep(dry_run=True)
    assert would.path.exists()
    assert store.sweep() == [would]
    assert names(store) == []


def test_a_sweep_between_the_making_and_the_locking_of_a_directory(
    store: ContentStore, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A new staging directory briefly looks like a leftover: if a sweep removes it, the maker takes
    another one.
    """
    try_lock = locks.try_lock
    swept: list[Path] = []

    def late(path: Path, *, create: bool = True) -> int | None:
        if not swept:
            monkeypatch.setattr(locks, "try_lock", try_lock)
            swept.extend(removed.path for removed in store.sweep())
        return try_lock(path, create=create)

    monkeypatch.setattr(locks, "try_lock", late)
    with store.staging() as stage:
        assert len(swept) == 1
        assert stage.is_dir()
        assert stage not in swept
        assert store.sweep() == []
    assert names(store) == []


def test_the_data_is_durable_before_the_name(store: ContentStore, monkeypatch: pytest.MonkeyPatch) -> None:
    """After a power cut an entry is complete or absent."""
    synced: list[str] = []

    def seen(path: Path) -> None:
        synced.append(f"{path.name}{' published' if (store.root / 'tree').exists() else ''}")
        sync(path)

    monkeypatch.setattr("coppice.content.store.sync", seen)
    store.make("tree", a_tree)
    assert synced == ["tree", "below", "file", "store published"]


def test_freezing_a_large_tree_can_be_stopped(store: ContentStore) -> None:
    """Freezing syncs thousands of files one by one, so a cancellation must stop it."""
    flag = threading.Event()

    def fill(path: Path) -> None:
        a_tree(path)
        flag.set()

    with pytest.raises(WorkStopped):
        run(flag, store.make, "tree", fill)
    assert names(store) == []
