"""Tab completion is quick and correct, and never prints a traceback into the prompt."""

from __future__ import annotations

import asyncio
import os
import subprocess
import sys
import tarfile
from pathlib import Path

import msgspec
import pytest

from cli_host import instance
from coppice.images.catalog import BuildOptions
from coppice.model import SnapshotKind, State, Volume
from coppice.names import new_id
from coppice.snapshots.snapshot import new_snapshot
from coppice.state.journal import JournalOperation
from coppice.state.layout import Layout
from coppice.state.store import Store
from image_archives import open_catalog
from kernel_files import bzimage

SOURCE = Path(__file__).parents[2] / "src"


@pytest.fixture
def home(tmp_path: Path) -> Path:
    """Make a data directory with three instances and an image."""
    layout = Layout(tmp_path / "home")
    layout.create()
    store = Store(layout.database, (1, 1))
    store.create([instance("web-1"), instance("web-2", State.TEMPLATE), instance("db")], JournalOperation.RUN)
    volume = Volume(id=new_id(), name="data", size_bytes=1, created_at=0)
    store.volumes.create(volume, JournalOperation.VOLUME, lambda: None)
    store.close()
    (tmp_path / "etc").mkdir()
    with tarfile.open(tmp_path / "root.tar", "w") as archive:
        archive.add(tmp_path / "etc", "etc")
    asyncio.run(open_catalog(layout.home).import_any("team/debian:12", tmp_path / "root.tar"))
    kernel = layout.kernels / "custom-6.1-0011aabb"
    kernel.mkdir()
    (kernel / "vmlinuz").write_bytes(bzimage(release="6.1"))
    return layout.home


def complete(home: Path, line: str) -> list[str]:
    """Return what bash would offer at the end of a line."""
    words = line.split(" ")
    env = {
        **os.environ,
        "PYTHONPATH": str(SOURCE),
        "COPPICE_HOME": str(home),
        "_COPPICE_COMPLETE": "bash_complete",
        "COMP_WORDS": line,
        "COMP_CWORD": str(len(words) - 1),
    }
    ended = subprocess.run([sys.executable, "-m", "coppice"], env=env, capture_output=True, timeout=30, check=False)
    assert ended.stderr == b""
    return [offer.partition(",")[2] for offer in ended.stdout.decode().split()]


@pytest.mark.parametrize(
    ("line", "offered"),
    [
        ("coppice inspect web", ["web-1", "web-2"]),
        ("coppice rm web-1 d", ["db"]),
        ("coppice demote ", ["web-2"]),
        ("coppice cp web", ["web-1:"]),
        ("coppice run te", ["team/debian:12"]),
        ("coppice volume rm d", ["data"]),
        ("coppice volume inspect x", []),
        ("coppice run debian --volume da", ["data:"]),
        ("coppice kernel rm c", ["custom-6.1-0011aabb"]),
        ("coppice run debian --kernel custom-7", []),
        ("coppice ls --state st", ["stopped", "standby"]),
        ("coppice ls --state St", ["Stopped", "Standby"]),
        ("coppice inspect %", []),
        ("coppice sta", ["standby", "start", "stats"]),
    ],
)
def test_names_are_completed(home: Path, line: str, offered: list[str]) -> None:
    """Instances, templates, images, volumes, kernels and states are offered where they fit."""
    assert complete(home, line) == offered


@pytest.fixture
def shared(home: Path) -> Path:
    """Add private and shared objects of two owners."""
    layout = Layout(home)
    store = Store(layout.database, (1, 1))
    mine = instance("a-vm", owner="alice")
    made = [
        mine,
        instance("b-vm", owner="bob"),
        instance("b-warm", State.TEMPLATE, owner="bob", public=True),
        instance("b-odd", owner="bob", public=True),
    ]
    store.create(made, JournalOperation.RUN)
    for name, owner in (("a-kept", "alice"), ("b-kept", "bob")):
        kept = msgspec.structs.replace(new_snapshot(mine, name, SnapshotKind.STOPPED, {}), owner=owner)
        store.snapshots.create(kept, JournalOperation.SNAPSHOT)
        store.snapshots.finish(kept)
    store.close()
    tar = home.parent / "root.tar"
    for name, owner, public in (("a-image", "alice", False), ("b-image", "bob", False), ("b-open", "bob", True)):
        options = BuildOptions(owner=owner, public=public)
        asyncio.run(open_catalog(layout.home).import_any(name, tar, options=options))
    return home


@pytest.mark.parametrize(
    ("owner", "line", "offered"),
    [
        ("alice", "inspect ", ["a-vm"]),
        ("alice", "rm b", []),
        ("alice", "fork ", ["a-vm", "b-warm"]),
        ("alice", "snapshot inspect ", ["a-kept"]),
        ("alice", "run ", ["a-image", "b-open"]),
        ("alice", "cp a", ["a-vm:"]),
        ("bob", "demote ", ["b-warm"]),
        ("carol", "inspect ", []),
        ("", "snapshot rm ", ["a-kept", "b-kept"]),
        ("", "fork b", ["b-odd", "b-vm", "b-warm"]),
    ],
)
@pytest.mark.parametrize("how", ["option", "variable"])
def test_an_owner_is_offered_only_names_it_may_use(
    shared: Path, monkeypatch: pytest.MonkeyPatch, owner: str, line: str, offered: list[str], how: str
) -> None:
    """Names hidden from an owner are not offered to it; the operator is offered all names."""
    if how == "variable":
        monkeypatch.setenv("COPPICE_OWNER", owner)
    said = f"--owner {owner} " if how == "option" and owner else ""
    assert sorted(complete(shared, f"coppice {said}{line}")) == offered


def test_completion_follows_home(home: Path, tmp_path: Path) -> None:
    """Names come from the data directory that --home on the line gives."""
    assert complete(tmp_path, f"coppice --home {home} inspect d") == ["db"]


@pytest.mark.parametrize("state", ["missing", "empty", "garbage"])
def test_completion_never_fails_and_writes_nothing(tmp_path: Path, state: str) -> None:
    """With a missing or damaged data directory, nothing is offered, printed or made."""
    home = tmp_path / "home"
    if state != "missing":
        home.mkdir()
    if state == "garbage":
        (home / "coppice.db").write_bytes(b"not a database" * 100)
    before = sorted(tmp_path.rglob("*"))
    assert complete(home, "coppice inspect ") == []
    assert complete(home, "coppice run ") == []
    assert sorted(tmp_path.rglob("*")) == before
