"""The use cases, one method per request. `LocalBackend` carries them out on this machine.

There is no daemon: any process may operate on an instance that another process started. SQLite
transactions and per-instance file locks keep processes apart. If a process is killed, the next
process that opens the data directory finishes or undoes its operations.

Each group of use cases is imported at its first request: a command needs one of them.
"""

from __future__ import annotations

from contextlib import AbstractAsyncContextManager
from functools import cached_property
from importlib import import_module
from typing import Any, Final, TypeVar

from coppice.host.base import UseCases
from coppice.host.opened import OpenedHost
from coppice.model import ProgressSink, no_progress
from coppice.requests import Request, StreamRequest

__all__ = ["LocalBackend", "group_of"]

R = TypeVar("R")
G = TypeVar("G", bound=UseCases)

_GROUPS: Final = {
    "view.View": "get ls inspect tree stats unloadable",
    "lifecycle.Lifecycle": "run start stop standby restore promote demote egress update",
    "forks.Forks": "fork start_ahead",
    "removal.Removal": "rm",
    "guest.Guest": "exec open_exec connect open_copy cp_in cp_out read_file write_file stat health logs wait",
    "commands.Commands": "command_start command_ls command_attach command_kill command_wait command_forget wait_process",
    "files.Files": "file_ls file_mkdir file_mv file_rm file_watch",
    "readiness.Readiness": "ready",
    "snapshots.Snapshots": "snapshot snapshot_ls snapshot_inspect snapshot_restore snapshot_fork snapshot_rm verify",
    "schedules.Schedules": "snapshot_schedule snapshot_schedule_set snapshot_schedule_rm",
    "auto_standby.AutoStandby": "auto_standby auto_standby_hold",
    "volumes.Volumes": "volume_create volume_ls volume_inspect volume_rm",
    "images.Images": (
        "image_build image_import image_pull image_ls image_inspect image_tag image_rm "
        "kernel_add kernel_fetch kernel_ls kernel_rm doctor"
    ),
    "admission.Admission": "budget",
    "events.Events": "events",
    "archives.Archives": "export open_export import_template open_import",
    "housekeeping.Housekeeping": "gc",
}
_GROUP_OF: Final = {operation: name for name, operations in _GROUPS.items() for operation in operations.split()}


def group_of(operation: str) -> type[UseCases]:
    """Return the class whose method of this name carries out the operation. Import it if needed."""
    module, _, name = _GROUP_OF[operation].partition(".")
    found: type[UseCases] = getattr(import_module(f"{__name__}.{module}"), name)
    return found


class LocalBackend(OpenedHost):
    """One data directory of this machine, and the use cases over it."""

    @cached_property
    def _groups(self) -> dict[type[UseCases], Any]:
        return {}

    def group(self, kind: type[G]) -> G:
        """Return the use cases of one group over this data directory."""
        if kind not in self._groups:
            self._groups[kind] = kind(self)
        made: G = self._groups[kind]
        return made

    async def call(self, request: Request[R], progress: ProgressSink = no_progress) -> R:
        """Carry out one operation and return its result."""
        method = getattr(self.group(group_of(request.operation)), request.operation)
        result: R = await (method(request, progress) if request.reports_progress else method(request))
        return result

    def stream(self, request: StreamRequest[R]) -> AbstractAsyncContextManager[R]:
        """Open a result that is used inside a block: a running command, a log."""
        method = getattr(self.group(group_of(request.operation)), request.operation)
        opened: AbstractAsyncContextManager[R] = method(request)
        return opened
