"""Observe which pages another process writes, by userfaultfd(2) with asynchronous write protection.

Soft-dirty bits are not in every kernel, and are of the whole process. A userfaultfd protects pages
of chosen mappings: the first write to a page takes the protection away in the kernel's fault handler,
without any other process, and `PAGEMAP_SCAN` reports the pages without protection. Linux 6.7 and
later. Facts: Documentation/admin-guide/mm/userfaultfd.rst and pagemap.rst of the kernel.

A userfaultfd is of the process that makes it. So the system call is made in the VMM
(`coppice.linux.tracing`), the descriptor is taken by pidfd_getfd(2), and the VMM closes its own in
the same few instructions, even if the tracer is killed in between. When the last descriptor closes,
as at the death of this process, the kernel takes away all protection.

A page that was pinned before its protection is written without a fault. So the VMM must use no
O_DIRECT, no VFIO device and no registered buffers for guest memory while its writes are observed.
"""

from __future__ import annotations

import ctypes
import errno
import fcntl
import os
import struct
from collections.abc import Sequence
from typing import Self

from coppice.errors import HostCannot
from coppice.linux import tracing
from coppice.linux.maps import Vma, process_error
from coppice.linux.pagemap import PrivateRange, private_and_written, protect_written

_CLOSE, _USERFAULTFD, _PIDFD_GETFD = 3, 323, 438
_USER_MODE_ONLY = 1  # no privilege needed; asynchronous protection also covers writes by the kernel and by KVM
_API, _WP_ASYNC, _MODE_WP = 0xAA, 1 << 15, 1 << 1
_UFFDIO_API, _UFFDIO_REGISTER = 0xC018AA3F, 0xC020AA00
_RESULT_TO_ARGUMENT = b"\x48\x89\xc7"  # mov rdi, rax

_libc = ctypes.CDLL(None, use_errno=True)
_libc.syscall.argtypes = [ctypes.c_long, ctypes.c_long, ctypes.c_long, ctypes.c_long]
_libc.syscall.restype = ctypes.c_long


class WriteObserver:
    """The observed private mappings of a process, until `close`."""

    def __init__(self, pid: int, mappings: Sequence[Vma]) -> None:
        """Observe writes to these mappings from now on. The process may run.

        :raises VmmDied: the process has ended
        :raises HostCannot: the kernel or a system call filter refuses; the process is unchanged
        """
        self._pid = pid
        self._mappings = sorted(mappings, key=lambda vma: vma.offset)
        self._descriptor = _userfaultfd(pid)
        try:
            fcntl.ioctl(self._descriptor, _UFFDIO_API, struct.pack("=3Q", _API, _WP_ASYNC, 0))
            for vma in mappings:
                request = struct.pack("=4Q", vma.start, vma.length, _MODE_WP, 0)
                fcntl.ioctl(self._descriptor, _UFFDIO_REGISTER, request)
        except OSError as error:
            self.close()
            raise _refused(error.errno or 0) from error

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def close(self) -> None:
        """End the observation. Idempotent."""
        if self._descriptor >= 0:
            os.close(self._descriptor)
            self._descriptor = -1

    def written(self) -> list[PrivateRange]:
        """Return the private pages written since the last call, or ever for the first one, and
        observe them again. The process may run: a write after this call is in the next result.

        :raises CoppiceError: a mapping is not observed any more, or the process has ended
        """
        return protect_written(self._pid, self._mappings)

    def final(self) -> tuple[list[PrivateRange], list[PrivateRange]]:
        """Return all private pages of a paused process, and those of them that may have changed
        since the last call of `written`. Raises as `written` does.
        """
        return private_and_written(self._pid, self._mappings)


def _userfaultfd(pid: int) -> int:
    """Make a userfaultfd in another process, and return a descriptor of it here."""
    if not tracing.supported():
        raise _refused(errno.ENOSYS)
    begin = tracing.load("rax", _USERFAULTFD) + tracing.load("rdi", os.O_CLOEXEC | _USER_MODE_ONLY) + tracing.SYSCALL
    end = _RESULT_TO_ARGUMENT + tracing.load("rax", _CLOSE) + tracing.SYSCALL
    size = len(tracing.then_resume(begin + end, tracing.Registers()))
    process = _process(pid)
    try:
        try:
            address = tracing.room_for(pid, size)  # before the stop: a VMM may have thousands of mappings
        except OSError as error:
            raise process_error(pid, f"read the code of process {pid}", error) from error
        with tracing.stopped(pid) as (registers, pending):
            tracing.write(pid, address, tracing.then_resume(begin + end, registers))
            moved = tracing.Registers.from_buffer_copy(registers)
            moved.rip, moved.orig_rax = address, tracing.NO_SYSCALL
            tracing.ptrace(tracing.SETREGS, pid, 0, ctypes.byref(moved))
            made = tracing.to_result(pid, address + len(begin), pending)
            if made < tracing.ERROR:
                descriptor: int = _libc.syscall(_PIDFD_GETFD, process, made, 0)
                number = ctypes.get_errno()
            else:
                descriptor, number = -1, (1 << 64) - made
            try:
                _remove(pid, address, size, registers, end=address + len(begin + end))
            except BaseException:
                if descriptor >= 0:
                    os.close(descriptor)
                raise
    finally:
        os.close(process)
    if descriptor < 0:
        raise _refused(number)
    return descriptor


def _process(pid: int) -> int:
    try:
        return os.pidfd_open(pid)
    except OSError as error:
        raise process_error(pid, f"open process {pid}", error) from error


def _remove(pid: int, address: int, size: int, stopped: tracing.Registers, *, end: int) -> None:
    """Let the process close its descriptor, and go on where it was stopped; remove the instructions,
    so that there is room for the next ones.
    """
    tracing.to_result(pid, end)
    moved = tracing.Registers.from_buffer_copy(stopped)
    moved.rax, moved.rip = tracing.continuation(stopped)
    moved.orig_rax = tracing.NO_SYSCALL
    tracing.ptrace(tracing.SETREGS, pid, 0, ctypes.byref(moved))
    tracing.write(pid, address, bytes(size))


def _refused(number: int) -> HostCannot:
    return HostCannot(
        f"writes of the VMM cannot be observed: {os.strerror(number)}",
        hint="pages are copied while the machine is paused; Linux 6.7 and later can copy them before",
    )
