"""Replace mappings of another process: make a shared one private in place, or lay layers over one.

A guest's first boot has its RAM in a file that is mapped shared. To fork the running guest, that
file must stop changing. Copying it would move hundreds of megabytes. Instead the paused VMM is made
to map the same file again at the same address with MAP_PRIVATE. The file is then the frozen base,
and further writes of the guest go to private pages. The page tables start empty and fill again from
the page cache; no byte is copied.

The system calls are made in the other process (`coppice.linux.tracing`): a tracer that is killed at
any instant does no harm. x86-64 only; on other architectures the caller copies.

The layers of a capture are laid over its base before the guest runs. Here a killed tracer may cost
the process: the kernel ends it with its tracer. So no guest ever runs on a part of its layers.
"""

from __future__ import annotations

import contextlib
import ctypes
import mmap
import os
import signal
import stat
import struct
from collections.abc import Callable, Collection, Sequence
from pathlib import Path
from typing import NamedTuple

from coppice.errors import HostCannot, IntegrityError, VmmError
from coppice.linux import tracing
from coppice.linux.files import os_errors
from coppice.linux.maps import FileIdentity, Part, Vma, identify, private_parts, read_maps, read_text, spans_of

_MAP_FIXED, _MAP_NORESERVE = 0x10, 0x4000
_OVERCOMMIT, _STRICT = Path("/proc/sys/vm/overcommit_memory"), "2"  # Documentation/mm/overcommit-accounting.rst
_ENTRY = struct.Struct("<4Q")  # address, length, descriptor, offset: one system call of the loop below
# Called twice. First with the registers of an mmap: it makes room for the table of entries, and stops. Then with r12 = the table, r13 = the number
# of entries, r15 and rbx = the room and its size: it maps each entry until one fails, gives the room back, and stops. r13 is then the number of
# entries that were not mapped, and r14 the result of the last mmap.
_LAY_OVER = bytes.fromhex(
    "0f05" "cc"
    "498b3c24"        # loop: mov rdi, [r12]
    "498b742408"      #       mov rsi, [r12 + 8]
    "4d8b442410"      #       mov r8, [r12 + 16]
    "4d8b4c2418"      #       mov r9, [r12 + 24]
    "ba03000000"      #       mov edx, PROT_READ | PROT_WRITE
    "41ba12400000"    #       mov r10d, MAP_PRIVATE | MAP_FIXED | MAP_NORESERVE
    "b809000000"      #       mov eax, mmap
    "0f05"            #       syscall
    "4989c6"          #       mov r14, rax
    "4839f8"          #       cmp rax, rdi
    "7509"            #       jne end
    "4983c420"        #       add r12, 32
    "49ffcd"          #       dec r13
    "75ca"            #       jnz loop
    "4c89ff"          # end:  mov rdi, r15
    "4889de"          #       mov rsi, rbx
    "b80b000000"      #       mov eax, munmap
    "0f05" "cc"
)  # fmt: skip
_FIRST_STOP = 3  # bytes
_BUT_TRAPS = ((1 << 64) - 1) & ~(1 << (signal.SIGTRAP - 1))


class Layer(NamedTuple):
    """A range of a file that belongs over a range of a base file."""

    file: str  # its name in the directory of the base
    offset: int  # in the base
    length: int
    position: int  # in the file


def can_remap() -> bool:
    """Return whether `make_private` and `lay_over` support this host's instruction set."""
    return tracing.supported()


def make_private(pid: int, file: Path) -> int:
    """Replace every shared mapping of a file in a process by a private one at the same address;
    return the bytes remapped.

    The process must not use the memory meanwhile: a VMM's vCPUs are paused and its disks drained.
    Blocks for a few milliseconds. All ptrace calls must come from one thread, so this is one call.

    :raises IntegrityError: the file is missing
    :raises VmmDied: there is no such process
    :raises HostCannot: it cannot be traced from here, this is not x86-64, or memory is not
        overcommitted here; nothing was changed
    :raises VmmError: the process could not map the file
    """
    if not can_remap():
        raise HostCannot("mappings can be replaced on x86-64 only", hint="the memory is copied instead")
    if _OVERCOMMIT.read_text().strip() == _STRICT:
        # Without overcommit the kernel refuses a private mapping of all RAM if memory is short,
        # after it has removed the old mapping.
        raise HostCannot(
            "this host does not overcommit memory (vm.overcommit_memory=2)", hint="the memory is copied instead"
        )
    identity = identify(file)
    shared = [vma for vma in read_maps(pid) if vma.file == identity and not vma.private]
    if not shared:
        return 0
    with os_errors(f"look at {file}"):
        descriptor = _open_descriptor(pid, file.stat())
    with tracing.stopped(pid) as (registers, pending):
        program = _program(registers, shared, descriptor)
        moved = tracing.Registers.from_buffer_copy(registers)
        moved.rip, moved.orig_rax = tracing.write_program(pid, program), tracing.NO_SYSCALL
        tracing.ptrace(tracing.SETREGS, pid, 0, ctypes.byref(moved))
        for vma in shared:
            tracing.to_syscall(pid, pending)  # its entry
            tracing.to_syscall(pid)  # its exit
            pending = 0
            _check_result(pid, vma)
    return sum(vma.length for vma in shared)


