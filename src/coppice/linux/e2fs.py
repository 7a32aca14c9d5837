"""Run the programs of e2fsprogs with the same settings on every host, and make file systems."""

from __future__ import annotations

import os
from collections.abc import Callable
from pathlib import Path

from coppice.errors import HostCannot, UsageError
from coppice.linux.tool import Ran, run_tool

ENVIRONMENT = {
    "MKE2FS_CONFIG": "/dev/null",  # the host's defaults would add features
    "E2FSPROGS_FAKE_TIME": "1700000000",
    "LC_ALL": "C",
    "PATH": "/usr/sbin:/sbin:/usr/bin:/bin",
}
_OUTPUT_LIMIT = 4000


def run_e2fs(
    tool: str,
    *arguments: str,
    deadline_s: float,
    launcher: tuple[str, ...] = (),
    line: Callable[[str], None] = lambda _: None,
) -> Ran:
    """Run a program of e2fsprogs to its end and return its exit status.

    Raises what `run_tool` raises.
    """
    return run_tool(
        tool,
        *arguments,
        environment=ENVIRONMENT,
        deadline_s=deadline_s,
        cure="install the package e2fsprogs",
        launcher=launcher,
        line=line,
    )


def tail(ran: Ran) -> str:
    """Return the end of a program's output."""
    return "\n".join(ran.lines).strip()[-_OUTPUT_LIMIT:]


def make_file_system(path: Path, size_bytes: int, *options: str, deadline_s: float) -> None:
    """Make a new file of `size_bytes`, mode 0600, and run mke2fs on it with `options` to make an
    ext4 file system.

    :raises UsageError: the files to copy do not fit on the volume
    :raises HostCannot: mke2fs failed; also what `run_tool` raises, and OSError as open(2) does
    """
    descriptor = os.open(path, os.O_RDWR | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, 0o600)
    try:
        os.ftruncate(descriptor, size_bytes)
    finally:
        os.close(descriptor)
    made = run_e2fs("mke2fs", "-q", "-F", *options, str(path), deadline_s=deadline_s)
    if made.status != 0 and "Could not allocate" in tail(made):
        raise UsageError(
            f"the files to copy do not fit on a volume of {size_bytes} bytes: {tail(made)}",
            hint="give the volume a larger size: it uses disk space only as it is filled",
        )
    if made.status != 0:
        raise HostCannot(
            f"mke2fs failed with status {made.status}: {tail(made)}",
            hint="install e2fsprogs 1.43 or later, and check that the disk is not full",
        )
