"""What is done to an instance without a request: it is ended, started again and checked.

Each method locks the instance and looks at it again, so a user's own command wins or comes after.
"""

from __future__ import annotations

import logging
import time
from collections.abc import Sequence

import msgspec

from coppice.completion import complete, in_thread
from coppice.errors import Busy, CoppiceError, NotFound
from coppice.host.idleness import Idleness
from coppice.host.removal import Removal
from coppice.model import Instance, Record, State
from coppice.model.lifecycle import Operation, legal_states
from coppice.model.ownership import owns

_log = logging.getLogger(__name__)


class Next(Record, frozen=True, kw_only=True):
    """When to look at an instance next, and the instance as it is now."""

    at: float | None = None
    instance: Instance | None = None  # None: it has no policies

    def by(self, at: float) -> Next:
        """Return the same, but no later than at a time."""
        return msgspec.structs.replace(self, at=at if self.at is None else min(self.at, at))

    @property
    def running(self) -> Instance | None:
        """The instance, if the end of its VMM is to be awaited."""
        found = self.instance
        if found is None or found.restart.when == "never":
            return None
        return found if found.state is State.RUNNING else None


class Upkeep(Idleness, Removal):
    """The operations of the supervisor."""

    async def attend(self, key: str, now: float) -> Next:
        """Do what is due for an instance, and return when to look at it next.

        :raises NotFound: the instance is gone, or is not of this host's owner
        """
        instance = await self._current(key)
        policies = instance.supervision
        if policies is None:
            return Next()
        if instance.expires_at is not None and instance.expires_at <= now:
            instance = await self.expire(key, now)
        seen = await in_thread(self.rooms.store.supervised.observed_of, instance.id)
        due = [instance.expires_at]
        runs = instance.state is State.RUNNING
        for duty in (self._keep_running, self._check, self._rest_if_idle) if runs else (self._start_again,):
            seen, at = await duty(instance, seen, now)
            due.append(at)
        return Next(at=min((each for each in due if each is not None), default=None), instance=instance)

    async def expire(self, key: str, now: float, *, deadline_s: float | None = None) -> Instance:
        """Remove, stop or capture an instance if its lifetime is over. Return its record.

        :raises NotFound: it is removed
        :raises InUse: it is a template with forks
        """
        async with self._hold(key, Operation.REMOVE, deadline_s=deadline_s) as (instance, _):
            policies = instance.supervision
            if policies is None or policies.expires_at is None or policies.expires_at > now:
                return instance
            _log.info("%s expired: %s", instance.name, policies.on_expiry)
            if policies.on_expiry == "remove":
                await complete(self._remove(instance))
            else:
                instance = await self._put_to_rest(instance, policies.on_expiry)
                changed = msgspec.structs.replace(policies, expires_at=None)
                instance = msgspec.structs.replace(instance, supervision=changed)
                await in_thread(self.rooms.store.save, instance)
        if policies.on_expiry == "remove":
            await self._spare().drop(instance.id)
            raise NotFound(f"{instance.name} has expired", hint="list the instances with `coppice ls`")
        return instance

    async def _put_to_rest(self, instance: Instance, how: str) -> Instance:
        """Stop or capture an instance that runs. One that does not run stays as it is."""
        operation = Operation.STOP if how == "stop" else Operation.STANDBY
        if instance.state not in legal_states(operation) - {State.STANDBY, State.STOPPED}:
            return instance
        if how == "stop":
            return await self._stop(instance, None)
        return (await self._capture(instance)).instance

    async def expire_now(self, keys: Sequence[str]) -> None:
        """Do what was asked for expired instances, but for those that another process holds."""
        for key in keys:
            try:
                if owns(self.owner, (await self.rooms.store.look_up(key))[0]):
                    await self.expire(key, time.time(), deadline_s=0)
            except (NotFound, Busy):
                continue
            except CoppiceError as error:
                _log.warning("cannot end an expired instance: %s", error)
