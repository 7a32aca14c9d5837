"""File locks exclude tasks, threads and processes alike, and the kernel frees them when a process
dies.
"""

from __future__ import annotations

import asyncio
import contextlib
import os
import re
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from threading import Thread

import pytest

from coppice.errors import Busy, NotFound
from coppice.state import locks
from coppice.state.locks import hold, release, try_lock

HOLDER = """
import sys
from pathlib import Path
from coppice.state.locks import try_lock
held = try_lock(Path(sys.argv[1]), shared=sys.argv[2] == "shared")
print("held" if held is not None else "busy", flush=True)
sys.stdin.read()
"""

FORKING = """
import os, sys
from pathlib import Path
from coppice.state.locks import release, try_lock
held = try_lock(Path(sys.argv[1]))
forked = os.fork() == 0
if not forked and sys.argv[2] == "end":
    os._exit(0)
if not forked:
    release(held)
os.write(1, b"ready\\n")
sys.stdin.read()
os._exit(0)
"""

CROWD = """
import asyncio, os, sys
from pathlib import Path
from coppice.state.locks import hold
path, shared = Path(sys.argv[1]), sys.argv[2] == "shared"

async def one():
    async with hold(path, shared=shared, deadline_s=60):
        await asyncio.sleep(0.05)

async def crowd():
    tasks = set()
    for number in range(10**6):
        if len(tasks) < 5:
            tasks.add(task := asyncio.create_task(one()))
            task.add_done_callback(tasks.discard)
        await asyncio.sleep(0.01)
        if number == 20:
            os.write(1, b"crowded\\n")

asyncio.run(crowd())
"""

WAITER = """
import asyncio, os, sys
from pathlib import Path
from coppice.state.locks import hold

async def wait():
    async with hold(Path(sys.argv[1]), deadline_s=60):
        os.write(1, b"has it\\n")

async def main():
    waiting = asyncio.create_task(wait())
    await asyncio.sleep(0)
    os.write(1, b"waits\\n")
    await waiting

asyncio.run(main())
"""


def holder(path: Path, kind: str = "exclusive") -> subprocess.Popen[str]:
    """Start another process that holds the lock until it is killed or its input ends."""
    process = subprocess.Popen(
        [sys.executable, "-c", HOLDER, str(path), kind], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
    )
    assert process.stdout is not None
    assert process.stdout.readline() == "held\n"
    return process


def test_an_exclusive_lock_excludes_all_others(tmp_path: Path) -> None:
    """The lock excludes even its own process, because it belongs to a descriptor and not to a
    process.
    """
    path = tmp_path / "a.lock"
    held = try_lock(path)
    assert held is not None
    assert try_lock(path) is None
    assert try_lock(path, shared=True) is None
    release(held)
    again = try_lock(path, shared=True)
    assert again is not None
    release(again)


def test_a_shared_lock_admits_only_shared_locks(tmp_path: Path) -> None:
    """Many forks hold the lock at once, and exclude a removal."""
    path = tmp_path / "a.lock"
    first, second = try_lock(path, shared=True), try_lock(path, shared=True)
    assert first is not None
    assert second is not None
    assert try_lock(path) is None
    release(first)
    assert try_lock(path) is None
    release(second)
    last = try_lock(path)
    assert last is not None
    release(last)


def test_descriptors_are_not_inherited(tmp_path: Path) -> None:
    """A VMM that inherited a lock would hold its instance forever."""
    held = try_lock(tmp_path / "a.lock")
    assert held is not None
    assert not os.get_inheritable(held)
    release(held)


def test_a_killed_process_releases_its_lock(tmp_path: Path) -> None:
    """No lock outlives its process, so a lock never has to be broken."""
    path = tmp_path / "a.lock"
    process = holder(path)
    assert try_lock(path) is None
    process.kill()
    process.communicate()
    held = try_lock(path)
    assert held is not None
    release(held)


def test_a_removed_lock_file_is_not_locked(tmp_path: Path) -> None:
    """A process that waits for a removed instance must not get the lock of a deleted file, which
    other processes cannot find.
    """
    path = tmp_path / "a.lock"
    held = try_lock(path)
    assert held is not None
    path.unlink()
    other = try_lock(path)  # a new file: the old holder does not block it
    assert other is not None
    assert os.fstat(other).st_ino == path.stat().st_ino
    release(held)
    assert try_lock(path) is None
    release(other)


