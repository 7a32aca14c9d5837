"""Checks of captures: whether this host can load them, and will after the next update."""

from __future__ import annotations

import asyncio
import contextlib
import re
import shutil
import sqlite3
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import NamedTuple

import msgspec

from coppice.completion import in_thread
from coppice.errors import HostCannot
from coppice.linux.tool import run_tool
from coppice.machine.loadable import manifest_of, unloadable
from coppice.model import Check, Instance, Snapshot
from coppice.state.layout import Layout
from coppice.vmm.registry import Drivers

_DEADLINE_S = 10.0
_NAMES_SHOWN = 5
_ENVIRONMENT = {"PATH": "/usr/sbin:/usr/bin:/sbin:/bin", "LC_ALL": "C"}


class Update(NamedTuple):
    """The package manager's versions of the VMM's package."""

    package: str
    installed: str
    candidate: str
    held: bool


async def loadable(home: Path, drivers: Drivers) -> Check:
    """Check whether the installed VMM can load all captures of a data directory."""
    holders = await asyncio.to_thread(_holders, home)
    reasons = await unloadable(drivers, holders)
    named = {holder.name: reasons[holder.id] for holder in holders if holder.id in reasons}
    return judge_loadable(sum(manifest_of(holder) is not None for holder in holders), named)


def judge_loadable(count: int, reasons: Mapping[str, str]) -> Check:
    """Judge `count` captures. `reasons` has those that cannot be loaded, by their holder's name."""
    if not reasons:
        return Check(
            name="captures", status="ok", detail=f"{count}, all of which can be loaded here" if count else "none yet"
        )
    names = ", ".join(list(reasons)[:_NAMES_SHOWN]) + (" and others" if len(reasons) > _NAMES_SHOWN else "")
    return Check(
        name="captures",
        status="warn",
        detail=f"{len(reasons)} of {count} cannot be loaded here: {names} ({next(iter(reasons.values()))})",
        cure="reinstall the version that made them, or keep their disks: coppice fork NAME --target stopped",
    )


async def update(home: Path, program: Callable[[], str]) -> Check:
    """Check whether apt is about to replace a VMM with captures. Needs no root and no network."""
    count = sum(manifest_of(holder) is not None for holder in await asyncio.to_thread(_holders, home))
    return judge_update(count, await _pending(program()) if count else None)


def judge_update(count: int, found: Update | None) -> Check:
    """Judge the package that `count` captures depend on; None if dpkg knows no such package."""
    name = "VMM updates"
    if found is None:
        detail = "no capture depends on the VMM" if not count else "no package manager here knows the VMM's package"
        return Check(name=name, status="ok", detail=detail)
    if found.held:
        return Check(name=name, status="ok", detail=f"{found.package} {found.installed} is held")
    if found.candidate in ("", found.installed):
        return Check(name=name, status="ok", detail=f"{found.package} {found.installed} is the latest that apt knows")
    return Check(
        name=name,
        status="warn",
        detail=f"apt is about to replace {found.package} {found.installed} by {found.candidate}, "
        f"which cannot load the {count} captures",
        cure=f"apt-mark hold {found.package}",
    )


def _holders(home: Path) -> list[Instance | Snapshot]:
    """Return all records that may hold a capture. The data directory is only read."""
    path = Layout(home.absolute()).database
    if not path.exists():
        return []
    with contextlib.closing(sqlite3.connect(f"{path.as_uri()}?mode=ro", uri=True, timeout=1.0)) as connection:
        instances = connection.execute("SELECT record FROM instances").fetchall()
        snapshots = connection.execute("SELECT record FROM snapshots").fetchall()
    return [
        *(msgspec.json.decode(record, type=Instance) for (record,) in instances),
        *(msgspec.json.decode(record, type=Snapshot) for (record,) in snapshots),
    ]


async def _pending(program: str) -> Update | None:
    path = shutil.which(program)
    if path is None:
        return None
    resolved = str(Path(path).resolve())
    # Packages may list a file of /usr/bin as /bin.
    for known_as in dict.fromkeys((resolved, path, resolved.removeprefix("/usr"))):
        if owner := await _said("dpkg-query", "-S", known_as):
            break
    else:
        return None
    package = owner.partition(":")[0]
    policy = await _said("apt-cache", "policy", package)
    held = package in (await _said("apt-mark", "showhold", package)).split()
    return parse_policy(package, policy, held=held)


def parse_policy(package: str, policy: str, *, held: bool) -> Update | None:
    """Read what `apt-cache policy` prints in the C locale."""
    versions = dict(re.findall(r"^  (Installed|Candidate): (\S+)$", policy, re.MULTILINE))
    if "Installed" not in versions:
        return None
    return Update(package, versions["Installed"], versions.get("Candidate", ""), held)


async def _said(program: str, *arguments: str) -> str:
    """Return the output of a program; empty if it is missing or fails."""
    try:
        ran = await in_thread(
            run_tool, program, *arguments, environment=_ENVIRONMENT, deadline_s=_DEADLINE_S, cure="install apt and dpkg"
        )
    except HostCannot:
        return ""
    return "\n".join(ran.lines) if ran.status == 0 else ""
