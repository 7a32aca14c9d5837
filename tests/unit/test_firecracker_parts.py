"""The parts of the Firecracker driver that run without Firecracker: requests by release, answers,
logs, builds, the check.
"""

from __future__ import annotations

import asyncio
import json
import struct
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

import pytest

from coppice.doctor.firecracker import judge_firecracker
from coppice.errors import HostCannot, NoSpace, NotSupported, VmmDied, VmmError, VmmTimeout
from coppice.machine import directory as directories
from coppice.model import MIB, MachineSpec, Manifest
from coppice.model.network import Nic, NicBackend
from coppice.vmm.driver import Launch
from coppice.vmm.firecracker import api, config, driver, host
from coppice.vmm.firecracker.api import Request

RELEASES = [(1, minor) for minor in range(10, 17)]
FACTS = json.loads((Path(__file__).parent.parent / "data" / "firecracker-v1.16.1.json").read_text())
# Fields that releases after the oldest one added, among those that Coppice's requests use
# (Firecracker's CHANGELOG).
NEWER = {
    (1, 12): {"network_overrides"},
    (1, 14): {"serial_out_path"},
    (1, 16): {"vsock_override", "clock_realtime", "mtu"},
}


@pytest.fixture
def launch(tmp_path: Path) -> Launch:
    """Return a machine with a volume."""
    machine = MachineSpec(memory_bytes=256 * MIB, cpus=2, kernel="k", network="none")
    manifest = Manifest(
        driver="firecracker",
        vmm_version="1.16.1",
        machine="virtio-mmio",
        accel="kvm",
        cpu_model="host",
        cpu_flags="",
        kernel="k",
        memory_bytes=machine.memory_bytes,
        cpus=2,
    )
    nic = Nic(backend=NicBackend.TAP, mac="02:00:00:00:00:01", tap="tap0", namespace="/run/netns/slot")
    return Launch(
        directory=tmp_path, machine=machine, disks=directories.devices(machine), nics=(nic,), manifest=manifest
    )


@pytest.mark.parametrize("release", RELEASES, ids=str)
def test_no_request_has_a_field_unknown_to_its_release(launch: Launch, release: config.Release) -> None:
    """From 1.10 to 1.16: PUT /serial has a limit only from 1.16 on, drives are never changed, and
    all paths are relative.
    """
    requests = [*config.boot(launch, release), *config.restore(launch, release, paused=True), *config.resume(release)]
    unknown = {field for since, fields in NEWER.items() if since > release for field in fields}
    for request in requests:
        text = json.dumps(request.body)
        assert not [field for field in unknown if f'"{field}"' in text]
        assert str(launch.directory) not in text
        assert request.path != "/serial" or release >= config.SERIAL_LIMIT
        assert not (request.method == "PATCH" and request.path.startswith("/drives"))
    assert any(request.path == "/serial" for request in requests) == (release >= config.SERIAL_LIMIT)
    assert (len(config.resume(release)) > 1) == (release >= config.RESET_BEFORE_RESUME)


def test_every_request_is_in_the_api_document(launch: Launch) -> None:
    """No request has a field that the document lacks."""
    for request in [
        *config.boot(launch, (1, 16)),
        *config.restore(launch, (1, 16), paused=False),
        *config.resume((1, 16)),
    ]:
        kind, _, item = request.path.removeprefix("/").partition("/")
        path = {"drives": "/drives/{drive_id}", "network-interfaces": "/network-interfaces/{iface_id}"}.get(
            kind, request.path
        )
        assert not item or kind in ("drives", "network-interfaces", "snapshot")
        name = f"{request.method} {path}"
        assert name in FACTS["requests"]
        known = {fact["field"] for fact in FACTS["fields"] if fact["request"] == name}
        assert set(request.body or ()) <= known


def test_a_version_that_is_too_old_is_refused() -> None:
    """A version that is too old is refused before anything starts."""
    assert host.require_release("1.16.1") == (1, 16)
    assert host.require_release("1.10.0-dev") == (1, 10)
    for old in ("1.9.1", "0.25.2", "unknown"):
        with pytest.raises(NotSupported, match=r"older than 1\.10"):
            host.require_release(old)


def test_a_host_without_kvm_is_refused(tmp_path: Path) -> None:
    """The message says that Firecracker needs KVM; a request for emulation is refused with that
    reason.
    """
    with pytest.raises(HostCannot, match="Firecracker needs"):
        host.require_kvm("auto", tmp_path / "none")
    with pytest.raises(NotSupported, match="cannot emulate a CPU"):
        host.require_kvm("tcg")


def test_the_build_shows_whether_it_has_filters(tmp_path: Path) -> None:
    """A program with an interpreter is dynamically linked and has no seccomp filters; a static one
    has them.
    """

    def elf(*kinds: int) -> Path:
        head = b"\x7fELF\x02\x01".ljust(0x20, b"\0") + struct.pack("<Q", 64)
        head = head.ljust(0x36, b"\0") + struct.pack("<HH", 56, len(kinds))
        path = tmp_path / "program"
        path.write_bytes(head.ljust(64, b"\0") + b"".join(struct.pack("<I", kind).ljust(56, b"\0") for kind in kinds))
        return path

    assert host.has_seccomp_filters(elf(1, 2, 6))
    assert not host.has_seccomp_filters(elf(1, 3, 6))
    (tmp_path / "script").write_text("#!/bin/sh\n")
    assert not host.has_seccomp_filters(tmp_path / "script")


