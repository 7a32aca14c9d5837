"""Processes whose random generators the forks share: found before the capture, recorded with it, and
named by every report.
"""

from __future__ import annotations

from pathlib import Path

from coppice.agent.control import MAX_PROCESSES
from coppice.client import AsyncHost
from coppice.model import SnapshotKind, State
from coppice.requests import (
    ForkRequest,
    PromoteRequest,
    SnapshotForkRequest,
    SnapshotRequest,
    StandbyRequest,
)
from fakes.driver import FakeDriver
from fakes.hosting import ask, boot
from fakes.hosting import make as make_instance

NODE = "node (pid 212): openssl"


async def running(host: AsyncHost) -> None:
    """Boot a machine whose guest reports one process."""
    await boot(host, "oak")
    await ask(host, "oak", "remember", "shared-random", NODE)


async def test_promote_and_fork_name_the_processes(fake_host: AsyncHost) -> None:
    """The capture has them, so the template, its forks' report and their own captures do."""
    await running(fake_host)
    captured = (await fake_host.call(StandbyRequest(instance="oak"))).instance
    assert captured.shared_random == (NODE,)
    assert (await fake_host.call(PromoteRequest(instance="oak"))).shared_random == (NODE,)
    report = await fake_host.call(ForkRequest(instance="oak", count=2, atomic=True))
    assert report.shared_random == (NODE,)
    (elm,) = (await fake_host.call(ForkRequest(instance="oak", target=State.STANDBY, names=["elm"]))).instances
    assert elm.shared_random == (NODE,)
    assert (await fake_host.call(ForkRequest(instance="oak", target=State.STOPPED))).shared_random == ()


async def test_a_running_source_and_a_snapshot_name_them(fake_host: AsyncHost) -> None:
    """Captures of a running machine have them, too."""
    await running(fake_host)
    report = await fake_host.call(ForkRequest(instance="oak", from_running=True))
    assert report.shared_random == (NODE,)
    await fake_host.call(SnapshotRequest(instance="oak", name="warm", kind=SnapshotKind.STANDBY))
    assert (await fake_host.call(SnapshotForkRequest(snapshot="warm"))).shared_random == (NODE,)


async def test_a_guest_that_does_not_report_is_captured(fake_host: AsyncHost, driver: FakeDriver) -> None:
    """An older agent, or one that fails, must not prevent a capture."""
    await running(fake_host)
    driver.faults.fail_at("shared_random")
    captured = (await fake_host.call(StandbyRequest(instance="oak"))).instance
    assert (captured.state, captured.shared_random) == (State.STANDBY, ())


async def test_a_guest_cannot_fill_the_records(fake_host: AsyncHost) -> None:
    """A hostile guest's report is cut to a bounded size."""
    await boot(fake_host, "oak")
    await ask(fake_host, "oak", "remember", "shared-random", "|".join("x" * 200))
    captured = (await fake_host.call(StandbyRequest(instance="oak"))).instance
    assert captured.shared_random == ("x",) * MAX_PROCESSES


async def test_a_machine_without_such_processes_reports_none(fake_host: AsyncHost, fake_home: Path) -> None:
    """Nothing is reported for nothing."""
    template = await make_instance(fake_host, State.TEMPLATE)
    assert template.shared_random == ()
    assert (await fake_host.call(ForkRequest(instance="oak"))).shared_random == ()
