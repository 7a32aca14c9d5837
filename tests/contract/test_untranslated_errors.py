"""An untranslated OS error names the failed operation and the path, and claims no cause that it
does not have.
"""

from __future__ import annotations

import errno
import os
from pathlib import Path
from typing import Any

import pytest

from coppice.client import AsyncHost
from coppice.errors import CoppiceError, HostCannot, IntegrityError, NoSpace
from coppice.machine import capture
from coppice.machine import directory as directories
from coppice.model import State
from coppice.requests import ForkRequest, StandbyRequest
from coppice.vmm import driver as files
from fakes.driver import FakeDriver
from fakes.hosting import ask, assert_tidy, boot, make

LIMIT = OSError(errno.EMFILE, os.strerror(errno.EMFILE))
RESET = ConnectionResetError(errno.ECONNRESET, os.strerror(errno.ECONNRESET))
AWAY = FileNotFoundError(errno.ENOENT, os.strerror(errno.ENOENT), "/run/somewhere.sock")


@pytest.mark.parametrize(
    ("error", "says"), [(LIMIT, "Too many open"), (RESET, "reset by peer"), (AWAY, "/run/somewhere.sock")]
)
async def test_an_unexpected_os_error_claims_no_cause(
    fake_host: AsyncHost, driver: FakeDriver, error: OSError, says: str
) -> None:
    """A socket error is not called a disk error, or a missing file damaged data."""
    await boot(fake_host)
    driver.faults.fail_at("pause", error=lambda: error)
    with pytest.raises(HostCannot, match=says) as failed:
        await fake_host.call(StandbyRequest(instance="oak"))
    assert "standby oak" in failed.value.message
    assert "disk" not in (failed.value.hint or "")
    await assert_tidy(fake_host, "oak")
    assert await ask(fake_host, "oak", "hostname") == "oak"


@pytest.mark.parametrize("error", [LIMIT, AWAY])
async def test_an_unexpected_os_error_of_one_child_spares_its_siblings(
    fake_host: AsyncHost, driver: FakeDriver, error: OSError
) -> None:
    """The error belongs to that child and names it; the source's data is not blamed."""
    await make(fake_host, State.TEMPLATE)
    driver.faults.fail_at("restore", error=lambda: error)
    report = await fake_host.call(ForkRequest(instance="oak", names=["elm", "ash"], count=2))
    assert report.succeeded == 1
    (failed,) = [result for result in report.results if not result.ok]
    assert failed.error_code == HostCannot.code
    assert failed.name in (failed.error or "")


async def test_a_host_limit_is_not_reported_as_a_silent_guest(fake_host: AsyncHost, driver: FakeDriver) -> None:
    """If this host cannot connect, the error must not say that the guest is silent."""
    await boot(fake_host)
    driver.faults.fail_at("dial", error=lambda: LIMIT)
    with pytest.raises(HostCannot, match="Cannot connect to agent port 1: Too many open files"):
        await ask(fake_host, "oak", "hostname")
    assert await ask(fake_host, "oak", "hostname") == "oak"


def test_errors_of_file_operations_name_the_operation_and_the_path(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The message has the operation and the path of the file."""
    taken = tmp_path / "taken"
    taken.mkdir()
    with pytest.raises(CoppiceError, match=f"make a directory: File exists: {taken}"):
        directories.create(taken)
    with pytest.raises(
        IntegrityError, match=f"look at a disk: No such file or directory: {tmp_path}/{files.OVERLAY_DISK}"
    ):
        directories.disk_stamp(tmp_path, {})
    (tmp_path / files.VMSTATE_NEW).mkdir()
    with pytest.raises(
        HostCannot, match=f"remove an unfinished capture: Is a directory: {tmp_path}/{files.VMSTATE_NEW}"
    ):
        capture.clear_new(tmp_path)

    def full(path: Path, *_: Any, **__: Any) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), str(path))

    monkeypatch.setattr(Path, "mkdir", full)
    with pytest.raises(NoSpace, match=f"{tmp_path}/new"):
        directories.create(tmp_path / "new")
