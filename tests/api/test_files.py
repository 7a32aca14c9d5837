"""Files of the client's machine reach a server and come back, as if both were one machine."""

from __future__ import annotations

import asyncio
import io
import json
import os
import tarfile
import threading
from collections.abc import AsyncIterator, Iterator
from functools import partial
from pathlib import Path
from typing import Any

import httpx
import pytest
from websockets.asyncio.client import ClientConnection, unix_connect

from agent_process import agent_binary
from coppice.client import AsyncHost
from coppice.client.connecting import connect_async
from coppice.errors import CoppiceError, GuestRefused, NoSpace, NotFound, UsageError
from coppice.model import MIB, Progress
from coppice.requests import CpOutRequest
from coppice.server import copies
from coppice.server.auth import make_token
from fakes.records import MEMORY_BYTES, OVERLAY_BYTES
from fakes.relay import files_below
from fakes.rooms import IMAGE
from image_archives import Layout, file, tar
from kernel_files import RELEASE, bzimage, module_tree, vmlinux
from servers import KEY, client_of


@pytest.fixture(autouse=True)
def _files(tmp_path: Path) -> Iterator[None]:
    """Fake guests have the files of the test's directory."""
    agent_binary("static")  # the first call compiles it, which can take as long as a deadline
    with files_below(tmp_path):
        yield


SMALL: dict[str, Any] = {"memory_bytes": MEMORY_BYTES, "overlay_bytes": OVERLAY_BYTES}
DEADLINE_S = 30.0


def tree(directory: Path) -> Path:
    """Make a tree with every kind of member that a copy keeps."""
    (directory / "deep/er").mkdir(parents=True)
    (directory / "deep/er/file").write_bytes(b"content")
    (directory / "program").write_bytes(b"#!/bin/sh\n")
    (directory / "program").chmod(0o755)
    (directory / "link").symlink_to("deep/er/file")
    with (directory / "sparse").open("wb") as file:
        file.truncate(64 * MIB)
        file.seek(32 * MIB)
        file.write(b"middle")
    return directory


def facts(directory: Path) -> dict[str, object]:
    """Return what a copy must keep of each member."""
    return {
        str(path.relative_to(directory)): (
            str(path.readlink()) if path.is_symlink() else None if path.is_dir() else path.read_bytes(),
            path.lstat().st_mode & 0o111,
        )
        for path in directory.rglob("*")
    }


def archive(path: Path, content: bytes = b"hello") -> Path:
    """Write a tar archive with one file."""
    with tarfile.open(path, "w") as tar:
        member = tarfile.TarInfo("etc/greeting")
        member.size = len(content)
        tar.addfile(member, io.BytesIO(content))
    return path


def left(home: Path) -> list[Path]:
    """Return the uploads that a server keeps."""
    return sorted((home / "uploads").glob("*"))


async def until_empty(home: Path) -> None:
    """Wait until a server has removed all uploads."""
    async with asyncio.timeout(DEADLINE_S):
        while left(home):  # noqa: ASYNC110 - the server's own task removes them
            await asyncio.sleep(0.01)


async def test_a_tree_goes_into_a_guest_and_comes_back(any_host: AsyncHost, tmp_path: Path) -> None:
    """Modes, links and holes are kept both ways; progress is reported."""
    vm = await any_host.run(IMAGE, name="oak", **SMALL)
    source = tree(tmp_path / "source")
    (tmp_path / "guest").mkdir()
    steps: list[Progress] = []
    copied = await vm.cp_in(source, f"{tmp_path}/guest", progress=steps.append)
    assert copied == sum(
        len(path.read_bytes()) for path in source.rglob("*") if path.is_file() and not path.is_symlink()
    )
    assert facts(tmp_path / "guest/source") == facts(source)
    assert steps[-1].done == steps[-1].total
    assert await vm.cp_out(f"{tmp_path}/guest/source", tmp_path / "back") == copied
    assert facts(tmp_path / "back") == facts(source)
    assert (tmp_path / "back/sparse").stat().st_blocks * 512 < MIB


