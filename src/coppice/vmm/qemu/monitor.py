"""QMP, one short conversation at a time: connect, negotiate, a few commands, hang up.

QEMU serves one monitor client at once; the host's instance lock keeps others away meanwhile.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import os
import socket
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

from qemu.qmp import ConnectError, ExecuteError, QMPClient, QMPError

from coppice.errors import VmmDied, VmmError, VmmTimeout

logging.getLogger("qemu.qmp").setLevel(logging.CRITICAL)  # it logs every hang-up; our errors say what matters


class Monitor:
    """An open conversation."""

    def __init__(self, client: QMPClient) -> None:
        self._client = client

    def send_file(self, descriptor: int) -> None:
        """Hand an open file to QEMU, to be claimed by the next command (`add-fd`)."""
        self._client.send_fd_scm(descriptor)

    async def execute(self, command: str, arguments: dict[str, object] | None = None) -> Any:
        """Run one command and return its result.

        :raises VmmError: QEMU refused it
        :raises VmmDied: QEMU hung up
        """
        try:
            return await self._client.execute(command, arguments)
        except ExecuteError as error:
            raise VmmError(
                f"QEMU refused {command}: {error}", hint="see what it said with `coppice logs --vmm NAME`"
            ) from error
        except QMPError as error:
            raise VmmDied(
                f"QEMU hung up during {command}", hint="see what it said with `coppice logs --vmm NAME`"
            ) from error


@contextlib.asynccontextmanager
async def monitor(directory: Path, socket_name: str, *, deadline_s: float = 15.0) -> AsyncIterator[Monitor]:
    """Open a conversation with the QEMU of an instance. The deadline covers all of it.

    :raises VmmDied: nobody listens
    :raises VmmTimeout: QEMU did not answer within `deadline_s`
    """
    client = QMPClient("coppice")
    try:
        async with asyncio.timeout(deadline_s):
            try:
                # A path below /proc/self/fd is short, whatever the length of the directory's own: sun_path has 108 bytes.
                descriptor = os.open(directory, os.O_PATH | os.O_DIRECTORY)
                try:
                    connection = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
                    connection.setblocking(False)
                    try:
                        connection.connect(f"/proc/self/fd/{descriptor}/{socket_name}")
                        await client.connect(connection)
                    except BaseException:
                        connection.close()
                        raise
                finally:
                    os.close(descriptor)
            except (OSError, ConnectError) as error:
                raise VmmDied(
                    "the VMM does not answer", hint="run `coppice inspect NAME` to see what became of it"
                ) from error
            try:
                yield Monitor(client)
            finally:
                with contextlib.suppress(QMPError, OSError):
                    await client.disconnect()
    except TimeoutError as error:
        raise VmmTimeout(
            f"the VMM did not answer within {deadline_s:g} s", hint="see what it said with `coppice logs --vmm NAME`"
        ) from error
