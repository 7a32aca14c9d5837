"""Every command that takes a name takes several: a failure of one does not stop the others, and the
status and --json show which failed.
"""

from __future__ import annotations

import asyncio
import json
from typing import Any

import msgspec
import pytest

from cli_host import FakeHost, instance, named
from cli_lines import document, output_of, run
from coppice.cli import progress
from coppice.errors import Busy, NotFound
from coppice.model import CaptureReport, MemoryReport, ProgressSink, State, Traffic, TreeNode, no_progress
from coppice.model.inspection import StandbyReport
from coppice.requests import GetRequest, Request, StopRequest

GONE = NotFound("there is no 'b'", hint="look")


def answers(method: str, **failing: Exception) -> FakeHost:
    """Return a host that grants the request for each name except the failing ones."""

    def answer(request: Request[Any], *_: ProgressSink) -> Any:
        if (name := named(request)) in failing:
            raise failing[name]
        if method == "standby":
            capture = CaptureReport(pause_ms=1, total_ms=2, ram_bytes_written=3, dirty_bytes=4)
            return StandbyReport(instance=instance(name, State.STANDBY), capture=capture)
        return None if method.endswith("_rm") else instance(name)

    return FakeHost(**{method: answer})


CHANGES = [
    (["start"], "start"),
    (["stop"], "stop"),
    (["standby"], "standby"),
    (["restore"], "restore"),
    (["promote"], "promote"),
    (["demote"], "demote"),
    (["snapshot", "restore"], "snapshot_restore"),
    (["snapshot", "create"], "snapshot"),
    (["volume", "create"], "volume_create"),
    (["pull", "-q"], "image_pull"),
    (["image", "pull", "-q"], "image_pull"),
]
REMOVALS = [
    (["volume", "rm"], "volume_rm"),
    (["snapshot", "rm"], "snapshot_rm"),
    (["image", "rm"], "image_rm"),
    (["kernel", "rm"], "kernel_rm"),
]


@pytest.mark.parametrize(("words", "method"), CHANGES, ids=lambda each: each if isinstance(each, str) else "")
def test_a_change_of_several_reports_each(capsys: pytest.CaptureFixture[str], words: list[str], method: str) -> None:
    """Every name is changed, with one line each; one failure neither hides nor stops the others."""
    lines = output_of(capsys, answers(method), *words, "a", "b").splitlines()
    assert [line.split()[0] for line in lines] == ["a", "b"]
    host = answers(method, b=GONE)
    assert run(host, *words, "a", "b", "c") == 3
    shown = capsys.readouterr()
    assert [line.split()[0] for line in shown.out.splitlines()] == ["a", "c"]
    assert "no 'b'" in shown.err
    assert sorted(map(named, host.calls)) == ["a", "b", "c"]
    found = document(capsys, answers(method, b=GONE), *words, "a", "b", status=3)
    assert len(found["done"]) == 1
    assert [(each["name"], each["code"]) for each in found["failed"]] == [("b", "not_found")]
    assert found["error"]["message"] == GONE.message


@pytest.mark.parametrize(("words", "method"), CHANGES, ids=lambda each: each if isinstance(each, str) else "")
def test_a_change_of_one_is_its_result(capsys: pytest.CaptureFixture[str], words: list[str], method: str) -> None:
    """With --json one name prints the result itself, and its failure prints a plain error."""
    found = document(capsys, answers(method), *words, "a")
    assert (found["instance"] if method == "standby" else found)["name"] == "a"
    assert document(capsys, answers(method, a=GONE), *words, "a", status=3)["error"]["code"] == "not_found"


@pytest.mark.parametrize(("words", "method"), REMOVALS, ids=lambda each: each if isinstance(each, str) else "")
def test_a_removal_of_several_reports_each(capsys: pytest.CaptureFixture[str], words: list[str], method: str) -> None:
    """All removable names are removed. With -f a missing name is not an error, and not printed as removed.
    A used one is an error.
    """
    busy = Busy("'c' is in use", hint="wait")
    host = answers(method, b=GONE, c=busy)
    found = document(capsys, host, *words, "a", "b", "c", "d", status=3)
    assert (found["removed"], [each["name"] for each in found["failed"]]) == (["a", "d"], ["b", "c"])
    assert output_of(capsys, answers(method, b=GONE), *words, "-f", "a", "b") == "a\n"
    assert output_of(capsys, answers(method, b=GONE), *words, "-f", "b") == ""
    assert document(capsys, answers(method, b=GONE), *words, "-f", "b") == {"removed": [], "failed": []}
    assert run(answers(method, c=busy), *words, "-f", "c") == busy.exit_code


