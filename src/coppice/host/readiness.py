"""Wait until the service in a machine answers."""

from __future__ import annotations

import asyncio
from typing import Final

from coppice.completion import beside
from coppice.errors import GuestTimeout, UsageError, VmmDied
from coppice.host import process
from coppice.host.guest import Guest
from coppice.host.probes import Probe
from coppice.model import HealthCheck, Instance
from coppice.model.instance import said
from coppice.requests import ReadyRequest

_FIRST_PAUSE_S: Final = 0.02
_LONGEST_PAUSE_S: Final = 1.0


class Readiness(Guest):
    """The operation that waits for a service."""

    async def ready(self, request: ReadyRequest) -> Instance:
        """Check again and again until a check succeeds, the machine ends, or the time is over."""
        instance = await self._running(request.instance)
        check = instance.health_check
        if check is None:
            raise UsageError(
                f"{instance.name} has no health check",
                hint=f"`coppice update {instance.name} --health exec:COMMAND` gives it one; its forks inherit it",
            )
        wrong = ["it was not checked yet"]
        try:
            async with asyncio.timeout(request.deadline_s):
                await beside(self._no_end(instance), self._answered(instance, check, wrong))
        except TimeoutError as error:
            end = (await process.learn(self.rooms, instance)).process_end
            ended = f"; its process {said(end)}" if end else ""
            raise GuestTimeout(
                f"the service of {instance.name} does not answer after {request.deadline_s:g} s: {wrong[0]}{ended}",
                hint=f"see `coppice logs {instance.name}`, or wait longer",
            ) from error
        return await self._get(instance.id)

    async def _no_end(self, instance: Instance) -> None:
        """Raise when the machine's VMM has ended.

        :raises VmmDied: it has ended
        """
        vmm, directory = instance.vmm, self.rooms.directory(instance.id)
        why = "its VMM is gone" if vmm is None else await self.rooms.driver(instance).wait_exit(directory, vmm)
        raise VmmDied(
            f"{instance.name} ended before its service answered: {why}", hint=f"see `coppice logs {instance.name}`"
        )

    async def _answered(self, instance: Instance, check: HealthCheck, wrong: list[str]) -> None:
        """Return after as many successes in a row as the check wants. Keep the latest failure."""
        pause, successes, probe = _FIRST_PAUSE_S, 0, Probe(self.rooms, instance, check)
        while successes < check.successes:
            if failure := await probe.failure():
                wrong[0], successes = failure, 0
                await asyncio.sleep(pause)  # no event tells that a service begins to answer
                pause = min(pause * 2, _LONGEST_PAUSE_S)
            else:
                successes += 1
