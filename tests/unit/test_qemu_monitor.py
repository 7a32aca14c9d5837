"""Conversations with QEMU's monitor: whatever QEMU does, they end."""

from __future__ import annotations

import asyncio
import contextlib
import functools
import json
from collections.abc import AsyncIterator
from pathlib import Path

import pytest

from coppice.errors import VmmTimeout
from coppice.vmm.qemu import driver as qemu
from coppice.vmm.qemu.command import QMP_SOCKET
from coppice.vmm.qemu.monitor import monitor

GREETING = {"QMP": {"version": {"qemu": {"major": 7, "minor": 2, "micro": 0}, "package": ""}, "capabilities": []}}
ANSWERS: dict[str, object] = {"qmp_capabilities": {}, "add-fd": {"fdset-id": 1, "fd": 7}}


@contextlib.asynccontextmanager
async def stuck_at(directory: Path, command: str) -> AsyncIterator[list[str]]:
    """A monitor that answers no more from this command on, as one whose disk hangs; yields what it was asked."""
    asked: list[str] = []

    async def serve(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        writer.write(json.dumps(GREETING).encode() + b"\n")
        while data := await reader.read(4096):  # one request at a time, and no line ends
            if not data.strip():  # it came with a file
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
    """The deadline ends the conversation, tidying up included: else a standby would hold its instance for as long as QEMU hangs."""
    monkeypatch.setattr(qemu, "monitor", functools.partial(monitor, deadline_s=0.3))
    async with stuck_at(tmp_path, "xen-save-devices-state") as asked:
        with pytest.raises(VmmTimeout):
            async with asyncio.timeout(10):
                await qemu.QemuDriver().save_devices(tmp_path)
    assert asked[-1] == "xen-save-devices-state"
