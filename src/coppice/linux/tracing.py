"""Make system calls in another process, by ptrace(2).

A tracer that is killed at any instant must do no harm: the kernel then resumes the thread with its
current registers. So instructions that do all of the work are first written into unused bytes, the
zeros after the end of a program's code. They make the system calls, restore each register, and jump
to where the thread was stopped. One ptrace call then points the thread at them, and from there on no
tracer is needed. The thread is not single-stepped: if the tracer dies during a step, the process
ends. x86-64 only.
"""

from __future__ import annotations

import contextlib
import ctypes
import os
import platform
import signal
from collections.abc import Iterator
from pathlib import Path

from coppice.errors import HostCannot, VmmDied
from coppice.linux.maps import read_maps

_SEIZE, _INTERRUPT, _DETACH, _TO_SYSCALL, GETREGS, SETREGS, _POKE = 0x4206, 0x4207, 17, 24, 12, 13, 5
CONTINUE, GETSIGMASK, SETSIGMASK = 7, 0x420A, 0x420B
TELL_SYSCALLS = 1  # PTRACE_O_TRACESYSGOOD
END_WITH_TRACER = 1 << 20  # PTRACE_O_EXITKILL
_SYSCALL_STOP = signal.SIGTRAP | 0x80
_EVENT = 8  # the bits of a stop from here on hold an event, such as that of PTRACE_INTERRUPT, not a signal
_WALL = 0x40000000
_ENDS = frozenset({os.CLD_EXITED, os.CLD_KILLED, os.CLD_DUMPED})
NO_SYSCALL = (1 << 64) - 1  # in orig_rax: the thread is in no system call, so there is none to restart
MMAP, _RESTART_SYSCALL = 9, 219
# include/linux/errno.h of the kernel: results of an interrupted system call, which programs never
# see.
_RESTARTED = frozenset({-512, -513, -514})
_RESTARTED_BY_BLOCK = -516
ERROR = (1 << 64) - 4095  # a result of at least this is a negated errno
WORD = 8
_MARGIN = 64  # zeros before the instructions, which show that this is padding and not the end of code or data
# `mov register, imm64`, `syscall`, and `jmp [rip]` with its address behind it; none of them changes
# the flags.
_MOV = {
    "rax": b"\x48\xb8", "rcx": b"\x48\xb9", "rdx": b"\x48\xba", "rsi": b"\x48\xbe", "rdi": b"\x48\xbf",
    "r8": b"\x49\xb8", "r9": b"\x49\xb9", "r10": b"\x49\xba", "r11": b"\x49\xbb",
}  # fmt: skip
SYSCALL = b"\x0f\x05"
_JUMP = b"\xff\x25\x00\x00\x00\x00"


class Registers(ctypes.Structure):
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


def supported() -> bool:
    """Return whether system calls can be made in other processes with this host's instruction set."""
    return platform.machine() == "x86_64"


def ptrace(request: int, pid: int, address: int = 0, data: object = None) -> None:
    """Make one ptrace(2) call. The calls for one process must come from one thread.

    :raises VmmDied: the process has ended
    :raises HostCannot: the process cannot be traced from here
    """
    if _libc.ptrace(request, pid, address, data) < 0:
        error = ctypes.get_errno()
        if error == 3:  # ESRCH
            raise vmm_ended()
        raise HostCannot(
            f"the VMM cannot be traced: {os.strerror(error)}", hint="run as root, or set kernel.yama.ptrace_scope to 0"
        )


def wait_stop(pid: int) -> int:
    """Wait until the thread stops; return the signal that stopped it, with the event in the bits
    above.
    """
    try:
        ended = os.waitid(os.P_PID, pid, os.WEXITED | os.WSTOPPED | os.WNOWAIT | _WALL)
        if ended is None or ended.si_code in _ENDS:  # its status is left to the waiter for its end
            raise vmm_ended()
        _, status = os.waitpid(pid, _WALL)
    except ChildProcessError as error:
        raise vmm_ended() from error
    if not os.WIFSTOPPED(status):
        raise vmm_ended()
    return status >> 8


