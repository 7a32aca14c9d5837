"""`coppice storage` makes, grows and removes a real file system, and leaves nothing behind."""

from __future__ import annotations

import os
import tempfile
from collections.abc import Iterator
from pathlib import Path

import pytest

from coppice import storage
from coppice.errors import HostCannot, InUse, NoSpace, NotFound, Refused, UsageError
from coppice.linux.clone import clone_file
from coppice.model import MIB

SIZE = 512 * MIB


@pytest.fixture
def place() -> Iterator[Path]:
    """A directory on a file system without reflinks, where files can be loop-mounted."""
    with tempfile.TemporaryDirectory(prefix="coppice-storage-", dir="/var/tmp") as directory:
        yield Path(directory).resolve()
        assert not any(directory in line for line in Path("/proc/self/mountinfo").read_text().splitlines())


@pytest.fixture
def units(place: Path) -> Path:
    """A directory for mount units that no systemd reads."""
    (place / "units").mkdir()
    return place / "units"


@pytest.fixture
def home(place: Path, units: Path) -> Iterator[Path]:
    """The path of a data directory. Its file system is removed with the test."""
    home = place / "home"
    yield home
    if os.path.ismount(home):
        storage._run("umount", str(home))


def test_it_has_reflinks_grows_and_goes_away(home: Path, units: Path) -> None:
    """The file is sparse, the unit mounts it again, settings outlive it."""
    made = storage.init(home, SIZE, units=units)
    assert Path(made.file).stat().st_blocks * 512 < SIZE // 4
    assert os.path.ismount(home)
    assert home.stat().st_mode & 0o777 == 0o700
    (home / "one").write_bytes(b"x" * MIB)
    assert clone_file(home / "one", home / "two").method == "reflink"
    assert made.unit is not None
    text = Path(made.unit).read_text()
    assert f"What={home}.xfs" in text
    assert f"Where={home}" in text
    assert (units / "local-fs.target.wants" / Path(made.unit).name).resolve() == Path(made.unit)

    before = os.statvfs(home).f_blocks
    assert storage.grow(home, 2 * SIZE).size_bytes == 2 * SIZE
    assert os.statvfs(home).f_blocks > 1.5 * before
    assert storage.grow(home, 2 * SIZE).size_bytes == 2 * SIZE  # a repeated call
    with pytest.raises(UsageError, match="cannot shrink"):
        storage.grow(home, SIZE)

    (home / "config.toml").write_text("[budgets]\n")
    storage.remove(home, units=units)
    assert not Path(made.file).exists()
    assert [each.name for each in home.iterdir()] == ["config.toml"]
    assert list(units.iterdir()) == []
    with pytest.raises(NotFound):
        storage.remove(home, units=units)
    storage.init(home, SIZE, units=units)
    assert (home / "config.toml").read_text() == "[budgets]\n"
    storage.remove(home, units=units)


def test_the_unit_of_a_path_with_special_characters(home: Path, units: Path) -> None:
    """A space needs no quotes in What= and Where=; "%" begins a specifier. No other line has a path."""
    home = home.with_name("50% a b")
    file = storage.file_of(home)
    unit = storage._write_unit(home, file, units)
    assert unit is not None
    where = str(home).replace("%", "%%")
    lines = [line for line in Path(unit).read_text().splitlines() if "/" in line]
    assert lines == [f"What={where}.xfs", f"Where={where}"]
    (units / "local-fs.target.wants/other.mount").touch()
    storage._remove_unit(home, units)
    assert [each.name for each in units.rglob("*")] == ["local-fs.target.wants", "other.mount"]


def test_a_used_file_system_is_not_removed(home: Path, units: Path) -> None:
    """Machines and images keep it, and so does a process that works in it."""
    storage.init(home, SIZE, units=units)
    (home / "instances/one").mkdir(parents=True)
    with pytest.raises(InUse, match="1 instances"):
        storage.remove(home, units=units)
    (home / "instances/one").rmdir()
    with (home / "open").open("w"), pytest.raises(InUse, match="in use"):
        storage.remove(home, units=units)
    assert os.path.ismount(home)
    storage.remove(home, units=units)


