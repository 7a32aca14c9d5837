"""The commands of snapshots and `verify`: their requests to the host, and their output for people
and for programs.
"""

from __future__ import annotations

from pathlib import Path

import pytest

from cli_host import DIGEST, FakeHost, instance
from cli_lines import document, output_of, run
from coppice.errors import InUse, NotFound
from coppice.model import (
    MIB,
    Difference,
    ForkReport,
    ForkResult,
    MachineSpec,
    MemFile,
    ProcessSpec,
    Publish,
    Sharing,
    Snapshot,
    SnapshotKind,
    State,
    VerifyReport,
)
from coppice.model.inspection import SnapshotInspection
from coppice.requests import SnapshotRmRequest
from fakes.records import make_capture

VM = instance("vm", State.STANDBY)
KEPT = Snapshot(
    id="s" + "0" * 23,
    name="kept",
    kind=SnapshotKind.STANDBY,
    source=VM.id,
    source_name="vm",
    created_at=1_700_000_000.0,
    driver="qemu",
    image=DIGEST,
    image_name="debian",
    machine=MachineSpec(kernel="debian-6.1"),
    process=ProcessSpec(),
    tags={"team": "a"},
    capture=make_capture(MemFile(inode=77, device=1, size_bytes=512 * MIB, sharing=Sharing.HARDLINK)),
    size_bytes=120 * MIB,
)
DISK = Snapshot(
    id="t" + "0" * 23,
    name="disk",
    kind=SnapshotKind.STOPPED,
    source=VM.id,
    source_name="vm",
    created_at=1_700_000_000.0,
    driver="qemu",
    image=DIGEST,
    image_name="debian",
    machine=MachineSpec(kernel="debian-6.1"),
    process=ProcessSpec(),
)


def test_create_prints_the_name(capsys: pytest.CaptureFixture[str]) -> None:
    """Only the name is printed, for `$(...)`; omitted options are left to the host."""
    host = FakeHost(snapshot=KEPT)
    words = ["snapshot", "create", "vm", "--name", "kept", "--kind", "stopped", "--tag", "team=a"]
    assert output_of(capsys, host, *words) == "kept\n"
    assert host.asked("snapshot") == {
        "instance": "vm", "name": "kept", "kind": SnapshotKind.STOPPED, "tags": {"team": "a"},
    }  # fmt: skip
    host = FakeHost(snapshot=KEPT)
    assert document(capsys, host, "snapshot", "create", "vm")["source_name"] == "vm"
    assert host.asked("snapshot") == {"instance": "vm", "name": None, "kind": None, "tags": {}}


def test_ls_prints_a_line_for_each_snapshot(capsys: pytest.CaptureFixture[str]) -> None:
    """Each line shows the snapshot's source; the filters are the host's."""
    host = FakeHost(snapshot_ls=[KEPT, DISK])
    lines = output_of(capsys, host, "snapshot", "ls", "--source", "vm", "--tag", "team=a").splitlines()
    assert lines[0].split() == ["NAME", "KIND", "SOURCE", "IMAGE", "MEMORY", "SIZE", "AGE", "TAGS"]
    assert lines[1].split()[:3] == ["kept", "Standby", "vm"]
    assert "120.0 MiB" in lines[1]
    assert lines[2].split()[:2] == ["disk", "Stopped"]
    assert host.asked("snapshot_ls") == {"source": "vm", "tags": {"team": "a"}}
    assert output_of(capsys, FakeHost(snapshot_ls=[KEPT, DISK]), "snapshot", "ls", "-q") == "kept\ndisk\n"
    assert [each["name"] for each in document(capsys, FakeHost(snapshot_ls=[KEPT]), "snapshot", "ls")] == ["kept"]


def test_inspect_prints_sizes_links_and_forks(capsys: pytest.CaptureFixture[str]) -> None:
    """Sizes, links and forks are printed; a removed source is marked as removed."""
    both = [
        SnapshotInspection(
            snapshot=each, source_lives=each is KEPT, forks=("elm",) if each is KEPT else (), directory="/d",
            memory_bytes=100 * MIB, disk_bytes=20 * MIB, link_count=3,
        )
        for each in (KEPT, DISK)
    ]  # fmt: skip
    host = FakeHost(snapshot_inspect=lambda request: both[request.snapshot == "disk"])
    shown = output_of(capsys, host, "snapshot", "inspect", "kept", "disk")
    first, second = shown.split("\n\n")
    for text in (
        "100.0 MiB allocated, inode 77, 3 links",
        "1 (elm)",
        "team=a",
        "pending",
        "20.0 MiB of 2.0 GiB",
    ):
        assert text in first
    assert "vm (gone)" in second
    assert "inode" not in second
    assert document(capsys, host, "snapshot", "inspect", "kept")[0]["link_count"] == 3


@pytest.mark.parametrize("start", [False, True])
def test_restore_prints_the_new_state(capsys: pytest.CaptureFixture[str], start: bool) -> None:
    """The output shows the instance's new state."""
    host = FakeHost(snapshot_restore=VM)
    assert output_of(capsys, host, "snapshot", "restore", "kept", *["--start"] * start) == "vm is Standby\n"
    assert host.asked("snapshot_restore") == {"snapshot": "kept", "start": start}