def test_rm_force_removes_a_running_machine(capsys: pytest.CaptureFixture[str]) -> None:
    """`rm -f` ends a running machine and ignores a missing one."""

    def get(request: GetRequest) -> Any:
        if request.instance == "b":
            raise GONE
        return instance(request.instance, State.RUNNING)

    assert output_of(capsys, FakeHost(get=get, rm=None), "rm", "-f", "a", "b") == "a\n"
    assert document(capsys, FakeHost(get=get, rm=None), "rm", "-f", "b") == {"removed": [], "failed": []}
    assert run(FakeHost(get=get, rm=None), "rm", "a", "b") == 3


@pytest.mark.parametrize("words", [["inspect"], ["image", "inspect"], ["volume", "inspect"], ["snapshot", "inspect"]])
def test_an_inspection_of_several_shows_those_found(capsys: pytest.CaptureFixture[str], words: list[str]) -> None:
    """An inspection of several names shows those that exist, and reports the others."""

    def look(request: Request[Any]) -> Any:
        if named(request) == "b":
            raise GONE
        return {"name": named(request)}

    method = "_".join(words)
    found = document(capsys, FakeHost(**{method: look}), *words, "a", "b", status=3)
    assert found["found"] == [{"name": "a"}]
    assert [each["name"] for each in found["failed"]] == ["b"]
    assert document(capsys, FakeHost(**{method: look}), *words, "a") == [{"name": "a"}]
    assert document(capsys, FakeHost(**{method: look}), *words, "b", status=3)["error"]["code"] == "not_found"


@pytest.mark.parametrize("words", [["pull", "x", "y"], ["snapshot", "create", "x", "y"]])
def test_one_name_is_not_for_several(capsys: pytest.CaptureFixture[str], words: list[str]) -> None:
    """`--name` names one result."""
    host = FakeHost()
    assert run(host, *words, "--name", "n") == 2
    assert "--name n is one name for 2 results" in capsys.readouterr().err
    assert not host.calls


def test_one_bar_is_drawn_at_a_time(monkeypatch: pytest.MonkeyPatch) -> None:
    """Two works at the same time do not draw over each other."""
    monkeypatch.setattr("sys.stderr.isatty", lambda: True)
    with progress.shown() as first, progress.shown() as second:
        assert first is not no_progress
        assert second is no_progress
    with progress.shown() as third:
        assert third is not no_progress


def test_several_names_are_handled_concurrently() -> None:
    """Ten machines stop in the time of one."""
    together = asyncio.Barrier(3)

    async def stop(request: StopRequest) -> Any:
        await together.wait()
        return instance(request.instance, State.STOPPED)

    assert run(FakeHost(stop=stop), "stop", "a", "b", "c") == 0


def test_an_os_error_concerns_one_name(capsys: pytest.CaptureFixture[str]) -> None:
    """A full disk under one machine does not hide the results of the others."""
    host = answers("start", b=OSError(28, "No space left", "/data"))
    assert run(host, "--json", "start", "a", "b") == 5
    found = json.loads(capsys.readouterr().out)
    assert (len(found["done"]), found["failed"][0]["name"]) == (1, "b")


def test_a_repeated_name_is_handled_once() -> None:
    """`start a a` starts one machine, once."""
    host = answers("start")
    assert run(host, "start", "a", "a") == 0
    assert len(host.calls) == 1


def test_views_take_several_names(capsys: pytest.CaptureFixture[str]) -> None:
    """stats and tree show the named instances."""
    report = MemoryReport(
        mapped_bytes=1, shared_bytes=1, unique_bytes=1, vmm_overhead_bytes=1, inode=None, link_count=1, sharing=None
    )
    host = FakeHost(
        stats=lambda request: {request.instance: report},
        tree=lambda request: [TreeNode(depth=0, instance=instance(request.instance), fork_count=0, memory=None)],
    )
    assert list(document(capsys, host, "stats", "a", "b")) == ["a", "b"]
    assert [node["instance"]["name"] for node in document(capsys, host, "tree", "a", "b")] == ["a", "b"]


def test_traffic_is_shown_where_it_is_known(capsys: pytest.CaptureFixture[str]) -> None:
    """A column that no machine has a value for is left out, also below a sum."""
    report = MemoryReport(
        mapped_bytes=1, shared_bytes=1, unique_bytes=1, vmm_overhead_bytes=1, inode=None, link_count=1, sharing=None
    )
    counted = msgspec.structs.replace(report, traffic=Traffic(received_bytes=2048, sent_bytes=0, counted_by="host"))
    assert run(FakeHost(stats=lambda _: {"a": report, "b": report}), "stats") == 0
    assert "RECEIVED" not in (lines := capsys.readouterr().out)
    assert "CHARGED" not in lines
    host = FakeHost(stats=lambda _: {"a": report, "b": counted})
    assert run(host, "stats") == 0
    heading, first, second, _ = capsys.readouterr().out.splitlines()
    assert heading.split()[-2:] == ["RECEIVED", "SENT"]
    assert first.split()[-2:] == ["-", "-"]
    assert second.split()[-3:] == ["KiB", "0", "B"]
    assert document(capsys, host, "stats")["b"]["traffic"]["received_bytes"] == 2048
