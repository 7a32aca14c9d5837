"""Check the health of machines, as their policies say."""

from __future__ import annotations

from coppice.host.probes import Probe
from coppice.host.restarts import Restarts
from coppice.model import HealthCheck, Instance, Observed, State
from coppice.model.supervision import HealthState


class Checks(Restarts):
    """The health check of one instance."""

    async def _check(self, instance: Instance, seen: Observed, now: float) -> tuple[Observed, float | None]:
        """Check the health of a Running machine if it is time. Return the time of the next check."""
        check = instance.health_check
        if check is None:
            return await self._observe(instance, seen, health=None, checked_at=None), None
        if seen.health is None or seen.health_of != instance.started_at:
            seen = await self._observe(
                instance,
                seen,
                "health",
                "starting",
                health="starting",
                health_of=instance.started_at,
                failures=0,
                successes=0,
                checked_at=None,
                health_error="",
            )
        if seen.checked_at is not None and seen.checked_at <= now < seen.checked_at + check.interval_s:
            return seen, seen.checked_at + check.interval_s
        error = await Probe(self.rooms, instance, check).failure()
        current, _ = await self.rooms.store.look_up(instance.id)
        if current.state is not State.RUNNING or current.started_at != instance.started_at:
            return seen, None  # the check met another state: its event brings the next look
        seen = await self._judge(instance, seen, check, error, now)
        if seen.health == "unhealthy" and check.restart and instance.restart.when != "never":
            await self._end(instance, f"unhealthy: {error or seen.health_error}", "failed")
            return seen, None
        return seen, now + check.interval_s

    async def _judge(self, instance: Instance, seen: Observed, check: HealthCheck, error: str, now: float) -> Observed:
        """Record the result of a check. Early failures do not count."""
        early = seen.health == "starting" and max(now - (instance.started_at or 0.0), 0.0) < check.start_period_s
        failures = 0 if not error else seen.failures + (0 if early else 1)
        successes = seen.successes + 1 if not error else 0
        health: HealthState | None = seen.health
        if successes >= check.successes:
            health = "healthy"
        elif failures >= check.failures:
            health = "unhealthy"
        changed = health != seen.health
        return await self._observe(
            instance,
            seen,
            "health" if changed else None,
            f"{health}: {error}" if error else str(health),
            health=health,
            failures=failures,
            successes=successes,
            checked_at=now,
            health_error=error or seen.health_error,
        )
