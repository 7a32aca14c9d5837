"""What a failed test leaves behind is ended, and nothing else is."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest

from coppice.vmm.process import start_ticks
from remains import end, in_network, machines_ended, tools_left, working_below


def test_machines_of_a_failed_test_are_ended(tmp_path: Path) -> None:
    """Those of its data directory only."""
    homes = [tmp_path / name for name in ("mine", "other")]
    left = []
    for home in homes:
        (home / "instances" / "vm").mkdir(parents=True)
        left.append(subprocess.Popen(["sleep", "1000"], cwd=home / "instances" / "vm"))
    mine, other = left
    hashing = [subprocess.Popen([sys.executable, "-c", "import time; time.sleep(1000)", str(home)]) for home in homes]
    try:
        with pytest.raises(RuntimeError), machines_ended(homes[0]):
            raise RuntimeError
        assert [each.wait(10) for each in (mine, hashing[0])] == [-signal.SIGKILL] * 2
        assert hashing[1].poll() is None
        assert other.poll() is None
        assert working_below(homes[0]) == {}
        assert working_below(homes[1]) == {"instances": {other.pid}}
    finally:
        for each in (*left, *hashing):
            each.kill()
            each.wait()


def test_processes_are_found_by_their_network() -> None:
    """This one is in its own. One that has ended already is no error."""
    assert os.getpid() in in_network(Path("/proc/self/ns/net"))
    child = subprocess.Popen([sys.executable, "-c", ""])
    child.wait()
    assert start_ticks(child.pid) is None
    end([child.pid])


def test_tools_are_found_by_their_files(tmp_path: Path) -> None:
    """Those with an open file of a data directory, or one in their command; not its machines and hosts."""
    home = tmp_path / "home"
    (home / "instances" / "vm").mkdir(parents=True)
    (home / "overlay.1").touch()
    os.mkfifo(home / "fifo")
    with (home / "overlay.1").open("rb") as file:
        holder = subprocess.Popen(["sleep", "1000"], stdin=file)
        names = subprocess.Popen(["cat", str(home / "fifo")])
        machine = subprocess.Popen(["sleep", "1000"], cwd=home / "instances" / "vm", stdin=file)
        host = subprocess.Popen([sys.executable, "-c", "import time; time.sleep(1000)", str(home / "db")])
    started = [holder, names, machine, host]
    try:
        assert tools_left(home, 0.0).keys() == {holder.pid, names.pid}
        assert tools_left(tmp_path / "other", 0.0) == {}
    finally:
        end(each.pid for each in started)
        for each in started:
            each.wait()
    assert tools_left(home) == {}
