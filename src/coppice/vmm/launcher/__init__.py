"""The launcher of VMM processes: C sources, and the static binary that the package build compiles from them."""

from __future__ import annotations

import functools
from pathlib import Path
from typing import Final

from coppice.errors import HostCannot

PROGRAM: Final = "coppice-launcher"


@functools.cache
def launcher_binary() -> str:
    """Return the path of the compiled launcher.

    :raises HostCannot: the package was not built
    """
    binary = Path(__file__).with_name(PROGRAM)
    if not binary.is_file():
        raise HostCannot("the VMM launcher is not compiled", hint="install the package with pip, which compiles it")
    return str(binary)
