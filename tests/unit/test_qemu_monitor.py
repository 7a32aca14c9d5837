"""Conversations with QEMU's monitor end, whatever QEMU does."""

from __future__ import annotations

import asyncio
import contextlib
import functools
import json
from collections.abc import AsyncIterator
from pathlib import Path

import pytest

from coppice.errors import VmmDied, VmmError, VmmTimeout
from coppice.vmm.qemu import driver as qemu
from coppice.vmm.qemu.command import QMP_SOCKET
from coppice.vmm.qemu.monitor import monitor

GREETING = {"QMP": {"version": {"qemu": {"major": 7, "minor": 2, "micro": 0}, "package": ""}, "capabilities": []}}
ANSWERS: dict[str, object] = {"qmp_capabilities": {}, "add-fd": {"fdset-id": 1, "fd": 7}}


@contextlib.asynccontextmanager
async def stuck_at(directory: Path, command: str) -> AsyncIterator[list[str]]:
    """Run a monitor that stops answering at this command, as one with a hanging disk does; yield
    the received commands.
    """
    asked: list[str] = []

    async def serve(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        writer.write(json.dumps(GREETING).encode() + b"\n")
        while data := await reader.read(4096):  # one request at a time, without line ends
            if not data.strip():  # an empty line came with a file descriptor
                continue
            request = json.loads(data)
            asked.append(request["execute"])
            if command not in asked:
                answer = {"return": ANSWERS[request["execute"]]}
                if "id" in request:
                    answer["id"] = request["id"]
                writer.write(json.dumps(answer).encode() + b"\n")
        writer.close()

    async with await asyncio.start_unix_server(serve, directory / QMP_SOCKET):
        yield asked


async def test_a_monitor_that_hangs_does_not_hang_a_capture(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The deadline covers the whole conversation, cleanup included: otherwise a standby would hold
    its instance as long as QEMU hangs.
    """
    monkeypatch.setattr(qemu, "monitor", functools.partial(monitor, deadline_s=0.3))
    async with stuck_at(tmp_path, "xen-save-devices-state") as asked:
        with pytest.raises(VmmTimeout):
            async with asyncio.timeout(10):
                await qemu.QemuDriver().save(tmp_path)
    assert asked[-1] == "xen-save-devices-state"


@contextlib.asynccontextmanager
async def saying(directory: Path, *, greeting: bytes | None = None, **answers: bytes) -> AsyncIterator[None]:
    """Run a monitor that answers these commands with these bytes; it hangs up on an empty answer."""

    async def serve(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        writer.write(json.dumps(GREETING).encode() + b"\n" if greeting is None else greeting)
        # one request at a time, without line ends
        while greeting is None and (line := await reader.read(4096)):
            request = json.loads(line)
            answer = json.dumps({"return": ANSWERS.get(request["execute"]), "id": request.get("id")}).encode()
            said = answers.get(request["execute"].replace("-", "_"), answer)
            writer.write(said.replace(b"ID", json.dumps(request.get("id")).encode()) + (b"\n" if said else b""))
            if not said:
                break
        writer.close()

    async with await asyncio.start_unix_server(serve, directory / QMP_SOCKET):
        yield


NOT_UNDERSTOOD = {
    "no JSON": b"Segmentation fault",
    "no object": b"[1, 2]",
    "neither result nor error": b'{"id": ID, "more": 1}',
    "an error without its words": b'{"id": ID, "error": {"class": 7}}',
}


@pytest.mark.parametrize("answer", NOT_UNDERSTOOD)
async def test_an_invalid_answer_is_not_a_hang_up(tmp_path: Path, answer: str) -> None:
    """QEMU is still alive; the error names the command and the defect of the answer."""
    async with saying(tmp_path, stop=NOT_UNDERSTOOD[answer]):
        with pytest.raises(VmmError, match="QEMU's answer during stop was not understood: ") as error:
            await qemu.QemuDriver().pause(tmp_path)
    assert not isinstance(error.value, VmmDied)
    assert error.value.hint


async def test_an_incomplete_result_is_an_error_of_qemu(tmp_path: Path) -> None:
    """The error blames QEMU's answer instead of raising an internal error."""
    async with saying(tmp_path, query_status=b'{"return": {"status": "running"}, "id": ID}'):
        with pytest.raises(VmmError, match="QEMU answered query-status without running: "):
            await qemu.QemuDriver().is_paused(tmp_path)


async def test_a_refusal_quotes_qemu(tmp_path: Path) -> None:
    """QEMU is still alive, and the error quotes its reason."""
    async with saying(tmp_path, stop=b'{"error": {"class": "GenericError", "desc": "not now"}, "id": ID}'):
        with pytest.raises(VmmError, match="QEMU refused stop: not now") as error:
            await qemu.QemuDriver().pause(tmp_path)
    assert not isinstance(error.value, VmmDied)


async def test_a_hang_up_is_reported_as_one(tmp_path: Path) -> None:
    """QEMU may hang up during a command or before the greeting; a socket without a listener is
    reported too.
    """
    async with saying(tmp_path, stop=b""):
        with pytest.raises(VmmDied, match="QEMU hung up during stop"):
            await qemu.QemuDriver().pause(tmp_path)
    (tmp_path / QMP_SOCKET).unlink(missing_ok=True)
    async with saying(tmp_path, greeting=b""):
        with pytest.raises(VmmDied, match="QEMU hung up when it was greeted"):
            await qemu.QemuDriver().pause(tmp_path)
    (tmp_path / QMP_SOCKET).unlink(missing_ok=True)
    with pytest.raises(VmmDied, match="does not answer: No such file"):
        await qemu.QemuDriver().pause(tmp_path)


async def test_an_invalid_greeting_is_not_a_hang_up(tmp_path: Path) -> None:
    """Another program listens on the socket."""
    async with saying(tmp_path, greeting=b"SSH-2.0-OpenSSH_9.2\n"):
        with pytest.raises(VmmError, match="QEMU's answer when it was greeted was not understood") as error:
            await qemu.QemuDriver().pause(tmp_path)
    assert not isinstance(error.value, VmmDied)
