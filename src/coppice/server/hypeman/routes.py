"""All routes of the hypeman API."""

from __future__ import annotations

from typing import Any, Final

from coppice.server.hypeman import (
    automation,
    copies,
    forks,
    guests,
    images,
    instances,
    snapshots,
    sockets,
    system,
    volumes,
)

ROUTES: Final[list[Any]] = [
    route
    for module in (instances, automation, forks, guests, snapshots, volumes, images, system, sockets, copies)
    for route in module.ROUTES
]
