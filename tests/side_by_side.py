"""The order and the concurrency of tests: `pytest -n` gives each worker process some of them.

Long tests begin first, so that the end of the run does not wait for them. A test marked `quiet`
measures time against a limit: it runs last, and alone on the machine. Without workers the order is
the same, and the locks never wait.
"""

from __future__ import annotations

import fcntl
import os
from collections.abc import Generator
from pathlib import Path

import pytest
from xdist.remote import Producer
from xdist.scheduler import LoadScopeScheduling

# The tests that kill hosts have their own template, so they go to one worker; it makes the image
# first, while the others begin with tests that need none. The tests of the wheel go to one worker,
# which builds it once. Tests of seconds come next and tests of milliseconds last, so that all
# workers finish at about the same time.
ORDER = ("crash", "contract", "api", "page", "vm", "firecracker", "network", "package", "benchmarks", "unit")
GROUPS = ("tests/crash/", "tests/package/")

# Two locks on existing paths. A test takes the turn lock before it waits for the machine lock, so
# tests that share the machine cannot starve one that needs it alone.
_TURN = os.open(__file__, os.O_RDONLY)
_MACHINE = os.open(Path(__file__).parent, os.O_RDONLY)


class Scheduling(LoadScopeScheduling):  # type: ignore[misc] # xdist has no types
    """Give each test to the next free worker, in the order of the collection; the tests of one of
    `GROUPS` go to the same worker.
    """

    def _split_scope(self, nodeid: str) -> str:
        return next((group for group in GROUPS if nodeid.startswith(group)), nodeid)


def pytest_xdist_make_scheduler(config: pytest.Config, log: Producer) -> Scheduling:
    """Use this scheduler, whatever --dist says."""
    config.option.loadscopereorder = False
    return Scheduling(config, log)


@pytest.hookimpl(tryfirst=True)
def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Sort long tests first within a folder, and quiet tests last of all."""
    items.sort(key=_rank)


def _rank(item: pytest.Item) -> tuple[bool, int, float]:
    deadline = item.get_closest_marker("timeout")
    return _is_quiet(item), ORDER.index(item.path.parent.name), -deadline.args[0] if deadline else 0.0


@pytest.hookimpl(wrapper=True, tryfirst=True)
def pytest_runtest_protocol(item: pytest.Item) -> Generator[None, object, object]:
    """Hold the machine, alone or shared, from the first fixture to the last. The test's deadline
    starts then: the wait is not part of the test's time.
    """
    fcntl.flock(_TURN, fcntl.LOCK_EX)
    fcntl.flock(_MACHINE, fcntl.LOCK_EX if _is_quiet(item) else fcntl.LOCK_SH)
    fcntl.flock(_TURN, fcntl.LOCK_UN)
    try:
        return (yield)
    finally:
        fcntl.flock(_MACHINE, fcntl.LOCK_UN)


def _is_quiet(item: pytest.Item) -> bool:
    return item.get_closest_marker("quiet") is not None
