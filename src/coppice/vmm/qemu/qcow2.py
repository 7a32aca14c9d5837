"""The header of a qcow2 file that comes from another host.

QEMU follows no name of a backing file, since the chain of layers is on its command line. But it would
open the external data file that a header names. Source: docs/interop/qcow2.txt of QEMU.
"""

from __future__ import annotations

import os
import struct
from pathlib import Path

from coppice.errors import IntegrityError
from coppice.linux.clone import open_source
from coppice.linux.files import os_errors

_HEADER = struct.Struct(">4sI 8x 4x I Q I 4x 8x 8x 4x I 8x Q")
"""Magic, version, cluster bits, size, encryption, snapshots, incompatible features."""
_MAGIC, _VERSION, _CLUSTER_BITS = b"QFI\xfb", 3, 16
_DIRTY, _EXTENDED_L2 = 1 << 0, 1 << 4


def check(path: Path, size_bytes: int) -> None:
    """Refuse a file that is not a layer as `images.create` makes one, over a disk of this size.

    :raises IntegrityError: it is none
    """
    with os_errors(f"read the header of {path}"), open_source(path) as fd:
        header = os.pread(fd, _HEADER.size, 0)
    fields = _HEADER.unpack(header.ljust(_HEADER.size, b"\0"))
    magic, version, cluster_bits, size, encryption, snapshots, incompatible = fields
    usual = (magic, version, cluster_bits, size, encryption, snapshots) == (
        _MAGIC, _VERSION, _CLUSTER_BITS, size_bytes, 0, 0,
    )  # fmt: skip
    if not usual or incompatible | _DIRTY != _DIRTY | _EXTENDED_L2:
        raise IntegrityError(f"{path} is not a disk layer that QEMU made for Coppice", hint="do not trust its source")
