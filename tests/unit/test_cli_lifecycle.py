"""Commands that change an instance: their requests to the host, and their output for people and for
programs.
"""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import msgspec
import pytest

from cli_host import DIGEST, FakeHost, instance
from cli_lines import document, output_of, run
from company import make_authority
from coppice.addresses import check_egress
from coppice.cli import parse
from coppice.errors import GuestTimeout, InUse, NotFound, UsageError
from coppice.model import (
    MIB,
    CaptureReport,
    Egress,
    EgressRefusal,
    EgressReport,
    HealthCheck,
    Image,
    ImageConfig,
    Instance,
    MemFile,
    Publish,
    RestartPolicy,
    Sharing,
    State,
    VolumeMount,
)
from coppice.model.inspection import StandbyReport
from coppice.model.kernel import Kernel
from coppice.requests import GetRequest, ReadyRequest, RmRequest
from coppice.state import locks
from coppice.state.layout import Layout
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
KERNEL = Kernel(key="custom-6.1-0011aabb", version="6.1", vmlinuz=Path("/k/vmlinuz"), modules=Path("/k/modules"))


@pytest.fixture(autouse=True)
def supervised(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Hold the lock of a server on the data directory."""
    monkeypatch.setenv("COPPICE_HOME", str(tmp_path))
    descriptor = locks.try_lock(Layout(tmp_path).supervisor_lock(None))
    assert descriptor is not None
    yield
    locks.release(descriptor)


def test_run_passes_every_option_on(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    """The machine has every option of the command line; only the name is printed, for `$(...)`."""
    (tmp_path / "env").write_text("C=3\n")
    authority = make_authority(tmp_path)
    host = FakeHost(run=VM)
    words = [
        "run", "debian", "--entrypoint", "/bin/env", "--name", "vm", "--cpus", "2", "--memory", "1G", "--overlay", "4G", "-e", "A=1", "--env", "B=x=y",
        "--env-file", str(tmp_path / "env"), "--workdir", "/srv", "--user", "web", "--hostname", "box", "--tag", "team=a",
        "--publish", "8080:80", "-p", "[::1]:53:53/udp", "--network", "none", "--egress", "allow=192.0.2.0/24,Example.org.,*.example.net,2001:db8::1",
        "--volume", "data:/srv/data:ro", "--ca", str(authority), "--proxy", "http://p:1",
        "--kernel", KERNEL.key, "--pull", "never", "--ttl", "15m", "--on-expiry", "stop",
        "--restart", "on-failure:5", "--health", "http:80/up", "--health-interval", "10s", "--restart-unhealthy",
        "--notify", "unix:/run/app.sock", "--no-start", "--", "sleep", "--long",
    ]  # fmt: skip
    assert output_of(capsys, host, *words) == "vm\n"
    asked = host.asked("run")
    assert asked == {
        "image": "debian",
        "pull": "never",
        "command": ("sleep", "--long"),
        "entrypoint": ("/bin/env",),
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
        "vmm": None,
        "network": "none",
        "egress": Egress(
            mode="allow", networks=("192.0.2.0/24", "2001:db8::1/128"), names=("example.org", "*.example.net")
        ),
        "volumes": (VolumeMount(volume="data", mount_path="/srv/data", readonly=True),),
        "limits": None,
        "certificates": (authority.read_text(),),
        "proxy": "http://p:1",
        "notify": "unix:/run/app.sock",
        "kernel": KERNEL.key,
        "start": False,
        "ttl_s": 900,
        "expires_at": None,
        "on_expiry": "stop",
        "restart": RestartPolicy(when="on-failure", max_attempts=5),
        "health_check": HealthCheck(kind="http", port=80, path="/up", interval_s=10, restart=True),
        "auto_standby_s": None,
    }


def test_run_waits_for_the_service(capsys: pytest.CaptureFixture[str]) -> None:
    """With --wait the name is printed when the health check has succeeded."""
    host = FakeHost(run=VM, ready=VM)
    assert output_of(capsys, host, "run", "debian", "--health", "http:80/", "--wait", "2m") == "vm\n"
    assert host.asked("ready") == {"instance": VM.id, "deadline_s": 120}
    for without in ([], ["--health", "none"], ["--health", "http:80", "--no-start"]):
        assert run(host, "run", "debian", "--wait", "5s", *without) == 2
        assert "--wait needs --health" in capsys.readouterr().err


def test_ready_waits_for_each(capsys: pytest.CaptureFixture[str]) -> None:
    """Each is reported; a late one is an error."""
    late = GuestTimeout("the service of b does not answer after 5 s: exit status 1", hint="see `coppice logs b`")

    def answer(request: ReadyRequest) -> Instance:
        if request.instance == "b":
            raise late
        return VM

    host = FakeHost(ready=answer)
    assert output_of(capsys, host, "ready", "vm", "--timeout", "5s") == "vm is ready\n"
    assert host.asked("ready")["deadline_s"] == 5
    assert run(host, "ready", "vm", "b") == late.exit_code
    shown = capsys.readouterr()
    assert shown.out == "vm is ready\n"
    assert "the service of b does not answer after 5 s: exit status 1" in shown.err


def test_run_takes_its_defaults_from_the_host(capsys: pytest.CaptureFixture[str]) -> None:
    """`coppice run debian` equals AsyncHost.run("debian"): the image's command, a generated name,
    and a boot.
    """
    host = FakeHost(run=VM)
    output_of(capsys, host, "run", "debian")
    asked = host.asked("run")
    assert (asked["image"], list(asked["command"]), asked["name"], asked["kernel"], asked["start"]) == (
        "debian",
        [],
        None,
        None,
        True,
    )
    assert (asked["cpus"], asked["memory_bytes"], asked["overlay_bytes"]) == (1, 512 * MIB, 2048 * MIB)


def test_run_adds_a_kernel_that_is_given_as_a_file(capsys: pytest.CaptureFixture[str]) -> None:
    """--kernel PATH adds the kernel, with the directory of --modules if there is one, and the
    machine gets its key.
    """
    for words, modules in ((["--modules", "./modules"], "modules"), ([], None)):
        host = FakeHost(run=VM, kernel_add=KERNEL)
        output_of(capsys, host, "run", "debian", "--kernel", "./bzImage", *words)
        asked = host.asked("kernel_add")
        assert (asked["kernel"], asked["modules"]) == ("./bzImage", modules)
        assert host.asked("run")["kernel"] == KERNEL.key


@pytest.mark.parametrize("command", ["start", "restore", "promote", "demote", "stop"])
def test_a_changing_command_prints_the_new_state(command: str, capsys: pytest.CaptureFixture[str]) -> None:
    """Each command requests only its operation and prints the new state; as JSON it prints the
    whole record.
    """
    changed = instance("vm", State.TEMPLATE)
    host = FakeHost(**{command: changed})
    assert output_of(capsys, host, command, "vm") == "vm is Template\n"
    assert host.operations == [command]
    found = document(capsys, host, command, "vm")
    assert (found["name"], found["state"]) == ("vm", "Template")


def test_another_command_at_a_start(capsys: pytest.CaptureFixture[str]) -> None:
    """Its words are split as by a shell; without it the machine keeps its command."""
    for words, command, entrypoint in (
        ([], None, None),
        (["--command", "serve '--name=a b'"], ["serve", "--name=a b"], None),
        (["--entrypoint", "/bin/sh", "--command", ""], [], ["/bin/sh"]),
    ):
        host = FakeHost(start=VM)
        output_of(capsys, host, "start", "vm", *words)
        asked = host.asked("start")
        given = (asked["command"], asked["entrypoint"])
        assert tuple(None if each is None else list(each) for each in given) == (command, entrypoint)
    assert run(FakeHost(start=VM), "start", "vm", "--command", "'open") == 2
    assert run(FakeHost(run=VM), "run", "debian", "--health", "exec:'open") == 2


def test_the_grace_of_a_stop(capsys: pytest.CaptureFixture[str]) -> None:
    """--grace 0 is no grace; without --grace the host's default applies."""
    for words, grace in ((["--grace", "0"], 0.0), ([], None)):
        host = FakeHost(stop=instance("vm", State.STOPPED))
        output_of(capsys, host, "stop", "vm", *words)
        assert host.asked("stop")["grace_s"] == grace


def test_standby_prints_its_pause(capsys: pytest.CaptureFixture[str]) -> None:
    """The pause is printed, because users of a live guest notice it."""
    report = CaptureReport(pause_ms=12.3, total_ms=48, ram_bytes_written=0, dirty_bytes=0)
    host = FakeHost(standby=StandbyReport(instance=instance("vm", State.STANDBY), capture=report))
    assert (
        output_of(capsys, host, "standby", "vm")
        == "vm is Standby (paused for 12 ms, 48 ms in all, 0 B of RAM written)\n"
    )
    assert document(capsys, host, "standby", "vm")["capture"]["pause_ms"] == 12.3


def test_promote_warns_of_shared_random_numbers(capsys: pytest.CaptureFixture[str]) -> None:
    """People read it on standard error, programs in the record's capture."""
    capture = make_capture(MemFile(inode=1, device=1, size_bytes=MIB, sharing=Sharing.OWN))
    capture = msgspec.structs.replace(capture, shared_random=("node (pid 212): openssl",))
    host = FakeHost(promote=instance("vm", State.TEMPLATE, capture=capture))
    assert run(host, "promote", "vm") == 0
    said = capsys.readouterr()
    assert said.out == "vm is Template\n"
    assert "all forks of vm continue with the same random numbers in node (pid 212): openssl" in said.err
    assert "fork-correctness.md" in said.err
    assert document(capsys, host, "promote", "vm")["capture"]["shared_random"] == ["node (pid 212): openssl"]


def test_public_and_private_reach_the_host(capsys: pytest.CaptureFixture[str]) -> None:
    """--public and --private reach the host; without either, a template keeps its setting."""
    for words, wanted in (((), None), (("--public",), True), (("--private",), False)):
        host = FakeHost(promote=instance("vm", State.TEMPLATE))
        output_of(capsys, host, "promote", "vm", *words)
        assert host.asked("promote")["public"] is wanted
    host = FakeHost(image_tag=IMAGE)
    output_of(capsys, host, "image", "tag", "debian", "debian", "--public")
    assert host.asked("image_tag")["public"] is True


class Family:
    """A template with two forks, one of which has a fork; a removal in the wrong order is refused."""

    def __init__(self) -> None:
        root = instance("root", State.TEMPLATE)
        child, other = instance("child", parent=root), instance("other", parent=root)
        grandchild = instance("grandchild", parent=child)
        self.living = {each.name: each for each in (root, child, other, grandchild)}
        self.host = FakeHost(get=self.get, ls=lambda _: list(self.living.values()), rm=self.rm)

    def get(self, request: GetRequest) -> Instance:
        if (name := request.instance) not in self.living:
            raise NotFound(f"there is no instance {name!r}")
        return self.living[name]

    def rm(self, request: RmRequest) -> None:
        (found,) = [each for each in self.living.values() if each.id == request.instance]
        if any(each.parent == found.id for each in self.living.values()):
            raise InUse(f"{found.name} cannot be removed: it has forks")
        del self.living[found.name]


def test_rm_removes_forks_before_their_source(capsys: pytest.CaptureFixture[str]) -> None:
    """One call removes a whole family, in any order of the names."""
    family = Family()
    assert (
        output_of(capsys, family.host, "rm", "root", "grandchild", "child", "other")
        == "grandchild\nchild\nother\nroot\n"
    )
    assert family.living == {}


@pytest.mark.parametrize("words", [["--all", "--yes"], ["--tag", "a=b"]])
def test_rm_by_selection(words: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    """--all and --tag select from the host's list; tags are passed to the host."""
    family = Family()
    output_of(capsys, family.host, "rm", *words)
    assert family.living == {}
    assert family.host.asked("ls")["tags"] == ({"a": "b"} if "--tag" in words else {})


def test_rm_goes_on_after_a_failure(capsys: pytest.CaptureFixture[str]) -> None:
    """A failed removal does not stop the others. All failures are printed, and the first one sets
    the exit status.
    """
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


def test_egress_shows_and_changes_the_policy(capsys: pytest.CaptureFixture[str]) -> None:
    """Refused connections are listed; without a policy the command changes nothing."""
    report = EgressReport(
        policy=Egress(mode="allow", names=("example.org",)),
        passed_packets=5,
        refused_packets=2,
        refused=(EgressRefusal(what="192.0.2.7:443/tcp", count=2),),
    )
    host = FakeHost(egress=report)
    assert output_of(capsys, host, "egress", "vm", "allow=example.org").splitlines() == [
        "allow=example.org: 5 packets passed, 2 refused",
        "  refused 192.0.2.7:443/tcp (2)",
    ]
    assert host.asked("egress") == {"instance": "vm", "policy": report.policy}
    host = FakeHost(egress=report)
    output_of(capsys, host, "egress", "vm")
    assert host.asked("egress") == {"instance": "vm", "policy": None}


@pytest.mark.parametrize(
    "word", ["some", "allow", "allow=", "none=192.0.2.0/24", "allow=192.0.2.1/24", "allow=-x.org", ""]
)
def test_an_invalid_policy_is_refused(word: str) -> None:
    """The error shows the right form; a network with bits beyond its prefix does not count as a
    host name.
    """
    with pytest.raises(UsageError) as refused:
        check_egress(parse.egress(word))
    assert refused.value.hint


@pytest.mark.parametrize(
    ("words", "expected"),
    [
        (["--ttl", "90s"], {"ttl_s": 90}),
        (["--auto-standby", "15m"], {"auto_standby_s": 900}),
        (["--restart", "always"], {"restart": RestartPolicy(when="always")}),
        (["--restart", "never"], {"restart": RestartPolicy()}),
        (
            ["--restart", "on-failure:2", "--restart-delay", "5s"],
            {"restart": RestartPolicy(when="on-failure", max_attempts=2, backoff_s=5)},
        ),
        (
            ["--health", "exec:pg_isready -q", "--health-timeout", "3s", "--health-retries", "2"],
            {"health_check": HealthCheck(kind="exec", command=("pg_isready", "-q"), timeout_s=3, failures=2)},
        ),
        (
            ["--health", "tcp:5432", "--health-start-period", "2m"],
            {"health_check": HealthCheck(kind="tcp", port=5432, start_period_s=120)},
        ),
        (["--health", "http:80"], {"health_check": HealthCheck(kind="http", port=80)}),
        (["--health", "log:up: ready"], {"health_check": HealthCheck(kind="log", text="up: ready")}),
        (["--health", "none"], {"health_check": HealthCheck()}),
    ],
)
def test_update_changes_what_is_given(
    words: list[str], expected: dict[str, object], capsys: pytest.CaptureFixture[str]
) -> None:
    """All else stays as it is."""
    host = FakeHost(update=VM)
    output_of(capsys, host, "update", "vm", *words)
    nothing = {
        "ttl_s": None,
        "expires_at": None,
        "on_expiry": None,
        "restart": None,
        "health_check": None,
        "auto_standby_s": None,
    }
    assert host.asked("update") == {"instance": "vm", **nothing, **expected}


@pytest.mark.parametrize(
    "words",
    [
        ["--restart", "sometimes"],
        ["--restart", "always:x"],
        ["--restart-delay", "5s"],
        ["--health", "ping"],
        ["--health", "tcp:80/x"],
        ["--health", "exec:"],
        ["--health", "log:"],
        ["--health-timeout", "3s"],
        ["--ttl", "soon"],
    ],
)
def test_a_malformed_policy_is_refused(words: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    """With a hint, before any request."""
    host = FakeHost(update=VM)
    assert run(host, "update", "vm", *words) == 2
    said = capsys.readouterr().err
    assert "write" in said or "add" in said


@pytest.mark.parametrize(
    ("words", "wanted"),
    [
        (["--restart", "always"], "--restart"),
        (["--restart", "on-failure:2", "--auto-standby", "10m"], "--restart and --auto-standby"),
        (["--restart", "never", "--auto-standby", "0s", "--health", "tcp:80"], None),
        ([], None),
    ],
)
def test_policies_that_nothing_carries_out_are_named(
    capsys: pytest.CaptureFixture[str], tmp_path: Path, words: list[str], wanted: str | None
) -> None:
    """Without a server on the data directory, a machine that ends by itself stays ended, and the user is told. With one,
    nothing is said.
    """
    host, home = FakeHost(run=VM, update=VM), tmp_path / "home"
    commands = [["run", "debian", *words], *([["update", "vm", *words]] if words else [])]
    for command in commands:
        assert run(host, "--home", str(home), *command) == 0
        told = capsys.readouterr().err
        assert (f"no server runs on {home}, so nothing carries out {wanted} yet" in told) == (wanted is not None)
        assert ("coppice serve" in told) == (wanted is not None)
    for command in commands:  # the common fixture holds the lock of its server
        assert run(host, *command) == 0
        assert capsys.readouterr().err == ""
