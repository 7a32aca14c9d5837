"""The use case that removes an instance."""

from __future__ import annotations

import contextlib
from collections.abc import Sequence

from coppice.completion import all_of, complete, in_thread
from coppice.errors import NoSpace
from coppice.host.admission import Admission
from coppice.machine import destroy
from coppice.model import Instance
from coppice.model.lifecycle import Operation
from coppice.requests import RmRequest
from coppice.state.journal import JournalOperation


class Removal(Admission):
    """The operation that removes an instance."""

    async def rm(self, request: RmRequest) -> None:
        """Remove the instance, and the VMMs that were started for its next forks."""
        async with self._hold(request.instance, Operation.REMOVE) as (instance, _):
            await complete(self._remove(instance))
        await self._spare().drop(instance.id)

    async def _remove(self, instance: Instance) -> None:
        if any(not (disk.readonly or disk.private) for disk in instance.machine.volumes):
            from coppice.machine import capture  # imported late: few machines write to a volume

            await capture.sync_disk(self.rooms, instance)  # the volume outlives the instance
        settled = False
        with contextlib.suppress(NoSpace):  # removal must work on a full disk
            settled = await in_thread(self.rooms.store.begin, instance, JournalOperation.REMOVE)
        await destroy.destroy(self.rooms, instance, settled=settled)

    async def _remove_all(self, instances: Sequence[Instance]) -> None:
        await all_of(self.rm(RmRequest(instance=instance.id)) for instance in instances)
