"""Each command: what it asks of the host, what it prints for people, what for programs."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import msgspec
import pytest

from cli_host import DIGEST, FakeHost, instance, memory
from coppice.cli import main, output
from coppice.errors import InUse, NotFound
from coppice.guest.kernel import Kernel
from coppice.host import Inspection
from coppice.model import (
    MIB,
    BudgetUse,
    CaptureReport,
    Check,
    ForkReport,
    ForkResult,
    GcReport,
    Image,
    ImageConfig,
    Instance,
    MemFile,
    Publish,
    Sharing,
    State,
    TreeNode,
    VmmProcess,
)

VM = instance("vm")
IMAGE = Image(
    digest=DIGEST,
    name="debian",
    size_bytes=200 * MIB,
    filesystem="erofs",
    config=ImageConfig(cmd=("bash",), env={"PATH": "/bin"}),
    source="bookworm minbase",
    created_at=1_700_000_000.0,
)
KERNEL = Kernel(key="custom-6.1-0011aabb", version="6.1", vmlinuz=Path("/k/vmlinuz"), modules=Path("/k/modules"))


def run(host: FakeHost, *words: str) -> int:
    """The exit status of a command line over that host."""
    return main(words, host_factory=host.factory)


def output_of(capsys: pytest.CaptureFixture[str], host: FakeHost, *words: str) -> str:
    """What a command that succeeds prints."""
    assert run(host, *words) == 0
    shown = capsys.readouterr()
    assert shown.err == ""
    return shown.out


def document(capsys: pytest.CaptureFixture[str], host: FakeHost, *words: str, status: int = 0) -> Any:
    """The one JSON document that a command prints, and nothing else."""
    assert run(host, "--json", *words) == status
    shown = capsys.readouterr()
    assert shown.err == ""
    assert shown.out.count("\n") == 1
    return json.loads(shown.out)


def test_run_passes_every_option_on(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    """What is written on the command line is what the machine becomes; the name alone is printed, for `$(...)`."""
    (tmp_path / "env").write_text("C=3\n")
    host = FakeHost(run=VM)
    words = [
        "run", "debian", "--name", "vm", "--cpus", "2", "--memory", "1G", "--overlay", "4G", "-e", "A=1", "--env", "B=x=y",
        "--env-file", str(tmp_path / "env"), "--workdir", "/srv", "--user", "web", "--hostname", "box", "--tag", "team=a",
        "--publish", "8080:80", "-p", "[::1]:53:53/udp", "--kernel", KERNEL.key, "--no-start", "--", "sleep", "--long",
    ]  # fmt: skip
    assert output_of(capsys, host, *words) == "vm\n"
    asked = host.asked("run")
    assert asked.pop("progress") is not None
    assert asked == {
        "0": "debian",
        "1": ["sleep", "--long"],
        "name": "vm",
        "cpus": 2,
        "memory_bytes": 1024 * MIB,
        "overlay_bytes": 4096 * MIB,
        "env": {"A": "1", "B": "x=y", "C": "3"},
        "workdir": "/srv",
        "user": "web",
        "hostname": "box",
        "tags": {"team": "a"},
        "publish": (
            Publish(host_port=8080, guest_port=80),
            Publish(host_port=53, guest_port=53, protocol="udp", host_address="::1"),
        ),
        "kernel": KERNEL.key,
        "start": False,
    }


def test_run_takes_its_defaults_from_the_host(capsys: pytest.CaptureFixture[str]) -> None:
    """`coppice run debian` is AsyncHost.run("debian"): the image's command, a generated name, and it boots."""
    host = FakeHost(run=VM)
    output_of(capsys, host, "run", "debian")
    asked = host.asked("run")
    assert (asked["0"], list(asked["1"]), asked["name"], asked["kernel"], asked["start"]) == (
        "debian",
        [],
        None,
        None,
        True,
    )
    assert (asked["cpus"], asked["memory_bytes"], asked["overlay_bytes"]) == (1, 512 * MIB, 2048 * MIB)


