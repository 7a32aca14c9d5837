"""Helper processes of NICs. Each has one end of a socket pair, and ends when its VMM closes the
other.
"""

from __future__ import annotations

import contextlib
import socket
import subprocess
import tempfile
from collections.abc import Iterable, Iterator
from typing import Final

from coppice.errors import HostCannot, MissingTool
from coppice.model.network import Nic, NicBackend

_START_S: Final = 20.0


@contextlib.contextmanager
def started(nics: Iterable[Nic]) -> Iterator[dict[Nic, int]]:
    """Start the helper of each NIC that has one; yield the descriptors for the VMM to inherit.
    Blocks.

    A helper whose VMM does not start ends with the block.

    :raises MissingTool: a helper is not installed
    :raises HostCannot: a helper refuses to start; the message has its last words
    """
    with contextlib.ExitStack() as ends:
        yield {nic: ends.enter_context(_start(nic)).fileno() for nic in nics if nic.backend is NicBackend.STREAM}


def _start(nic: Nic) -> socket.socket:
    ours, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_STREAM)
    program = nic.helper[0]
    try:
        with theirs, tempfile.TemporaryFile() as said:
            # It goes into the background when it is ready, and its standard error with it.
            status = subprocess.run(
                [*nic.helper, str(theirs.fileno())],
                stdin=subprocess.DEVNULL,
                stdout=said,
                stderr=said,
                cwd="/",
                timeout=_START_S,
                start_new_session=True,
                pass_fds=(theirs.fileno(),),
                check=False,
            ).returncode
            said.seek(0)
            words = said.read().decode("utf-8", "replace").strip().splitlines()
        if status:
            raise HostCannot(
                f"{program} does not start: {words[-1] if words else f'exit status {status}'}",
                hint="see whether this host has a default route; or use another --network",
            )
        if nic.greeting:  # as QEMU sends it: the length, then the frame
            ours.sendall(len(nic.greeting).to_bytes(4) + nic.greeting)
    except BaseException as error:
        ours.close()
        if isinstance(error, FileNotFoundError):
            raise MissingTool(f"{program} is not installed", hint=f"apt-get install {program}") from error
        if isinstance(error, subprocess.TimeoutExpired):
            raise HostCannot(
                f"{program} was not ready within {_START_S:g} s", hint="try again when this host is less busy"
            ) from error
        raise
    return ours
