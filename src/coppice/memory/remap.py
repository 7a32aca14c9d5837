"""Turn a shared mapping of a running process into a private one, in place.

A guest's first boot has its RAM in a file that is mapped shared. To fork it while it runs, that file must stop changing. Instead of copying hundreds of
megabytes, the VMM, paused, is made to map the same file again at the same address with MAP_PRIVATE: the file is from then on the frozen
base of all, and what the guest writes next goes to private pages. The page tables start empty and fill again from the page cache; no byte is copied.

The system call is made in the other process by ptrace(2), and so that a tracer which is killed at any instant does no harm: the kernel then lets the thread
go on from the registers that it has. So a few instructions are written where nothing else is, into the zeros behind the end of a program's code: they map,
put each register back, and go on where the thread was stopped. Only then the thread is pointed at them, by one call. From there on it needs nobody. It is
not stepped: a step that is under way when the tracer dies ends the process. x86-64 only; elsewhere the caller copies.
"""

from __future__ import annotations

import contextlib
import ctypes
import mmap
import os
import platform
import signal
from collections.abc import Iterator
from pathlib import Path

from coppice.errors import HostCannot, VmmDied, VmmError
from coppice.memory.maps import FileIdentity, Vma, read_maps

_SEIZE, _INTERRUPT, _DETACH, _TO_SYSCALL, _GETREGS, _SETREGS, _POKE = 0x4206, 0x4207, 17, 24, 12, 13, 5
_TELL_SYSCALLS = 1  # PTRACE_O_TRACESYSGOOD
_SYSCALL_STOP = signal.SIGTRAP | 0x80
_EVENT = 8  # bits of a stop from here on: an event, as that which PTRACE_INTERRUPT asks for, and no signal
_WALL = 0x40000000
_NO_SYSCALL = (1 << 64) - 1  # in orig_rax: the thread is in none, so there is none to restart
_MMAP, _RESTART_SYSCALL = 9, 219
# include/linux/errno.h of the kernel: what an interrupted system call has for a result, never seen by a program.
_RESTARTED = frozenset({-512, -513, -514})
_RESTARTED_BY_BLOCK = -516
_MAP_FIXED, _MAP_NORESERVE = 0x10, 0x4000
_OVERCOMMIT, _STRICT = Path("/proc/sys/vm/overcommit_memory"), "2"  # Documentation/mm/overcommit-accounting.rst
_ERROR = (1 << 64) - 4095  # a result at or above is a negated errno
_WORD = 8
_MARGIN = 64  # zeros before the instructions: padding, and not the end of something
# `mov register, imm64`, `syscall`, and `jmp [rip]` with its address behind it; none of them changes the flags.
_MOV = {
    "rax": b"\x48\xb8", "rcx": b"\x48\xb9", "rdx": b"\x48\xba", "rsi": b"\x48\xbe", "rdi": b"\x48\xbf",
    "r8": b"\x49\xb8", "r9": b"\x49\xb9", "r10": b"\x49\xba", "r11": b"\x49\xbb",
}  # fmt: skip
_SYSCALL = b"\x0f\x05"
_JUMP = b"\xff\x25\x00\x00\x00\x00"


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
    with _stopped(pid) as (registers, pending):
        program = _program(registers, shared, descriptor)
        moved = _Registers.from_buffer_copy(registers)
        moved.rip, moved.orig_rax = _write_program(pid, program), _NO_SYSCALL
        _ptrace(_SETREGS, pid, 0, ctypes.byref(moved))
        for vma in shared:
            _to_syscall(pid, pending)  # its entry
            _to_syscall(pid)  # its exit
            pending = 0
            _check_result(pid, vma)
    return sum(vma.length for vma in shared)


def _program(stopped: _Registers, shared: list[Vma], descriptor: int) -> bytes:
    """Instructions that map each of the ranges privately, and then go on as the thread would have gone on if it had not been stopped."""
    code = b""
    for vma in shared:
        code += _load("rax", _MMAP) + _load("rdi", vma.start) + _load("rsi", vma.length)
        code += _load("rdx", mmap.PROT_READ | mmap.PROT_WRITE)
        code += _load("r10", mmap.MAP_PRIVATE | _MAP_FIXED | _MAP_NORESERVE)
        code += _load("r8", descriptor) + _load("r9", vma.offset) + _SYSCALL
    rax, rip = _continuation(stopped)
    code += _load("rax", rax) + b"".join(_load(name, getattr(stopped, name)) for name in _MOV if name != "rax")
    code += _JUMP + rip.to_bytes(_WORD, "little")
    return code + bytes(-len(code) % _WORD)


