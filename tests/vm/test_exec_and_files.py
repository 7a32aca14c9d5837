"""Commands and files in a real guest are binary-safe, of any size, with exact exit codes."""

from __future__ import annotations

import asyncio
import hashlib
import io
import os
import tarfile
from collections.abc import AsyncIterator
from pathlib import Path

import pytest

from coppice.agent.copy import archive_in, archive_out
from coppice.client import AsyncHost
from coppice.errors import GuestRefused, GuestTimeout
from coppice.model import Instance
from coppice.requests import (
    CpInRequest,
    CpOutRequest,
    ExecRequest,
    ForkRequest,
    OpenCopyRequest,
    OpenExecRequest,
    RmRequest,
    StandbyRequest,
    StatRequest,
)


async def test_exit_codes_and_streams(host: AsyncHost, vm: Instance) -> None:
    """stdout and stderr are separate.

    The exit code is the command's own, or 128+n for signal n, as in a shell.
    """
    result = await host.call(ExecRequest(instance=vm.id, argv=["sh", "-c", "echo out; echo err >&2; exit 7"]))
    assert (result.exit_code, result.stdout, result.stderr) == (7, b"out\n", b"err\n")
    assert (await host.call(ExecRequest(instance=vm.id, argv=["sh", "-c", "kill -TERM $$"]))).exit_code == 143
    with pytest.raises(GuestRefused, match="no-such-program"):
        await host.call(ExecRequest(instance=vm.id, argv=["no-such-program"]))
    with pytest.raises(GuestTimeout):
        await host.call(ExecRequest(instance=vm.id, argv=["sleep", "60"], timeout_s=1))


async def test_environment_user_and_directory(host: AsyncHost, vm: Instance) -> None:
    """The command runs with the given environment, directory and user."""
    result = await host.call(
        ExecRequest(
            instance=vm.id,
            argv=["sh", "-c", "echo $WORD; pwd; id -un"],
            env={"WORD": "two words"},
            workdir="/usr",
            user="nobody",
        )
    )
    assert result.stdout.decode().splitlines() == ["two words", "/usr", "nobody"]


async def test_stdin_is_binary_safe(host: AsyncHost, vm: Instance) -> None:
    """Four MiB of random bytes pass through stdin and stdout unchanged."""
    data = os.urandom(4 << 20)
    result = await host.call(ExecRequest(instance=vm.id, argv=["cat"], stdin=data, timeout_s=60))
    assert hashlib.sha256(result.stdout).digest() == hashlib.sha256(data).digest()


async def test_sessions_at_once(host: AsyncHost, vm: Instance) -> None:
    """Seven sessions run in parallel, and each gets its own output."""
    results = await asyncio.gather(
        *(host.call(ExecRequest(instance=vm.id, argv=["sh", "-c", f"sleep 0.2; echo {n}"])) for n in range(7))
    )
    assert [result.stdout.decode().strip() for result in results] == [str(n) for n in range(7)]


async def test_copy_both_ways(host: AsyncHost, vm: Instance, tmp_path: Path) -> None:
    """A directory tree keeps contents, modes and links on its way into the guest and back."""
    tree = tmp_path / "tree"
    (tree / "sub").mkdir(parents=True)
    (tree / "data").write_bytes(os.urandom(300_000))
    (tree / "sub" / "run.sh").write_text("#!/bin/sh\necho ran\n")
    (tree / "sub" / "run.sh").chmod(0o755)
    (tree / "link").symlink_to("data")
    await host.call(CpInRequest(instance=vm.id, host_path=str(tree), guest_path="/root/tree"))
    assert (await host.call(ExecRequest(instance=vm.id, argv=["/root/tree/sub/run.sh"]))).stdout == b"ran\n"
    await host.call(CpOutRequest(instance=vm.id, guest_path="/root/tree", host_path=str(tmp_path / "back")))
    assert (tmp_path / "back" / "data").read_bytes() == (tree / "data").read_bytes()
    assert (tmp_path / "back" / "sub" / "run.sh").stat().st_mode & 0o777 == 0o755
    assert (tmp_path / "back" / "link").readlink() == Path("data")
    seen = await host.call(StatRequest(instance=vm.id, path="/root/tree/sub/run.sh"))
    assert (seen.kind, seen.mode & 0o777) == ("f", 0o755)


async def test_a_copy_is_the_content(host: AsyncHost, vm: Instance, tmp_path: Path) -> None:
    """Files of /proc have no true size: they are read to their end, and an endless one is refused."""
    machine = host.machine(vm)
    await machine.cp_out("/proc/cpuinfo", tmp_path / "cpuinfo")
    said = (await machine.exec(["cat", "/proc/cpuinfo"])).stdout
    assert (tmp_path / "cpuinfo").read_bytes() == said != b""
    await machine.cp_in("/proc/version", "/run/version")
    assert await machine.read_file("/run/version") == Path("/proc/version").read_bytes()
    with pytest.raises(GuestRefused):
        await machine.cp_out("/proc/kcore", tmp_path / "kcore")
    assert not (tmp_path / "kcore").exists()


async def test_files_are_watched_moved_and_removed(host: AsyncHost, vm: Instance) -> None:
    """The guest's kernel reports the changes of its overlay, made by its programs and by the host."""
    files = (await host.get(vm.id)).files
    await files.mkdir("/root/watched/sub", parents=True)
    seen: list[tuple[str, str]] = []
    async with asyncio.timeout(60):
        async for event in files.watch("/root/watched", recursive=True):
            seen.append((event.kind, event.path))
            if event.kind == "watching":
                await host.call(ExecRequest(instance=vm.id, argv=["touch", "/root/watched/sub/file"]))
            elif seen[-1] == ("closed", "/root/watched/sub/file"):
                await files.mv("/root/watched/sub/file", "/root/watched")
            elif seen[-1] == ("moved_to", "/root/watched/file"):
                assert [each.path async for each in files.ls("/root/watched")].count("/root/watched/file") == 1
                await files.rm("/root/watched", recursive=True)
    assert ("created", "/root/watched/sub/file") in seen
    assert seen[-1] == ("gone", "/root/watched")