async def test_a_copy_goes_where_cp_puts_it(any_host: AsyncHost, tmp_path: Path) -> None:
    """`DIR/.` copies the content, a new name renames, and one file replaces another."""
    vm = await any_host.run(IMAGE, name="oak", **SMALL)
    source = tree(tmp_path / "source")
    guest = tmp_path / "guest"
    guest.mkdir()
    await vm.cp_in(f"{source}/.", str(guest))
    assert facts(guest) == facts(source)
    await vm.cp_in(source / "program", f"{guest}/renamed")
    assert (guest / "renamed").read_bytes() == b"#!/bin/sh\n"
    await vm.cp_out(f"{guest}/deep/er/file", tmp_path / "renamed")
    assert (tmp_path / "renamed").read_bytes() == b"content"


async def test_copies_that_cannot_be_made(any_host: AsyncHost, tmp_path: Path) -> None:
    """The errors are those of an embedded host."""
    vm = await any_host.run(IMAGE, name="oak", **SMALL)
    tree(tmp_path / "source")
    with pytest.raises(NotFound, match="does not exist"):
        await vm.cp_in(tmp_path / "nothing", str(tmp_path))
    with pytest.raises(NotFound, match="does not exist"):
        await vm.cp_in(tmp_path / "source", f"{tmp_path}/no/such/place")
    with pytest.raises(GuestRefused) as caught:
        await vm.cp_out(f"{tmp_path}/nothing", tmp_path / "back")
    assert caught.value.errno == 2
    with pytest.raises(UsageError, match="is not a directory"):
        await vm.cp_in(tmp_path / "source/deep", f"{tmp_path}/source/program")
    with pytest.raises(NotFound, match="no instance"):
        await any_host.call(CpOutRequest(instance="gone", guest_path="/x", host_path=str(tmp_path / "x")))


async def test_a_file_that_the_guest_cannot_write_ends_the_copy(any_host: AsyncHost, tmp_path: Path) -> None:
    """The error arrives, although the client has more to send."""
    vm = await any_host.run(IMAGE, name="oak", **SMALL)
    source = tmp_path / "source"
    source.mkdir()
    (source / "first").write_bytes(os.urandom(MIB))
    (source / "second").write_bytes(os.urandom(40 * MIB))
    guest = tmp_path / "guest/source"
    for name in ("first", "second"):
        (guest / name / "in the way").mkdir(parents=True)
    async with asyncio.timeout(DEADLINE_S):
        with pytest.raises(GuestRefused):
            await vm.cp_in(source, f"{tmp_path}/guest")
    assert (await vm.exec(["hostname"])).stdout == b"oak\n"


def _begun(started: threading.Event, step: Progress) -> None:
    if step.done:
        started.set()


async def test_a_cancelled_copy_frees_its_port(any_host: AsyncHost, tmp_path: Path) -> None:
    """More copies than a machine has ports are cancelled one after the other; then one more succeeds."""
    vm = await any_host.run(IMAGE, name="oak", **SMALL)
    (tmp_path / "guest").mkdir()
    source = tmp_path / "big"
    with source.open("wb") as file:
        for _ in range(64):
            file.write(os.urandom(MIB))
    for _ in range(9):
        started = threading.Event()
        progress = partial(_begun, started)
        copy = asyncio.create_task(vm.cp_in(source, f"{tmp_path}/guest/copy", progress=progress))
        async with asyncio.timeout(DEADLINE_S):
            await asyncio.to_thread(started.wait, DEADLINE_S)
            copy.cancel()
            await asyncio.wait({copy})
        assert copy.cancelled()
    async with asyncio.timeout(DEADLINE_S):
        assert await vm.cp_in(source, f"{tmp_path}/guest/copy") == 64 * MIB


async def test_images_of_the_clients_files(any_host: AsyncHost, fake_home: Path, tmp_path: Path) -> None:
    """A root file system, and the directory of a layout, become images."""
    steps: list[Progress] = []
    made = await any_host.images.import_("web", archive(tmp_path / "rootfs.tar"), progress=steps.append)
    assert made.source == "rootfs.tar"
    assert steps
    layout = Layout(tmp_path / "layout")
    layout.index(layout.image(tar(file("etc/greeting", b"hello"))))
    again = await any_host.images.import_("other", layout.path)
    assert {each.name for each in await any_host.images.ls()} >= {"web", "other"}
    assert again.digest
    await until_empty(fake_home)