def to_syscall(pid: int, pending: int = 0) -> None:
    """Let the thread run to the next entry or exit of a system call.

    Deliver `pending`, and the signals that arrive meanwhile.
    """
    while True:
        ptrace(_TO_SYSCALL, pid, 0, pending)
        pending = wait_stop(pid)
        if pending == _SYSCALL_STOP:
            return
        if pending >> _EVENT:
            pending = 0


def to_result(pid: int, address: int, pending: int = 0) -> int:
    """Let the thread run to the end of the system call before this address; return its result.

    Signal handlers may run before.
    """
    registers = Registers()
    for _ in ("entry", "exit"):
        registers.rip = 0
        while registers.rip != address:
            to_syscall(pid, pending)
            pending = 0
            ptrace(GETREGS, pid, 0, ctypes.byref(registers))
    result: int = registers.rax
    return result


@contextlib.contextmanager
def stopped(pid: int, options: int = TELL_SYSCALLS, *, end_on_error: bool = False) -> Iterator[tuple[Registers, int]]:
    """Stop the process's first thread; detach from it at the end.

    With `end_on_error` an error ends the process first.

    Yield its registers and the signal that is still to be delivered, or 0.
    """
    ptrace(_SEIZE, pid, 0, options)
    try:
        ptrace(_INTERRUPT, pid)
        stop = wait_stop(pid)
        registers = Registers()
        ptrace(GETREGS, pid, 0, ctypes.byref(registers))
        yield registers, 0 if stop >> _EVENT else stop
    except BaseException:
        if end_on_error:  # it is ours to trace, so the pid is still its own
            with contextlib.suppress(ProcessLookupError):
                os.kill(pid, signal.SIGKILL)
        raise
    finally:
        with contextlib.suppress(VmmDied, HostCannot):
            ptrace(_DETACH, pid)


def load(register: str, value: int) -> bytes:
    """Return the instruction that loads a register."""
    return _MOV[register] + value.to_bytes(WORD, "little")


def then_resume(code: bytes, stopped: Registers) -> bytes:
    """Return a program: this code, and then the thread goes on where it was stopped."""
    rax, rip = continuation(stopped)
    code += load("rax", rax) + b"".join(load(name, getattr(stopped, name)) for name in _MOV if name != "rax")
    code += _JUMP + rip.to_bytes(WORD, "little")
    return code + bytes(-len(code) % WORD)


def continuation(stopped: Registers) -> tuple[int, int]:
    """Return the rax and rip to resume with.

    An interrupted system call is restarted, as the kernel does after a signal without a handler.
    """
    rax, rip = stopped.rax, stopped.rip
    if stopped.orig_rax == NO_SYSCALL:
        return rax, rip
    error = rax - (1 << 64)
    if error in _RESTARTED:
        return stopped.orig_rax, rip - len(SYSCALL)
    return (_RESTART_SYSCALL, rip - len(SYSCALL)) if error == _RESTARTED_BY_BLOCK else (rax, rip)


def write_program(pid: int, program: bytes) -> int:
    """Write instructions into unused bytes of a stopped process; return their address."""
    address = room_for(pid, len(program))
    write(pid, address, program)
    return address


def room_for(pid: int, size: int) -> int:
    """Return the address of unused bytes: those after the end of a program's code.

    :raises HostCannot: the process has none
    """
    wanted = size + _MARGIN
    with Path(f"/proc/{pid}/mem").open("rb", buffering=0) as memory:
        for vma in read_maps(pid):
            if vma.permissions == "r-xp" and vma.file.inode and wanted <= vma.length:
                memory.seek(vma.end - wanted)
                if memory.read(wanted) == bytes(wanted):
                    return vma.end - size
    raise HostCannot("the VMM's code has no unused bytes to place system calls in", hint="the memory is copied instead")


def write(pid: int, address: int, words: bytes) -> None:
    """Write whole words into the copy that a stopped process has of its code."""
    for at in range(0, len(words), WORD):
        ptrace(_POKE, pid, address + at, int.from_bytes(words[at : at + WORD], "little"))


def vmm_ended() -> VmmDied:
    """Return the error for a process that ended while it was traced."""
    return VmmDied("the VMM ended while its memory was remapped", hint="see its log with `coppice logs --vmm NAME`")
