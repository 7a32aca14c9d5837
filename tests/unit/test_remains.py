"""What a failed test leaves behind is ended, and nothing else is."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

from coppice.vmm.process import start_ticks
from remains import end, in_network, machines_ended, working_below


def test_machines_of_a_failed_test_are_ended(tmp_path: Path) -> None:
    """Those of its data directory only."""
    homes = [tmp_path / name for name in ("mine", "other")]
    left = []
    for home in homes:
        (home / "instances" / "vm").mkdir(parents=True)
        left.append(subprocess.Popen(["sleep", "1000"], cwd=home / "instances" / "vm"))
    mine, other = left
    try:
        with pytest.raises(RuntimeError), machines_ended(homes[0]):
            raise RuntimeError
        assert mine.wait(10) < 0
        assert other.poll() is None
        assert working_below(homes[0]) == {}
        assert working_below(homes[1]) == {"instances": {other.pid}}
    finally:
        for each in left:
            each.kill()
            each.wait()


def test_processes_are_found_by_their_network() -> None:
    """This one is in its own. One that has ended already is no error."""
    assert os.getpid() in in_network(Path("/proc/self/ns/net"))
    child = subprocess.Popen([sys.executable, "-c", ""])
    child.wait()
    assert start_ticks(child.pid) is None
    end([child.pid])
