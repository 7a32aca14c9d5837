"""Tests side by side: `pytest -n` gives each worker process some of them.

What takes long begins first, so that nobody waits for it at the end. A test marked `quiet` measures time against a limit: it comes last, and has the machine
for itself. Where there are no workers the order is the same, and nobody waits for anybody.
"""

from __future__ import annotations

import fcntl
import os
from collections.abc import Generator
from pathlib import Path

import pytest
from xdist.remote import Producer
from xdist.scheduler import LoadScopeScheduling

# Those that kill hosts have a template of their own, and so go to one worker; it makes the image first, and the others begin with what needs none.
# Then come those of seconds, and at the end those of milliseconds, so that all workers are done at about the same time.
ORDER = ("crash", "contract", "vm", "bench", "unit")
GROUP = "tests/crash/"

# Two locks that are there anyway. Who wants one of them waits for its turn at the other first: so those who share cannot keep out the one who is to be alone.
_TURN = os.open(__file__, os.O_RDONLY)
_MACHINE = os.open(Path(__file__).parent, os.O_RDONLY)


class Scheduling(LoadScopeScheduling):  # type: ignore[misc] # xdist has no types
    """Each test goes to the worker that is free, in the order of the collection; those of `GROUP` to the same one."""

    def _split_scope(self, nodeid: str) -> str:
        return GROUP if nodeid.startswith(GROUP) else nodeid


def pytest_xdist_make_scheduler(config: pytest.Config, log: Producer) -> Scheduling:
    """Take it, whatever --dist says."""
    config.option.loadscopereorder = False
    return Scheduling(config, log)


@pytest.hookimpl(tryfirst=True)
def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Within a folder those first that may take long; those that are to be alone last of all."""
    items.sort(key=_rank)


def _rank(item: pytest.Item) -> tuple[bool, int, float]:
    deadline = item.get_closest_marker("timeout")
    return _is_quiet(item), ORDER.index(item.path.parent.name), -deadline.args[0] if deadline else 0.0


@pytest.hookimpl(wrapper=True, tryfirst=True)
def pytest_runtest_protocol(item: pytest.Item) -> Generator[None, object, object]:
    """Hold the machine, alone or with others, from the first fixture to the last. Its deadline begins then: waiting is not the test's own time."""
    fcntl.flock(_TURN, fcntl.LOCK_EX)
    fcntl.flock(_MACHINE, fcntl.LOCK_EX if _is_quiet(item) else fcntl.LOCK_SH)
    fcntl.flock(_TURN, fcntl.LOCK_UN)
    try:
        return (yield)
    finally:
        fcntl.flock(_MACHINE, fcntl.LOCK_UN)


def _is_quiet(item: pytest.Item) -> bool:
    return item.get_closest_marker("quiet") is not None
