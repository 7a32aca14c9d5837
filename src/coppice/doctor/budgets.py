"""Check of the budgets: can they be understood, and how much of them is left."""

from __future__ import annotations

import contextlib
import os
import sqlite3
from pathlib import Path

from coppice.errors import UsageError
from coppice.model import GIB, Budgets, BudgetUse, Check
from coppice.store.budgets import load_budgets, use_of
from coppice.store.layout import Layout
from coppice.store.store import LOAD, Load

_NAME = "budgets"
_NEARLY = 0.9


def budgets(home: Path, where: Path) -> Check:
    """What admission would say of the data directory, which is only read. `where` is the nearest directory that exists."""
    try:
        found = load_budgets(home, where)
    except UsageError as error:
        return Check(name=_NAME, status="fail", detail=error.message, cure=error.hint or "")
    return judge_budgets(_use(home, where, found))


def _use(home: Path, where: Path, found: Budgets) -> BudgetUse:
    load = Load(instances=0, running=0, ram_bytes=0)
    database = f"{Layout(home.absolute()).database.as_uri()}?mode=ro"
    with (
        contextlib.suppress(sqlite3.Error),  # there is none yet
        contextlib.closing(sqlite3.connect(database, uri=True, timeout=1.0)) as connection,
    ):
        instances, running, ram_bytes = connection.execute(LOAD).fetchone()
        load = Load(instances=instances, running=running, ram_bytes=ram_bytes)
    disk = os.statvfs(where)
    return use_of(found, load, disk.f_bavail * disk.f_frsize)


def judge_budgets(use: BudgetUse) -> Check:
    """A budget of which nine tenths are in use is worth a warning: the next fan-out may be refused."""
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
