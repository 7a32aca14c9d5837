"""Names in a guest are the same embedded and over a server: list, make, move, remove, watch."""

from __future__ import annotations

import asyncio
import contextlib
import errno
import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from agent_process import agent_binary
from coppice import connect
from coppice.client import AsyncHost
from coppice.errors import CoppiceError, GuestRefused, UsageError
from coppice.model import FileEvent
from fakes.records import MEMORY_BYTES, OVERLAY_BYTES
from fakes.relay import files_below
from fakes.rooms import IMAGE

SMALL: dict[str, Any] = {"memory_bytes": MEMORY_BYTES, "overlay_bytes": OVERLAY_BYTES}
DEADLINE_S = 30.0


@pytest.fixture(autouse=True)
def _files(tmp_path: Path) -> Iterator[None]:
    """Fake guests have the files of the test's directory."""
    agent_binary("static")  # the first call compiles it, which can take as long as a deadline
    with files_below(tmp_path):
        yield


async def test_names_are_made_listed_moved_and_removed(any_host: AsyncHost, tmp_path: Path) -> None:
    """Each operation has the same result and the same errors over a server."""
    files = (await any_host.run(IMAGE, name="oak", **SMALL)).files
    guest = tmp_path / "guest"
    await files.mkdir(f"{guest}/a/b", parents=True, mode=0o700)
    with pytest.raises(GuestRefused) as caught:
        await files.mkdir(f"{guest}/a/b")
    assert caught.value.errno == errno.EEXIST
    assert "mkdir -p" in (caught.value.hint or "")
    (guest / "file").write_bytes(b"12345")
    (guest / "link").symlink_to("file")
    await files.mv(f"{guest}/file", f"{guest}/a")  # into a directory
    await files.mv(f"{guest}/a/file", f"{guest}/a/renamed")
    found = {Path(each.path).name: each async for each in files.ls(str(guest / "a"))}
    assert {name: each.kind for name, each in found.items()} == {"b": "d", "renamed": "f"}
    assert (found["renamed"].size_bytes, found["b"].mode) == (5, 0o700)
    assert [each.link_target async for each in files.ls(str(guest)) if each.kind == "l"] == ["file"]
    with pytest.raises(GuestRefused) as caught:
        await files.rm(f"{guest}/a")
    assert caught.value.errno == errno.ENOTEMPTY
    await files.rm(f"{guest}/a", recursive=True)
    await files.rm(f"{guest}/a", missing_ok=True)
    with pytest.raises(GuestRefused) as caught:
        [each async for each in files.ls(f"{guest}/a")]
    assert caught.value.errno == errno.ENOENT
    assert [path.name for path in guest.iterdir()] == ["link"]
    with pytest.raises(UsageError):
        await files.mkdir(str(guest), mode=0o10000)


async def test_a_large_directory_is_listed(any_host: AsyncHost, tmp_path: Path) -> None:
    """Thousands of entries arrive, also when the reader stops early. Names that are not UTF-8 do, too."""
    files = (await any_host.run(IMAGE, name="oak", **SMALL)).files
    (tmp_path / "many").mkdir()
    for number in range(3000):
        (tmp_path / "many" / f"{number}").touch()
    (tmp_path / "many" / os.fsdecode(b"\xff")).touch()
    names = {Path(each.path).name async for each in files.ls(f"{tmp_path}/many")}
    assert len(names) == 3001
    assert names & {os.fsdecode(b"\xff"), "\ufffd"}
    async with contextlib.aclosing(files.ls(f"{tmp_path}/many")) as some:  # type: ignore[type-var]
        await anext(some)
    assert len([each async for each in files.ls(f"{tmp_path}/many")]) == 3001


async def test_changes_are_reported_as_they_happen(any_host: AsyncHost, tmp_path: Path) -> None:
    """Events arrive in order until the path is gone; a reader that leaves ends the watch."""
    files = (await any_host.run(IMAGE, name="oak", **SMALL)).files
    guest = tmp_path / "guest"
    guest.mkdir()
    async with asyncio.timeout(DEADLINE_S):
        async with contextlib.aclosing(files.watch(str(guest), recursive=True)) as events:  # type: ignore[type-var]
            assert await anext(events) == FileEvent(kind="watching", path=str(guest))
            await files.mkdir(f"{guest}/sub")
            assert await anext(events) == FileEvent(kind="created", path=f"{guest}/sub", is_directory=True)
            (guest / "sub" / "file").touch()
            while (event := await anext(events)).path != f"{guest}/sub/file":
                pass
            assert event.kind == "created"
        kinds = []
        async for event in files.watch(str(guest)):
            kinds.append(event.kind)
            if event.kind == "watching":
                await files.rm(str(guest), recursive=True)
    assert (kinds[0], kinds[-1]) == ("watching", "gone")


async def test_a_watch_ends_with_its_machine(any_host: AsyncHost, tmp_path: Path) -> None:
    """A machine that stops ends the watch with an error, in time."""
    vm = await any_host.run(IMAGE, name="oak", **SMALL)
    async with asyncio.timeout(DEADLINE_S):
        events = vm.files.watch(str(tmp_path))
        assert (await anext(events)).kind == "watching"
        await vm.stop()
        with pytest.raises(CoppiceError):
            await anext(events)


async def test_blocking_code_lists_and_watches(socket_address: str, tmp_path: Path) -> None:
    """The blocking twins are iterators."""
    (tmp_path / "guest").mkdir()

    def work() -> None:
        with connect(socket_address) as host:
            files = host.run(IMAGE, name="oak", **SMALL).files
            events = files.watch(f"{tmp_path}/guest")
            assert next(events).kind == "watching"
            files.mkdir(f"{tmp_path}/guest/new")
            assert next(events).path == f"{tmp_path}/guest/new"
            assert [each.path for each in files.ls(f"{tmp_path}/guest")] == [f"{tmp_path}/guest/new"]

    await asyncio.to_thread(work)
