"""fork and tree: their requests to the host, and their output for people and for programs."""

from __future__ import annotations

from pathlib import Path

import msgspec
import pytest

from cli_host import FakeHost, instance, memory
from cli_lines import document, output_of, run
from coppice.cli import output
from coppice.model import Egress, ForkReport, ForkResult, Limits, Publish, Sharing, State, TreeNode, VmmProcess

VM = instance("vm")


def _fork_result(name: str) -> ForkResult:
    return ForkResult(
        name=name,
        ok=True,
        instance=instance(name, parent=VM),
        sharing=Sharing.HARDLINK,
        memory=memory(),
        disk_bytes_written=4096,
        stages={"place": 2.0, "start": 50.0, "identity": 180.0},
        total_ms=232.0,
    )


def _fork_report(*results: ForkResult) -> ForkReport:
    return ForkReport(
        source=VM.id,
        source_name="vm",
        count=len(results),
        succeeded=sum(result.ok for result in results),
        wall_ms=260.0,
        results=results,
    )


def test_fork_passes_every_option_on(capsys: pytest.CaptureFixture[str]) -> None:
    """Count, names, target, atomicity, tags and ports reach the host."""
    host = FakeHost(fork=_fork_report(_fork_result("a")))
    output_of(capsys, host, "fork", "vm", "--count", "2", "--name", "a", "--name", "b", "--target", "standby", "--atomic", "--from-running",
              "--tag", "k=v", "--publish", "own:1:2", "--egress", "none", "--pids-limit", "16", "--ttl", "8h",
              "--volume-policy", "clone", "--notify", "8000")  # fmt: skip
    asked = host.asked("fork")
    assert asked == {
        "instance": "vm",
        "count": 2,
        "names": ("a", "b"),
        "target": State.STANDBY,
        "atomic": True,
        "from_running": True,
        "volume_policy": "clone",
        "payload": None,
        "payloads": (),
        "notify": 8000,
        "tags": {"k": "v"},
        "vmm": None,
        "egress": Egress(mode="none"),
        "limits": Limits(pids=16),
        "measure": False,
        "ttl_s": 8 * 3600,
        "expires_at": None,
        "on_expiry": None,
        "restart": None,
        "health_check": None,
        "auto_standby_s": None,
        "publish": (Publish(host_port=1, guest_port=2, host_address="own"),),
    }


@pytest.mark.parametrize(
    ("words", "count"), [([], 1), (["--name", "a"], 1), (["--name", "a", "--name", "b"], 2), (["-n", "3"], 3)]
)
def test_fork_counts_names(words: list[str], count: int, capsys: pytest.CaptureFixture[str]) -> None:
    """Two names make two forks without a count."""
    host = FakeHost(fork=_fork_report(_fork_result("a")))
    output_of(capsys, host, "fork", "vm", *words)
    assert host.asked("fork")["count"] == count


def test_fork_warns_of_shared_random_numbers(capsys: pytest.CaptureFixture[str]) -> None:
    """People read it on standard error, programs in the document; `-q` prints names alone."""
    report = msgspec.structs.replace(_fork_report(_fork_result("a")), shared_random=("node (pid 212): openssl",))
    host = FakeHost(fork=report)
    assert run(host, "fork", "vm") == 0
    said = capsys.readouterr()
    assert "all forks of vm continue with the same random numbers in node (pid 212): openssl" in said.err
    assert "node" not in said.out
    assert document(capsys, host, "fork", "vm")["shared_random"] == ["node (pid 212): openssl"]
    assert run(host, "fork", "vm", "-q") == 0
    assert "random" not in capsys.readouterr().err


