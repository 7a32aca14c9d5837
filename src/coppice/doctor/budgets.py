"""Check of the budgets: whether they are valid, and how much is left."""

from __future__ import annotations

import contextlib
import os
import sqlite3
from pathlib import Path

from coppice.errors import UsageError
from coppice.model import GIB, Budgets, BudgetUse, Check
from coppice.state.budgets import load_budgets, use_of
from coppice.state.layout import Layout
from coppice.state.load import Load, read_load

_NAME = "budgets"
_NEARLY = 0.9


def budgets(home: Path, where: Path) -> Check:
    """Check the use of the budgets. The data directory is only read.

    :param where: the data directory, or its nearest existing parent
    """
    try:
        found = load_budgets(home, where)
    except UsageError as error:
        return Check(name=_NAME, status="fail", detail=error.message, cure=error.hint or "")
    return judge_budgets(_use(home, where, found))


def _use(home: Path, where: Path, found: Budgets) -> BudgetUse:
    load = Load()
    database = f"{Layout(home.absolute()).database.as_uri()}?mode=ro"
    with (
        contextlib.suppress(sqlite3.Error),  # no database exists yet
        contextlib.closing(sqlite3.connect(database, uri=True, timeout=1.0)) as connection,
    ):
        load = read_load(connection)
    disk = os.statvfs(where)
    return use_of(found, load, disk.f_bavail * disk.f_frsize)


def judge_budgets(use: BudgetUse) -> Check:
    """Warn if more than nine tenths of a budget are in use: the next fan-out may be refused."""
    detail = (
        f"{use.instances} of {use.max_instances} instances; {use.running} running, {use.memory_bytes / GIB:.1f} of "
        f"{use.memory_limit_bytes / GIB:.1f} GiB of memory at {use.memory_overcommit:g} times over-commit; "
        f"{use.disk_free_bytes / GIB:.1f} GiB of disk free, {use.disk_floor_bytes / GIB:.1f} GiB kept"
    )
    spent = [
        name
        for name, used, limit in (
            ("max_instances", use.instances, use.max_instances),
            ("memory", use.memory_bytes, use.memory_limit_bytes),
        )
        if used > _NEARLY * limit
    ]
    if use.disk_free_bytes <= use.disk_floor_bytes:
        spent.append("disk_floor")
    if not spent:
        return Check(name=_NAME, status="ok", detail=detail)
    cure = f"remove instances, run `coppice gc --caches`, or change {', '.join(spent)} in config.toml of the data directory"
    return Check(name=_NAME, status="warn", detail=detail, cure=cure)
