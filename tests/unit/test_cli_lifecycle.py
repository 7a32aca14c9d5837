"""Commands that change what an instance is: what they ask of the host, what they print for people and for programs."""

from __future__ import annotations

from pathlib import Path

import pytest

from cli_host import DIGEST, FakeHost, instance
from cli_lines import document, output_of, run
from coppice.errors import InUse, NotFound
from coppice.guest.kernel import Kernel
from coppice.model import MIB, CaptureReport, Image, ImageConfig, Instance, Publish, State, VolumeMount

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


def test_run_passes_every_option_on(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    """What is written on the command line is what the machine becomes; the name alone is printed, for `$(...)`."""
    (tmp_path / "env").write_text("C=3\n")
    host = FakeHost(run=VM)
    words = [
        "run", "debian", "--name", "vm", "--cpus", "2", "--memory", "1G", "--overlay", "4G", "-e", "A=1", "--env", "B=x=y",
        "--env-file", str(tmp_path / "env"), "--workdir", "/srv", "--user", "web", "--hostname", "box", "--tag", "team=a",
        "--publish", "8080:80", "-p", "[::1]:53:53/udp", "--volume", "data:/srv/data:ro", "--kernel", KERNEL.key, "--no-start", "--", "sleep", "--long",
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
        "volumes": (VolumeMount(volume="data", mount_path="/srv/data", readonly=True),),
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


def test_sharing_with_others_is_asked_for(capsys: pytest.CaptureFixture[str]) -> None:
    """--public and --private reach the host; without either a template stays as it is."""
    for words, wanted in (((), None), (("--public",), True), (("--private",), False)):
        host = FakeHost(promote=instance("vm", State.TEMPLATE))
        output_of(capsys, host, "promote", "vm", *words)
        assert host.asked("promote")["public"] is wanted
    host = FakeHost(image_tag=IMAGE)
    output_of(capsys, host, "image", "tag", "debian", "debian", "--public")
    assert host.asked("image_tag")["public"] is True


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
