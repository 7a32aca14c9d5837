"""Say when an idle machine is put into standby, and hold that off."""

from __future__ import annotations

import time
from typing import Final

from coppice.completion import in_thread
from coppice.errors import InStandby
from coppice.host.activity import active, idle_s, use_of
from coppice.host.base import UseCases
from coppice.model import Instance, State
from coppice.model.automation import AutoStandbyStatus
from coppice.requests import AutoStandbyHoldRequest, AutoStandbyRequest

_AT_REST: Final = (State.STANDBY, State.TEMPLATE)
_AWAKE: Final = (State.RUNNING, State.INITIALIZING)


class AutoStandby(UseCases):
    """The automatic standby of instances, as their users see it. The supervisor carries it out."""

    async def auto_standby(self, request: AutoStandbyRequest) -> AutoStandbyStatus:
        """Look at the policy, and at what keeps the instance awake."""
        return await self._status(await self._current(request.instance))

    async def auto_standby_hold(self, request: AutoStandbyHoldRequest) -> AutoStandbyStatus:
        """Record the hold during a session: so it comes after a standby that is under way, or before the next."""
        instance = await self._current(request.instance)
        async with active(self.rooms, instance):
            instance = await self._current(instance.id)
            limit = idle_s(instance)
            if limit and instance.state in _AT_REST:
                raise InStandby(
                    f"{instance.name} is {instance.state}", hint=f"`coppice restore {instance.name}` wakes it"
                )
            if limit and instance.state in _AWAKE:
                now = time.time()
                await in_thread(self.rooms.store.supervised.hold, instance.id, now, now + limit)
        return await self._status(instance)

    async def _status(self, instance: Instance) -> AutoStandbyStatus:
        limit, now = idle_s(instance), time.time()
        if not limit:
            return AutoStandbyStatus(status="disabled")
        held = await in_thread(self.rooms.store.supervised.held_until, instance.id, now)
        if instance.state is not State.RUNNING:
            return AutoStandbyStatus(status="ineligible", idle_timeout_s=limit, hold_until=held)
        seen = await in_thread(self.rooms.store.supervised.observed_of, instance.id)
        use = await use_of(self.rooms, instance, seen, now)
        busy = use.in_use or use.connections > 0
        due = use.due(now, limit)
        return AutoStandbyStatus(
            status="active" if busy else "idle_countdown" if now < due else "ready_for_standby",
            idle_timeout_s=limit,
            in_use=use.in_use,
            connections=use.connections,
            last_active_at=now if busy else use.last,
            idle_since=None if busy else use.last,
            standby_at=None if busy else due,
            hold_until=use.held_until,
        )
