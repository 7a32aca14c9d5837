"""Start machines again that ended by themselves, as their policies say."""

from __future__ import annotations

import logging
from typing import Any, Final

import msgspec

from coppice.completion import in_thread
from coppice.errors import CoppiceError
from coppice.host.lifecycle import Lifecycle
from coppice.model import Instance, Observed, RestartPolicy, State
from coppice.model.events import Kind
from coppice.model.instance import said
from coppice.model.lifecycle import Operation
from coppice.model.supervision import Ending
from coppice.state.journal import JournalOperation

_log = logging.getLogger(__name__)
_LONGEST_BACKOFF_S: Final = 300.0


class Restarts(Lifecycle):
    """The restart policy of one instance."""

    async def _keep_running(self, instance: Instance, seen: Observed, now: float) -> tuple[Observed, float | None]:
        """End a machine whose process has ended, if it is to be started again. Return the time of
        the next look.
        """
        policy = instance.restart
        if policy.when == "never":
            return seen, None
        if seen.gave_up or seen.next_attempt_at is not None:  # a command has started it meanwhile
            seen = await self._observe(instance, seen, gave_up=False, next_attempt_at=None, attempts=0)
        stable_at = (instance.started_at or 0.0) + policy.stable_after_s
        if seen.attempts and now >= stable_at:
            seen = await self._observe(instance, seen, attempts=0)
        if (end := instance.process_end) is not None:  # its event brought this look
            ending: Ending = "failed" if end.exit_code else "clean"
            if _wants(policy, ending):
                await self._end(instance, f"its process {said(end)}", ending)
                return seen, None
        return seen, stable_at if seen.attempts else None

    async def _end(self, instance: Instance, why: str, ending: Ending) -> None:
        """Stop a machine that failed, unless a command has changed it since."""
        async with self._hold(instance.id, Operation.STOP) as (current, target):
            if current.state is not target and current.started_at == instance.started_at:
                _log.info("stop %s: %s", instance.name, why)
                await self._stop(current, None, why, ending)

    async def _start_again(self, instance: Instance, seen: Observed, now: float) -> tuple[Observed, float | None]:
        """Start a machine that ended by itself when its time has come. Return that time."""
        policy = instance.restart
        if instance.state is not State.STOPPED or not _wants(policy, instance.ending):
            return await self._observe(instance, seen, next_attempt_at=None), None
        if seen.gave_up and seen.gave_up_on == instance.started_at:
            return seen, None
        if seen.gave_up:  # a command has started it since
            seen = await self._observe(instance, seen, gave_up=False, attempts=0)
        longest = max(policy.backoff_s, _LONGEST_BACKOFF_S)
        if seen.next_attempt_at is None or seen.next_attempt_at > now + longest:  # the clock was set back
            if policy.max_attempts and seen.attempts >= policy.max_attempts:
                detail = f"gave up after {seen.attempts} attempts: {instance.exit_reason}"
                given_up = {"gave_up": True, "gave_up_on": instance.started_at}
                return await self._observe(instance, seen, "restart", detail, **given_up), None
            delay = min(policy.backoff_s * 2.0 ** min(seen.attempts, 32), longest)
            seen = await self._observe(instance, seen, next_attempt_at=now + delay)
        if seen.next_attempt_at is not None and now < seen.next_attempt_at:
            return seen, seen.next_attempt_at
        of = f" of {policy.max_attempts}" if policy.max_attempts else ""
        seen = await self._observe(
            instance,
            seen,
            "restart",
            f"attempt {seen.attempts + 1}{of}: {instance.exit_reason}",
            attempts=seen.attempts + 1,
            next_attempt_at=None,
            last_attempt_at=now,
        )
        try:
            async with self._hold(instance.id, Operation.START) as (current, _):
                if current.state is State.STOPPED and _wants(current.restart, current.ending):
                    await self._activate(current, JournalOperation.START, boot=True)
        except CoppiceError as error:
            _log.warning("cannot start %s again: %s", instance.name, error)
            return seen, now  # look again at once: the next attempt has its own back-off
        return seen, None

    async def _observe(
        self, instance: Instance, seen: Observed, kind: Kind | None = None, detail: str = "", **changes: Any
    ) -> Observed:
        """Record what has changed, with an event if `kind` is given."""
        changed = msgspec.structs.replace(seen, **changes)
        if changed != seen:
            await in_thread(self.rooms.store.supervised.observe, instance.id, changed, kind, detail)
        return changed


def _wants(policy: RestartPolicy, ending: Ending | None) -> bool:
    return ending in {"never": (), "on-failure": ("failed",), "always": ("failed", "clean")}[policy.when]
