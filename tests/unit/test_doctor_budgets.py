"""The doctor's line of budgets: it reads, never makes, and warns before a fan-out is refused."""

from __future__ import annotations

from pathlib import Path

import msgspec
import pytest

from coppice.doctor import budgets
from coppice.model import GIB, MIB, BudgetUse
from coppice.store.store import Store
from fakes.records import make_instance

USE = BudgetUse(
    instances=5,
    max_instances=100,
    running=3,
    memory_bytes=192 * MIB,
    memory_limit_bytes=4 * GIB,
    memory_overcommit=16.0,
    disk_free_bytes=20 * GIB,
    disk_floor_bytes=GIB,
)


@pytest.mark.parametrize(
    ("changes", "status", "named"),
    [
        ({}, "ok", ""),
        ({"instances": 91}, "warn", "max_instances"),
        ({"memory_bytes": 4 * GIB}, "warn", "memory"),
        ({"disk_free_bytes": GIB}, "warn", "disk_floor"),
    ],
)
def test_a_budget_that_is_nearly_spent_is_a_warning(changes: dict[str, int], status: str, named: str) -> None:
    """With the name of the budget, and what to do."""
    check = budgets.judge_budgets(msgspec.structs.replace(USE, **changes))
    assert check.status == status
    assert named in check.cure
    assert "5 of 100" in budgets.judge_budgets(USE).detail


def test_a_data_directory_that_is_not_there_is_not_made(tmp_path: Path) -> None:
    """The first look at a new machine changes nothing."""
    check = budgets.budgets(tmp_path / "home", tmp_path)
    assert check.detail.startswith("0 of ")
    assert list(tmp_path.iterdir()) == []


def test_what_is_recorded_is_counted(tmp_path: Path) -> None:
    """The numbers are those of the database."""
    store = Store(tmp_path / "coppice.db", (1, 1))
    store.create([make_instance("a"), make_instance("b")], "run")
    assert budgets.budgets(tmp_path, tmp_path).detail.startswith("2 of ")
    store.close()


def test_a_config_that_cannot_be_understood_is_a_failure(tmp_path: Path) -> None:
    """It would keep every command from opening the data directory: the doctor says so, and what to correct."""
    (tmp_path / "config.toml").write_text("[budgets]\nmemory = 'much'\n")
    check = budgets.budgets(tmp_path, tmp_path)
    assert check.status == "fail"
    assert "memory" in check.detail
    assert check.cure
