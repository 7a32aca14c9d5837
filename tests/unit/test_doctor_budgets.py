"""The doctor's budget check only reads, and warns before a fan-out is refused."""

from __future__ import annotations

from pathlib import Path

import msgspec
import pytest

from coppice.doctor import budgets
from coppice.model import GIB, MIB, BudgetUse
from coppice.state.journal import JournalOperation
from coppice.state.store import Store
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
    """The warning names the budget and gives a remedy."""
    check = budgets.judge_budgets(msgspec.structs.replace(USE, **changes))
    assert check.status == status
    assert named in check.cure
    assert "5 of 100" in budgets.judge_budgets(USE).detail


def test_a_missing_data_directory_is_not_made(tmp_path: Path) -> None:
    """A look at a new machine changes nothing."""
    check = budgets.budgets(tmp_path / "home", tmp_path)
    assert check.detail.startswith("0 of ")
    assert list(tmp_path.iterdir()) == []


def test_the_database_is_counted(tmp_path: Path) -> None:
    """The numbers are the database's."""
    store = Store(tmp_path / "coppice.db", (1, 1))
    store.create([make_instance("a"), make_instance("b")], JournalOperation.RUN)
    assert budgets.budgets(tmp_path, tmp_path).detail.startswith("2 of ")
    store.close()


def test_an_invalid_config_is_a_failure(tmp_path: Path) -> None:
    """An invalid config keeps every command from opening the data directory, so the doctor reports
    it with a correction.
    """
    (tmp_path / "config.toml").write_text("[budgets]\nmemory = 'much'\n")
    check = budgets.budgets(tmp_path, tmp_path)
    assert check.status == "fail"
    assert "memory" in check.detail
    assert check.cure
