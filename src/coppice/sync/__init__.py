"""Host: the blocking twin of AsyncHost, for programs that do not use asyncio.

Each Host has an event loop in a thread of its own (see `portal`); a call hands its work over and waits.
"""

from __future__ import annotations

from coppice.host import AsyncHost
from coppice.sync.guest import Guest
from coppice.sync.images import Images
from coppice.sync.lifecycle import Lifecycle
from coppice.sync.session import ExecSession
from coppice.sync.snapshots import Snapshots
from coppice.sync.view import View
from coppice.sync.volumes import Volumes

__all__ = ["ExecSession", "Host"]


class Host(Lifecycle, Snapshots, Volumes, Guest, View, Images):
    """One data directory and what can be done in it: AsyncHost, blocking.

    with Host() as host:
        vm = host.run("debian", ["sleep", "infinity"])

    Any thread may call it. Methods, parameters, results and errors are AsyncHost's.
    """


for _base in Host.__mro__[:-1]:  # one text for both
    for _name, _member in vars(_base).items():
        if not _name.startswith("_"):
            _member.__doc__ = getattr(AsyncHost, _name).__doc__