def test_what_a_killed_call_leaves_is_finished(home: Path, units: Path) -> None:
    """A file that is not mounted, as after a reboot without systemd, is mounted or removed."""
    file = Path(storage.init(home, SIZE, units=units).file)
    (home / "volumes/one").mkdir(parents=True)
    storage._run("umount", str(home))
    with pytest.raises(InUse, match="1 volumes"):
        storage.remove(home, units=units)
    storage._run("umount", str(home))
    storage.init(home, 2 * SIZE, units=units)
    assert file.stat().st_size == SIZE
    (home / "volumes/one").rmdir()
    storage._run("umount", str(home))
    storage.remove(home, units=units)
    assert not file.exists()


def test_it_refuses_with_a_reason(home: Path, units: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A directory in use, an impossible size, one file system in another, and another user."""
    (home / "instances/one").mkdir(parents=True)
    with pytest.raises(InUse, match="1 instances") as caught:
        storage.init(home, SIZE, units=units)
    assert f"mv {home} {home}.old" in str(caught.value.hint)
    (home / "instances/one").rmdir()
    (home / "instances").rmdir()
    with pytest.raises(UsageError):
        storage.init(home, MIB, units=units)
    with pytest.raises(NoSpace):
        storage.init(home, 1 << 60, units=units)
    with pytest.raises(NotFound):
        storage.grow(home, SIZE)
    storage.init(home, SIZE, units=units)
    with pytest.raises(Refused, match="already"):
        storage.init(home, SIZE, units=units)
    with pytest.raises(Refused, match="reflinks already"):
        storage.init(home / "inner", SIZE, units=units)
    monkeypatch.setattr(os, "geteuid", lambda: 1000)
    for call in (lambda: storage.init(home, SIZE), lambda: storage.grow(home, SIZE), lambda: storage.remove(home)):
        with pytest.raises(HostCannot, match="only root"):
            call()


@pytest.mark.parametrize("step", ["mkfs.xfs", "mount", "unit"])
def test_a_failure_leaves_nothing(home: Path, units: Path, monkeypatch: pytest.MonkeyPatch, step: str) -> None:
    """Each step of `init` is undone."""
    run = storage._run

    def failing(program: str, *arguments: str) -> None:
        if program == step:
            raise HostCannot(f"{program} failed")
        run(program, *arguments)

    def no_unit(*_: object) -> str:
        raise OSError(30, "Read-only file system")

    monkeypatch.setattr(storage, "_run", failing)
    if step == "unit":
        monkeypatch.setattr(storage, "_write_unit", no_unit)
    with pytest.raises(HostCannot):
        storage.init(home, SIZE, units=units)
    assert [each.name for each in home.parent.iterdir()] == ["units"]


@pytest.mark.parametrize(
    ("path", "name"),
    [
        ("/var/lib/coppice", "var-lib-coppice.mount"),
        ("/srv/a-b c", "srv-a\\x2db\\x20c.mount"),
        ("/.hidden/é", "\\x2ehidden-\\xc3\\xa9.mount"),
    ],
)
def test_names_of_units(path: str, name: str) -> None:
    """They are those of `systemd-escape --path --suffix=mount`."""
    assert storage.unit_name(Path(path)) == name


def test_a_mount_unit_of_the_administrator_stays(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Its name is that of the mount point, so it may exist already."""
    home, units = tmp_path / "home", tmp_path / "units"
    units.mkdir()
    unit = units / storage.unit_name(home)
    unit.write_text("[Mount]\nWhat=/dev/sdb1\n")
    monkeypatch.setattr(storage, "_require_root", lambda: None)
    with pytest.raises(Refused, match="Coppice has not made it"):
        storage.init(home, SIZE, units=units)
    storage._remove_unit(home, units)
    assert unit.read_text() == "[Mount]\nWhat=/dev/sdb1\n"
    assert not home.exists()
