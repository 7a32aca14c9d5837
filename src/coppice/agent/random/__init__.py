"""Files that keep forks of a warm process from sharing random numbers. Every guest has them in
/run/coppice.

* `openssl-random.so`, compiled from `openssl_random.c`: a provider of OpenSSL 3
* `openssl.cnf`: selects the provider; named by OPENSSL_CONF
* `node-random.js`: for Node.js; named by NODE_OPTIONS
"""

from __future__ import annotations

from pathlib import Path
from typing import Final

from coppice.errors import HostCannot

NAMES: Final = ("openssl-random.so", "openssl.cnf", "node-random.js")


def guest_files() -> tuple[Path, ...]:
    """Return the paths of the files.

    :raises HostCannot: the package was not built
    """
    found = tuple(Path(__file__).with_name(name) for name in NAMES)
    for path in found:
        if not path.is_file():
            raise HostCannot(f"{path.name} is not compiled", hint="install the package with pip, which compiles it")
    return found
