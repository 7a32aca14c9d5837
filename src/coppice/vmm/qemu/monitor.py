"""QMP, one short conversation at a time: connect, negotiate, run a few commands, hang up.

QEMU serves one monitor client at a time; the instance's lock excludes other clients meanwhile.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import socket
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any, TypeVar

from qemu.qmp import ExecInterruptedError, ExecuteError, QMPClient, QMPError

from coppice.errors import VmmDied, VmmError, VmmTimeout
from coppice.vmm import sockets

logging.getLogger("qemu.qmp").setLevel(logging.CRITICAL)  # it logs every hang-up, which our errors report

_SEE_LOG = "see its log with `coppice logs --vmm NAME`"
_SEE_FATE = "see the machine's state with `coppice inspect NAME`"
T = TypeVar("T")


class Monitor:
    """An open conversation."""

    def __init__(self, client: QMPClient, connection: socket.socket) -> None:
        self._client = client
        self._connection = connection

    def send_file(self, descriptor: int) -> None:
        """Pass an open file to QEMU. The next command must be `add-fd`, which takes it."""
        # The client's own method works in no other event loop than asyncio's.
        socket.send_fds(self._connection, [b" "], [descriptor])

    async def execute(self, command: str, arguments: dict[str, object] | None = None) -> Any:
        """Run one command and return its result.

        :raises VmmError: QEMU refused the command, or its answer is not QMP
        :raises VmmDied: QEMU hung up
        """
        try:
            return await self._client.execute(command, arguments)
        except ExecuteError as error:
            raise VmmError(f"QEMU refused {command}: {error}", hint=_SEE_LOG) from error
        except ExecInterruptedError as error:  # only the connection knows the cause
            raise _translated(f"during {command}", await self._end() or error) from error
        except QMPError as error:
            raise _translated(f"during {command}", error) from error

    async def ask(self, command: str, field: str, kind: type[T], arguments: dict[str, object] | None = None) -> T:
        """Run one command and return a field of its result.

        :raises VmmError: as for `execute`, or the result has no such field
        :raises VmmDied: QEMU hung up
        """
        result = await self.execute(command, arguments)
        value = result.get(field) if isinstance(result, dict) else None
        if not isinstance(value, kind):
            raise VmmError(f"QEMU answered {command} without {field}: {str(result)[:200]}", hint=_SEE_LOG)
        return value

    async def _end(self) -> BaseException | None:
        """Close the conversation; return the error that ended it."""
        try:
            await self._client.disconnect()
        except (QMPError, OSError, EOFError) as error:
            return error
        return None


def _translated(when: str, error: BaseException) -> VmmError:
    """Return the error of a conversation that ended: QEMU hung up, or its answer is not QMP."""
    cause = error
    while isinstance(inner := getattr(cause, "exc", None), BaseException):  # qemu.qmp wraps the cause
        cause = inner
    if isinstance(cause, OSError | EOFError | ExecInterruptedError):
        return VmmDied(f"QEMU hung up {when}: {cause or 'end of file'}", hint=_SEE_LOG)
    said = str(cause).strip().splitlines()
    return VmmError(
        f"QEMU's answer {when} was not understood: {said[0] if said else type(cause).__name__}", hint=_SEE_LOG
    )


@contextlib.asynccontextmanager
async def monitor(directory: Path, socket_name: str, *, deadline_s: float = 15.0) -> AsyncIterator[Monitor]:
    """Open a conversation with the QEMU of an instance. The deadline covers the whole block.

    :raises VmmDied: nothing listens, or QEMU hung up
    :raises VmmError: QEMU's answer is not QMP
    :raises VmmTimeout: QEMU did not answer within `deadline_s`
    """
    client = QMPClient("coppice")
    try:
        async with asyncio.timeout(deadline_s):
            try:
                connection = sockets.connect(directory, socket_name)
            except OSError as error:
                raise VmmDied(f"the VMM does not answer: {error.strerror}", hint=_SEE_FATE) from error
            try:
                await client.connect(connection)
            except (QMPError, OSError) as error:
                connection.close()
                raise _translated("when it was greeted", error) from error
            except BaseException:
                connection.close()
                raise
            try:
                yield Monitor(client, connection)
            finally:
                with contextlib.suppress(QMPError, OSError, EOFError):
                    await client.disconnect()
    except TimeoutError as error:
        raise VmmTimeout(f"the VMM did not answer within {deadline_s:g} s", hint=_SEE_LOG) from error
