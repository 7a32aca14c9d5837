"""Copies by the official client of the hypeman API, with the files of fake guests."""

from __future__ import annotations

import asyncio
import json
import os
from collections.abc import AsyncIterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from hypeman import AsyncHypeman
from hypeman.lib import cp_from_instance_async, cp_to_instance_async
from hypeman.lib.cp import CopyProtocolError
from websockets.asyncio.client import connect

from agent_process import agent_binary
from coppice.agent import records
from coppice.client.connecting import connect_async
from coppice.errors import GuestError, NoSpace
from coppice.server.auth import make_token
from coppice.server.hypeman import copies
from fakes.records import MEMORY_BYTES, OVERLAY_BYTES
from fakes.relay import files_below
from fakes.rooms import IMAGE
from servers import KEY


@pytest.fixture
async def client(tcp_address: str) -> AsyncIterator[AsyncHypeman]:
    """A client of a server with one running machine, oak."""
    agent_binary("static")  # the first call compiles it, which can take as long as a deadline
    token = make_token(KEY, owner=None)
    async with connect_async(tcp_address, token=token) as host:
        await host.run(IMAGE, name="oak", memory_bytes=MEMORY_BYTES, overlay_bytes=OVERLAY_BYTES)
    async with AsyncHypeman(api_key=token, base_url=tcp_address, max_retries=0) as opened:
        yield opened


async def test_modes_and_owners_are_kept(client: AsyncHypeman, tmp_path: Path) -> None:
    """In both directions, also of directories, and without a program in the guest."""
    guest, back = tmp_path / "guest", tmp_path / "back"
    guest.mkdir()
    source = tmp_path / "tree"
    (source / "deep" / "empty").mkdir(parents=True)
    (source / "deep" / "data").write_bytes(content := os.urandom(200_000))
    (source / "deep" / "data").chmod(0o664)
    (source / "deep").chmod(0o2775)
    os.chown(source / "deep" / "data", 1234, 2345)
    with files_below(guest):
        await cp_to_instance_async(client, "oak", source, f"{guest}/new/tree", archive=True)
        made = (guest / "new/tree/deep/data").stat()
        assert (guest / "new/tree/deep/data").read_bytes() == content
        assert (made.st_mode & 0o7777, made.st_uid, made.st_gid) == (0o664, 1234, 2345)
        assert (guest / "new/tree/deep").stat().st_mode & 0o7777 == 0o2775
        os.link(guest / "new/tree/deep/data", guest / "new/tree/deep/zlast")
        await cp_from_instance_async(client, "oak", f"{guest}/new/tree", back, archive=True)
        for name in ("data", "zlast"):
            found = (back / "deep" / name).stat()
            assert (back / "deep" / name).read_bytes() == content
            assert (found.st_mode & 0o777, found.st_uid, found.st_gid) == (0o664, 1234, 2345)
        assert (back / "deep/empty").is_dir()
        await cp_from_instance_async(client, "oak", f"{guest}/new/tree/deep/data", back)
        assert (back / "data").read_bytes() == content
        (guest / "new/tree/link").symlink_to("deep/data")
        await cp_from_instance_async(client, "oak", f"{guest}/new/tree", back)
        assert (back / "link").readlink() == Path("deep/data")
        with pytest.raises(CopyProtocolError, match="cannot be followed"):
            await cp_from_instance_async(client, "oak", f"{guest}/new/tree", back, follow_symlinks=True)
        for wrong in (f"{guest}/nothing", "relative"):
            with pytest.raises(CopyProtocolError, match="copy failed"):
                await cp_from_instance_async(client, "oak", wrong, back)
        with pytest.raises(CopyProtocolError, match="copy failed"):
            await cp_to_instance_async(client, "oak", source / "deep/data", f"{guest}/new/tree")