def test_run_adds_a_kernel_that_is_given_as_a_file(capsys: pytest.CaptureFixture[str]) -> None:
    """--kernel PATH --modules DIR adds that kernel, and the machine gets its key."""
    host = FakeHost(run=VM, kernel_add=KERNEL)
    output_of(capsys, host, "run", "debian", "--kernel", "./bzImage", "--modules", "./modules")
    assert host.asked("kernel_add") == {"0": "./bzImage", "1": Path("modules")}
    assert host.asked("run")["kernel"] == KERNEL.key


@pytest.mark.parametrize("command", ["start", "restore", "promote", "demote", "stop"])
def test_changing_commands(command: str, capsys: pytest.CaptureFixture[str]) -> None:
    """Each asks for just that operation and says what the instance is now; as JSON it is the whole record."""
    changed = instance("vm", State.TEMPLATE)
    host = FakeHost(**{command: changed})
    assert output_of(capsys, host, command, "vm") == "vm is Template\n"
    assert [name for name, _, _ in host.calls] == [command]
    found = document(capsys, host, command, "vm")
    assert (found["name"], found["state"]) == ("vm", "Template")


def test_stop_at_once(capsys: pytest.CaptureFixture[str]) -> None:
    """--grace 0 is no grace, and no --grace is the host's default."""
    for words, grace in ((["--grace", "0"], 0.0), ([], None)):
        host = FakeHost(stop=instance("vm", State.STOPPED))
        output_of(capsys, host, "stop", "vm", *words)
        assert host.asked("stop")["grace_s"] == grace


def test_standby_tells_its_cost(capsys: pytest.CaptureFixture[str]) -> None:
    """The pause is what users of a live guest want to know."""
    report = CaptureReport(pause_ms=12.3, total_ms=48, ram_bytes_written=0, dirty_bytes=0)
    host = FakeHost(standby=(instance("vm", State.STANDBY), report))
    assert (
        output_of(capsys, host, "standby", "vm")
        == "vm is Standby (paused for 12 ms, 48 ms in all, 0 B of RAM written)\n"
    )
    assert document(capsys, host, "standby", "vm")["capture"]["pause_ms"] == 12.3


def test_ls_for_people_and_for_programs(capsys: pytest.CaptureFixture[str]) -> None:
    """A table with one line for each; names alone with -q; exact records as JSON; filters are the host's."""
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


def test_ls_with_several_states(capsys: pytest.CaptureFixture[str]) -> None:
    """--state is repeatable: any of them."""
    host = FakeHost(ls=[VM, instance("s", State.STANDBY), instance("t", State.TEMPLATE)])
    assert output_of(capsys, host, "ls", "-q", "--state", "standby", "--state", "Template") == "s\nt\n"


def test_inspect_shows_what_is_known(capsys: pytest.CaptureFixture[str]) -> None:
    """Several names give several records; as JSON always a list; what a guest's process is called cannot drive the terminal."""

    def inspection(name: str) -> Inspection:
        file = MemFile(inode=77, device=1, size_bytes=MIB, sharing=Sharing.COPY, reason="EXDEV")
        found = instance(name, mem_file=file, exit_reason="powered off", tags={"a": "b"})
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
        "1 (x)",
        "/d/vm",
    ):
        assert part in text
    assert [found["instance"]["name"] for found in document(capsys, host, "inspect", "vm")] == ["vm"]


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
    """Count, names, target, atomicity, tags and ports are the user's."""
    host = FakeHost(fork=_fork_report(_fork_result("a")))
    output_of(capsys, host, "fork", "vm", "--count", "2", "--name", "a", "--name", "b", "--target", "standby", "--atomic", "--from-running",
              "--tag", "k=v", "--publish", "1:2")  # fmt: skip
    asked = host.asked("fork")
    assert asked.pop("progress") is not None
    assert asked == {
        "0": "vm",
        "count": 2,
        "names": ("a", "b"),
        "target": State.STANDBY,
        "atomic": True,
        "from_running": True,
        "payload": None,
        "payloads": [],
        "tags": {"k": "v"},
        "publish": (Publish(host_port=1, guest_port=2),),
    }


