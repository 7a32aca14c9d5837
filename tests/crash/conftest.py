"""Where host processes are killed: a data directory of its own beside those of the other real machines, with one small warm template.

COPPICE_CRASH_KILLS says how many are killed (default 30; from 200 on it is a full run), COPPICE_CRASH_SEED at which random instants, and
COPPICE_CRASH_REPORT into which files the result goes: `RAW.json:PAGE.md`.
"""

from __future__ import annotations

import contextlib
import os
import shutil
import signal
import tempfile
import time
from collections.abc import AsyncIterator
from pathlib import Path

import pytest

from coppice.bench.accounting import host_facts
from coppice.host import AsyncHost
from coppice.store.layout import Layout
from crash.kills import Ground
from crash.operations import DISK, MEMORY, SEED, STUMP, learn
from crash.report import CrashReport, write
from crash.survey import working_below
from fakes.hosting import assert_tidy, fingerprint, memory_of
from machines import IMAGE, link_caches


@pytest.fixture(scope="session")
async def ground(common_home: Path) -> AsyncIterator[Ground]:
    """The stump, ready to be forked; at the end nothing but it is left, and then nothing."""
    directory = Path(tempfile.mkdtemp(prefix="coppice-crash-", dir=common_home / "workers"))
    layout = Layout(directory / "home")
    layout.create()
    link_caches(common_home, layout.home)
    try:
        async with AsyncHost(layout.home) as host:
            stump = await host.run(IMAGE, ["sleep", "infinity"], name=STUMP, memory_bytes=MEMORY, overlay_bytes=DISK)
            await learn(host, STUMP)
            facts = await host_facts(host)
            await host.standby(stump)
            stump = await host.promote(stump)
            await host.snapshot_create(stump, name=SEED)
            ground = Ground(
                layout.home, fingerprint(memory_of(host, stump)), int(os.environ.get("COPPICE_CRASH_SEED", "1"))
            )
        begin = time.monotonic()
        yield ground
        if names := os.environ.get("COPPICE_CRASH_REPORT"):
            wall_s = time.monotonic() - begin
            report = CrashReport(host=facts, seed=ground.seed, wall_s=wall_s, kills=tuple(ground.kills))
            write(report, *map(Path, names.split(":")))
        async with AsyncHost(layout.home) as host:
            await assert_tidy(host, STUMP)
            await host.snapshot_rm(SEED)
            await host.rm(STUMP)
            await assert_tidy(host)
            assert working_below(layout.instances) == {}
    finally:
        for pids in working_below(layout.instances).values():  # of a run that failed: it leaves nothing all the same
            for pid in pids:
                with contextlib.suppress(ProcessLookupError):
                    os.kill(pid, signal.SIGKILL)
        shutil.rmtree(directory)
