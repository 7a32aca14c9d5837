"""The operations that a server offers, from the request records, and the scope that each needs."""

from __future__ import annotations

from typing import Any, Final

from coppice import requests
from coppice.requests import Request, StreamRequest
from coppice.requests.base import operation_name

_ABSTRACT: Final = {Request, StreamRequest, requests.FanOut}
_READ: Final = frozenset(
    {
        *("get", "ls", "inspect", "stats", "tree", "unloadable", "health", "logs", "stat", "wait", "events"),
        *("command_ls", "command_wait", "wait_process", "file_ls", "file_watch", "auto_standby", "snapshot_schedule"),
        *("image_ls", "image_inspect", "snapshot_ls", "snapshot_inspect", "volume_ls", "volume_inspect", "kernel_ls"),
    }
)
_RESOURCES: Final = frozenset({"budget", "doctor", "verify"})


def _kinds() -> list[type[Request[Any]]]:
    named = (getattr(requests, name) for name in requests.__all__)
    return [each for each in named if isinstance(each, type) and issubclass(each, Request) and each not in _ABSTRACT]


REQUESTS: Final[dict[str, type[Request[Any]]]] = {operation_name(kind.__name__): kind for kind in _kinds()}
"""All requests by operation name."""
STREAMS: Final = {name: kind for name, kind in REQUESTS.items() if issubclass(kind, StreamRequest)}
"""Those whose result stays open while it is used."""
CALLS: Final = {
    name: kind
    for name, kind in REQUESTS.items()
    if name not in STREAMS and name not in ("cp_in", "cp_out", "export", "import_template")
}
"""Those that are one call with a result. A client moves its own files by the streams `open_copy`, `open_export` and
`open_import`."""


WAITS: Final = frozenset({"wait", "wait_process", "command_wait"})
"""Those that may take long although they change nothing."""


def scope_of(operation: str) -> str:
    """Return the scope that an operation needs."""
    if operation in _RESOURCES:
        return "resource:read"
    resource = next(
        (each for each in ("image", "kernel", "volume", "snapshot") if operation.startswith(each)), "instance"
    )
    if resource == "kernel":
        resource = "image"
    if operation in _READ:
        return f"{resource}:read"
    deletes = operation in ("rm", "gc") or (operation.endswith("_rm") and operation != "file_rm")
    return f"{resource}:{'delete' if deletes else 'write'}"
