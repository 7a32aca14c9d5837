"""Shared by the pool and the filter of names: policy and refusal files, and the start of the
filter.
"""

from __future__ import annotations

import contextlib
import errno
import json
import os
import socket
import time
from pathlib import Path
from typing import Final

import msgspec

from coppice.model import Egress
from coppice.network.nat.helper import start_helper, take

DEFAULT: Final = Egress()  # the policy of a new slot
SERVING: Final = b"1"  # the filter's answer to a caller that needs it
_SOCKET: Final = "names.sock"
_WAITING: Final = 256  # callers of one burst
_START_S: Final = 10.0
_PAUSE_S: Final = 0.005


def read_policy(file: Path, default: Egress = DEFAULT) -> Egress:
    """Return the policy of a slot, or `default` if it has none. Blocks."""
    try:
        return msgspec.json.decode(file.read_bytes(), type=Egress)
    except FileNotFoundError:
        return default


def needs_names(file: Path) -> bool:
    """Return whether a slot's policy needs the filter of names: if it allows names, or the host's
    own resolver. Blocks.
    """
    policy = read_policy(file, Egress(mode="none"))
    return bool(policy.names) or policy.mode == "all"


def read_refused(file: Path) -> dict[str, int]:
    """Return the names that a slot was refused, with their counts. Blocks."""
    try:
        names: dict[str, int] = json.loads(file.read_text())
    except FileNotFoundError:
        return {}
    return names


def start_names(root: Path, key: str, host: Path | None, resolv_conf: Path) -> None:
    """Start the filter of names if none serves; return when one does. Blocks.

    Policies that were written before this call count: the filter that serves has seen them, so it
    does not end before they are gone. A filter that is ending, or was killed and still has its
    lock, gives no answer.

    :raises OSError: no filter serves; the message names its log
    """
    end = time.monotonic() + _START_S
    directory = os.open(root, os.O_PATH | os.O_DIRECTORY | os.O_CLOEXEC)
    try:
        started = False
        while not _serves(directory, end):
            if started or time.monotonic() >= end:
                raise OSError(errno.ENOTCONN, "the filter of names does not answer", str(root / "names.log"))
            started = _start(directory, [str(root), key, str(host or ""), str(resolv_conf)])
            if not started:  # another process is starting one, or the kernel is still removing one
                time.sleep(_PAUSE_S)
    finally:
        os.close(directory)


def _serves(directory: int, end: float) -> bool:
    """Ask the filter whether it serves. It does not if it ends instead, or if `end` comes first."""
    with socket.socket(socket.AF_UNIX, socket.SOCK_STREAM) as asking:
        try:
            asking.settimeout(max(_PAUSE_S, end - time.monotonic()))
            asking.connect(f"/proc/self/fd/{directory}/{_SOCKET}")
            return asking.recv(1) == SERVING
        except OSError:
            return False


def _start(directory: int, arguments: list[str]) -> bool:
    """Start a filter that holds the lock from its start on; return False if another one has it.

    The filter's socket listens before the filter runs, so other callers wait for its answer too.
    """
    lock = os.open("names.lock", os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600, dir_fd=directory)
    try:
        if not take(lock):
            return False
        with contextlib.suppress(FileNotFoundError):
            os.unlink(_SOCKET, dir_fd=directory)
        with socket.socket(socket.AF_UNIX, socket.SOCK_STREAM) as listener:
            listener.bind(f"/proc/self/fd/{directory}/{_SOCKET}")
            listener.listen(_WAITING)
            log = Path(f"/proc/self/fd/{directory}/names.log")
            start_helper("coppice.network.nat.names", arguments, (lock, listener.fileno()), log)
        return True
    finally:
        os.close(lock)
