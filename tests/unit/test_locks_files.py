"""File locks: between tasks, threads and processes alike; freed by the kernel when a process dies."""

from __future__ import annotations

import asyncio
import os
import subprocess
import sys
from pathlib import Path

import pytest

from coppice.errors import Busy
from coppice.store.locks import hold, release, try_lock

HOLDER = """
import sys
from pathlib import Path
from coppice.store.locks import try_lock
held = try_lock(Path(sys.argv[1]), shared=sys.argv[2] == "shared")
print("held" if held is not None else "busy", flush=True)
sys.stdin.read()
"""

FORKING = """
import os, sys
from pathlib import Path
from coppice.store.locks import release, try_lock
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


def holder(path: Path, kind: str = "exclusive") -> subprocess.Popen[str]:
    """Another process that holds the lock until it is killed or its input ends."""
    process = subprocess.Popen(
        [sys.executable, "-c", HOLDER, str(path), kind], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
    )
    assert process.stdout is not None
    assert process.stdout.readline() == "held\n"
    return process


def test_exclusive_keeps_everyone_out(tmp_path: Path) -> None:
    """In one process too: a lock belongs to the descriptor and not to the process."""
    path = tmp_path / "a.lock"
    held = try_lock(path)
    assert held is not None
    assert try_lock(path) is None
    assert try_lock(path, shared=True) is None
    release(held)
    again = try_lock(path, shared=True)
    assert again is not None
    release(again)


def test_shared_admits_shared_only(tmp_path: Path) -> None:
    """Many forks at once, and no removal meanwhile."""
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
    """A VMM that inherited a lock would hold its instance for ever."""
    held = try_lock(tmp_path / "a.lock")
    assert held is not None
    assert not os.get_inheritable(held)
    release(held)


def test_a_killed_process_lets_go(tmp_path: Path) -> None:
    """No lock outlives its process, so none ever has to be broken."""
    path = tmp_path / "a.lock"
    process = holder(path)
    assert try_lock(path) is None
    process.kill()
    process.communicate()
    held = try_lock(path)
    assert held is not None
    release(held)


def test_a_removed_lock_file_is_not_locked(tmp_path: Path) -> None:
    """Whoever waits for an instance that is removed must not end up with the lock of a file that nobody else can find."""
    path = tmp_path / "a.lock"
    held = try_lock(path)
    assert held is not None
    path.unlink()
    other = try_lock(path)  # a new file: the old holder is no obstacle
    assert other is not None
    assert os.fstat(other).st_ino == path.stat().st_ino
    release(held)
    assert try_lock(path) is None
    release(other)


def test_an_open_of_a_file_that_is_then_removed_is_tried_again(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Between open and flock the instance may be removed with its lock file: the lock taken is then of the new file."""
    path = tmp_path / "a.lock"
    real_open = os.open
    removed: list[int] = []

    def racing_open(name: Path, flags: int, mode: int = 0o777) -> int:
        descriptor = real_open(name, flags, mode)
        if not removed:
            removed.append(path.stat().st_ino)
            path.rename(tmp_path / "old")  # kept, so that its inode number is not given out again
        return descriptor

    monkeypatch.setattr(os, "open", racing_open)
    held = try_lock(path)
    assert held is not None
    assert os.fstat(held).st_ino == path.stat().st_ino != removed[0]
    release(held)


async def test_hold_waits_its_turn(tmp_path: Path) -> None:
    """Tasks take turns: no two are ever inside at once, and all get in."""
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


async def test_hold_gives_up_and_says_what_is_held(tmp_path: Path) -> None:
    """A wait has an end."""
    path = tmp_path / "a.lock"
    async with hold(path):
        with pytest.raises(Busy, match="oak") as refusal:
            async with hold(path, deadline_s=0.02, what="oak"):
                pytest.fail("two hold it")
    assert refusal.value.hint


async def test_a_cancelled_wait_leaves_no_lock(tmp_path: Path) -> None:
    """Neither does a cancelled holder."""
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


async def test_an_error_inside_lets_go(tmp_path: Path) -> None:
    """The lock goes with the block, however it ends."""
    path = tmp_path / "a.lock"
    with pytest.raises(ZeroDivisionError):
        async with hold(path):
            raise ZeroDivisionError
    held = try_lock(path)
    assert held is not None
    release(held)


@pytest.mark.parametrize("parent", ["release", "end"])
def test_a_forked_process_holds_nothing(tmp_path: Path, parent: str) -> None:
    """What multiprocessing forks has all descriptors: a lock would be held for as long as it lives, by nobody who could let go of it."""
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
