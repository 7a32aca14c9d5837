"""Network namespaces by system calls: no `ip netns exec`, which copies the mount namespace for each
call.

setns(2) and unshare(2) change the calling thread alone.
"""

from __future__ import annotations

import ctypes
import functools
import os
import threading
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Final, TypeVar

T = TypeVar("T")

RUNTIME: Final = Path("/run/netns")  # where `ip netns` looks
_CLONE_NEWNET: Final = 0x40000000
_MS_BIND: Final = 4096
_MNT_DETACH: Final = 2


@functools.cache
def _libc() -> ctypes.CDLL:
    return ctypes.CDLL(None, use_errno=True)


def inside(namespace: Path | None, work: Callable[[], T]) -> T:
    """Run `work` in a network namespace, or in the caller's if `namespace` is None. Blocks.

    The calling thread enters the namespace and returns: waiting for a new thread takes milliseconds
    on a busy host. `work` must not start threads or processes.

    :raises OSError: there is no such namespace, or this process may not enter it
    """
    if namespace is None:
        return work()
    own = os.open("/proc/thread-self/ns/net", os.O_RDONLY | os.O_CLOEXEC)
    try:
        enter(namespace)
        try:
            return work()
        finally:
            if _libc().setns(own, _CLONE_NEWNET) != 0:
                os.abort()  # all further work of this thread would run in the wrong namespace
    finally:
        os.close(own)


def apart(namespace: Path | None, work: Callable[[], T]) -> T:
    """Run `work` as `inside` does, in a new thread. Blocks.

    For work that starts threads, processes or an event loop.
    """
    with ThreadPoolExecutor(1, thread_name_prefix="netns") as thread:
        return thread.submit(inside, namespace, work).result()


def enter(namespace: Path) -> None:
    """Move the calling thread, and the threads and processes that it starts, into a network
    namespace.

    :raises OSError: there is no such namespace, or this process may not enter it
    """
    descriptor = os.open(namespace, os.O_RDONLY | os.O_CLOEXEC)
    try:
        _check(_libc().setns(descriptor, _CLONE_NEWNET), namespace)
    finally:
        os.close(descriptor)


def create(path: Path, work: Callable[[], T]) -> T:
    """Make a network namespace that a mount at `path` keeps alive, and run `work` in it. Blocks.

    :raises OSError: it exists, or this process may not make one; `remove` removes a partial result
    """

    def made() -> T:
        path.parent.mkdir(exist_ok=True)
        os.close(os.open(path, os.O_RDONLY | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, 0o444))
        _check(_libc().unshare(_CLONE_NEWNET), path)
        source = f"/proc/self/task/{threading.get_native_id()}/ns/net"
        _check(_libc().mount(source.encode(), bytes(path), b"none", _MS_BIND, None), path)
        return work()

    with ThreadPoolExecutor(1, thread_name_prefix="netns") as thread:  # this thread stays in the new namespace
        return thread.submit(made).result()


def remove(path: Path) -> None:
    """Remove the mount that keeps a namespace alive.

    The kernel removes the namespace after its last user. Idempotent. Blocks.
    """
    while _libc().umount2(bytes(path), _MNT_DETACH) == 0:
        pass
    path.unlink(missing_ok=True)


def _check(status: int, path: Path) -> None:
    if status != 0:
        number = ctypes.get_errno()
        raise OSError(number, os.strerror(number), str(path))