async def test_volumes_with_the_clients_files(any_host: AsyncHost, fake_home: Path, tmp_path: Path) -> None:
    """A volume begins with the archive's content; a bad archive is named by the client's path."""
    volume = await any_host.volumes.create("data", size_bytes=64 * MIB, archive=archive(tmp_path / "first.tar"))
    assert volume.name == "data"
    (tmp_path / "broken.tar").write_bytes(b"no archive" * 1000)
    with pytest.raises(CoppiceError) as caught:
        await any_host.volumes.create("other", size_bytes=64 * MIB, archive=tmp_path / "broken.tar")
    assert "upload" not in str(caught.value)
    with pytest.raises(UsageError):
        await any_host.volumes.create("other", size_bytes=64 * MIB, archive=tmp_path / "nothing.tar")
    assert [each.name for each in await any_host.volumes.ls()] == ["data"]
    await until_empty(fake_home)


async def test_kernels_of_the_clients_files(any_host: AsyncHost, fake_home: Path, tmp_path: Path) -> None:
    """A kernel is added with its modules, whose directory has the usual link to the sources."""
    kernel = tmp_path / "vmlinuz"
    kernel.write_bytes(bzimage(vmlinux()))
    modules = module_tree(tmp_path / RELEASE)
    config = tmp_path / ".config"
    config.write_text("CONFIG_ACPI=y\n")
    added = await any_host.kernels.add(kernel, modules, config=config)
    assert (fake_home / "kernels" / added.key / "modules/modules.order").is_file()
    await until_empty(fake_home)


@pytest.mark.parametrize("kind", ["fifo", "device", "missing"])
async def test_what_is_no_file_is_refused_at_once(
    any_host: AsyncHost, fake_home: Path, tmp_path: Path, kind: str
) -> None:
    """A pipe may stay silent for ever, and a device never ends."""
    path = Path("/dev/full") if kind == "device" else tmp_path / kind
    if kind == "fifo":
        os.mkfifo(path)
    async with asyncio.timeout(DEADLINE_S):
        with pytest.raises(CoppiceError) as caught:
            await any_host.images.import_("web", path)
    assert caught.value.exit_code in (1, 2)
    assert str(path) in str(caught.value)
    await until_empty(fake_home)


