"""Turn a shared mapping of a running process into a private one, in place.

A guest's first boot has its RAM in a file that is mapped shared. To fork it while it runs, that file must stop changing. Instead of copying hundreds of
megabytes, the VMM, paused, is made to map the same file again at the same address with MAP_PRIVATE: the file is from then on the frozen
base of all, and what the guest writes next goes to private pages. The page tables start empty and fill again from the page cache; no byte is copied.

The system call is made in the other process by ptrace(2): stop one thread, point it at a `syscall` instruction (the vDSO has one), step once, and put its
registers back. The interrupted system call of that thread is restarted by the kernel as after any signal. x86-64 only; elsewhere the caller copies.
"""

from __future__ import annotations

import contextlib
import ctypes
import mmap
import os
import platform
from collections.abc import Iterator
from pathlib import Path

from coppice.errors import HostCannot, VmmDied, VmmError
from coppice.memory.maps import FileIdentity, Vma, read_maps

_SEIZE, _INTERRUPT, _DETACH, _SINGLESTEP, _GETREGS, _SETREGS = 0x4206, 0x4207, 17, 9, 12, 13
_WALL = 0x40000000
_SYSCALL = b"\x0f\x05"
_MMAP = 9
_MAP_FIXED, _MAP_NORESERVE = 0x10, 0x4000
_OVERCOMMIT, _STRICT = Path("/proc/sys/vm/overcommit_memory"), "2"  # Documentation/mm/overcommit-accounting.rst
_ERROR = (1 << 64) - 4095  # a result at or above is a negated errno


class _Registers(ctypes.Structure):
    """struct user_regs_struct of x86-64 (sys/user.h)."""

    _fields_ = [
        (name, ctypes.c_ulonglong)
        for name in (
            "r15", "r14", "r13", "r12", "rbp", "rbx", "r11", "r10", "r9", "r8", "rax", "rcx", "rdx", "rsi", "rdi",
            "orig_rax", "rip", "cs", "eflags", "rsp", "ss", "fs_base", "gs_base", "ds", "es", "fs", "gs",
        )
    ]  # fmt: skip


_libc = ctypes.CDLL(None, use_errno=True)
_libc.ptrace.argtypes = [ctypes.c_long, ctypes.c_long, ctypes.c_void_p, ctypes.c_void_p]
_libc.ptrace.restype = ctypes.c_long


def can_remap() -> bool:
    """Whether this machine's instruction set is one that `make_private` knows."""
    return platform.machine() == "x86_64"


def make_private(pid: int, identity: FileIdentity) -> int:
    """Replace every shared mapping that the process has of a file by a private one at the same place; return the bytes remapped.

    The process must not touch the memory meanwhile: a VMM's vCPUs are paused and its disks drained. Blocks for a few milliseconds; all
    calls of ptrace must come from one thread, so this is one call.

    :raises VmmDied: there is no such process
    :raises HostCannot: it cannot be traced from here, this is not x86-64, or memory is not overcommitted here; nothing was changed
    :raises VmmError: the process could not map it
    """
    if not can_remap():
        raise HostCannot("mappings can be replaced on x86-64 only", hint="the memory is copied instead")
    if _OVERCOMMIT.read_text().strip() == _STRICT:
        # A private mapping of all of RAM is then refused where memory is not free for all of it, after the kernel has taken the old one away.
        raise HostCannot(
            "this host does not overcommit memory (vm.overcommit_memory=2)", hint="the memory is copied instead"
        )
    shared = [vma for vma in read_maps(pid) if vma.file == identity and not vma.private]
    if not shared:
        return 0
    descriptor = _open_descriptor(pid, identity)
    with _stopped(pid) as registers:
        entry = _syscall_instruction(pid)
        for vma in shared:
            _call_mmap(pid, registers, entry, vma, descriptor)
    return sum(vma.length for vma in shared)


def _open_descriptor(pid: int, identity: FileIdentity) -> int:
    """The number under which the process has the file open: a VMM keeps its mem-file open as long as it lives."""
    with contextlib.suppress(FileNotFoundError):
        for entry in Path(f"/proc/{pid}/fd").iterdir():
            with contextlib.suppress(OSError):
                status = entry.stat()
                if status.st_ino == identity.inode:
                    return int(entry.name)
    raise VmmError(
        "the VMM does not have its mem-file open", hint="it cannot be forked while it runs; put it into standby"
    )


def _syscall_instruction(pid: int) -> int:
    """The address of a `syscall` instruction in the process's vDSO."""
    for line in Path(f"/proc/{pid}/maps").read_text().splitlines():
        if line.endswith("[vdso]"):
            start, end = (int(word, 16) for word in line.split()[0].split("-"))
            with Path(f"/proc/{pid}/mem").open("rb", buffering=0) as memory:
                memory.seek(start)
                at = memory.read(end - start).find(_SYSCALL)
            if at >= 0:
                return start + at
    raise HostCannot("the VMM has no vDSO to make a system call from", hint="the memory is copied instead")


def _ptrace(request: int, pid: int, address: int = 0, data: object = None) -> None:
    if _libc.ptrace(request, pid, address, data) < 0:
        error = ctypes.get_errno()
        if error == 3:  # ESRCH
            raise VmmDied("the VMM ended while its memory was remapped", hint="see vmm.log of the instance")
        raise HostCannot(
            f"the VMM cannot be traced: {os.strerror(error)}", hint="run as root, or set kernel.yama.ptrace_scope to 0"
        )


def _wait_stop(pid: int) -> None:
    try:
        _, status = os.waitpid(pid, _WALL)
    except ChildProcessError as error:
        raise VmmDied("the VMM ended while its memory was remapped", hint="see vmm.log of the instance") from error
    if not os.WIFSTOPPED(status):
        raise VmmDied("the VMM ended while its memory was remapped", hint="see vmm.log of the instance")


@contextlib.contextmanager
def _stopped(pid: int) -> Iterator[_Registers]:
    """Stop the process's first thread; let it go on in every case exactly as it was."""
    _ptrace(_SEIZE, pid)
    saved = _Registers()
    try:
        _ptrace(_INTERRUPT, pid)
        _wait_stop(pid)
        _ptrace(_GETREGS, pid, 0, ctypes.byref(saved))
        try:
            yield saved
        finally:
            _ptrace(_SETREGS, pid, 0, ctypes.byref(saved))
    finally:
        with contextlib.suppress(VmmDied, HostCannot):
            _ptrace(_DETACH, pid)


def _call_mmap(pid: int, saved: _Registers, entry: int, vma: Vma, descriptor: int) -> None:
    call = _Registers.from_buffer_copy(saved)
    call.rip, call.rax, call.orig_rax = entry, _MMAP, (1 << 64) - 1  # no system call is to be restarted here
    call.rdi, call.rsi, call.rdx = vma.start, vma.length, mmap.PROT_READ | mmap.PROT_WRITE
    call.r10, call.r8, call.r9 = mmap.MAP_PRIVATE | _MAP_FIXED | _MAP_NORESERVE, descriptor, vma.offset
    _ptrace(_SETREGS, pid, 0, ctypes.byref(call))
    _ptrace(_SINGLESTEP, pid)
    _wait_stop(pid)
    _ptrace(_GETREGS, pid, 0, ctypes.byref(call))
    if call.rax != vma.start:
        number = (1 << 64) - call.rax if call.rax >= _ERROR else 0
        raise VmmError(
            f"the VMM could not map its memory privately: {os.strerror(number)}", hint="see vmm.log of the instance"
        )
