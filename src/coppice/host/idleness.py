"""Put idle machines into standby, as their policies say."""

from __future__ import annotations

import logging
from typing import Final

from coppice.commands import PROCESS
from coppice.completion import in_thread
from coppice.errors import Busy, CoppiceError
from coppice.host.activity import activity_file, idle_s, use_of
from coppice.host.checks import Checks
from coppice.model import Instance, Observed, State
from coppice.model.lifecycle import Operation
from coppice.state import locks

_SAMPLES: Final = 10  # of connections, in the time until a machine is idle
_SOONEST_S: Final = 1.0
_ANSWER_S: Final = 10.0

_log = logging.getLogger(__name__)


class Idleness(Checks):
    """The automatic standby of one instance."""

    async def _rest_if_idle(self, instance: Instance, seen: Observed, now: float) -> tuple[Observed, float | None]:
        """Put a Running machine into standby if it was idle long enough. Return the time of the
        next look.
        """
        limit = idle_s(instance)
        if not limit:
            return seen, None
        use = await use_of(self.rooms, instance, seen, now)
        if (use.in_use or use.connections) and now - (seen.active_at or 0.0) > limit / _SAMPLES:
            seen = await self._observe(instance, seen, active_at=now)
        if use.last is None:
            seen = await self._observe(instance, seen, active_at=now)
        due = use.due(now, limit)
        if now >= due:
            if not await self._rest(instance, now):  # a command runs in it, or it is held
                return await self._observe(instance, seen, active_at=now), now + limit
            return seen, None
        sampled = any(port.protocol == "tcp" for port in instance.publish)
        return seen, min(due, now + max(limit / _SAMPLES, _SOONEST_S)) if sampled else due

    async def _rest(self, instance: Instance, now: float) -> bool:
        """Capture an idle machine. A session or a hold that began meanwhile keeps it awake, and so does a
        command that runs without a client. Return whether none did.
        """
        async with self._hold(instance.id, Operation.STANDBY) as (current, _):
            if current.state is not State.RUNNING or current.started_at != instance.started_at or not idle_s(current):
                return True
            descriptor = locks.try_lock(activity_file(self.rooms, current))
            if descriptor is None:
                raise Busy(f"{instance.name} is in use", hint="its next idle time counts")
            try:
                if await in_thread(self.rooms.store.supervised.held_until, current.id, now):
                    return False
                if await self._runs_commands(current):
                    return False
                await self._capture(current)
            finally:
                locks.release(descriptor)
        return True

    async def _runs_commands(self, instance: Instance) -> bool:
        """Return whether a command runs in a machine, other than the machine's process. A guest that
        does not answer is not known to run any.
        """
        try:
            async with self.rooms.ports(instance).session(_ANSWER_S, patience_s=_ANSWER_S) as session:
                commands = await session.commands()
        except CoppiceError as error:
            _log.info("%s does not tell its commands: %s", instance.name, error)
            return False
        return any(command.exit_code is None and command.id != PROCESS for command in commands)
