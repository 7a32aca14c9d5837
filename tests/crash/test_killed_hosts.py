"""A host process is killed at its steps, and at random instants, in every operation over real machines: nothing is lost, nothing is left.

The full run kills at every step that recovery decides by (each commit, each start, end and word to a VMM, each name that a file gets), at a quarter of the
other steps, and at random instants; where an operation boots a machine, at some of them.
"""

from __future__ import annotations

import contextlib
import os
import random
from collections.abc import Iterator

import pytest

from crash.kills import Ground
from crash.operations import OPERATIONS, Operation
from crash.steps import is_of_journal

KILLS = int(os.environ.get("COPPICE_CRASH_KILLS", "30"))
FULL = KILLS >= 200
CHOSEN = [operation for operation in OPERATIONS.values() if FULL or not operation.boots]
SHARE = -(-KILLS // len(CHOSEN))  # of each operation
_MOST_OF_BOOTS = 12  # steps of an operation that takes seconds


@pytest.mark.timeout(1200)
@pytest.mark.parametrize("operation", CHOSEN, ids=lambda operation: operation.name)
async def test_a_killed_host_loses_nothing_and_leaves_nothing(ground: Ground, operation: Operation) -> None:
    """Every machine is whole or absent and answers as itself; no process, file, link, lock or row is left; the template is as it was."""
    rng = random.Random(f"{ground.seed} {operation.name}")
    if FULL:
        await ground.measure(operation)
    errors: list[Exception] = []
    for number in steps_of(ground, operation, rng):
        with _kept(errors):
            while not await ground.kill_at_step(operation, number):
                number = rng.randint(1, number)  # on a quick host it has fewer steps than it is known for
    _, seconds = ground.size_of(operation)
    for _ in range(SHARE // 3 if FULL else SHARE // 2):
        delay_s = rng.uniform(0, seconds)
        with _kept(errors):
            while not await ground.kill_after(operation, delay_s):
                delay_s /= 2  # it had ended already
    if errors:
        raise errors[0] if len(errors) == 1 else ExceptionGroup(f"{operation.name} with seed {ground.seed}", errors)


@contextlib.contextmanager
def _kept(errors: list[Exception]) -> Iterator[None]:
    """One kill that finds something does not end the run."""
    try:
        yield
    except Exception as error:
        errors.append(error)


def steps_of(ground: Ground, operation: Operation, rng: random.Random) -> Iterator[int]:
    """The numbers of the steps to die at: in a full run all that decide and some others, else some that are drawn."""
    if not FULL:
        for _ in range(SHARE - SHARE // 2):
            yield rng.randint(1, ground.size_of(operation)[0])
        return
    first: dict[str, int] = {}
    for number, name in enumerate(ground.measured[operation.name].steps, 1):
        first.setdefault(name, number)
    deciding = [number for name, number in first.items() if is_of_journal(name)]
    others = [number for number in first.values() if number not in deciding]
    if operation.boots:
        yield from sorted(rng.sample(deciding, min(_MOST_OF_BOOTS, len(deciding))))
    else:
        yield from sorted([*deciding, *rng.sample(others, len(others) // 4)])