async def test_a_copy_out_of_a_guest_takes_no_reserved_space(
    client: AsyncHypeman, fake_home: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A guest cannot fill the server's disk, and what was kept is removed."""
    (tmp_path / "guest").mkdir()
    (tmp_path / "guest" / "data").write_bytes(bytes(1 << 20))
    monkeypatch.setattr(copies, "space_left", lambda _: 1 << 19)
    with files_below(tmp_path / "guest"), pytest.raises(CopyProtocolError, match="more than 524288 bytes"):
        await cp_from_instance_async(client, "oak", f"{tmp_path}/guest/data", tmp_path / "back")
    assert list((fake_home / "uploads").glob("*")) == []


async def copied(address: str, *sent: dict[str, Any] | bytes) -> list[Any]:
    """Return the frames of the server, for a client that is not the official one."""
    url = f"{address.replace('http', 'ws')}/instances/oak/cp"
    headers = {"authorization": f"Bearer {make_token(KEY, owner=None)}"}
    async with asyncio.timeout(20), connect(url, additional_headers=headers) as socket:
        for frame in sent:
            await socket.send(frame if isinstance(frame, bytes) else json.dumps(frame))
        return [json.loads(frame) async for frame in socket]


@pytest.mark.usefixtures("client")
async def test_wrong_owners_are_the_clients_error(tcp_address: str, tmp_path: Path) -> None:
    """Numbers that no user id can be."""
    for wrong in (-1, 2**32 - 1, 2**32, 2**64, 10**30):
        first = {"direction": "to", "guest_path": f"{tmp_path}/data", "uid": wrong}
        (answer,) = await copied(tcp_address, first, b"data", {"type": "end"})
        assert answer["type"] == "error"
        assert "$.uid" in answer["message"]


@pytest.mark.usefixtures("client")
async def test_a_directory_that_exists_keeps_its_mode(tcp_address: str, tmp_path: Path) -> None:
    """Such as /tmp, if the copy has no owners. A new one without a mode can be entered by all."""
    (there := tmp_path / "tmp").mkdir()
    there.chmod(0o1777)
    (tmp_path / "link").symlink_to("tmp")
    first = {"direction": "to", "is_dir": True}
    with files_below(tmp_path):
        for given in (
            {"guest_path": f"{there}"},
            {"guest_path": f"{tmp_path}/link"},
            {"guest_path": f"{tmp_path}/new"},
        ):
            (answer,) = await copied(tcp_address, {**first, "mode": 0o700, **given}, {"type": "end"})
            assert answer == {"type": "result", "success": True, "bytes_written": 0}
        assert there.stat().st_mode & 0o7777 == 0o1777
        assert (tmp_path / "link").is_symlink()
        assert (tmp_path / "new").stat().st_mode & 0o7777 == 0o700
        await copied(tcp_address, {**first, "guest_path": f"{tmp_path}/plain"}, {"type": "end"})
        assert (tmp_path / "plain").stat().st_mode & 0o7777 == 0o755
        await copied(tcp_address, {**first, "guest_path": f"{there}", "mode": 0o750, "uid": 7}, {"type": "end"})
        assert (there.stat().st_mode & 0o7777, there.stat().st_uid) == (0o750, 7)


@pytest.mark.usefixtures("client")
@pytest.mark.parametrize("kind", ["name", "target"])
async def test_names_that_json_cannot_carry_are_refused(tcp_address: str, tmp_path: Path, kind: str) -> None:
    """A JSON frame has no bytes that are not UTF-8."""
    (tmp_path / "tree").mkdir()
    if kind == "name":
        Path(os.fsdecode(os.fsencode(tmp_path / "tree") + b"/\xff")).mkdir()
    else:
        (tmp_path / "tree" / "link").symlink_to(os.fsdecode(b"\xfe"))
    with files_below(tmp_path):
        (answer,) = await copied(tcp_address, {"direction": "from", "guest_path": f"{tmp_path}/tree"})
    assert "not UTF-8" in answer["message"]


def full(_: object, directory: Path) -> None:
    """Find no space."""
    raise NoSpace(f"the server has no disk space in {directory}")


async def test_a_tree_takes_a_bounded_part_of_memory_and_disk(
    client: AsyncHypeman, fake_home: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Names of members are kept until the end of a copy, and other copies may fill the disk meanwhile."""
    (guest := tmp_path / "guest").mkdir()
    for number in range(20):
        (guest / f"{number}-{'x' * 200}").write_bytes(b"data")
    (guest / "large").write_bytes(bytes(1 << 20))
    limits: list[tuple[str, dict[str, object]]] = [
        ("too many entries", {"_MOST_BYTES": 10_000}),
        ("no disk space", {"CHECK_EVERY": 1 << 18, "require_space": full}),
    ]
    for refusal, changed in limits:
        with monkeypatch.context() as patch, files_below(guest):
            for name, value in changed.items():
                patch.setattr(copies, name, value)
            with pytest.raises(CopyProtocolError, match=refusal):
                await cp_from_instance_async(client, "oak", f"{guest}", tmp_path / "back")
    assert list((fake_home / "uploads").glob("*")) == []


async def test_a_hostile_guest_sends_no_path_that_this_host_cannot_open(tmp_path: Path) -> None:
    """It can make one in its records, whatever its own kernel allows."""
    parts = ["tree", *("x" * 250 for _ in range(20))]

    class Hostile:
        async def tree_out(self, _: str) -> AsyncIterator[bytes]:
            for depth in range(1, len(parts) + 1):
                yield records.encode(records.Entry(path="/".join(parts[:depth]), kind="d"))
            yield records.END

    host = SimpleNamespace(home=tmp_path, budgets=SimpleNamespace(disk_floor_bytes=0))
    with pytest.raises(GuestError, match="too long"):
        await copies._received(Hostile(), "/tree", tmp_path / "content", host)  # type: ignore[arg-type]


async def test_the_status_of_a_path_that_cannot_be_followed(client: AsyncHypeman, tmp_path: Path) -> None:
    """It does not exist, with the reason; a path that is only missing has none."""
    (tmp_path / "loop").symlink_to("loop")
    with files_below(tmp_path):
        found = await client.instances.stat("oak", path=f"{tmp_path}/loop", follow_links=True)
        assert (found.exists, found.is_symlink) == (False, False)
        assert "symbolic links" in (found.error or "")
        found = await client.instances.stat("oak", path=f"{tmp_path}/nothing")
        assert (found.exists, found.error) == (False, None)
