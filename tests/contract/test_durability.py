"""Success means durable: an operation that claims "on disk" has seen its fsync succeed, and no
reader of the database can delay it.
"""

from __future__ import annotations

import os
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack, closing, contextmanager
from pathlib import Path
from typing import IO

import pytest

from coppice.model import State
from coppice.state.store import Store
from durable_process import PREPARED

TESTS = Path(__file__).parent.parent
READER = """
import sqlite3, sys
connection = sqlite3.connect(sys.argv[1], isolation_level=None)
connection.execute("BEGIN")
connection.execute("SELECT count(*) FROM instances").fetchone()
print(flush=True)
sys.stdin.read()
"""
PROMPTLY_S = 10.0  # a checkpoint that waits for a reader gives up after 30 s


@pytest.fixture(scope="session")
def fsync_log(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Compile the library that logs each fsync."""
    library = tmp_path_factory.mktemp("fsync-log") / "fsync_log.so"
    source = TESTS / "fakes" / "fsync_log.c"
    command = ["gcc", "-O1", "-shared", "-fPIC", "-Wall", "-Wextra", "-Werror", "-o", str(library), str(source), "-ldl"]
    subprocess.run(command, check=True, timeout=60)
    return library


class Host:
    """A host process of `durable_process`, prepared for one operation."""

    def __init__(self, process: subprocess.Popen[str], home: Path, log: Path, fails: Path) -> None:
        self.process = process
        self.home = home
        self.fails = fails
        self._log = log

    def act(self) -> str:
        """Make the process do the operation; return the outcome that it prints."""
        _pipe(self.process.stdin).write("\n")
        _pipe(self.process.stdin).flush()
        return _pipe(self.process.stdout).readline().strip()

    def synced(self) -> list[str]:
        """Return the synced paths in order, relative to the data directory; ids are shown as ID."""
        paths = [Path(line) for line in self._log.read_text().splitlines()]
        shown = [path.relative_to(self.home) for path in paths if path.is_relative_to(self.home)]
        return ["/".join("ID" if len(part) == 24 else part for part in path.parts) for path in shown]


def _pipe(stream: IO[str] | None) -> IO[str]:
    assert stream is not None
    return stream


@contextmanager
def host_process(home: Path, vmm: Path, fsync_log: Path, operation: str) -> Iterator[Host]:
    log, fails = home.parent / "fsync.log", home.parent / "fails"
    environment = {
        **os.environ,
        "LD_PRELOAD": str(fsync_log),
        "FSYNC_LOG": str(log),
        "FSYNC_FAILS": str(fails),
        "PYTHONPATH": os.pathsep.join([str(TESTS), *sys.path]),
    }
    arguments = [sys.executable, str(TESTS / "durable_process.py"), str(home), str(vmm), operation]
    with subprocess.Popen(
        arguments, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, env=environment
    ) as process:
        try:
            assert _pipe(process.stdout).readline() == "ready\n"
            yield Host(process, home, log, fails)
        finally:
            process.kill()


@contextmanager
def reader_of(database: Path) -> Iterator[None]:
    """Run another process with an open read transaction, as a backup or an sqlite3 shell has."""
    with subprocess.Popen(
        [sys.executable, "-c", READER, str(database)], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
    ) as process:
        _pipe(process.stdout).readline()
        yield
        _pipe(process.stdin).close()


@pytest.mark.usefixtures("driver")  # ends the VMMs of a killed host
@pytest.mark.parametrize("operation", PREPARED)
def test_success_is_on_disk_while_a_reader_is_active(
    fake_home: Path, personality: str, fake_vmm: Path, fsync_log: Path, operation: str
) -> None:
    """The operation returns promptly, and syncs the log with the record after all files and
    directories.
    """
    with ExitStack() as stack:
        host = stack.enter_context(host_process(fake_home, fake_vmm, fsync_log, operation))
        stack.enter_context(reader_of(fake_home / "coppice.db"))
        begin = time.monotonic()
        assert host.act() == "done"
        assert time.monotonic() - begin < PROMPTLY_S
        synced = host.synced()
        assert synced[-1] == "coppice.db-wal"
        for path in EXPECTED[operation]:
            if personality != "file":  # RAM is in no file until it is saved
                path = path.replace("memory.live", "memory.new")
            assert path in synced[:-1], f"{path} is not in {synced}"
        with closing(Store(fake_home.parent / "copy" / "coppice.db", (1, 1))) as after:
            assert after.journal() == []
            assert RECORDED[operation](after), "the record would not survive a power cut"


EXPECTED: dict[str, set[str]] = {
    "standby": {
        *(f"instances/ID/{name}" for name in ("memory.live", "vmstate.new", "overlay.raw")),
        *("instances/ID", "instances"),
    },
    "promote": set(),
    "demote": set(),
    "snapshot": {
        *(f"snapshots/ID/{name}" for name in ("memory", "vmstate", "overlay.raw")),
        *("snapshots/ID", "snapshots"),
    },
    "snapshot restore": {"instances/ID/restore.new/overlay.raw", "instances/ID/restore.new", "instances/ID"},
    # The linked memory and device state were synced when they were captured.
    "fork to standby": {"instances/ID/overlay.raw", "instances/ID", "instances"},
    "forks to stopped, all or none": {"instances/ID/overlay.raw", "instances/ID", "instances"},
    "volume": {"volumes/ID", "volumes"},  # the disk is synced under a temporary name
}
EXPECTED["snapshot of a running machine"] = EXPECTED["snapshot"]
RECORDED: dict[str, Callable[[Store], bool]] = {
    "standby": lambda store: store.get("oak").state is State.STANDBY,
    "promote": lambda store: store.get("oak").state is State.TEMPLATE,
    "demote": lambda store: store.get("oak").state is State.STANDBY,
    "snapshot": lambda store: store.snapshots.get("moment").size_bytes > 0,
    "snapshot of a running machine": lambda store: store.snapshots.get("moment").size_bytes > 0,
    "snapshot restore": lambda store: store.get("oak").snapshot is not None,
    "fork to standby": lambda store: store.get("ash").state is State.STANDBY,
    "forks to stopped, all or none": lambda store: len(store.children(store.get("oak").id)) == 2,
    "volume": lambda store: store.volumes.get("data").size_bytes == 16 << 20,
}


@pytest.mark.usefixtures("driver")  # ends the VMMs of a killed host
@pytest.mark.parametrize("operation", PREPARED)
def test_a_failed_fsync_is_no_success(fake_home: Path, fake_vmm: Path, fsync_log: Path, operation: str) -> None:
    """An fsync that fails is an error, and the guest of a failed capture runs on."""
    with host_process(fake_home, fake_vmm, fsync_log, operation) as host:
        host.fails.touch()
        failed, error, *state = host.act().split()
        assert failed == "failed"
        assert error in {"HostCannot", "IntegrityError"}
        before = PREPARED[operation]
        assert state == ([] if before is None else [str(before)])
