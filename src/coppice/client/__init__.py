"""The public API: hosts, managers and handles. Their methods make requests and pass them to a
backend.

`aio` is for asyncio; `blocking` is its twin for blocking code, generated from it. Most methods of
`aio` are generated from the request records: see `tools/generate_client.py`. Names are imported at
first use, because the command line needs only a part of them.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from coppice.lazily import Names

if TYPE_CHECKING:
    from coppice.client.aio.forks import AsyncForks as AsyncForks
    from coppice.client.aio.host import AsyncHost as AsyncHost
    from coppice.client.aio.images import AsyncImages as AsyncImages, AsyncKernels as AsyncKernels
    from coppice.client.aio.machine import AsyncMachine as AsyncMachine
    from coppice.client.aio.managers import AsyncSnapshots as AsyncSnapshots, AsyncVolumes as AsyncVolumes
    from coppice.client.backend import Backend as Backend
    from coppice.client.blocking.forks import Forks as Forks
    from coppice.client.blocking.host import Host as Host
    from coppice.client.blocking.images import Images as Images, Kernels as Kernels
    from coppice.client.blocking.machine import Machine as Machine
    from coppice.client.blocking.managers import Snapshots as Snapshots, Volumes as Volumes
    from coppice.client.session import ExecSession as ExecSession

_NAMES = Names(
    __name__,
    {
        "aio.forks": "AsyncForks",
        "aio.host": "AsyncHost",
        "aio.images": "AsyncImages AsyncKernels",
        "aio.machine": "AsyncMachine",
        "aio.managers": "AsyncSnapshots AsyncVolumes",
        "backend": "Backend",
        "blocking.forks": "Forks",
        "blocking.host": "Host",
        "blocking.images": "Images Kernels",
        "blocking.machine": "Machine",
        "blocking.managers": "Snapshots Volumes",
        "session": "ExecSession",
    },
)
__all__ = sorted(_NAMES)
__getattr__ = _NAMES.find