async def test_a_cancelled_upload_leaves_nothing(
    socket_address: str, fake_home: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The server removes what has arrived."""
    free = asyncio.Event()
    receive = copies._receive

    async def slow(*arguments: Any, **named: Any) -> None:
        await free.wait()
        await receive(*arguments, **named)

    monkeypatch.setattr(copies, "_receive", slow)
    async with connect_async(socket_address) as host, asyncio.timeout(DEADLINE_S):
        task = asyncio.create_task(host.images.import_("web", archive(tmp_path / "a.tar", b"x" * 64 * MIB)))
        while not left(fake_home):  # noqa: ASYNC110 - the server's own task makes it
            await asyncio.sleep(0.01)
        task.cancel()
        await asyncio.wait({task})
        assert task.cancelled()
        free.set()
        await until_empty(fake_home)


async def test_text_that_is_not_utf_8_is_refused(any_host: AsyncHost, tmp_path: Path) -> None:
    """No bare Python error reaches the caller."""
    vm = await any_host.run(IMAGE, name="oak", **SMALL)
    for call in (vm.exec(["\udcff"]), vm.cp_out(f"{tmp_path}/\udcff", tmp_path / "x")):
        with pytest.raises(CoppiceError):
            await call


async def test_a_server_without_disk_space_refuses_at_once(
    socket_address: str, fake_home: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The client does not send the rest."""

    def full(*_: object) -> None:
        raise NoSpace("the server has no disk space for this file")

    monkeypatch.setattr(copies, "require_space", full)
    with (tmp_path / "big").open("wb") as file:
        file.truncate(1 << 40)
    async with connect_async(socket_address) as host, asyncio.timeout(DEADLINE_S):
        with pytest.raises(NoSpace):
            await host.images.import_("web", tmp_path / "big")
    await until_empty(fake_home)


async def test_no_path_of_the_server_is_read(socket_address: str, tmp_path: Path) -> None:
    """A request that names a file of the server is refused, and so is an upload that nobody made."""
    secret = archive(tmp_path / "secret.tar")
    async with client_of(socket_address) as client:
        for path, status in ((str(secret), 501), ("upload:nothing", 404)):
            body = {"operation": "image_import", "name": "web", "path": path}
            answer = await client.post("/call/image_import", json=body)
            assert answer.status_code == status, answer.text
        body = {"operation": "volume_create", "name": "data", "archive": str(secret)}
        headers = {"idempotency-key": "one"}
        assert (await client.post("/call/volume_create", json=body, headers=headers)).status_code == 501


async def _upload(connection: ClientConnection, first: dict[str, Any], *content: bytes) -> dict[str, Any]:
    await connection.send(json.dumps(first))
    for each in content:
        await connection.send(each)
    await connection.send('{"eof": true}')
    answer: dict[str, Any] = json.loads(await connection.recv())
    return answer


@pytest.fixture
async def connection(socket_address: str) -> AsyncIterator[ClientConnection]:
    """A WebSocket to `/stream/upload`."""
    socket = socket_address.removeprefix("unix:")
    async with unix_connect(socket, "ws://coppice/stream/upload") as opened:
        yield opened


async def test_a_client_without_coppice_copies_archives(socket_address: str, fake_home: Path, tmp_path: Path) -> None:
    """`tar_in` and `tar_out` of `/stream/copy` take and give tar archives."""
    async with client_of(socket_address) as client:
        body = {"operation": "run", "image": IMAGE, "name": "oak", **SMALL}
        assert (await client.post("/call/run", json=body)).status_code == 200
    (tmp_path / "guest").mkdir()
    socket = socket_address.removeprefix("unix:")
    async with unix_connect(socket, "ws://coppice/stream/copy") as opened:
        await opened.send(json.dumps({"instance": "oak"}))
        assert json.loads(await opened.recv()) == {}
        await opened.send(json.dumps({"tar_in": f"{tmp_path}/guest"}))
        await opened.send(archive(tmp_path / "rootfs.tar").read_bytes())
        await opened.send('{"eof": true}')
        assert json.loads(await opened.recv()) == {"unpacked": {"members": 1, "content_bytes": 5}}
        assert (tmp_path / "guest/etc/greeting").read_bytes() == b"hello"
        await opened.send(json.dumps({"tar_out": f"{tmp_path}/guest/etc"}))
        received = b""
        while isinstance(frame := await opened.recv(), bytes):
            received += frame
        assert json.loads(frame) == {"end": True}
    with tarfile.open(fileobj=io.BytesIO(received)) as tar:
        assert tar.getnames() == ["etc", "etc/greeting"]


@pytest.mark.parametrize("name", ["", ".", "..", "a/b", "/etc/passwd", "../../coppice.db", "a\0b", "x" * 256])
async def test_names_of_uploads_are_not_paths(connection: ClientConnection, name: str) -> None:
    """The name of an upload is the last part of a path."""
    answer = await _upload(connection, {"operation": "image_import", "name": name}, b"content")
    assert answer["error"]["code"] == "invalid_request"


def _tar(*members: tarfile.TarInfo) -> bytes:
    buffer = io.BytesIO()
    with tarfile.open(fileobj=buffer, mode="w") as tar:
        for member in members:
            tar.addfile(member)
    return buffer.getvalue()


def _member(name: str, kind: bytes = tarfile.DIRTYPE, target: str = "") -> tarfile.TarInfo:
    member = tarfile.TarInfo(name)
    member.type, member.linkname = kind, target
    return member


@pytest.mark.parametrize(
    "member",
    [
        _member("layout/index.json", tarfile.SYMTYPE, "/etc/passwd"),
        _member("layout/blobs", tarfile.SYMTYPE, "../../.."),
        _member("layout/../../x", tarfile.REGTYPE),
        _member("layout/device", tarfile.CHRTYPE),
    ],
)
async def test_a_directory_cannot_lead_outside_itself(
    connection: ClientConnection, fake_home: Path, member: tarfile.TarInfo
) -> None:
    """Links to the server's files, devices and climbing paths are refused."""
    first = {"operation": "image_import", "name": "layout", "directory": True}
    answer = await _upload(connection, first, _tar(_member("layout"), member))
    assert answer["error"]["code"] == "invalid_request"
    assert "the guest" not in answer["error"]["message"]
    await until_empty(fake_home)


async def test_an_upload_belongs_to_its_owner(tcp_address: str, tmp_path: Path) -> None:
    """Another owner cannot use it, and a token without the scope cannot make it."""
    ann = {"authorization": f"Bearer {make_token(KEY, owner='ann')}"}
    bob = {"authorization": f"Bearer {make_token(KEY, owner='bob')}"}
    reader = {"authorization": f"Bearer {make_token(KEY, owner='ann', scopes=['image:read', 'volume:write'])}"}
    content = archive(tmp_path / "rootfs.tar").read_bytes()
    from websockets.asyncio.client import connect

    url = tcp_address.replace("http", "ws") + "/stream/upload"
    first = {"operation": "image_import", "name": "rootfs.tar"}
    async with connect(url, additional_headers=reader) as refused:
        assert (await _upload(refused, first))["error"]["code"] == "forbidden"
    async with connect(url, additional_headers=ann) as opened, httpx.AsyncClient(base_url=tcp_address) as client:
        token = (await _upload(opened, first, content))["upload"]
        body = {"operation": "image_import", "name": "web", "path": token}
        assert (await client.post("/call/image_import", json=body, headers=bob)).status_code == 404
        assert (await client.post("/call/image_import", json=body, headers=ann)).status_code == 200


async def test_an_operation_keeps_its_upload(socket_address: str, fake_home: Path, tmp_path: Path) -> None:
    """A client that goes away after its request does not take the file away from it."""
    content = archive(tmp_path / "rootfs.tar").read_bytes()
    socket = socket_address.removeprefix("unix:")
    async with client_of(socket_address) as client:
        async with unix_connect(socket, "ws://coppice/stream/upload") as opened:
            token = (await _upload(opened, {"operation": "volume_create", "name": "a.tar"}, content))["upload"]
            body = {"operation": "volume_create", "name": "data", "size_bytes": 64 * MIB, "archive": token}
            begun = await client.post("/call/volume_create", json=body, headers={"prefer": "respond-async"})
            assert begun.status_code == 202
        operation = f"/operations/{begun.json()['id']}"
        async with asyncio.timeout(DEADLINE_S):
            while (await client.get(operation)).json()["status"] == "running":  # noqa: ASYNC110
                await asyncio.sleep(0.01)
        assert (await client.get(operation)).json()["status"] == "succeeded"
    await until_empty(fake_home)


async def test_a_lost_answer_does_not_need_the_upload_again(socket_address: str, tmp_path: Path) -> None:
    """A repeated request with the same key gets the result, although its upload is gone."""
    content = archive(tmp_path / "rootfs.tar").read_bytes()
    socket = socket_address.removeprefix("unix:")
    headers = {"idempotency-key": "once"}
    async with client_of(socket_address) as client:
        async with unix_connect(socket, "ws://coppice/stream/upload") as opened:
            token = (await _upload(opened, {"operation": "image_import", "name": "a.tar"}, content))["upload"]
            body = {"operation": "image_import", "name": "web", "path": token}
            first = await client.post("/call/image_import", json=body, headers=headers)
        again = await client.post("/call/image_import", json=body, headers=headers)
    assert (first.status_code, again.status_code) == (200, 200)
    assert first.json()["digest"] == again.json()["digest"]


async def test_a_repeated_import_is_compared_by_its_content(socket_address: str, tmp_path: Path) -> None:
    """The same file that is sent again gets the first result, another one is refused. Names are by content."""
    content = archive(tmp_path / "rootfs.tar").read_bytes()
    socket = socket_address.removeprefix("unix:")
    answers, tokens = [], []
    async with client_of(socket_address) as client:
        for sent in (content, content, content + bytes(512)):
            async with unix_connect(socket, "ws://coppice/stream/upload") as opened:
                tokens.append((await _upload(opened, {"operation": "image_import", "name": "a.tar"}, sent))["upload"])
                body = {"operation": "image_import", "name": "web", "path": tokens[-1]}
                answers.append(await client.post("/call/image_import", json=body, headers={"idempotency-key": "once"}))
    assert tokens[0] == tokens[1] != tokens[2]
    assert [each.status_code for each in answers] == [200, 200, 422]
    assert answers[0].json() == answers[1].json()