def test_a_lock_file_removed_after_its_open_is_opened_again(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The instance and its lock file may be removed between open and flock: the lock then taken is
    the new file's.
    """
    path = tmp_path / "a.lock"
    real_open = os.open
    removed: list[int] = []

    def racing_open(name: Path, flags: int, mode: int = 0o777) -> int:
        descriptor = real_open(name, flags, mode)
        if not removed:
            removed.append(path.stat().st_ino)
            path.rename(tmp_path / "old")  # kept, so that its inode number is not reused
        return descriptor

    monkeypatch.setattr(os, "open", racing_open)
    held = try_lock(path)
    assert held is not None
    assert os.fstat(held).st_ino == path.stat().st_ino != removed[0]
    release(held)


async def test_hold_waits_for_its_turn(tmp_path: Path) -> None:
    """Tasks take turns: two never hold the lock at once, and all get it."""
    path = tmp_path / "a.lock"
    inside = most = done = 0

    async def work() -> None:
        nonlocal inside, most, done
        async with hold(path, deadline_s=30):
            inside += 1
            most = max(most, inside)
            await asyncio.sleep(0)
            inside -= 1
        done += 1

    await asyncio.gather(*(work() for _ in range(12)))
    assert (most, done) == (1, 12)


async def test_hold_gives_up_and_names_the_lock(tmp_path: Path) -> None:
    """A wait has a deadline."""
    path = tmp_path / "a.lock"
    async with hold(path):
        with pytest.raises(Busy, match="oak") as refusal:
            async with hold(path, deadline_s=0.02, what="oak"):
                pytest.fail("two tasks hold the lock")
    assert refusal.value.hint


async def test_a_cancelled_wait_leaves_no_lock(tmp_path: Path) -> None:
    """A cancelled waiter or holder leaves no lock."""
    path = tmp_path / "a.lock"
    entered = asyncio.Event()

    async def work() -> None:
        async with hold(path):
            entered.set()
            await asyncio.Event().wait()

    first = asyncio.create_task(work())
    await entered.wait()
    second = asyncio.create_task(work())
    await asyncio.sleep(0)
    for task in (second, first):
        task.cancel()
    await asyncio.gather(first, second, return_exceptions=True)
    held = try_lock(path)
    assert held is not None
    release(held)


async def test_an_error_in_the_block_releases_the_lock(tmp_path: Path) -> None:
    """The block releases the lock however it ends."""
    path = tmp_path / "a.lock"
    with pytest.raises(ZeroDivisionError):
        async with hold(path):
            raise ZeroDivisionError
    held = try_lock(path)
    assert held is not None
    release(held)


@pytest.mark.parametrize("parent", ["release", "end"])
def test_a_forked_process_does_not_keep_a_lock(tmp_path: Path, parent: str) -> None:
    """A process forked by multiprocessing inherits all descriptors: it would hold the lock as long
    as it lives, without a way to release it.
    """
    path = tmp_path / "a.lock"
    process = subprocess.Popen(
        [sys.executable, "-c", FORKING, str(path), parent], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
    )
    with process:
        assert process.stdin is not None
        assert process.stdout is not None
        lines = [process.stdout.readline() for _ in range(2 if parent == "release" else 1)]
        if parent == "end":
            process.wait(10)
        assert set(lines) == {"ready\n"}
        held = try_lock(path)
        assert held is not None
        release(held)
        process.stdin.close()


# Turns


@contextlib.contextmanager
def process(program: str, *arguments: str) -> Iterator[subprocess.Popen[str]]:
    """Start another process and wait until it is ready; kill it at the end."""
    with subprocess.Popen([sys.executable, "-c", program, *arguments], stdout=subprocess.PIPE, text=True) as started:
        assert started.stdout is not None
        assert started.stdout.readline()
        try:
            yield started
        finally:
            started.kill()


@pytest.mark.parametrize("crowd", ["shared", "exclusive"])
async def test_a_crowd_of_other_processes_does_not_starve_a_waiter(tmp_path: Path, crowd: str) -> None:
    """Overlapping forks of a template hold the shared lock without a gap, and still a removal gets
    its turn. The reverse holds too.
    """
    path = tmp_path / "a.lock"
    with process(CROWD, str(path), crowd), process(CROWD, str(path), crowd):
        for _ in range(3):
            async with hold(path, shared=crowd == "exclusive", deadline_s=10.0):
                pass


async def test_shared_waiters_continue_together(tmp_path: Path) -> None:
    """Waiters behind an exclusive holder get the shared lock together afterwards."""
    path = tmp_path / "a.lock"
    inside = 0
    together = asyncio.Event()

    async def share() -> None:
        nonlocal inside
        async with hold(path, shared=True, deadline_s=10.0):
            inside += 1
            if inside == 5:
                together.set()
            await together.wait()

    async with hold(path):
        sharing = [asyncio.create_task(share()) for _ in range(5)]
        await asyncio.sleep(0)
    async with asyncio.timeout(10.0):
        await asyncio.gather(*sharing)


async def test_a_killed_waiter_does_not_block_others(tmp_path: Path) -> None:
    """A waiter for the exclusive lock goes before later shared ones only as long as it lives and
    has not given up.
    """
    path = tmp_path / "a.lock"
    first = try_lock(path, shared=True)
    assert first is not None
    with process(WAITER, str(path)):
        assert try_lock(path, shared=True) is None
    async with hold(path, shared=True, deadline_s=10.0):
        pass
    with pytest.raises(Busy):
        async with hold(path, deadline_s=0.0):
            pass
    second = try_lock(path, shared=True)
    assert second is not None
    release(first)
    release(second)
    assert list(tmp_path.iterdir()) == [path]


async def test_a_waiter_finds_the_file_that_replaced_the_removed_one(tmp_path: Path) -> None:
    """A waiter at the turnstile of a deleted lock file moves on to the new file, which other
    processes can find.
    """
    path = tmp_path / "a.lock"
    held = try_lock(path)
    assert held is not None
    with process(WAITER, str(path)) as waiter:
        path.unlink()
        new = try_lock(path)
        if new is not None:  # otherwise the waiter was quicker, and has already reported
            release(new)
        assert waiter.stdout is not None
        assert waiter.stdout.readline() == "has it\n"
    release(held)


async def test_a_lock_of_a_missing_record_leaves_no_file(tmp_path: Path) -> None:
    """Taking the lock of a removed record makes the lock file again, so the file is removed on
    NotFound, but not on another error.
    """
    path = tmp_path / "lock"

    async def meets(error: Exception) -> None:
        async with locks.hold(path):
            with locks.of_record(path, "vm"):
                raise error

    for error, stays, message in ((ZeroDivisionError("x"), True, "x"), (NotFound("no 'id'"), False, "vm was removed")):
        with pytest.raises(type(error), match=message):
            await meets(error)
        assert path.exists() is stays


def test_lock_files_are_removed_only_by_their_holder() -> None:
    """If a process removed a lock file without holding its lock, two processes could hold the lock."""
    sources = Path(locks.__file__).parents[1]
    unlinks = re.compile(r"lock[\w.()]*\.unlink\(")
    assert [path for path in sources.rglob("*.py") if unlinks.search(path.read_text())] == []


def test_those_who_ask_for_holders_do_not_see_each_other(tmp_path: Path) -> None:
    """Many may ask at the same time whether a machine is in use: that is no use. A holder of either kind is seen."""
    path = tmp_path / "lock"
    assert not locks.is_held(path)
    assert not path.exists()
    path.touch()
    seen: list[bool] = []
    threads = [Thread(target=lambda: seen.extend(locks.is_held(path) for _ in range(2000))) for _ in range(3)]
    for each in threads:
        each.start()
    for each in threads:
        each.join(60)
    assert (len(seen), sum(seen)) == (6000, 0)
    for shared in (True, False):
        descriptor = try_lock(path, shared=shared)
        assert descriptor is not None
        assert locks.is_held(path)
        release(descriptor)
    assert not locks.is_held(path)
