"""Background hashing: each capture gets its SHA-256 without a request, and a hashing process that
dies does no harm.
"""

from __future__ import annotations

import asyncio
import contextlib
import os
import shutil
import signal
import subprocess
from pathlib import Path
from typing import Any

import msgspec
import pytest

from conftest import HostFactory
from coppice.client import AsyncHost
from coppice.errors import UsageError
from coppice.host import hashing
from coppice.integrity import digests
from coppice.linux.clone import clone_file
from coppice.memory import memfile
from coppice.model import MIB, MemFile, Sharing, State, VmmProcess
from coppice.requests import ForkRequest, RestoreRequest, RmRequest, SnapshotRequest, StandbyRequest, StopRequest
from coppice.state.journal import JournalOperation
from coppice.state.settings import hashes_in_background
from coppice.vmm import driver as files
from coppice.vmm import process as processes
from coppice.vmm.launcher import PROGRAM as LAUNCHER
from fakes.driver import FakeDriver
from fakes.hosting import fingerprint, make, memory_of
from fakes.records import make_capture, make_instance
from fakes.rooms import DEADLINES, open_rooms

LONG = 256 << 30  # sparse; minutes to hash
DEADLINE_S = 30.0


@pytest.fixture(autouse=True)
def hashing_on(fake_home: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Switch hashing on at normal priority; at the lowest it would be late on a busy host."""
    monkeypatch.setenv("COPPICE_HASHING", "on")
    monkeypatch.setattr(hashing, "step_aside", lambda _: None)


def hashers(home: Path) -> list[VmmProcess]:
    """Return the processes that hash for this data directory."""
    found: list[VmmProcess] = []
    for entry in Path("/proc").iterdir():
        with contextlib.suppress(OSError):
            words = (entry / "cmdline").read_bytes().split(b"\0") if entry.name.isdigit() else []
            if digests.__name__.encode() in words and str(home).encode() in words:
                pid = int(entry.name)
                executable = str((entry / "exe").readlink())
                found.append(VmmProcess(pid=pid, start_ticks=processes.start_ticks(pid) or 0, executable=executable))
    return found


def sums(host: AsyncHost, *names: str) -> set[str | None]:
    """Return the recorded digests of these instances."""
    found = [host.local.rooms.store.get(name).mem_file for name in names]
    return {mem_file.sha256 if mem_file else "no memory" for mem_file in found}


async def hashed(host: AsyncHost) -> None:
    """Wait until nothing lacks its digest; fail if that takes too long."""
    async with asyncio.timeout(DEADLINE_S):
        # Do not wait for the hashers' lock: its holder counts as a hasher, so no other would be
        # started.
        while await asyncio.to_thread(digests.any_lacking, host.local.rooms.layout, host.local.rooms.store):  # noqa: ASYNC110 - the work of another process
            await asyncio.sleep(0.02)


async def hasher(home: Path) -> VmmProcess:
    """Wait until one hashing process runs, and return it. Another may just be ending, and the launcher
    may not have become it yet.
    """
    async with asyncio.timeout(DEADLINE_S):
        while len(found := hashers(home)) != 1 or found[0].executable.endswith(LAUNCHER):  # noqa: ASYNC110 - a start has no event
            await asyncio.sleep(0.01)
    return found[0]


async def gone(process: VmmProcess) -> None:
    """Wait until the process has ended."""
    await asyncio.wait_for(processes.wait_exit(process), DEADLINE_S)


def place_long(host: AsyncHost) -> Path:
    """Record an instance whose memory takes minutes to hash; return its directory."""
    instance = make_instance("long", State.STANDBY)
    directory = host.local.rooms.directory(instance.id)
    directory.mkdir()
    memory = directory / files.MEMORY
    with memory.open("wb") as file:
        file.truncate(LONG)
    memory.chmod(0o444)
    status = memory.stat()
    mem_file = MemFile(inode=status.st_ino, device=status.st_dev, size_bytes=LONG, sharing=Sharing.OWN)
    record = msgspec.structs.replace(instance, capture=make_capture(mem_file))
    host.local.rooms.store.create([record], JournalOperation.RUN)
    host.local.rooms.store.save(record, done=True)
    return directory


async def test_a_capture_gets_its_digest_and_verify_names_a_later_change(fake_host: AsyncHost) -> None:
    """The recorded digest is the plain SHA-256 of the file.

    It is computed without a request, so the first verify has it to compare with.
    """
    oak = await make(fake_host, State.STANDBY)
    await hashed(fake_host)
    memory = memory_of(fake_host, oak)
    assert sums(fake_host, "oak") == {fingerprint(memory)[3]}
    memory.chmod(0o644)
    with memory.open("r+b") as file:
        file.seek(4096)
        file.write(b"\x5a")
    memory.chmod(0o444)
    report = await fake_host.verify()
    assert report.recorded == 0
    ((name, file_name),) = [(found.name, found.file) for found in report.differences]
    assert (name, file_name) == ("oak", files.MEMORY)


async def test_all_that_share_a_file_get_its_digest(fake_host: AsyncHost) -> None:
    """Forks made before the digest was known get it too, also while they run.

    So do both files of a snapshot.
    """
    await make(fake_host, State.TEMPLATE)
    await fake_host.call(ForkRequest(instance="oak", names=["ash"]))
    await fake_host.call(ForkRequest(instance="oak", names=["elm"], target=State.STANDBY))
    kept = await fake_host.call(SnapshotRequest(instance="oak", name="kept"))
    await hashed(fake_host)
    (digest,) = sums(fake_host, "oak", "ash", "elm")
    found = (await fake_host.snapshots.inspect("kept")).snapshot
    assert found.mem_file
    assert found.mem_file.sha256 == digest
    assert found.disk_sha256 == fingerprint(fake_host.local.rooms.layout.snapshot(kept.id) / files.OVERLAY_DISK)[3]
    assert (await fake_host.verify()).recorded == 0


async def test_a_shared_file_is_read_once(fake_host: AsyncHost, monkeypatch: pytest.MonkeyPatch) -> None:
    """A file that several instances share is hashed once, and each records the digest."""
    oak = await make(fake_host, State.TEMPLATE)
    forks = (await fake_host.call(ForkRequest(instance="oak", count=3, target=State.STANDBY))).instances
    await hashed(fake_host)
    for each in (oak, *forks):
        fake_host.local.rooms.store.save(each)  # without its digest
    read: list[Path] = []
    sha256 = memfile.sha256

    def counted(path: Path, **options: Any) -> str | None:
        read.append(path)
        return sha256(path, **options)

    monkeypatch.setattr(memfile, "sha256", counted)
    await digests.Digests(fake_host.local.rooms.layout, fake_host.local.rooms.store).compute()
    assert len(read) == 1
    assert len(sums(fake_host, "oak", *(fork.name for fork in forks)) - {None}) == 1
    assert None not in sums(fake_host, "oak", *(fork.name for fork in forks))


async def test_captures_of_running_machines_get_digests_too(fake_host: AsyncHost) -> None:
    """A fork --from-running and a second capture of a fork are hashed like any other capture."""
    await make(fake_host, State.RUNNING)
    await fake_host.call(ForkRequest(instance="oak", names=["ash"], from_running=True))
    await fake_host.call(StandbyRequest(instance="ash"))
    await hashed(fake_host)
    assert None not in sums(fake_host, "oak", "ash")
    assert (await fake_host.verify()).differences == ()


async def test_a_running_hasher_takes_later_captures(fake_host: AsyncHost) -> None:
    """A capture made while a hasher runs starts no second hasher, also on another host, and still
    gets its digest.
    """
    directory = place_long(fake_host)
    await make(fake_host, State.STANDBY, "ash")
    one = await hasher(fake_host.home)
    os.kill(one.pid, signal.SIGSTOP)
    await make(fake_host, State.STANDBY, "oak")
    await fake_host.call(ForkRequest(instance="oak", names=["elm"], target=State.STANDBY))
    assert hashers(fake_host.home) == [one]
    assert sums(fake_host, "oak", "elm") == {None}
    shutil.rmtree(directory)
    os.kill(one.pid, signal.SIGCONT)
    await gone(one)
    assert None not in sums(fake_host, "oak", "elm", "ash")


async def test_hashing_stops_when_the_file_is_removed(fake_host: AsyncHost) -> None:
    """When the last link is gone, the process ends and the space is freed."""
    place_long(fake_host)
    await make(fake_host, State.STANDBY)
    one = await hasher(fake_host.home)
    await fake_host.call(RmRequest(instance="long"))
    await gone(one)
    assert hashers(fake_host.home) == []


async def test_a_hasher_ends_when_its_data_directory_vanishes(fake_host: AsyncHost, tmp_path: Path) -> None:
    """The data directory is removed while its files are hashed; there is nothing left
    to report to.
    """
    place_long(fake_host)
    await make(fake_host, State.STOPPED)
    await fake_host.call(SnapshotRequest(instance="oak", name="kept"))
    one = await hasher(fake_host.home)
    for name in ("instances", "snapshots", "locks"):
        await asyncio.to_thread(shutil.rmtree, fake_host.home / name)
    await gone(one)
    for name in ("instances", "snapshots", "locks"):
        (fake_host.home / name).mkdir()


async def test_a_killed_hasher_is_followed_by_another(make_host: HostFactory) -> None:
    """SIGKILL leaves no lock and no partial digest.

    The next host starts a new hasher, which ends with that host.
    """
    async with make_host() as host:
        place_long(host)
        await make(host, State.STANDBY)
        one = await hasher(host.home)
        await processes.kill(one)
        assert sums(host, "long") == {None}
    async with make_host() as host:
        another = await hasher(host.home)
        assert another != one
    assert hashers(host.home) == []
    assert not processes.is_alive(another)


async def test_a_detached_hasher_outlives_its_host(driver: FakeDriver, fake_home: Path) -> None:
    """The command line detaches its hasher: the host does not wait for it, and the digest arrives
    from a session of its own.
    """
    options = {"driver": driver, "deadlines": DEADLINES, "open_rooms": open_rooms}
    async with AsyncHost(fake_home, background="detached", **options) as host:  # type: ignore[arg-type]
        directory = place_long(host)
        await make(host, State.STANDBY)
        one = await hasher(fake_home)
    assert processes.is_alive(one)
    assert os.getsid(one.pid) == one.pid
    assert {os.readlink(f"/proc/{one.pid}/fd/{number}") for number in (0, 1, 2)} == {"/dev/null"}  # noqa: PTH115
    shutil.rmtree(directory)
    await gone(one)
    async with AsyncHost(fake_home, background="off", **options) as host:  # type: ignore[arg-type]
        assert None not in sums(host, "oak")


def test_a_hasher_has_the_lowest_priority_for_cpu_and_disk() -> None:
    """Hashing must slow down forks that run at the same time as little as possible."""
    with subprocess.Popen(["sleep", "infinity"], start_new_session=True) as process:
        digests.step_aside(process.pid)
        assert os.getpriority(os.PRIO_PROCESS, process.pid) == 19
        assert subprocess.check_output(["ionice", "-p", str(process.pid)]).strip() == b"idle"
        group = Path(f"/proc/{process.pid}/autogroup")
        assert not group.exists() or group.read_text().split()[-1] in ("19", "")
        process.kill()


async def test_hashing_can_be_switched_off(
    make_host: HostFactory, monkeypatch: pytest.MonkeyPatch, fake_home: Path
) -> None:
    """The environment or config.toml switches hashing off.

    Then the first verify records the digests and reports that.
    """
    monkeypatch.setenv("COPPICE_HASHING", "off")
    async with make_host() as host:
        await make(host, State.STANDBY)
    monkeypatch.delenv("COPPICE_HASHING")
    (fake_home / "config.toml").write_text("[hashing]\nbackground = false\n")
    async with make_host() as host:
        await make(host, State.STANDBY, "elm")
        await host.call(ForkRequest(instance="elm", names=["ash"], target=State.STANDBY))
    async with make_host() as host:
        assert hashers(fake_home) == []
        assert sums(host, "oak", "elm", "ash") == {None}
        assert (await host.verify()).recorded == 3


@pytest.mark.parametrize(
    ("text", "word", "named"),
    [
        ("", "maybe", "COPPICE_HASHING"),
        ("[hashing]\nbackground = 'no'\n", "", "background"),
        ("[hashing]\nforeground = true\n", "", "foreground"),
        ("hashing = true\n", "", "hashing"),
    ],
)
def test_an_invalid_switch_is_named(tmp_path: Path, text: str, word: str, named: str) -> None:
    """A misspelt setting is an error that names it, not silently the default."""
    (tmp_path / "config.toml").write_text(text)
    with pytest.raises(UsageError, match=named):
        hashes_in_background(tmp_path, {"COPPICE_HASHING": word})


async def test_a_replaced_file_gets_no_digest(make_host: HostFactory, monkeypatch: pytest.MonkeyPatch) -> None:
    """Only the captured file gets a digest, so that verify names any other file."""
    monkeypatch.setenv("COPPICE_HASHING", "off")
    async with make_host() as host:
        oak = await make(host, State.STANDBY)
        memory = memory_of(host, oak)
        clone_file(memory, memory.with_name("other"), mode=0o444)
        memory.with_name("other").rename(memory)
        work = digests.Digests(host.local.rooms.layout, host.local.rooms.store)
        await work.compute()
        assert sums(host, "oak") == {None}
        assert work.todo() == []
        assert [found.file for found in (await host.verify()).differences] == [files.MEMORY]


async def test_a_digest_is_not_recorded_for_another_file(fake_host: AsyncHost, monkeypatch: pytest.MonkeyPatch) -> None:
    """If the instance gets another mem-file while its old one is hashed, the old digest is not
    recorded. A recorded digest is not changed either.
    """
    oak = await make(fake_host, State.STANDBY)
    await hashed(fake_host)
    store, memory = fake_host.local.rooms.store, memory_of(fake_host, oak)
    assert oak.mem_file
    assert store.record_sha256(oak.id, oak.mem_file.inode, "0" * 64) is False
    store.save(oak)  # without its digest
    read = memfile.sha256

    def overtaken(path: Path, **options: Any) -> str | None:
        digest = read(path, **options)
        clone_file(memory, memory.with_name("other"), mode=0o444)
        memory.with_name("other").rename(memory)
        assert oak.capture
        now = msgspec.structs.replace(oak.capture.mem_file, inode=memory.stat().st_ino)
        store.save(msgspec.structs.replace(oak, capture=msgspec.structs.replace(oak.capture, mem_file=now)))
        return digest

    monkeypatch.setattr(memfile, "sha256", overtaken)
    work = digests.Digests(fake_host.local.rooms.layout, store)
    monkeypatch.setattr(work, "todo", iter([work.todo(), []]).__next__)
    await work.compute()
    assert sums(fake_host, "oak") == {None}


def test_holes_are_hashed_as_zeros(tmp_path: Path) -> None:
    """The digest of a sparse file equals that of the same file without holes."""
    sparse, dense = tmp_path / "sparse", tmp_path / "dense"
    with sparse.open("wb") as file:
        file.seek(3 * MIB + 5)
        file.write(b"data")
        file.truncate(8 * MIB)
    dense.write_bytes(sparse.read_bytes())
    assert sparse.stat().st_blocks < dense.stat().st_blocks
    assert memfile.sha256(sparse) == fingerprint(dense)[3]


@pytest.mark.parametrize("then", ["stopped", "removed"])
async def test_a_late_digest_leaves_the_lock_of_a_living_instance(fake_host: AsyncHost, then: str) -> None:
    """A late digest removes the lock file of a removed instance only.

    Without its lock file, two processes could hold a living instance at once.
    """
    oak = await make(fake_host, State.STANDBY)
    assert oak.mem_file is not None
    await fake_host.call(RestoreRequest(instance="oak"))
    await (
        fake_host.call(StopRequest(instance="oak", grace_s=0))
        if then == "stopped"
        else fake_host.call(RmRequest(instance="oak"))
    )
    rooms = fake_host.local.rooms
    assert not await digests.record(rooms.layout, rooms.store, oak, oak.mem_file.inode, "0" * 64, deadline_s=5)
    assert rooms.layout.lock(oak.id).exists() == (then == "stopped")
