"""Commands that only look, and gc: their requests to the host, and their output for people and for
programs.
"""

from __future__ import annotations

import msgspec
import pytest

from cli_host import DIGEST, FakeHost, instance, memory
from cli_lines import document, output_of, run
from coppice.model import (
    MIB,
    BudgetUse,
    GcReport,
    Image,
    ImageConfig,
    MemFile,
    ProcessEnd,
    Publish,
    Sharing,
    State,
    TreeNode,
)
from coppice.model.inspection import Inspection
from coppice.requests import GcRequest, InspectRequest
from fakes.records import make_capture

VM = instance("vm")
IMAGE = Image(
    digest=DIGEST,
    name="debian",
    size_bytes=200 * MIB,
    config=ImageConfig(cmd=("bash",), env={"PATH": "/bin"}),
    source="bookworm minbase",
    created_at=1_700_000_000.0,
)


def test_ls_for_people_and_for_programs(capsys: pytest.CaptureFixture[str]) -> None:
    """For people a table has a line for each instance, or only names with -q; JSON has exact
    records; filters are the host's.
    """
    fork = instance("vm-1", State.STANDBY, parent=VM, tags={"a": "b"}, publish=(Publish(host_port=1, guest_port=2),))
    host = FakeHost(ls=[VM, fork])
    header, first, second = output_of(capsys, host, "ls").splitlines()
    assert header.split() == ["NAME", "STATE", "IMAGE", "CPUS", "MEMORY", "AGE", "PARENT", "PORTS", "TAGS"]
    assert first.split()[:3] == ["vm", "Running", "debian"]
    assert second.endswith("vm      127.0.0.1:1->2/tcp  a=b")
    assert output_of(capsys, host, "ls", "-q") == "vm\nvm-1\n"
    assert [found["name"] for found in document(capsys, host, "ls")] == ["vm", "vm-1"]
    host = FakeHost(ls=[])
    assert document(capsys, host, "ls", "--state", "running", "--tag", "a=b") == []
    assert host.asked("ls") == {"state": State.RUNNING, "tags": {"a": "b"}}


def test_an_ended_process_is_shown_with_the_state(capsys: pytest.CaptureFixture[str]) -> None:
    """In lists and in all fields; not of a machine that is stopped, whose process cannot run."""
    exited, killed = ProcessEnd(exit_code=1, at=0.0), ProcessEnd(exit_code=137, signal=9, at=0.0)
    machines = [
        instance("a", process_end=exited),
        instance("b", State.STANDBY, process_end=killed),
        instance("c", State.STOPPED, process_end=exited),
    ]
    lines = output_of(capsys, FakeHost(ls=machines), "ls").splitlines()
    assert ["Running (exited 1)" in lines[1], "Standby (killed by signal 9)" in lines[2]] == [True, True]
    assert "Stopped  " in lines[3]
    inspected = Inspection(instance=machines[1], fork_count=0, forks=(), directory="/d", disk_bytes=0, memory=None)
    assert "it was ended by signal 9, at 1970-01-01" in output_of(capsys, FakeHost(inspect=inspected), "inspect", "b")


def test_ls_with_several_states(capsys: pytest.CaptureFixture[str]) -> None:
    """--state can be repeated and selects any of the states."""
    host = FakeHost(ls=[VM, instance("s", State.STANDBY), instance("t", State.TEMPLATE)])
    assert output_of(capsys, host, "ls", "-q", "--state", "standby", "--state", "Template") == "s\nt\n"


def test_ls_shows_owners_if_there_are_any(capsys: pytest.CaptureFixture[str]) -> None:
    """The operator sees each instance's owner; without owners there is no such column."""
    assert "OWNER" not in output_of(capsys, FakeHost(ls=[VM]), "ls")
    lines = output_of(capsys, FakeHost(ls=[VM, instance("theirs", owner="alice")]), "ls").splitlines()
    assert "OWNER" in lines[0]
    assert lines[2].split()[-1] == "alice"


def test_inspect_shows_the_whole_record(capsys: pytest.CaptureFixture[str]) -> None:
    """Several names give several records, and JSON is always a list; the name of a guest's process
    cannot control the terminal.
    """

    def inspection(request: InspectRequest) -> Inspection:
        name = request.instance
        file = MemFile(inode=77, device=1, size_bytes=MIB, sharing=Sharing.COPY, reason="EXDEV")
        found = instance(name, capture=make_capture(file), exit_reason="powered off", tags={"a": "b"})
        return Inspection(
            instance=found, fork_count=1, forks=("x",), directory="/d/" + name, disk_bytes=MIB, memory=memory()
        )

    host = FakeHost(inspect=inspection)
    text = output_of(capsys, host, "inspect", "vm", "vm-2")
    for part in (
        "vm-2",
        "powered off",
        "120.0 MiB shared, 1.0 MiB unique",
        "inode 77, 3 links",
        "copy: EXDEV",
        "SHA-256    pending",
        "1 (x)",
        "/d/vm",
    ):
        assert part in text
    assert [found["instance"]["name"] for found in document(capsys, host, "inspect", "vm")] == ["vm"]


