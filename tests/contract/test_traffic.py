"""The traffic in `stats`: counted by the host where it can, by the guest where nothing else counts, or unknown."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest

from coppice.client import AsyncHost
from coppice.errors import GuestTimeout, HostCannot
from coppice.model import Instance, State, Traffic
from coppice.requests import AutoStandbyRequest, StandbyRequest, StatsRequest
from fakes.cards import cards, table
from fakes.driver import FakeDriver
from fakes.hosting import boot
from fakes.network import SlotNetwork


@pytest.fixture
def card(tmp_path: Path) -> Iterator[Path]:
    """A card in every guest. Return the file of its counters."""
    with cards(tmp_path) as counters:
        yield counters


async def traffic_of(host: AsyncHost, instance: str | None = "oak") -> Traffic | None:
    """Return the traffic of oak, asked for alone or with all machines."""
    return (await host.call(StatsRequest(instance=instance)))["oak"].traffic


async def test_the_host_counts_where_it_can(
    fake_host: AsyncHost, driver: FakeDriver, card: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Then no guest is asked, and the counts of all machines are in one answer."""

    async def count(_: SlotNetwork, instance: Instance) -> Traffic:
        return Traffic(received_bytes=len(instance.name), sent_bytes=8, counted_by="host")

    monkeypatch.setattr(SlotNetwork, "traffic", count)
    await boot(fake_host)
    for asked in ("oak", None):
        assert await traffic_of(fake_host, asked) == Traffic(received_bytes=3, sent_bytes=8, counted_by="host")


async def test_a_machine_without_a_network_has_no_traffic(fake_host: AsyncHost) -> None:
    """That is a count too."""
    await boot(fake_host, network="none")
    assert await traffic_of(fake_host) == Traffic(received_bytes=0, sent_bytes=0, counted_by="host")


async def test_the_guest_counts_where_nothing_else_does(fake_host: AsyncHost, card: Path) -> None:
    """Its card counts, and not its bridges. A list asks no guest."""
    await boot(fake_host)
    assert await traffic_of(fake_host) == Traffic(received_bytes=1200, sent_bytes=340, counted_by="guest")
    assert await traffic_of(fake_host, None) is None


@pytest.mark.parametrize(
    "counters",
    [
        "",
        table(lo=(5, 5)),
        table(ens3=(-1, 5)),
        table(ens3=(1 << 64, 5)),
        table(ens3=("9" * 5000, 5)),
        table(ens3=("\u0663", 5)),
        "  ens3: 1 2 3\n",
        "x" * (2 << 20),
    ],
)
async def test_a_hostile_guest_makes_its_traffic_unknown(fake_host: AsyncHost, card: Path, counters: str) -> None:
    """No error, and no false number."""
    await boot(fake_host)
    card.write_text(counters)
    assert await traffic_of(fake_host) is None


@pytest.mark.parametrize("error", [GuestTimeout("silent"), HostCannot("no counters")])
async def test_unreadable_counters_make_the_traffic_unknown(
    fake_host: AsyncHost, card: Path, monkeypatch: pytest.MonkeyPatch, error: Exception
) -> None:
    """The memory is reported all the same."""

    async def fail(*_: object) -> Traffic:
        raise error

    monkeypatch.setattr(SlotNetwork, "traffic", fail)
    await boot(fake_host)
    assert await traffic_of(fake_host) is None


async def test_a_guest_without_a_card_has_unknown_traffic(fake_host: AsyncHost, card: Path) -> None:
    """Its loopback and its bridges are no card."""
    await boot(fake_host)
    (card.parent / "links/ens3").unlink()
    assert await traffic_of(fake_host) is None


async def test_a_machine_at_rest_has_no_traffic(fake_host: AsyncHost, card: Path) -> None:
    """Only Running machines have counters."""
    await boot(fake_host)
    captured = (await fake_host.call(StandbyRequest(instance="oak"))).instance
    assert captured.state is State.STANDBY
    assert await traffic_of(fake_host) is None


async def test_a_question_for_the_traffic_is_no_use_of_a_machine(fake_host: AsyncHost, card: Path) -> None:
    """Who watches a machine does not keep it from an automatic standby."""
    await boot(fake_host, auto_standby_s=60)
    before = await fake_host.call(AutoStandbyRequest(instance="oak"))
    assert await traffic_of(fake_host) is not None
    after = await fake_host.call(AutoStandbyRequest(instance="oak"))
    assert (after.idle_since, after.in_use) == (before.idle_since, False)
