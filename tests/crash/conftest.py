"""Data directories in which host processes are killed, and the report of the run.

COPPICE_CRASH_KILLS is the approximate number of kills over each kind of machines (default 30; from
200 on it is a full run), COPPICE_CRASH_SEED chooses the random instants, and COPPICE_CRASH_REPORT
names the files of the report: `RAW.json:PAGE.md`.
"""

from __future__ import annotations

import contextlib
import os
import shutil
import tempfile
import time
from collections.abc import AsyncIterator, Iterator
from pathlib import Path

import pytest

from bench.accounting import host_facts
from coppice.state.layout import Layout
from crash.fake_kind import FakeKind
from crash.kills import HostGround, HostProcesses
from crash.kinds import RealKind
from crash.plan import SEED
from crash.report import Runs, write
from crash.served import ServedGround, ServerProcesses
from fakes.driver import FakeDriver
from fakes.keeping import keeping
from fakes.rooms import plant
from machines import link_caches
from remains import machines_ended


@pytest.fixture(scope="session")
def runs() -> Iterator[Runs]:
    """The kills of this session, which are written at its end if a report is wanted."""
    begin = time.monotonic()
    runs = Runs(seed=SEED)
    yield runs
    if runs.host and (names := os.environ.get("COPPICE_CRASH_REPORT")):
        write(runs.report(time.monotonic() - begin), *map(Path, names.split(":")))


@pytest.fixture(scope="session")
async def real_ground(common_home: Path, runs: Runs) -> AsyncIterator[HostGround]:
    """A data directory with real machines. Processes that a failed run leaves are ended."""
    directory = Path(tempfile.mkdtemp(prefix="coppice-crash-", dir=common_home / "workers"))
    layout = Layout(directory / "home")
    layout.create()
    link_caches(common_home, layout.home)
    kind = RealKind()
    try:
        with machines_ended(layout.home):
            async with HostGround.at(layout.home, kind, runs.kills, HostProcesses) as ground:
                async with kind.host(layout.home) as host:
                    runs.host = await host_facts(host)
                yield ground
    finally:
        shutil.rmtree(directory)


@pytest.fixture(scope="session")
async def fake_ground(fake_vmm: Path, seed_home: Path, personality: str, runs: Runs) -> AsyncIterator[HostGround]:
    """A data directory with fake machines of one personality, whose guests live in this process."""
    async with (
        _fakes(fake_vmm, seed_home, personality) as (home, kind),
        HostGround.at(home, kind, runs.kills, HostProcesses) as ground,
    ):
        yield ground


@pytest.fixture(scope="session")
async def served_ground(fake_vmm: Path, seed_home: Path, personality: str, runs: Runs) -> AsyncIterator[ServedGround]:
    """The same, whose operations a server carries out."""
    async with (
        _fakes(fake_vmm, seed_home, personality) as (home, kind),
        ServedGround.at(home, kind, runs.kills, ServerProcesses) as ground,
    ):
        yield ground


@contextlib.asynccontextmanager
async def _fakes(fake_vmm: Path, seed_home: Path, personality: str) -> AsyncIterator[tuple[Path, FakeKind]]:
    home = Path(tempfile.mkdtemp(prefix="crash-", dir=seed_home.parent)) / "home"
    plant(seed_home, home)
    driver = FakeDriver(fake_vmm, personality)
    with pytest.MonkeyPatch.context() as patch, keeping(driver) as channel:
        patch.setenv("COPPICE_HASHING", "off")
        try:
            yield home, FakeKind(fake_vmm, driver, channel)
        finally:
            await driver.end(home / "instances")
            shutil.rmtree(home.parent)