def test_text_of_others_cannot_control_the_terminal(capsys: pytest.CaptureFixture[str]) -> None:
    """Tags come from another owner, the working directory from the image, and a VMM's last message
    possibly from its guest.
    """
    evil = "\x1b]0;owned\x07"
    found = instance("vm", tags={"a": evil}, exit_reason=f"the VMM ended: {evil}")
    found = msgspec.structs.replace(found, process=msgspec.structs.replace(found.process, workdir=f"/{evil}"))
    seen = Inspection(instance=found, fork_count=0, forks=(), directory="/i", disk_bytes=0, memory=None)
    host = FakeHost(ls=[found], inspect=seen)
    for words in (["ls"], ["inspect", "vm"]):
        text = output_of(capsys, host, *words)
        assert "owned" in text
        assert "\x1b" not in text
        assert "\x07" not in text


def test_stats_prints_a_total(capsys: pytest.CaptureFixture[str]) -> None:
    """Each machine has one line, and the last line totals the memory that cannot be shared."""
    resting = msgspec.structs.replace(memory(), shared_bytes=0, unique_bytes=0, vmm_overhead_bytes=0)
    host = FakeHost(stats={"a": memory(), "b": memory(unique_mib=3), "resting": resting})
    lines = output_of(capsys, host, "stats").splitlines()
    assert lines[1].split()[:7] == ["a", "512.0", "MiB", "120.0", "MiB", "1.0", "MiB"]
    assert lines[3].split()[:6] == ["resting", "512.0", "MiB", "-", "-", "-"]
    assert lines[4].split() == ["(running)", "1.0", "GiB", "4.0", "MiB", "56.0", "MiB"]
    assert document(capsys, host, "stats")["b"]["unique_bytes"] == 3 * MIB


def test_stats_prints_the_budgets(capsys: pytest.CaptureFixture[str]) -> None:
    """Usage and limits are printed for people, and as exact numbers for programs."""
    use = BudgetUse(
        instances=5,
        max_instances=100,
        running=3,
        memory_bytes=192 * MIB,
        measured_bytes=70 * MIB,
        memory_limit_bytes=4096 * MIB,
        memory_overcommit=16.0,
        disk_free_bytes=2048 * MIB,
        disk_floor_bytes=1024 * MIB,
    )
    host = FakeHost(budget=use)
    shown = output_of(capsys, host, "stats", "--budget")
    for words in (
        "5 of 100, 3 running",
        "192.0 MiB of 4.0 GiB reserved, at 16",
        "70.0 MiB in use",
        "2.0 GiB free, of which 1.0",
    ):
        assert words in shown
    assert document(capsys, host, "stats", "--budget")["memory_bytes"] == 192 * MIB


def test_gc_reports_its_removals(capsys: pytest.CaptureFixture[str]) -> None:
    """--dry-run reaches the host, and the output says that nothing was removed."""

    def collect(request: GcRequest) -> GcReport:
        removed = ("instances/x", "kernels/y") if request.caches else ("instances/x",)
        return GcReport(removed=removed, bytes_freed=MIB, dry_run=request.dry_run)

    host = FakeHost(gc=collect)
    assert output_of(capsys, host, "gc") == "instances/x\n1 leftover, 1.0 MiB freed\n"
    assert output_of(capsys, host, "gc", "--dry-run") == "instances/x\n1 leftover, 1.0 MiB would be freed\n"
    assert output_of(capsys, host, "gc", "--caches").splitlines()[-1] == "2 leftovers, 1.0 MiB freed"


def test_unloadable_captures_are_marked(capsys: pytest.CaptureFixture[str]) -> None:
    """The list shows which and why, once; in JSON the record has the reason, or null."""
    useless, good = instance("warm", State.TEMPLATE), instance("cold", State.TEMPLATE)
    reasons = {useless.id: "vmm version was 1, is 2"}
    host = FakeHost(ls=[useless, good], unloadable=reasons)
    assert run(host, "ls") == 0
    shown = capsys.readouterr()
    assert [line.split()[:3] for line in shown.out.splitlines()[1:]] == [
        ["warm", "Template", "!"],
        ["cold", "Template", "debian"],
    ]
    assert shown.err.count("vmm version was 1, is 2") == 1
    assert "can no longer be loaded here: warm (" in shown.err
    assert [each["unloadable"] for each in document(capsys, host, "ls")] == ["vmm version was 1, is 2", None]
    many = [instance(f"fork-{number:02}", State.STANDBY) for number in range(20)]
    assert run(FakeHost(ls=many, unloadable={each.id: "vmm version was 1, is 2" for each in many}), "ls") == 0
    assert "fork-06, fork-07 and 12 more (vmm version" in capsys.readouterr().err
    tree = [
        TreeNode(instance=useless, depth=0, fork_count=1, memory=None),
        TreeNode(instance=good, depth=1, fork_count=0, memory=None),
    ]
    host = FakeHost(tree=tree, unloadable=reasons)
    assert run(host, "tree") == 0
    shown = capsys.readouterr()
    assert "Template !" in shown.out
    assert "can no longer be loaded here: warm (" in shown.err
    root, child = document(capsys, host, "tree")
    assert root["instance"]["unloadable"] == "vmm version was 1, is 2"
    assert (child["depth"], child["instance"]["unloadable"]) == (1, None)
    assert output_of(capsys, FakeHost(ls=[useless], unloadable=reasons), "ls", "-q") == "warm\n"