def test_fork_passes_payloads_on(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    """--payload is for every fork; --payloads has one for each, and so sets the number of forks."""
    host = FakeHost(fork=_fork_report(_fork_result("a")))
    output_of(capsys, host, "fork", "vm", "--payload", '{"job": 1}')
    asked = host.asked("fork")
    assert (asked["count"], asked["payload"], asked["payloads"]) == (1, b'{"job": 1}', ())
    host = FakeHost(fork=_fork_report(_fork_result("a")))
    each = tmp_path / "each.jsonl"
    each.write_text('{"job": 1}\n{"job": 2}\n')
    output_of(capsys, host, "fork", "vm", "--payloads", str(each))
    asked = host.asked("fork")
    assert (asked["count"], asked["payload"], asked["payloads"]) == (2, None, (b'{"job": 1}', b'{"job": 2}'))


def test_fork_shows_stages_sharing_and_memory(capsys: pytest.CaptureFixture[str]) -> None:
    """The table shows the duration of each stage, how memory is shared, and the cost of each fork."""
    host = FakeHost(fork=_fork_report(_fork_result("a"), _fork_result("b")))
    header, first, _, summary = output_of(capsys, host, "fork", "vm", "-n", "2").splitlines()
    columns = ["NAME", "STATE", "TOTAL", "PLACE", "START", "IDENTITY", "SHARING", "UNIQUE", "OVERHEAD", "DISK"]
    assert header.split() == columns
    assert "232 ms" in first
    assert "hardlink" in first
    assert "1.0 MiB" in first
    assert "28.0 MiB" in first
    assert summary == "2 of 2 forks of vm in 260 ms, 2.0 MiB of unique memory, 56.0 MiB of VMM overhead"
    assert output_of(capsys, host, "fork", "vm", "-q") == "a\nb\n"
    assert document(capsys, host, "fork", "vm")["results"][1]["name"] == "b"


def test_fork_prints_the_address_of_each_fork(capsys: pytest.CaptureFixture[str]) -> None:
    """The chosen addresses and ports are printed; a port that is chosen at the start is marked so."""
    ports = (
        Publish(host_port=8080, guest_port=80, host_address="127.80.51.7"),
        Publish(host_port=0, guest_port=53, protocol="udp"),
    )
    web = msgspec.structs.replace(_fork_result("web"), instance=instance("web", parent=VM, publish=ports))
    report = _fork_report(web, _fork_result("b"))
    header, first, second, _ = output_of(capsys, FakeHost(fork=report), "fork", "vm", "-n", "2").splitlines()
    assert header.split()[-1] == "PORTS"
    assert first.endswith("127.80.51.7:8080->80/tcp, 127.0.0.1:auto->53/udp")
    assert second.split()[-1] == "-"


def test_fork_fits_a_narrow_terminal(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    """The table omits its stages if they would wrap."""
    host = FakeHost(fork=_fork_report(_fork_result("a")))
    monkeypatch.setattr(output, "width", lambda: 80)
    header, first, _ = output_of(capsys, host, "fork", "vm").splitlines()
    assert header.split() == ["NAME", "STATE", "TOTAL", "SHARING", "UNIQUE", "OVERHEAD", "DISK"]
    assert max(len(header), len(first)) <= 80


def test_fork_of_a_running_instance_prints_its_pause(capsys: pytest.CaptureFixture[str]) -> None:
    """The pause of the live guest is printed."""
    report = msgspec.structs.replace(_fork_report(_fork_result("a")), source_pause_ms=12.3)
    last = output_of(capsys, FakeHost(fork=report), "fork", "vm", "--from-running").splitlines()[-1]
    assert last == "vm was paused for 12 ms"


def test_a_failed_fork_is_named_and_exits_with_1(capsys: pytest.CaptureFixture[str]) -> None:
    """If some forks fail, the others exist, each failed one is named with its reason, and the
    status is 1.
    """
    failed = ForkResult(name="b", ok=False, error="the machine ended; see its log", error_code="vmm_died")
    copied = ForkResult(
        name="c", ok=True, instance=VM, sharing=Sharing.COPY, sharing_reason="EXDEV: another file system"
    )
    host = FakeHost(fork=_fork_report(_fork_result("a"), failed, copied))
    assert run(host, "fork", "vm") == 1
    shown = capsys.readouterr()
    assert "2 of 3 forks of vm" in shown.out
    assert "coppice: the fork b failed: the machine ended; see its log\n" in shown.err
    assert "coppice: memory was copied, not shared: EXDEV: another file system\n" in shown.err
    assert document(capsys, host, "fork", "vm", status=1)["succeeded"] == 2


@pytest.mark.parametrize(
    ("codes", "status"),
    [
        (["insufficient_resources"], 5),
        (["conflict", "conflict"], 4),
        (["conflict", "vmm_died"], 1),
        (["unheard of"], 1),
    ],
)
def test_the_exit_status_of_a_fan_out_is_its_only_reason(codes: list[str], status: int) -> None:
    """A full disk is 5 as for every command if it is the only reason; several reasons are 1."""
    failed = [ForkResult(name="b", ok=False, error="no; do", error_code=code) for code in codes]
    assert run(FakeHost(fork=_fork_report(_fork_result("a"), *failed)), "fork", "vm", "--count", "3") == status


def test_tree_draws_the_lineage(capsys: pytest.CaptureFixture[str]) -> None:
    """Each instance is one line under its parent, with state, fork count, memory, inode and links."""
    vmm = VmmProcess(pid=1, start_ticks=1, executable="/q")
    root = instance("warm", State.TEMPLATE)
    first, second = instance("warm-1", parent=root, vmm=vmm), instance("warm-2", parent=root, vmm=vmm)
    grandchild = instance("warm-1-a", State.STOPPED, parent=first)
    nodes = [
        TreeNode(instance=root, depth=0, fork_count=2, memory=memory(unique_mib=0)),
        TreeNode(instance=first, depth=1, fork_count=1, memory=memory()),
        TreeNode(instance=grandchild, depth=2, fork_count=0, memory=None),
        TreeNode(instance=second, depth=1, fork_count=0, memory=memory(unique_mib=2)),
        TreeNode(instance=VM, depth=0, fork_count=0, memory=None),
    ]
    host = FakeHost(tree=nodes)
    lines = output_of(capsys, host, "tree").splitlines()
    assert [line.partition("  ")[0].rstrip() for line in lines[1:6]] == [
        "warm",
        "├── warm-1",
        "│",
        "└── warm-2",
        "vm",
    ]
    assert lines[3].startswith("│   └── warm-1-a")
    assert lines[2].split()[2:] == ["Running", "1", "120.0", "MiB", "1.0", "MiB", "28.0", "MiB", "77", "3", "hardlink"]
    assert (
        lines[6]
        == "2 running machines see 1.0 GiB of RAM; 3.0 MiB is unique to one of them, and their VMMs take 56.0 MiB"
    )
    assert [(each["depth"], each["instance"]["name"]) for each in document(capsys, host, "tree", "warm")][:3] == [
        (0, "warm"),
        (1, "warm-1"),
        (2, "warm-1-a"),
    ]