def lay_over(pid: int, base: Path, layers: Sequence[Layer]) -> None:
    """Map ranges of other files privately over the private mapping that a process has of a base file.

    The process must have the files open, and must not touch the memory meanwhile: it has mapped the base, and loads nothing yet. Blocks for a
    few milliseconds. On failure the process is ended, because its memory is incomplete.

    :raises IntegrityError: the base or a layer is missing, or is not mapped where it should be
    :raises VmmDied: the process has ended
    :raises HostCannot: it cannot be traced from here
    :raises VmmError: the process could not map a layer
    """
    identity = identify(base)
    with tracing.stopped(pid, tracing.END_WITH_TRACER, end_on_error=True) as (registers, pending):
        _lay_over(pid, registers, identity, base.parent, layers)
        if pending:
            os.kill(pid, pending)  # again: the stop has taken it


def lay_over_when_mapped(
    pid: int, base: Path, size_bytes: int, layers: Sequence[Layer], ready: Callable[[], None]
) -> None:
    """Wait until a process has mapped all of a base file privately, and lay the layers over it before it goes on.

    For a VMM that reads the guest's memory right after it has mapped it. `ready` is called when the process is watched: then it may be asked
    to map the base. The caller ends the process if that request fails, which ends the wait. Parameters and errors are those of `lay_over`.
    """
    identity = identify(base)
    with tracing.stopped(pid, tracing.TELL_SYSCALLS | tracing.END_WITH_TRACER, end_on_error=True) as (
        registers,
        pending,
    ):
        ready()
        mapped = 0
        while mapped < size_bytes:
            tracing.to_syscall(pid, pending)
            pending = 0
            tracing.ptrace(tracing.GETREGS, pid, 0, ctypes.byref(registers))
            if registers.orig_rax == tracing.MMAP and registers.rax < tracing.ERROR:  # at its entry rax is an error
                mapped = sum(vma.length for vma in _mappings(pid, identity))
        _lay_over(pid, registers, identity, base.parent, layers)


def _lay_over(
    pid: int, stopped: tracing.Registers, base: FileIdentity, directory: Path, layers: Sequence[Layer]
) -> None:
    names = {layer.file for layer in layers}
    with os_errors(f"look at the layers in {directory}"):
        files = {name: (_open_descriptor(pid, (directory / name).stat()), identify(directory / name)) for name in names}
    places = _places(_mappings(pid, base), layers)
    table = b"".join(_ENTRY.pack(at, length, files[name][0], position) for at, (name, _, length, position) in places)
    mask = ctypes.c_uint64()
    tracing.ptrace(tracing.GETSIGMASK, pid, ctypes.sizeof(mask), ctypes.byref(mask))
    tracing.ptrace(tracing.SETSIGMASK, pid, ctypes.sizeof(mask), ctypes.byref(ctypes.c_uint64(_BUT_TRAPS)))
    moved = tracing.Registers.from_buffer_copy(stopped)
    program = tracing.write_program(pid, _LAY_OVER + bytes(-len(_LAY_OVER) % tracing.WORD))
    moved.rip, moved.orig_rax = program, tracing.NO_SYSCALL
    moved.rax, moved.rdi, moved.rsi, moved.rdx = tracing.MMAP, 0, len(table), mmap.PROT_READ | mmap.PROT_WRITE
    moved.r10, moved.r8, moved.r9 = mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS, tracing.NO_SYSCALL, 0
    room = _run(pid, moved).rax
    if room >= tracing.ERROR:
        raise _cannot_map((1 << 64) - room)
    with Path(f"/proc/{pid}/mem").open("r+b", buffering=0) as memory:
        memory.seek(room)
        if memory.write(table) != len(table):
            raise tracing.vmm_ended()
    moved.rip, moved.orig_rax = program + _FIRST_STOP, tracing.NO_SYSCALL
    moved.r12, moved.r13, moved.r15, moved.rbx = room, len(places), room, len(table)
    done = _run(pid, moved)
    if done.r13 != 0:
        raise _cannot_map((1 << 64) - done.r14 if done.r14 >= tracing.ERROR else 0)
    tracing.ptrace(tracing.SETREGS, pid, 0, ctypes.byref(stopped))
    tracing.ptrace(tracing.SETSIGMASK, pid, ctypes.sizeof(mask), ctypes.byref(mask))
    expected = [Part(at, at + length, position, files[name][1]) for at, (name, _, length, position) in places]
    _require_mapped(pid, {identity for _, identity in files.values()}, expected)