def _load(register: str, value: int) -> bytes:
    return _MOV[register] + value.to_bytes(_WORD, "little")


def _continuation(stopped: _Registers) -> tuple[int, int]:
    """What rax and rip would be on: a system call that the stop has interrupted is made again, as the kernel does it after a signal without a handler."""
    rax, rip = stopped.rax, stopped.rip
    if stopped.orig_rax == _NO_SYSCALL:
        return rax, rip
    error = rax - (1 << 64)
    if error in _RESTARTED:
        return stopped.orig_rax, rip - len(_SYSCALL)
    return (_RESTART_SYSCALL, rip - len(_SYSCALL)) if error == _RESTARTED_BY_BLOCK else (rax, rip)


def _write_program(pid: int, program: bytes) -> int:
    """Put the instructions behind the end of a program's code, into its own copy of that page; return their address."""
    wanted = len(program) + _MARGIN
    with Path(f"/proc/{pid}/mem").open("rb", buffering=0) as memory:
        for vma in read_maps(pid):
            if vma.permissions == "r-xp" and vma.file.inode and wanted <= vma.length:
                memory.seek(vma.end - wanted)
                if memory.read(wanted) == bytes(wanted):
                    address = vma.end - len(program)
                    for at in range(0, len(program), _WORD):
                        _ptrace(_POKE, pid, address + at, int.from_bytes(program[at : at + _WORD], "little"))
                    return address
    raise HostCannot("the VMM has no room for a system call", hint="the memory is copied instead")


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


def _ptrace(request: int, pid: int, address: int = 0, data: object = None) -> None:
    if _libc.ptrace(request, pid, address, data) < 0:
        error = ctypes.get_errno()
        if error == 3:  # ESRCH
            raise VmmDied(
                "the VMM ended while its memory was remapped", hint="see what it said with `coppice logs --vmm NAME`"
            )
        raise HostCannot(
            f"the VMM cannot be traced: {os.strerror(error)}", hint="run as root, or set kernel.yama.ptrace_scope to 0"
        )


def _wait_stop(pid: int) -> int:
    """Wait until the thread is stopped; return the signal that it was stopped by, with the event in the bits above."""
    try:
        _, status = os.waitpid(pid, _WALL)
    except ChildProcessError as error:
        raise VmmDied(
            "the VMM ended while its memory was remapped", hint="see what it said with `coppice logs --vmm NAME`"
        ) from error
    if not os.WIFSTOPPED(status):
        raise VmmDied(
            "the VMM ended while its memory was remapped", hint="see what it said with `coppice logs --vmm NAME`"
        )
    return status >> 8


def _to_syscall(pid: int, pending: int = 0) -> None:
    """Let the thread run to the next entry or exit of a system call; signals on the way, and the one that is `pending`, are delivered."""
    while True:
        _ptrace(_TO_SYSCALL, pid, 0, pending)
        pending = _wait_stop(pid)
        if pending == _SYSCALL_STOP:
            return
        if pending >> _EVENT:
            pending = 0


@contextlib.contextmanager
def _stopped(pid: int) -> Iterator[tuple[_Registers, int]]:
    """Stop the process's first thread; yield its registers, and a signal that is still to be delivered or 0. At the end it is let go."""
    _ptrace(_SEIZE, pid, 0, _TELL_SYSCALLS)
    try:
        _ptrace(_INTERRUPT, pid)
        stop = _wait_stop(pid)
        registers = _Registers()
        _ptrace(_GETREGS, pid, 0, ctypes.byref(registers))
        yield registers, 0 if stop >> _EVENT else stop
    finally:
        with contextlib.suppress(VmmDied, HostCannot):
            _ptrace(_DETACH, pid)


def _check_result(pid: int, vma: Vma) -> None:
    result = _Registers()
    _ptrace(_GETREGS, pid, 0, ctypes.byref(result))
    if result.rax != vma.start:
        number = (1 << 64) - result.rax if result.rax >= _ERROR else 0
        raise VmmError(
            f"the VMM could not map its memory privately: {os.strerror(number)}",
            hint="see what it said with `coppice logs --vmm NAME`",
        )