@pytest.mark.parametrize(
    ("words", "count"), [([], 1), (["--name", "a"], 1), (["--name", "a", "--name", "b"], 2), (["-n", "3"], 3)]
)
def test_fork_counts_names(words: list[str], count: int, capsys: pytest.CaptureFixture[str]) -> None:
    """Two names are two forks; the number need not be said twice."""
    host = FakeHost(fork=_fork_report(_fork_result("a")))
    output_of(capsys, host, "fork", "vm", *words)
    assert host.asked("fork")["count"] == count


def test_fork_shows_stages_sharing_and_memory(capsys: pytest.CaptureFixture[str]) -> None:
    """The table says where the time went, how memory is shared and what each fork costs."""
    host = FakeHost(fork=_fork_report(_fork_result("a"), _fork_result("b")))
    header, first, _, summary = output_of(capsys, host, "fork", "vm", "-n", "2").splitlines()
    assert header.split() == ["NAME", "STATE", "TOTAL", "PLACE", "START", "IDENTITY", "SHARING", "UNIQUE", "DISK"]
    assert "232 ms" in first
    assert "hardlink" in first
    assert "1.0 MiB" in first
    assert summary == "2 of 2 forks of vm in 260 ms, 2.0 MiB of memory of their own"
    assert output_of(capsys, host, "fork", "vm", "-q") == "a\nb\n"
    assert document(capsys, host, "fork", "vm")["results"][1]["name"] == "b"


