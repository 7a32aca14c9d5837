"""What drivers need to map the layers of a memory."""

from __future__ import annotations

import contextlib
import functools
import os
from collections.abc import Iterator
from pathlib import Path

from coppice.linux.files import os_errors
from coppice.vmm.driver import Launch
from coppice.vmm.process import may_trace_any

_PTRACE_SCOPE = Path("/proc/sys/kernel/yama/ptrace_scope")
_ADMIN_ONLY = 2  # from here on not even children are traced without CAP_SYS_PTRACE (the kernel's Yama.rst)


@functools.cache
def mappable() -> bool:
    """Return whether this process can map layers in a VMM that it has started."""
    from coppice.linux.remap import can_remap  # takes long, and listing machines does not need it

    return allows(_scope(), capable=may_trace_any()) and can_remap()


def allows(scope: int, *, capable: bool) -> bool:
    """Return whether a process may trace its own children.

    :param scope: ptrace_scope of the Yama security module; 0 without it
    :param capable: whether the process has CAP_SYS_PTRACE
    """
    return scope < _ADMIN_ONLY or (scope == _ADMIN_ONLY and capable)


def _scope() -> int:
    try:
        return int(_PTRACE_SCOPE.read_text())
    except (OSError, ValueError):
        return 0


@contextlib.contextmanager
def opened(launch: Launch) -> Iterator[tuple[int, ...]]:
    """Open the layers of a machine for reading, for its VMM to inherit: it maps them by descriptor."""
    with contextlib.ExitStack() as stack:
        descriptors = []
        with os_errors(f"open the memory layers in {launch.directory}"):
            for name in sorted({layer.file for layer in launch.layers}):
                descriptor = os.open(launch.directory / name, os.O_RDONLY | os.O_NOFOLLOW | os.O_CLOEXEC)
                stack.callback(os.close, descriptor)
                descriptors.append(descriptor)
        yield tuple(descriptors)