async def test_an_archive_goes_in_and_comes_back(host: AsyncHost, vm: Instance) -> None:
    """A tar archive of the host is unpacked with its owners, and the guest's own tar agrees on the way back."""
    packed, received = io.BytesIO(), bytearray()
    with tarfile.open(fileobj=packed, mode="w") as tar:
        member = tarfile.TarInfo("dir/file")
        member.size, member.uid, member.gid, member.mtime = 4, 1234, 5678, 1_700_000_000
        tar.addfile(member, io.BytesIO(b"data"))

    async def source() -> AsyncIterator[bytes]:
        yield packed.getvalue()

    async def take(chunk: bytes) -> None:
        received.extend(chunk)

    async with host.stream(OpenCopyRequest(instance=vm.id)) as session:
        await archive_in(session, source(), "/root")
        await archive_out(session, "/root/dir", take)
    with tarfile.open(fileobj=io.BytesIO(received)) as tar:
        back = tar.getmember("dir/file")
        assert (back.size, back.uid, back.gid, back.mtime) == (4, 1234, 5678, 1_700_000_000)
    inside = await host.call(ExecRequest(instance=vm.id, argv=["stat", "-c", "%u:%g %Y", "/root/dir/file"]))
    assert inside.stdout == b"1234:5678 1700000000\n"


async def test_a_sparse_file_stays_sparse_when_copied(host: AsyncHost, vm: Instance, tmp_path: Path) -> None:
    """Only the data of a sparse file is sent, both ways; all 64 GiB would take an hour."""
    source, back = tmp_path / "disk", tmp_path / "back"
    with source.open("wb") as file:
        file.seek(32 << 30)
        file.write(os.urandom(1 << 20))
        file.truncate(64 << 30)
    assert await host.call(CpInRequest(instance=vm.id, host_path=str(source), guest_path="/root/disk")) == 64 << 30
    inside = await host.call(ExecRequest(instance=vm.id, argv=["stat", "-c", "%s %b", "/root/disk"]))
    size, blocks = map(int, inside.stdout.split())
    assert size == 64 << 30
    assert blocks * 512 < 2 << 20
    assert await host.call(CpOutRequest(instance=vm.id, guest_path="/root/disk", host_path=str(back))) == 64 << 30
    assert back.stat().st_blocks * 512 < 2 << 20
    with source.open("rb") as ours, back.open("rb") as theirs:
        for offset in (0, 32 << 30, 63 << 30):
            assert os.pread(ours.fileno(), 1 << 20, offset) == os.pread(theirs.fileno(), 1 << 20, offset)


async def test_a_session_of_the_source_does_not_reach_into_the_fork(host: AsyncHost, vm: Instance) -> None:
    """The source is captured while a command prints without pause.

    The first command on a fork gets only its own output.
    """
    async with host.stream(OpenExecRequest(instance=vm.id, argv=["yes", "noise"], stdin=False)) as flood:
        async for _, _data in flood:
            break
        await host.call(StandbyRequest(instance=vm.id))
    async with (await host.get(vm.id)).fork(2, atomic=True) as forks:
        for fork in forks:
            assert (await host.call(ExecRequest(instance=fork.id, argv=["echo", "mine"]))).stdout == b"mine\n"
            async with asyncio.timeout(10):  # the command of the source's session is ended too
                while (
                    await host.call(
                        ExecRequest(instance=fork.id, argv=["sh", "-c", "cat /proc/[0-9]*/comm | grep -x yes"])
                    )
                ).exit_code == 0:
                    pass


async def test_outbound_and_published_ports(host: AsyncHost, template: Instance) -> None:
    """A guest reaches a server of the host through the user-mode network, and a published port
    reaches a server in the guest.
    """
    from coppice.model import Publish

    async def serve(_: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        writer.write(b"from the host")
        writer.close()
        await writer.wait_closed()

    server = await asyncio.start_server(serve, "127.0.0.1", 0)
    port = server.sockets[0].getsockname()[1]
    free = await asyncio.start_server(serve, "127.0.0.1", 0)
    published = free.sockets[0].getsockname()[1]
    free.close()
    await free.wait_closed()
    fork = (
        await host.call(ForkRequest(instance=template.id, publish=[Publish(host_port=published, guest_port=8000)]))
    ).instances[0]
    try:
        script = f"import socket; print(socket.create_connection(('10.0.2.2', {port}), 20).makefile().read())"
        result = await host.call(ExecRequest(instance=fork.id, argv=["python3", "-c", script], timeout_s=60))
        assert result.stdout == b"from the host\n", result.stderr
        serve_once = (
            "import socket; s = socket.create_server(('0.0.0.0', 8000)); print('up', flush=True); "
            "c = s.accept()[0]; c.sendall(b'from the guest'); c.close()"
        )
        async with host.stream(
            OpenExecRequest(instance=fork.id, argv=["python3", "-c", serve_once], stdin=False)
        ) as session:
            async for _, data in session:
                assert data == b"up\n"
                break
            reader, writer = await asyncio.open_connection("127.0.0.1", published)
            assert await asyncio.wait_for(reader.read(), 20) == b"from the guest"
            writer.close()
            await writer.wait_closed()
    finally:
        await host.call(RmRequest(instance=fork.id))
        server.close()
        await server.wait_closed()
