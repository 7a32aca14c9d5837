"""AsyncHost: every use case, each as one readable method. The CLI, the library and an HTTP server are this over one data directory.

There is no daemon: any process may operate on an instance that another one started. SQLite transactions and per-instance file locks keep
them apart; what a killed process left half-done is finished or undone by the next one that opens the data directory.
"""

from __future__ import annotations

from coppice.host.base import Reference
from coppice.host.guest import Guest, LogSource
from coppice.host.housekeeping import Housekeeping
from coppice.host.images import Images
from coppice.host.snapshots import SnapshotInspection, SnapshotReference, Snapshots
from coppice.host.view import Inspection, View
from coppice.host.volumes import VolumeInspection, VolumeReference

__all__ = [
    "AsyncHost",
    "Inspection",
    "LogSource",
    "Reference",
    "SnapshotInspection",
    "SnapshotReference",
    "VolumeInspection",
    "VolumeReference",
]


class AsyncHost(Snapshots, Guest, View, Images, Housekeeping):
    """One data directory and what can be done in it, for asyncio.

    async with AsyncHost() as host:
        vm = await host.run("debian", ["sleep", "infinity"])
    """
