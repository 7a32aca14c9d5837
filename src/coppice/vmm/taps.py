"""TAP devices that a VMM inherits open, so that it needs no right to open them and no access to
their namespace.
"""

from __future__ import annotations

import contextlib
import os
from collections.abc import Iterable, Iterator
from pathlib import Path

from coppice.errors import HostCannot
from coppice.linux import tap
from coppice.model.network import Nic, NicBackend


@contextlib.contextmanager
def opened(nics: Iterable[Nic]) -> Iterator[dict[Nic, int]]:
    """Open the TAP of each NIC that has one, for the length of the block. Blocks.

    :raises HostCannot: a TAP cannot be opened
    """
    taps: dict[Nic, int] = {}
    try:
        for nic in nics:
            if nic.backend is NicBackend.TAP:
                taps[nic] = _open(nic)
        yield taps
    finally:
        for descriptor in taps.values():
            os.close(descriptor)


def _open(nic: Nic) -> int:
    try:
        return tap.open_in(Path(nic.namespace), nic.tap)
    except OSError as error:
        raise HostCannot(
            f"cannot open the TAP device {nic.tap} of {nic.namespace}: {error.strerror}",
            hint="check this host with `coppice doctor`",
        ) from error
