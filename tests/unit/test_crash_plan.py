"""The plan of a full crash run: which steps of which operations are killed, and what the page says about it."""

from __future__ import annotations

import random
from pathlib import Path
from types import SimpleNamespace
from typing import Any, cast

import pytest

from bench_samples import HOST
from crash import plan
from crash.operation import Operation
from crash.operations import OPERATIONS
from crash.report import Runs, write
from crash.steps import Measured

_STEPS = ["committed begin", "os.link memory", "ptrace 0x5", "os.link root.img", "ptrace 0x5", "os.link memory"]
_LAYERED, _OTHER = OPERATIONS["fork-from-running-on-layers"], OPERATIONS["promote"]


@pytest.fixture(autouse=True)
def full_run(monkeypatch: pytest.MonkeyPatch) -> None:
    """Plan as `make crash` does."""
    monkeypatch.setattr(plan, "FULL", True)
    monkeypatch.setattr(plan, "KILLS", 200)


def steps_of(
    operation: Operation, *, steps: list[str] = _STEPS, quick: bool = True, sampled: bool = False
) -> list[int]:
    measured = {operation.name: Measured(steps=steps, wall_s=0.1)}
    ground = SimpleNamespace(measured=measured, sampled=sampled, kind=SimpleNamespace(quick=quick))
    return list(plan.planned_steps(cast(Any, ground), operation, random.Random(1), 1))


def test_an_operation_on_layers_of_a_fake_is_killed_at_every_step() -> None:
    """Also at later ones with the same name, unless one call takes them many times."""
    assert steps_of(_LAYERED) == [1, 2, 3, 4, 6]
    assert steps_of(_OTHER) == [1, 3]  # of the other two, a quarter is none


def test_an_operation_that_takes_seconds_is_killed_at_a_sample() -> None:
    """On real machines, and in servers."""
    many = [f"committed {number}" for number in range(100)]
    booting = OPERATIONS["standby-to-a-whole-file"]
    assert len(steps_of(_LAYERED, steps=many, quick=False)) == plan.MOST_STEPS
    assert len(steps_of(booting, steps=many, quick=False)) == plan.MOST_BOOT_STEPS
    assert len(steps_of(booting, steps=many, sampled=True)) == plan.MOST_SERVED_STEPS
    assert steps_of(_OTHER, quick=False) == [1, 3]


def test_memory_layers_are_merged_dropped_and_flattened_in_operations_killed_at_every_step() -> None:
    """Each thing that a capture or fork makes of layers has an operation."""
    names = {each.name for each in OPERATIONS.values() if each.of_layers}
    assert names >= {"standby-that-merges-layers", "standby-to-a-whole-file", "fork-that-flattens-layers"}


def test_the_page_names_the_operations_killed_at_every_step(tmp_path: Path) -> None:
    """And no others."""
    page = tmp_path / "page.md"
    write(Runs(seed=1, host=HOST).report(60), tmp_path / "raw.json", page)
    (line,) = [line for line in page.read_text().splitlines() if "`fork-that-flattens-layers`" in line]
    assert "`standby-to-a-whole-file`" in line
    assert "`promote`" not in line
