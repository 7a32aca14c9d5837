"""The commands of automatic standbys and of snapshot schedules: their requests, and their output."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest

from cli_host import FakeHost
from cli_lines import document, output_of, run
from coppice.errors import InStandby, NotFound
from coppice.model.automation import AutoStandbyStatus, SnapshotSchedule
from coppice.state import locks
from coppice.state.layout import Layout

AT = 1_700_000_000.0
SCHEDULE = SnapshotSchedule(
    instance="i" * 24,
    interval_s=3600,
    max_count=24,
    max_age_s=86400,
    tags={"team": "a"},
    created_at=AT,
    updated_at=AT,
    next_run_at=AT + 3600,
    last_run_at=AT,
    last_error="the disk is full",
)


@pytest.fixture(autouse=True)
def supervised(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Hold the lock of a server on the data directory."""
    monkeypatch.setenv("COPPICE_HOME", str(tmp_path))
    descriptor = locks.try_lock(Layout(tmp_path).supervisor_lock(None))
    assert descriptor is not None
    yield
    locks.release(descriptor)


def test_the_status_names_what_keeps_an_instance_awake(capsys: pytest.CaptureFixture[str]) -> None:
    """Only what is known is shown."""
    host = FakeHost(auto_standby=AutoStandbyStatus(status="active", idle_timeout_s=900, in_use=True, connections=2))
    shown = output_of(capsys, host, "auto-standby", "status", "web")
    assert [line.split("  ")[-1].strip() for line in shown.splitlines()] == [
        "active",
        "900 s",
        "in use, 2 connections",
    ]
    host = FakeHost(auto_standby=AutoStandbyStatus(status="idle_countdown", idle_timeout_s=900, standby_at=AT))
    shown = output_of(capsys, host, "auto-standby", "status", "web")
    assert "idle countdown" in shown
    assert "Standby at" in shown
    assert document(capsys, host, "auto-standby", "status", "web")["standby_at"] == AT


def test_a_hold(capsys: pytest.CaptureFixture[str]) -> None:
    """It says until when; an instance in standby refuses it."""
    found = AutoStandbyStatus(status="idle_countdown", idle_timeout_s=60, hold_until=AT)
    assert "Held until" in output_of(capsys, FakeHost(auto_standby_hold=found), "auto-standby", "hold", "web")
    assert run(FakeHost(auto_standby_hold=InStandby("web is Standby")), "auto-standby", "hold", "web") == 4


def test_a_schedule_is_set(capsys: pytest.CaptureFixture[str]) -> None:
    """Durations have units."""
    host = FakeHost(snapshot_schedule_set=SCHEDULE)
    words = ["--every", "1h", "--keep", "24", "--max-age", "7d", "--prefix", "nightly", "--tag", "team=a"]
    assert output_of(capsys, host, "snapshot", "schedule", "set", "web", *words)
    asked = host.asked("snapshot_schedule_set")
    assert (asked["instance"], asked["interval_s"], asked["max_count"]) == ("web", 3600, 24)
    assert (asked["max_age_s"], asked["name_prefix"], asked["tags"]) == (7 * 86400, "nightly", {"team": "a"})


def test_a_schedule_that_nothing_carries_out_is_named(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    """Without a server on the data directory no snapshot is taken, and the user is told."""
    host = FakeHost(snapshot_schedule_set=SCHEDULE)
    words = ["snapshot", "schedule", "set", "web", "--every", "1h", "--keep", "24"]
    assert run(host, "--home", str(home := tmp_path / "home"), *words) == 0
    assert f"no server runs on {home}, so nothing carries out the schedule yet" in capsys.readouterr().err
    assert run(host, *words) == 0  # the common fixture holds the lock of its server
    assert capsys.readouterr().err == ""


@pytest.mark.parametrize("words", [["--every", "1h"], ["--every", "soon", "--keep", "1"], ["--keep", "1"]])
def test_a_schedule_needs_a_time_and_a_limit(words: list[str]) -> None:
    """Nothing is asked of the host before."""
    host = FakeHost()
    assert run(host, "snapshot", "schedule", "set", "web", *words) == 2
    assert host.calls == []


def test_a_schedule_is_shown(capsys: pytest.CaptureFixture[str]) -> None:
    """With its limits and the error of its latest run."""
    host = FakeHost(snapshot_schedule=SCHEDULE, snapshot_schedule_rm=None)
    shown = output_of(capsys, host, "snapshot", "schedule", "show", "web")
    assert "the newest 24, for 86400 s" in shown
    assert "the disk is full" in shown
    assert document(capsys, host, "snapshot", "schedule", "show", "web")["interval_s"] == 3600
    assert output_of(capsys, host, "snapshot", "schedule", "rm", "web") == ""
    missing = FakeHost(snapshot_schedule=NotFound("web has no snapshot schedule"))
    assert run(missing, "snapshot", "schedule", "show", "web") == 3