def test_the_doctors_check_of_firecracker() -> None:
    """Each finding has a remedy; the build is named, and a build without filters is not called
    safe.
    """
    assert judge_firecracker("1.16.1", "ok", [], filters=True).status == "ok"
    for check, word in (
        (judge_firecracker("1.16.1", "ok", [], filters=False), "glibc"),
        (judge_firecracker("1.17.0", "ok", [], filters=True), "newer than 1.16"),
        (judge_firecracker("1.16.1", "denied", [], filters=True), "may not open"),
        (judge_firecracker("1.16.1", "ok", ["IRQFD"], filters=True), "KVM_CAP_IRQFD"),
    ):
        assert check.status in ("warn", "fail")
        assert word in check.detail
        assert check.cure


def test_the_reason_of_an_end_is_the_last_logged_error(tmp_path: Path) -> None:
    """The exit status is 0 even after errors, so the reason is the last error in the log since the
    start.
    """
    log = tmp_path / "vmm.log"
    assert driver.exit_reason(log, 0) == "exit status 0"
    line = "2026-01-01T00:00:00.1 [anonymous-instance:main:{}] {}\n"
    log.write_text(
        line.format("INFO", "Running Firecracker v1.16.1")
        + line.format("ERROR", "an older life")
        + line.format("INFO", "Running Firecracker v1.16.1")
    )
    assert driver.exit_reason(log, 0) == "exit status 0"
    with log.open("a") as stream:
        stream.write(line.format("ERROR", "Failed to map") + line.format("INFO", "exiting"))
        stream.write(line.format("ERROR", "Received Error. Status code: 400 Bad Request. Message: refused"))
    assert driver.exit_reason(log, 0) == "Failed to map"
    assert driver.exit_reason(log, -9) == "signal 9, last words: Failed to map"


@asynccontextmanager
async def answering(directory: Path, say: Callable[[asyncio.StreamWriter], Awaitable[Any]]) -> AsyncIterator[None]:
    """Run a server that answers each connection in the same way."""

    async def serve(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        await reader.readuntil(b"\r\n\r\n")
        await say(writer)
        writer.close()

    async with await asyncio.start_unix_server(serve, directory / api.SOCKET):
        yield


@pytest.mark.parametrize(
    ("answer", "error", "word"),
    [
        (b'HTTP/1.1 400 \r\nContent-Length: 26\r\n\r\n{"fault_message":"too bad"}'[:-1] + b"}", VmmError, "too bad"),
        (b"HTTP/1.1 500 \r\n\r\n", VmmError, "not understood"),
        (b"HTTP/1.1 200 \r\nContent-Length: 3\r\n\r\n{]}", VmmError, "not understood"),
        (b"HTTP/1.1 200 \r\nContent-Length: 99999999\r\n\r\n", VmmError, "not understood"),
        (b"SSH-2.0-nonsense\r\n", VmmError, "not understood"),
        (b"HTTP/1.1 2", VmmDied, "hung up"),
        (b"", VmmDied, "hung up"),
    ],
)  # fmt: skip
async def test_any_answer_is_translated(tmp_path: Path, answer: bytes, error: type[VmmError], word: str) -> None:
    """Any answer is translated to one of Coppice's errors that quotes it."""

    async def say(writer: asyncio.StreamWriter) -> None:
        for at in range(0, len(answer), 7):  # in pieces
            writer.write(answer[at : at + 7])
            await writer.drain()

    async with answering(tmp_path, say):
        with pytest.raises(error, match=word):
            await api.ask(tmp_path, Request("GET", "/"), deadline_s=5)


async def test_a_full_disk_is_reported_as_one(tmp_path: Path) -> None:
    """The caller can then free space and try again."""
    body = b'{"fault_message":"Create snapshot error: No space left on device (os error 28)"}'

    async def say(writer: asyncio.StreamWriter) -> None:
        writer.write(b"HTTP/1.1 400 \r\nContent-Length: %d\r\n\r\n%s" % (len(body), body))

    async with answering(tmp_path, say):
        with pytest.raises(NoSpace):
            await api.ask(tmp_path, Request("PUT", "/snapshot/create", {}))


async def test_a_silent_socket_is_a_timeout(tmp_path: Path) -> None:
    """The deadline covers the whole exchange. Without a socket there is no VMM."""
    with pytest.raises(VmmDied):
        await api.ask(tmp_path, Request("GET", "/"))

    async def say(_: asyncio.StreamWriter) -> None:
        await asyncio.sleep(5)

    async with answering(tmp_path, say):
        with pytest.raises(VmmTimeout):
            await api.ask(tmp_path, Request("GET", "/"), deadline_s=0.05)