def test_fork_has_the_options_and_the_report_of_coppice_fork(capsys: pytest.CaptureFixture[str]) -> None:
    """The options and the report are those of `coppice fork`; a failed fork sets the exit status."""
    result = ForkResult(name="elm", ok=True, instance=instance("elm"))
    report = ForkReport(source=KEPT.id, source_name="kept", count=1, succeeded=1, wall_ms=5.0, results=(result,))
    host = FakeHost(snapshot_fork=report)
    words = ["snapshot", "fork", "kept", "--name", "elm", "--target", "standby", "--atomic", "--tag", "a=b", "-q"]
    assert output_of(capsys, host, *words) == "elm\n"
    asked = host.asked("snapshot_fork")
    assert (asked["snapshot"], asked["count"], asked["names"], asked["target"]) == ("kept", 1, ("elm",), State.STANDBY)
    assert (asked["atomic"], asked["tags"], asked["publish"]) == (True, {"a": "b"}, ())
    assert "1 of 1 fork of kept" in output_of(capsys, host, "snapshot", "fork", "kept")
    failed = ForkReport(
        source=KEPT.id, source_name="kept", count=1, succeeded=0, wall_ms=5.0,
        results=(ForkResult(name="elm", ok=False, error="no"),),
    )  # fmt: skip
    assert run(FakeHost(snapshot_fork=failed), "snapshot", "fork", "kept") == 1


def test_fork_passes_payloads_on(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    """As in `coppice fork`, one payload serves all forks, or each fork has one, which sets their
    number.
    """
    result = ForkResult(name="elm", ok=True, instance=instance("elm"))
    report = ForkReport(source=KEPT.id, source_name="kept", count=1, succeeded=1, wall_ms=5.0, results=(result,))
    host = FakeHost(snapshot_fork=report)
    output_of(capsys, host, "snapshot", "fork", "kept", "--payload", '{"job": 1}', "--publish", "own:8080:80")
    asked = host.asked("snapshot_fork")
    assert (asked["count"], asked["payload"], asked["payloads"]) == (1, b'{"job": 1}', ())
    assert asked["publish"] == (Publish(host_port=8080, guest_port=80, host_address="own"),)
    each = tmp_path / "each.json"
    each.write_text('["one", "two", "three"]')
    host = FakeHost(snapshot_fork=report)
    output_of(capsys, host, "snapshot", "fork", "kept", "--payloads", str(each))
    asked = host.asked("snapshot_fork")
    assert (asked["count"], asked["payload"], asked["payloads"]) == (3, None, (b'"one"', b'"two"', b'"three"'))


def test_rm_goes_on_after_a_failure(capsys: pytest.CaptureFixture[str]) -> None:
    """A failed removal does not stop the others, and sets the exit status."""

    def remove(request: SnapshotRmRequest) -> None:
        name = request.snapshot
        if name == "nobody":
            raise NotFound("there is no snapshot 'nobody'", hint="look")
        if name == "held":
            raise InUse("held is in use", hint="wait")

    assert run(FakeHost(snapshot_rm=remove), "snapshot", "rm", "nobody", "kept", "held", "kept") == 3
    shown = capsys.readouterr()
    assert shown.out == "kept\n"
    assert "nobody" in shown.err
    assert "held is in use" in shown.err
    found = document(capsys, FakeHost(snapshot_rm=remove), "snapshot", "rm", "held", "kept", status=4)
    assert (found["removed"], found["failed"][0]["name"]) == (["kept"], "held")


def test_verify_counts_sound_files_and_names_differences(capsys: pytest.CaptureFixture[str]) -> None:
    """Sound files are counted. Differences are named on standard error and set the exit status,
    with --json too.
    """
    sound = VerifyReport(mem_files=1, disks=2, bytes_hashed=512 * MIB, recorded=3, skipped=("vm",))
    shown = output_of(capsys, FakeHost(verify=sound), "verify")
    assert shown.splitlines() == [
        "1 mem-file and 2 disks checked, 512.0 MiB hashed, 3 new SHA-256 sums recorded",
        "not checked because they are in use: the disks of vm",
    ]
    difference = Difference(
        holder="snapshot", id=KEPT.id, name="kept", file="memory", detail="its size is 1 bytes, not 2"
    )
    broken = VerifyReport(mem_files=1, differences=(difference,))
    assert run(FakeHost(verify=broken), "verify") == 1
    assert "memory of the snapshot kept: its size is 1 bytes, not 2" in capsys.readouterr().err
    found = document(capsys, FakeHost(verify=broken), "verify", status=1)
    assert found["differences"][0]["name"] == "kept"


def test_verify_says_which_disks_had_no_space(capsys: pytest.CaptureFixture[str]) -> None:
    """They are no success, and the message says what to do."""
    report = VerifyReport(mem_files=1, disks=1, no_space=("ash", "elm"))
    assert run(FakeHost(verify=report), "verify") == 1
    assert "the disks of ash, elm; free disk space" in capsys.readouterr().err