def _run(pid: int, registers: tracing.Registers) -> tracing.Registers:
    """Let the stopped thread run from these registers to the next int3; return its registers then."""
    tracing.ptrace(tracing.SETREGS, pid, 0, ctypes.byref(registers))
    stop = 0
    while stop != signal.SIGTRAP:  # no other signal gets through, but the kernel may report a stop of all threads
        tracing.ptrace(tracing.CONTINUE, pid)
        stop = tracing.wait_stop(pid)
    result = tracing.Registers()
    tracing.ptrace(tracing.GETREGS, pid, 0, ctypes.byref(result))
    return result


def _mappings(pid: int, file: FileIdentity) -> list[Vma]:
    spans = spans_of(private_parts(read_text(pid, "maps"), [file]), lambda part: part.offset)
    return sorted(spans, key=lambda vma: vma.offset)  # the kernel may put a later piece at a lower address


def _places(mappings: list[Vma], layers: Sequence[Layer]) -> list[tuple[int, Layer]]:
    """Return the address of each layer. One that the VMM maps in several pieces becomes several.

    :raises IntegrityError: the base is not mapped there
    """
    places: list[tuple[int, Layer]] = []
    for file, first, length, position in layers:
        offset, end = first, first + length
        for vma in mappings:
            piece = min(end, vma.offset + vma.length) - offset
            if vma.offset <= offset and piece > 0:
                places.append((vma.start + offset - vma.offset, Layer(file, offset, piece, position + offset - first)))
                offset += piece
        if offset != end:
            raise _not_mapped()
    return places


def _require_mapped(pid: int, files: Collection[FileIdentity], expected: list[Part]) -> None:
    """Compare the mappings of the layers' files with the expected ones; the kernel may have merged some."""
    merged: list[Part] = []
    for part in sorted(expected):
        last = merged[-1] if merged else None
        if (
            last
            and (last.end, last.file) == (part.start, part.file)
            and part.offset - last.offset == part.start - last.start
        ):
            merged[-1] = last._replace(end=part.end)
        else:
            merged.append(part)
    if private_parts(read_text(pid, "maps"), files) != merged:
        raise _not_mapped()


def _not_mapped() -> IntegrityError:
    return IntegrityError(
        "the VMM does not map its memory as its layers need it", hint="see its log with `coppice logs --vmm NAME`"
    )


def _cannot_map(number: int) -> VmmError:
    return VmmError(
        f"the VMM could not map its memory privately: {os.strerror(number)}",
        hint="see its log with `coppice logs --vmm NAME`",
    )


def _program(stopped: tracing.Registers, shared: list[Vma], descriptor: int) -> bytes:
    """Return instructions that map each range privately, then resume the stopped thread."""
    code = b""
    for vma in shared:
        code += tracing.load("rax", tracing.MMAP) + tracing.load("rdi", vma.start) + tracing.load("rsi", vma.length)
        code += tracing.load("rdx", mmap.PROT_READ | mmap.PROT_WRITE)
        code += tracing.load("r10", mmap.MAP_PRIVATE | _MAP_FIXED | _MAP_NORESERVE)
        code += tracing.load("r8", descriptor) + tracing.load("r9", vma.offset) + tracing.SYSCALL
    return tracing.then_resume(code, stopped)


def _open_descriptor(pid: int, wanted: os.stat_result) -> int:
    """Return the number under which the process has the file open.

    A VMM keeps its mem-file open all its life.

    An inode number alone does not identify a file: a socket, or a file of another file system, may
    have the same one.
    """
    with contextlib.suppress(FileNotFoundError):
        for entry in Path(f"/proc/{pid}/fd").iterdir():
            with contextlib.suppress(OSError):
                status = entry.stat()
                if stat.S_ISREG(status.st_mode) and os.path.samestat(status, wanted):
                    return int(entry.name)
    raise VmmError(
        "the VMM does not have its mem-file open", hint="it cannot be forked while it runs; put it into standby"
    )


def _check_result(pid: int, vma: Vma) -> None:
    result = tracing.Registers()
    tracing.ptrace(tracing.GETREGS, pid, 0, ctypes.byref(result))
    if result.rax != vma.start:
        raise _cannot_map((1 << 64) - result.rax if result.rax >= tracing.ERROR else 0)
