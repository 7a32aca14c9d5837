"""Budgets: their sources, the order of precedence, and errors that name an invalid value."""

from __future__ import annotations

import contextlib
import os
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from coppice.errors import UsageError
from coppice.model import GIB, MIB, Budgets
from coppice.state.budgets import default_budgets, load_budgets, use_of, worst_case
from coppice.state.database import Database
from coppice.state.journal import JournalOperation
from coppice.state.load import Load
from coppice.state.store import Store
from fakes.records import MEMORY_BYTES, make_instance

BUDGETS = Budgets(max_instances=10, memory_bytes=GIB, memory_overcommit=16.0, disk_floor_bytes=GIB)


def test_defaults_fit_the_hosts_size(tmp_path: Path) -> None:
    """The defaults leave some of the host's memory free, set a floor that the disk can meet, and
    allow a fan-out of hundreds of forks on any server.
    """
    found = load_budgets(tmp_path, environ={})
    assert found == default_budgets(tmp_path)
    assert 0 < found.memory_bytes < os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    assert 0 < found.disk_floor_bytes <= GIB
    assert found.max_instances >= 1000
    assert worst_case(found, 100 * 512 * MIB, 100 * 32 * MIB) < 8 * GIB


def test_the_file_wins_over_the_default_and_the_environment_over_the_file(tmp_path: Path) -> None:
    """Each value is chosen independently; an empty variable does not count."""
    (tmp_path / "config.toml").write_text(
        '[budgets]\nmax_instances = 7\nmemory = "2G"\nmemory_overcommit = 4\ndisk_floor = 0\n'
    )
    variables = {"COPPICE_MEMORY_BUDGET": "3G", "COPPICE_MEMORY_OVERCOMMIT": "1.5", "COPPICE_MAX_INSTANCES": ""}
    assert load_budgets(tmp_path, environ=variables) == Budgets(
        max_instances=7, memory_bytes=3 * GIB, memory_overcommit=1.5, disk_floor_bytes=0
    )


@pytest.mark.parametrize(
    ("text", "named"),
    [
        ("budgets", "config.toml"),
        ("budgets = 1\n", "budgets"),
        ("[budget]\n", "budget"),
        ("[budgets]\nmemori = 1\n", "memori"),
        ("[budgets]\nmemory = 'much'\n", "memory"),
        ("[budgets]\nmemory = -1\n", "memory"),
        ("[budgets]\nmax_instances = 0\n", "max_instances"),
        ("[budgets]\nmax_instances = true\n", "max_instances"),
        ("[budgets]\nmemory_overcommit = 0.5\n", "memory_overcommit"),
        ("[budgets]\nmemory_overcommit = inf\n", "memory_overcommit"),
        ("[budgets]\nmemory_overcommit = nan\n", "memory_overcommit"),
        ("[budgets]\ndisk_floor = [1]\n", "disk_floor"),
        ("\x00", "config.toml"),
    ],
)
def test_an_invalid_budget_is_named(tmp_path: Path, text: str, named: str) -> None:
    """A misspelt budget does not silently become the default."""
    (tmp_path / "config.toml").write_text(text)
    with pytest.raises(UsageError, match=named) as refused:
        load_budgets(tmp_path, environ={})
    assert refused.value.hint


@given(st.text(max_size=20))
def test_any_text_in_a_variable_is_a_budget_or_a_usage_error(text: str) -> None:
    """Garbage in the environment raises nothing else, and an accepted value is within bounds."""
    for variable in ("COPPICE_MEMORY_BUDGET", "COPPICE_MAX_INSTANCES", "COPPICE_DISK_FLOOR"):
        with contextlib.suppress(UsageError):
            found = load_budgets(Path("/"), environ={variable: text})
            assert found.max_instances >= 1
            assert min(found.memory_bytes, found.disk_floor_bytes) >= 0


@given(st.integers(0, 1000), st.integers(0, 1 << 50), st.floats(1, 1000))
def test_the_worst_case_never_exceeds_all_ram_and_all_vmms(machines: int, ram_bytes: int, factor: float) -> None:
    """Over-commit can only lower the worst case, and each VMM counts, whatever its guest's size."""
    budgets = Budgets(max_instances=1, memory_bytes=1, memory_overcommit=factor, disk_floor_bytes=0)
    found = worst_case(budgets, ram_bytes, machines * 32 * MIB)
    assert machines * 32 * MIB <= found <= machines * 32 * MIB + ram_bytes


def test_the_load_counts_running_and_starting_instances(tmp_path: Path) -> None:
    """An instance counts from the start of its operation, and a parked one does not count; a check
    inside a transaction sees the same load.
    """
    store = Store(tmp_path / "db", (1, 1))
    stopped, parked = make_instance("stopped"), make_instance("parked")
    store.create([stopped, parked], JournalOperation.RUN)
    for instance in (stopped, parked):
        store.save(instance, done=True)
    assert store.load() == Load(instances=2, running=0)
    seen: list[Load] = []
    store.begin(stopped, JournalOperation.START, lambda: seen.append(store.load()))
    assert seen == [Load(instances=2, running=0)]
    assert store.load() == Load(instances=2, running=1, ram_bytes=MEMORY_BYTES, vmm_bytes=stopped.vmm_bytes)
    store.close()
    Database(tmp_path / "db").close()


def test_use_shows_the_load_and_the_budgets() -> None:
    """The figures shown are the ones that admission uses."""
    use = use_of(BUDGETS, Load(instances=3, running=2, ram_bytes=2 * 512 * MIB, vmm_bytes=2 * 96 * MIB), 5 * GIB)
    assert (use.instances, use.running, use.memory_bytes) == (3, 2, 2 * (32 + 96) * MIB)
    assert (use.max_instances, use.memory_limit_bytes, use.disk_free_bytes) == (10, GIB, 5 * GIB)
