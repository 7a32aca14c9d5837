"""Choose at which steps and instants of an operation processes are killed, and kill them.

A full run kills at every step that recovery depends on: each commit, each start and end of a
process, each order to a VMM, each rename. It adds a quarter of the other steps (from 800 kills on,
all of them). Steps with the same name count once.

In an operation on layers (`Operation.of_layers`) it kills at every step, also at those with the
same name: a fork of a running machine links each file twice. It does so over fake machines, which
take milliseconds. Over real machines, and in servers, it kills at a sample of the steps.

A short run kills at a random sample of all steps. Both add random instants.
"""

from __future__ import annotations

import os
import random
from collections.abc import Iterator, Sequence
from typing import Any

from crash.kills import Findings, Ground
from crash.kinds import Kind
from crash.operation import Operation
from crash.operations import OPERATIONS
from crash.steps import is_of_journal, is_repeated

KILLS = int(os.environ.get("COPPICE_CRASH_KILLS", "30"))
SEED = int(os.environ.get("COPPICE_CRASH_SEED", "1"))
FULL = KILLS >= 200
_EVERY_STEP = 800  # this many kills are enough for every step of every operation
MOST_STEPS = 24  # steps killed at in an operation on real machines
MOST_BOOT_STEPS = 8  # steps killed at in one on real machines that takes seconds
MOST_SERVED_STEPS = 6  # steps killed at in an operation of a server
_RESUMED = (
    *("fork", "fan-out", "fork-from-running", "standby", "restore", "rm", "run"),
    *("snapshot-create", "snapshot-restore", "snapshot-rm", "volume-create"),
)


def chosen(kind: type[Kind]) -> list[Operation]:
    """Return the operations to kill hosts in."""
    return [operation for operation in OPERATIONS.values() if FULL or kind.quick or not operation.boots]


def repeatable() -> list[Operation]:
    """Return the operations to kill servers in: in a short run those that servers resume differently."""
    return [each for each in OPERATIONS.values() if (each.repeatable if FULL else each.name in _RESUMED)]


async def kill_in(ground: Ground[Any], operation: Operation) -> None:
    """Kill processes in an operation, check the data directory after each kill, and raise every
    finding at the end.
    """
    rng = random.Random(f"{SEED} {operation.name}")
    if FULL:
        await ground.measure(operation)
    share = -(-KILLS // len(chosen(type(ground.kind))))
    findings = Findings(f"{operation.name} with seed {SEED}")
    for number in planned_steps(ground, operation, rng, share - share // 2):
        with findings.kept():
            while not await ground.kill_at_step(operation, number):
                number = rng.randint(1, number)  # a fast host may need fewer steps
    _, seconds = ground.size_of(operation)
    for _ in range(share // 3 if FULL or ground.sampled else share // 2):
        delay_s = rng.uniform(0, seconds)
        with findings.kept():
            while not await ground.kill_after(operation, delay_s):
                delay_s /= 2  # the operation had already ended
    findings.raise_all()


def planned_steps(ground: Ground[Any], operation: Operation, rng: random.Random, sample: int) -> Iterator[int]:
    """Yield the steps to kill at.

    :param sample: how many in a short run
    """
    if not FULL:
        for _ in range(sample):
            yield rng.randint(1, ground.size_of(operation)[0])
        return
    steps = ground.measured[operation.name].steps
    first: dict[str, int] = {}
    for number, name in enumerate(steps, 1):
        first.setdefault(name, number)
    deciding = [number for name, number in first.items() if is_of_journal(name)]
    others = [number for number in first.values() if number not in deciding]
    quick = ground.kind.quick
    if ground.sampled or (operation.boots and not quick):
        yield from _sample(rng, deciding, MOST_SERVED_STEPS if ground.sampled else MOST_BOOT_STEPS)
    elif operation.of_layers and quick:
        yield from (number for number, name in enumerate(steps, 1) if first[name] == number or not is_repeated(name))
    else:
        share = len(others) * min(KILLS, _EVERY_STEP) // _EVERY_STEP
        wanted = [*deciding, *rng.sample(others, share)]
        yield from _sample(rng, wanted, len(wanted) if quick or KILLS >= _EVERY_STEP else MOST_STEPS)


def _sample(rng: random.Random, numbers: Sequence[int], most: int) -> list[int]:
    """Return so many of the numbers at most, in order."""
    return sorted(rng.sample(numbers, min(most, len(numbers))))
