"""Choose at which steps and instants of an operation hosts are killed, and kill them.

A full run kills at every step that recovery depends on: each commit, each start and end of a
process, each order to a VMM, each rename. It adds a quarter of the other steps (from 800 kills on,
all of them). In an operation that boots a real machine, which takes seconds, it kills at a sample
of these steps. A short run kills at a random sample of all steps. Both add random instants.
"""

from __future__ import annotations

import os
import random
from collections.abc import Iterator

from crash.kills import Findings, Ground
from crash.kinds import Kind
from crash.operations import OPERATIONS, Operation
from crash.steps import is_of_journal

KILLS = int(os.environ.get("COPPICE_CRASH_KILLS", "30"))
SEED = int(os.environ.get("COPPICE_CRASH_SEED", "1"))
FULL = KILLS >= 200
_EVERY_STEP = 800  # this many kills are enough for every step of every operation
_MAX_BOOT_STEPS = 12  # steps killed at in an operation that takes seconds


def chosen(kind: type[Kind]) -> list[Operation]:
    """Return the operations to kill hosts in."""
    return [operation for operation in OPERATIONS.values() if FULL or kind.quick or not operation.boots]


async def kill_hosts(ground: Ground, operation: Operation) -> None:
    """Kill hosts in an operation, check the data directory after each kill, and raise every
    finding at the end.
    """
    rng = random.Random(f"{SEED} {operation.name}")
    if FULL:
        await ground.measure(operation)
    share = -(-KILLS // len(chosen(type(ground.kind))))
    findings = Findings(f"{operation.name} with seed {SEED}")
    for number in _steps(ground, operation, rng, share - share // 2):
        with findings.kept():
            while not await ground.kill_at_step(operation, number):
                number = rng.randint(1, number)  # a fast host may need fewer steps
    _, seconds = ground.size_of(operation)
    for _ in range(share // 3 if FULL else share // 2):
        delay_s = rng.uniform(0, seconds)
        with findings.kept():
            while not await ground.kill_after(operation, delay_s):
                delay_s /= 2  # the operation had already ended
    findings.raise_all()


def _steps(ground: Ground, operation: Operation, rng: random.Random, sample: int) -> Iterator[int]:
    if not FULL:
        for _ in range(sample):
            yield rng.randint(1, ground.size_of(operation)[0])
        return
    first: dict[str, int] = {}
    for number, name in enumerate(ground.measured[operation.name].steps, 1):
        first.setdefault(name, number)
    deciding = [number for name, number in first.items() if is_of_journal(name)]
    others = [number for number in first.values() if number not in deciding]
    if operation.boots and not ground.kind.quick:
        yield from sorted(rng.sample(deciding, min(_MAX_BOOT_STEPS, len(deciding))))
    else:
        share = len(others) * min(KILLS, _EVERY_STEP) // _EVERY_STEP
        yield from sorted([*deciding, *rng.sample(others, share)])
