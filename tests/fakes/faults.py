"""Planned faults of the fake driver and its guests."""

from __future__ import annotations

import asyncio
import os
import signal
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass, field

from coppice.errors import VmmError
from coppice.model import VmmProcess
from fakes.pids import ended


@dataclass
class Gate:
    """A step that waits: `reached` is set when the wait begins, and `release` ends it."""

    reached: asyncio.Event = field(default_factory=asyncio.Event)
    release: asyncio.Event = field(default_factory=asyncio.Event)


@dataclass
class _Plan:
    nth: int
    error: Callable[[], BaseException] | None = None
    die: bool = False
    gate: Gate | None = None


class Faults:
    """Plans by step. A step is the name of a driver's method, `booted` or `restored` (the process
    runs), or a request to the guest.

    Each plan is carried out once, at the `nth` time that its step is reached from now on.
    """

    def __init__(self) -> None:
        self.reached: Counter[str] = Counter()
        self._plans: dict[str, list[_Plan]] = {}

    def fail_at(self, step: str, *, nth: int = 1, error: Callable[[], BaseException] | None = None) -> None:
        """Make the step raise a VmmError that names it, or the error that `error` makes."""
        self._add(
            step,
            _Plan(
                self.reached[step] + nth,
                error=error or (lambda: VmmError(f"{step} is planned to fail", hint="see the test")),
            ),
        )

    def die_at(self, step: str, *, nth: int = 1) -> None:
        """Kill the VMM process when the step is reached."""
        self._add(step, _Plan(self.reached[step] + nth, die=True))

    def hold_at(self, step: str, *, nth: int = 1) -> Gate:
        """Make the step wait at the returned gate."""
        gate = Gate()
        self._add(step, _Plan(self.reached[step] + nth, gate=gate))
        return gate

    def _add(self, step: str, plan: _Plan) -> None:
        self._plans.setdefault(step, []).append(plan)

    async def reach(self, step: str, process: VmmProcess | None = None) -> None:
        """Run the planned fault of a step, if any."""
        self.reached[step] += 1
        due = [plan for plan in self._plans.get(step, []) if plan.nth == self.reached[step]]
        for plan in due:
            if plan.gate is not None:
                plan.gate.reached.set()
                await plan.gate.release.wait()
            if plan.die and process is not None:
                os.kill(process.pid, signal.SIGKILL)
                await ended(process)
            if plan.error is not None:
                raise plan.error()