def test_fork_fits_into_a_narrow_terminal(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    """Where its stages would wrap, the table does without them."""
    host = FakeHost(fork=_fork_report(_fork_result("a")))
    monkeypatch.setattr(output, "width", lambda: 80)
    assert output_of(capsys, host, "fork", "vm").split()[:6] == ["NAME", "STATE", "TOTAL", "SHARING", "UNIQUE", "DISK"]


def test_fork_of_a_running_instance_tells_its_pause(capsys: pytest.CaptureFixture[str]) -> None:
    """Who forks a live guest wants to know for how long it stood still."""
    report = msgspec.structs.replace(_fork_report(_fork_result("a")), source_pause_ms=12.3)
    last = output_of(capsys, FakeHost(fork=report), "fork", "vm", "--from-running").splitlines()[-1]
    assert last == "vm was paused for 12 ms, and runs on"


def test_a_failed_fork_is_named_and_exit_1(capsys: pytest.CaptureFixture[str]) -> None:
    """Some failed: those that did not are there, those that did are named with the reason, and the status says so."""
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
def test_the_exit_status_of_a_fan_out_is_why_it_failed(codes: list[str], status: int) -> None:
    """A full disk is 5 here as everywhere, where that is all that went wrong; several reasons are 1."""
    failed = [ForkResult(name="b", ok=False, error="no; do", error_code=code) for code in codes]
    assert run(FakeHost(fork=_fork_report(_fork_result("a"), *failed)), "fork", "vm", "--count", "3") == status


def test_tree_draws_the_lineage(capsys: pytest.CaptureFixture[str]) -> None:
    """Every instance is one line under its parent, with state, fork count, memory, inode and links."""
    vmm = VmmProcess(pid=1, start_ticks=1, executable="/q")
    root = instance("warm", State.TEMPLATE)
    first, second = instance("warm-1", parent=root, vmm=vmm), instance("warm-2", parent=root, vmm=vmm)
    grandchild = instance("warm-1-a", State.STOPPED, parent=first)
    nodes = [
        TreeNode(
            instance=root,
            fork_count=2,
            memory=memory(unique_mib=0),
            children=(
                TreeNode(
                    instance=first,
                    fork_count=1,
                    memory=memory(),
                    children=(TreeNode(instance=grandchild, fork_count=0, memory=None),),
                ),
                TreeNode(instance=second, fork_count=0, memory=memory(unique_mib=2)),
            ),
        ),
        TreeNode(instance=VM, fork_count=0, memory=None),
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
    assert lines[2].split()[2:] == ["Running", "1", "120.0", "MiB", "1.0", "MiB", "77", "3", "hardlink"]
    assert lines[6] == "2 running machines see 1.0 GiB of RAM; 3.0 MiB is unique to one of them"
    assert document(capsys, host, "tree", "warm")[0]["children"][0]["children"][0]["instance"]["name"] == "warm-1-a"


def test_stats_sums_up(capsys: pytest.CaptureFixture[str]) -> None:
    """One line for each machine, and the sum of what cannot be shared."""
    resting = msgspec.structs.replace(memory(), shared_bytes=0, unique_bytes=0, vmm_overhead_bytes=0)
    host = FakeHost(stats={"a": memory(), "b": memory(unique_mib=3), "resting": resting})
    lines = output_of(capsys, host, "stats").splitlines()
    assert lines[1].split()[:7] == ["a", "512.0", "MiB", "120.0", "MiB", "1.0", "MiB"]
    assert lines[3].split()[:6] == ["resting", "512.0", "MiB", "-", "-", "-"]
    assert lines[4].split() == ["(running)", "1.0", "GiB", "4.0", "MiB", "56.0", "MiB"]
    assert document(capsys, host, "stats")["b"]["unique_bytes"] == 3 * MIB


class Family:
    """A template with two forks, one of which has a fork; removing it in the wrong order is refused."""

    def __init__(self) -> None:
        root = instance("root", State.TEMPLATE)
        child, other = instance("child", parent=root), instance("other", parent=root)
        grandchild = instance("grandchild", parent=child)
        self.living = {each.name: each for each in (root, child, other, grandchild)}
        self.host = FakeHost(get=self.get, ls=lambda **_: list(self.living.values()), rm=self.rm)

    def get(self, name: str) -> Instance:
        if name not in self.living:
            raise NotFound(f"there is no instance {name!r}")
        return self.living[name]

    def rm(self, found: Instance) -> None:
        if any(each.parent == found.id for each in self.living.values()):
            raise InUse(f"{found.name} cannot be removed: it has forks")
        del self.living[found.name]


def test_rm_removes_forks_before_their_source(capsys: pytest.CaptureFixture[str]) -> None:
    """A whole family goes in one call, in whatever order it is named."""
    family = Family()
    assert (
        output_of(capsys, family.host, "rm", "root", "grandchild", "child", "other")
        == "grandchild\nchild\nother\nroot\n"
    )
    assert family.living == {}


@pytest.mark.parametrize("words", [["--all", "--yes"], ["--tag", "a=b"]])
def test_rm_by_selection(words: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    """--all and --tag select by the host's list; tags are passed to it."""
    family = Family()
    output_of(capsys, family.host, "rm", *words)
    assert family.living == {}
    assert family.host.asked("ls") == {"tags": {"a": "b"} if "--tag" in words else {}}


def test_rm_goes_on_after_a_failure(capsys: pytest.CaptureFixture[str]) -> None:
    """One that cannot be removed does not keep the others; the status is the first failure's, and all are told."""
    family = Family()
    assert run(family.host, "rm", "missing", "root", "grandchild") == 3
    shown = capsys.readouterr()
    assert shown.out == "grandchild\n"
    assert shown.err == "coppice: there is no instance 'missing'\ncoppice: root cannot be removed: it has forks\n"
    found = document(capsys, family.host, "rm", "root", "other", "child", "gone", status=3)
    assert found["removed"] == ["other", "child", "root"]
    assert found["failed"] == [
        {"code": "not_found", "message": "there is no instance 'gone'", "hint": None, "name": "gone"}
    ]
    assert found["error"]["code"] == "not_found"


def test_gc_tells_what_it_did(capsys: pytest.CaptureFixture[str]) -> None:
    """--dry-run reaches the host, and the words say that nothing was removed."""

    def collect(*, dry_run: bool, caches: bool) -> GcReport:
        removed = ("instances/x", "kernels/y") if caches else ("instances/x",)
        return GcReport(removed=removed, bytes_freed=MIB, dry_run=dry_run)

    host = FakeHost(gc=collect)
    assert output_of(capsys, host, "gc") == "instances/x\n1 leftover, 1.0 MiB freed\n"
    assert output_of(capsys, host, "gc", "--dry-run") == "instances/x\n1 leftover, 1.0 MiB would be freed\n"
    assert output_of(capsys, host, "gc", "--caches").splitlines()[-1] == "2 leftovers, 1.0 MiB freed"


def test_stats_shows_the_budgets(capsys: pytest.CaptureFixture[str]) -> None:
    """How much is in use, and of how much: for people, and with exact numbers for programs."""
    use = BudgetUse(
        instances=5,
        max_instances=100,
        running=3,
        memory_bytes=192 * MIB,
        memory_limit_bytes=4096 * MIB,
        memory_overcommit=16.0,
        disk_free_bytes=2048 * MIB,
        disk_floor_bytes=1024 * MIB,
    )
    host = FakeHost(budget=use)
    shown = output_of(capsys, host, "stats", "--budget")
    for words in ("5 of 100, 3 running", "192.0 MiB of 4.0 GiB, at 16 times over-commit", "2.0 GiB free, of which 1.0"):
        assert words in shown
    assert document(capsys, host, "stats", "--budget")["memory_bytes"] == 192 * MIB


def test_fork_hands_payloads_over(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    """--payload is everyone's; --payloads says how many forks there are, one each."""
    host = FakeHost(fork=_fork_report(_fork_result("a")))
    output_of(capsys, host, "fork", "vm", "--payload", '{"job": 1}')
    asked = host.asked("fork")
    assert (asked["count"], asked["payload"], asked["payloads"]) == (1, b'{"job": 1}', [])
    host = FakeHost(fork=_fork_report(_fork_result("a")))
    each = tmp_path / "each.jsonl"
    each.write_text('{"job": 1}\n{"job": 2}\n')
    output_of(capsys, host, "fork", "vm", "--payloads", str(each))
    asked = host.asked("fork")
    assert (asked["count"], asked["payload"], asked["payloads"]) == (2, None, [b'{"job": 1}', b'{"job": 2}'])


def test_ls_shows_owners_where_there_are_any(capsys: pytest.CaptureFixture[str]) -> None:
    """The operator sees whose an instance is; nobody else is bothered with it."""
    assert "OWNER" not in output_of(capsys, FakeHost(ls=[VM]), "ls")
    lines = output_of(capsys, FakeHost(ls=[VM, instance("theirs", owner="alice")]), "ls").splitlines()
    assert "OWNER" in lines[0]
    assert lines[2].split()[-1] == "alice"


def test_sharing_with_others_is_asked_for(capsys: pytest.CaptureFixture[str]) -> None:
    """--public and --private reach the host; without either a template stays as it is."""
    for words, wanted in (((), None), (("--public",), True), (("--private",), False)):
        host = FakeHost(promote=instance("vm", State.TEMPLATE))
        output_of(capsys, host, "promote", "vm", *words)
        assert host.asked("promote")["public"] is wanted
    host = FakeHost(image_tag=IMAGE)
    output_of(capsys, host, "image", "tag", "debian", "debian", "--public")
    assert host.asked("image_tag")["public"] is True


def test_image_commands(capsys: pytest.CaptureFixture[str]) -> None:
    """build, import, ls, inspect, tag and rm ask for what was written."""
    host = FakeHost(
        image_build=IMAGE, image_import=IMAGE, image_ls=[IMAGE], image_inspect=IMAGE, image_tag=IMAGE, image_rm=None
    )
    line = f"debian is {DIGEST}, 200.0 MiB\n"
    assert output_of(capsys, host, "image", "build", "debian", "--include", "python3,curl", "--include", "git") == line
    built = host.asked("image_build")
    assert (built["0"], built["suite"], built["include"]) == ("debian", "bookworm", ["python3", "curl", "git"])
    assert output_of(capsys, host, "image", "import", "debian", "a.tar") == line
    assert host.asked("image_import")["1"] == Path("a.tar")
    assert output_of(capsys, host, "image", "tag", "debian", "other") == line
    assert host.asked("image_tag") == {"0": "debian", "1": "other", "public": False}
    assert "bookworm minbase" in output_of(capsys, host, "image", "ls")
    assert output_of(capsys, host, "image", "ls", "-q") == "debian\n"
    assert "PATH=/bin" in output_of(capsys, host, "image", "inspect", "debian")
    assert document(capsys, host, "image", "inspect", "debian")["digest"] == DIGEST
    assert document(capsys, host, "image", "rm", "debian") == {"removed": ["debian"]}


def test_kernel_commands(capsys: pytest.CaptureFixture[str]) -> None:
    """add, fetch and ls print keys, which `run --kernel` takes."""
    host = FakeHost(kernel_add=KERNEL, kernel_fetch=KERNEL, kernel_ls=[KERNEL])
    assert output_of(capsys, host, "kernel", "add", "bzImage", "modules") == f"{KERNEL.key}\n"
    assert host.asked("kernel_add") == {"0": Path("bzImage"), "1": Path("modules")}
    assert output_of(capsys, host, "kernel", "fetch") == f"{KERNEL.key}\n"
    assert KERNEL.key in output_of(capsys, host, "kernel", "ls")
    assert document(capsys, host, "kernel", "ls")[0]["vmlinuz"] == "/k/vmlinuz"


def test_doctor_names_the_cure(capsys: pytest.CaptureFixture[str]) -> None:
    """Each failing check comes with what to type; the data directory is not opened, as it may be what is broken."""
    good = Check(name="memory", status="ok", detail="8 GiB", cure="never shown")
    bad = Check(name="qemu", status="fail", detail="not found", cure="apt-get install qemu-system-x86")
    host = FakeHost(doctor=[good])
    assert "cure" not in output_of(capsys, host, "doctor")
    assert not host.opened
    host = FakeHost(doctor=[good, bad])
    assert run(host, "doctor") == 5
    assert "-> apt-get install qemu-system-x86" in capsys.readouterr().out
    assert document(capsys, host, "doctor", status=5)[1]["status"] == "fail"


@pytest.mark.parametrize(
    ("words", "call"),
    [
        (["cp", "vm:/etc/x", "here"], ("cp_out", ("vm", "/etc/x", Path("here")))),
        (["cp", "here", "vm:/tmp/"], ("cp_in", ("vm", Path("here"), "/tmp/"))),
    ],
)
def test_cp_goes_the_way_it_was_written(
    words: list[str], call: tuple[str, Any], capsys: pytest.CaptureFixture[str]
) -> None:
    """The instance's side decides the direction."""
    host = FakeHost(cp_in=2 * MIB, cp_out=2 * MIB)
    assert output_of(capsys, host, *words) == "2.0 MiB copied\n"
    assert [(name, args) for name, args, _ in host.calls] == [call]
    assert document(capsys, host, *words) == {"bytes": 2 * MIB}


def test_logs_are_passed_through(capsysbinary: pytest.CaptureFixture[bytes]) -> None:
    """Into a pipe a log goes byte for byte; as JSON it is text."""
    host = FakeHost(logs=[b"a\xff\x1b[2J\r", b""])
    assert run(host, "logs", "vm", "-n", "5", "--vmm") == 0
    assert capsysbinary.readouterr().out == b"a\xff\x1b[2J\r\n\n"
    assert host.asked("logs") == {"0": "vm", "source": "vmm", "tail": 5, "follow": False}
    assert run(host, "--json", "logs", "vm") == 0
    assert json.loads(capsysbinary.readouterr().out) == {"lines": ["a�\x1b[2J\r", ""]}
