"""The public API: hosts, managers and handles. Their methods make requests and pass them to a
backend.

`aio` is for asyncio; `blocking` is its twin for blocking code, generated from it. Most methods of
`aio` are generated from the request records: see `tools/generate_client.py`. Names are imported at
first use, because the command line needs only a part of them.
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from coppice.client.aio.forks import AsyncForks
    from coppice.client.aio.host import AsyncHost
    from coppice.client.aio.images import AsyncImages, AsyncKernels
    from coppice.client.aio.machine import AsyncMachine
    from coppice.client.aio.managers import AsyncSnapshots, AsyncVolumes
    from coppice.client.backend import Backend
    from coppice.client.blocking.forks import Forks
    from coppice.client.blocking.host import Host
    from coppice.client.blocking.images import Images, Kernels
    from coppice.client.blocking.machine import Machine
    from coppice.client.blocking.managers import Snapshots, Volumes
    from coppice.client.session import ExecSession

__all__ = [
    "AsyncForks",
    "AsyncHost",
    "AsyncImages",
    "AsyncKernels",
    "AsyncMachine",
    "AsyncSnapshots",
    "AsyncVolumes",
    "Backend",
    "ExecSession",
    "Forks",
    "Host",
    "Images",
    "Kernels",
    "Machine",
    "Snapshots",
    "Volumes",
]
_HOME = {
    "AsyncForks": "aio.forks",
    "AsyncHost": "aio.host",
    "AsyncMachine": "aio.machine",
    **dict.fromkeys(("AsyncImages", "AsyncKernels"), "aio.images"),
    **dict.fromkeys(("AsyncSnapshots", "AsyncVolumes"), "aio.managers"),
    "Backend": "backend",
    "ExecSession": "session",
    "Forks": "blocking.forks",
    "Host": "blocking.host",
    "Machine": "blocking.machine",
    **dict.fromkeys(("Images", "Kernels"), "blocking.images"),
    **dict.fromkeys(("Snapshots", "Volumes"), "blocking.managers"),
}


def __getattr__(name: str) -> object:
    if name not in _HOME:
        raise AttributeError(f"module 'coppice.client' has no attribute {name!r}")
    value: object = getattr(import_module(f"coppice.client.{_HOME[name]}"), name)
    globals()[name] = value
    return value
