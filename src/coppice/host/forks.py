"""Use cases that grow forks of an instance, and start VMMs ahead for them."""

from __future__ import annotations

import asyncio
import contextlib
from functools import partial

import msgspec

from coppice.completion import complete, in_thread
from coppice.errors import NotSupported
from coppice.fork.fanout import fan_out
from coppice.fork.spare import serves
from coppice.host.admission import demand_of_forks
from coppice.host.removal import Removal
from coppice.machine import limits
from coppice.model import ForkReport, ProgressSink
from coppice.model.lifecycle import Operation
from coppice.requests import FanOut, ForkRequest, StartAheadRequest


class Forks(Removal):
    """The operations that grow forks."""

    async def fork(self, request: ForkRequest, progress: ProgressSink) -> ForkReport:
        """Grow the forks. Use the VMMs that were started ahead first."""
        if request.from_running:
            return await self._fork_running(request, progress)
        clones = request.clones_volumes
        async with self._hold_source(request.instance, Operation.FORK, clones_volumes=clones) as (source, _):
            with self._spare().taken(source, request) as spares:
                demand = partial(demand_of_forks, self.rooms, source, request, ahead=len(spares))
                record = partial(self._record_forks, demand)
                forked = await fan_out(
                    self.rooms, source, request, progress, owner=self.owner, record=record, spares=spares
                )
        self._spare().forked(source, request)
        self._hash().captured(*forked.instances)
        return forked

    async def start_ahead(self, request: StartAheadRequest) -> int:
        """Start VMMs until the requested number is waiting."""
        async with self._hold_source(request.instance, Operation.FORK) as (source, _):
            if not serves(self.rooms, source, FanOut()):
                raise NotSupported(
                    f"cannot start VMMs ahead for {source.name}",
                    hint="it must be a template without volumes, and its driver must support paused restores",
                )
            return await self._spare().prepare(source, request.count)

    async def _fork_running(self, request: ForkRequest, progress: ProgressSink) -> ForkReport:
        from coppice.machine import live  # imported late: most forks are of captured memory

        forked: ForkReport | None = None
        try:
            async with contextlib.AsyncExitStack() as until_forked:
                held = self._hold(request.instance, Operation.FORK_RUNNING, clones_volumes=request.clones_volumes)
                async with held as (source, _):
                    # Check first, so that the source is not paused in vain.
                    self.rooms.networks.check(source.machine, request.publish, request.egress)
                    if request.limits is not None:
                        await in_thread(limits.check, request.limits, self.rooms.layout.home)
                    await in_thread(self.rooms.store.require_free, request.child_names)
                    admit = await self._admit(partial(demand_of_forks, self.rooms, source, request))
                    stem = await until_forked.enter_async_context(live.stem(self.rooms, source, admit))
                    captured, report = await live.capture_running(self.rooms, source, stem)
                rest = msgspec.structs.replace(request, from_running=False)
                record = partial(self._record_forks, partial(demand_of_forks, self.rooms, captured, rest))
                forked = await fan_out(
                    self.rooms, captured, rest, progress, owner=self.owner, record=record, parent=source
                )
        except asyncio.CancelledError:
            if forked is not None:  # the caller will not get the report with the forks
                await complete(self._remove_all(forked.instances))
            raise
        self._hash().captured(*forked.instances)
        return msgspec.structs.replace(forked, source_pause_ms=report.pause_ms, capture=report)
