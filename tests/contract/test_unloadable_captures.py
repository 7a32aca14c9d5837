"""After an update of the VMM, captures that can no longer be loaded are named before a fork fails,
and the VMM is asked once.
"""

from __future__ import annotations

from pathlib import Path

from coppice.client import AsyncHost
from coppice.doctor import captures
from coppice.model import State
from coppice.requests import ForkRequest, GetRequest, SnapshotRequest, StandbyRequest
from fakes.driver import FakeDriver
from fakes.hosting import boot, make


async def test_captures_of_another_vmm_are_named(fake_host: AsyncHost, driver: FakeDriver) -> None:
    """Templates, standbys and snapshots are named with the reason that a fork would give.

    Running machines are not.
    """
    template = await make(fake_host, State.TEMPLATE)
    kept = await fake_host.call(SnapshotRequest(instance="oak"))
    report = await fake_host.call(ForkRequest(instance="oak", count=2, names=["elm", "ash"]))
    assert report.succeeded == 2
    running = await fake_host.call(GetRequest(instance="elm"))
    standby = (await fake_host.call(StandbyRequest(instance="ash"))).instance
    holders = [template.id, kept.id, running.id, standby.id]
    assert await fake_host.unloadable(holders) == {}
    driver.vmm_version = "2"
    reasons = await fake_host.unloadable(holders)
    assert set(reasons) == {template.id, kept.id, standby.id}
    assert set(reasons.values()) == {"vmm version was 1, is 2"}
    (result,) = (await fake_host.call(ForkRequest(instance="oak", names=["yew"]))).results
    assert reasons[template.id] in (result.error or "")


async def test_the_vmm_is_asked_once_for_all_captures(fake_host: AsyncHost, driver: FakeDriver) -> None:
    """A list of many captures asks the VMM once, and a list without captures does not ask it."""
    asked: list[str] = []
    manifest = driver.manifest

    async def counted(machine: object) -> object:
        asked.append("manifest")
        return await manifest(machine)  # type: ignore[arg-type]  # passes its argument on

    template = await make(fake_host, State.TEMPLATE)
    driver.manifest = counted  # type: ignore[method-assign, assignment]  # counts the calls
    await fake_host.unloadable([template.id] * 5)
    assert asked == ["manifest"]
    running = await boot(fake_host, "elm")
    asked.clear()
    assert await fake_host.unloadable([running.id]) == {}
    assert asked == []


async def test_a_missing_vmm_is_the_reason(fake_host: AsyncHost, driver: FakeDriver) -> None:
    """The list works even if the VMM was removed."""
    template = await make(fake_host, State.TEMPLATE)
    driver.faults.fail_at("manifest")
    assert list(await fake_host.unloadable([template.id])) == [template.id]


async def test_the_doctor_names_unloadable_captures(fake_host: AsyncHost, driver: FakeDriver, tmp_path: Path) -> None:
    """It reads the data directory without opening it."""
    assert (await captures.loadable(tmp_path / "none", fake_host.local.rooms.drivers)).status == "ok"
    await make(fake_host, State.TEMPLATE)
    check = await captures.loadable(fake_host.home, fake_host.local.rooms.drivers)
    assert (check.status, check.detail) == ("ok", "1, all of which can be loaded here")
    driver.vmm_version = "2"
    check = await captures.loadable(fake_host.home, fake_host.local.rooms.drivers)
    assert check.status == "warn"
    assert "oak" in check.detail
    assert "vmm version was 1, is 2" in check.detail
    assert "coppice fork NAME --target stopped" in (check.cure or "")
