"""The commands of volumes: their requests to the host, and their output for people and for
programs.
"""

from __future__ import annotations

import json

import msgspec
import pytest

from cli_host import FakeHost, instance
from coppice.cli import main
from coppice.errors import InUse, NotFound
from coppice.model import GIB, MIB, Attachment, MachineSpec, State, Volume, VolumeDisk, VolumeMount
from coppice.model.inspection import Inspection, VolumeInspection
from coppice.requests import VolumeRmRequest


def held(name: str, *, readonly: bool = True) -> Attachment:
    """Return an attachment of the volume to an instance."""
    return Attachment(holder="instance", instance_id="i" * 24, name=name, mount_path="/srv/data", readonly=readonly)


DATA = Volume(
    id="v" * 24, name="data", size_bytes=2 * GIB, created_at=1_700_000_000.0, tags={"team": "a"},
    attachments=(held("oak", readonly=False),),
)  # fmt: skip
MODELS = Volume(
    id="w" * 24, name="models", size_bytes=512 * MIB, created_at=1_700_000_000.0, owner="alice",
    attachments=tuple(held(f"fork-{number}") for number in range(5)),
)  # fmt: skip
SPARE = Volume(id="x" * 24, name="spare", size_bytes=16 * MIB, created_at=1_700_000_000.0)


def run(host: FakeHost, *words: str) -> int:
    """Return the exit status of a command line over that host."""
    return main(words, host_factory=host.factory)


def test_create_passes_its_options_on(capsys: pytest.CaptureFixture[str]) -> None:
    """Size, tags and initial contents reach the host; the name or the record is printed."""
    host = FakeHost(volume_create=DATA)
    assert run(host, "volume", "create", "data", "--size", "2G", "--tag", "team=a", "--from", "a.tar") == 0
    asked = host.asked("volume_create")
    assert asked == {"name": "data", "size_bytes": 2 * GIB, "archive": "a.tar", "tags": {"team": "a"}}
    assert capsys.readouterr().out == "data\n"
    assert run(FakeHost(volume_create=DATA), "--json", "volume", "create", "data") == 0
    assert json.loads(capsys.readouterr().out)["attachments"][0]["name"] == "oak"


def test_ls_shows_the_holders(capsys: pytest.CaptureFixture[str]) -> None:
    """Each line names the writer and the readers, or gives the number of many readers."""
    host = FakeHost(volume_ls=[DATA, MODELS, SPARE])
    assert run(host, "volume", "ls", "--tag", "team=a") == 0
    assert host.asked("volume_ls") == {"tags": {"team": "a"}}
    lines = capsys.readouterr().out.splitlines()
    assert [line.split()[0] for line in lines] == ["NAME", "data", "models", "spare"]
    assert "2.0 GiB  oak" in lines[1]
    assert "5, read-only" in lines[2]
    assert "alice" in lines[2]
    assert " - " in lines[3]
    assert run(FakeHost(volume_ls=[DATA, SPARE]), "volume", "ls", "-q") == 0
    assert capsys.readouterr().out == "data\nspare\n"
    assert run(FakeHost(volume_ls=[DATA, SPARE]), "--json", "volume", "ls") == 0
    assert [each["name"] for each in json.loads(capsys.readouterr().out)] == ["data", "spare"]


def test_inspect_shows_each_holder(capsys: pytest.CaptureFixture[str]) -> None:
    """Each holder is shown with its path and its access; with --json the output is always a list."""
    found = VolumeInspection(volume=DATA, disk="/x/data.raw", disk_bytes=MIB, link_count=2)
    assert run(FakeHost(volume_inspect=found), "volume", "inspect", "data") == 0
    shown = capsys.readouterr().out
    for words in ("1.0 MiB of 2.0 GiB", "oak, at /srv/data, for writing", "/x/data.raw, 2 links", "team=a"):
        assert words in shown
    assert run(FakeHost(volume_inspect=found), "--json", "volume", "inspect", "data") == 0
    (document,) = json.loads(capsys.readouterr().out)
    assert (document["disk_bytes"], document["volume"]["size_bytes"]) == (MIB, 2 * GIB)


def test_rm_goes_on_and_ends_with_the_first_failure(capsys: pytest.CaptureFixture[str]) -> None:
    """An attached volume is refused with its holders, and does not stop the other removals."""
    problems = {"data": InUse("oak has it", hint="remove it"), "nothing": NotFound("there is none")}

    def answer(request: VolumeRmRequest) -> None:
        name = request.volume
        if name in problems:
            raise problems[name]

    assert run(FakeHost(volume_rm=answer), "volume", "rm", "data", "spare", "nothing") == InUse.exit_code
    shown = capsys.readouterr()
    assert shown.out == "spare\n"
    assert "oak has it; remove it" in shown.err


def test_run_attaches_volumes(capsys: pytest.CaptureFixture[str]) -> None:
    """Volumes are attached for writing, or with `:ro` for reading, in the written order."""
    host = FakeHost(run=instance("vm"))
    words = ("run", "debian", "--volume", "data:/srv/data", "-v", "models:/models:ro")
    assert run(host, *words) == 0
    assert host.asked("run")["volumes"] == (
        VolumeMount(volume="data", mount_path="/srv/data"),
        VolumeMount(volume="models", mount_path="/models", readonly=True),
    )
    assert capsys.readouterr().out == "vm\n"


def test_inspect_of_an_instance_shows_its_volumes(capsys: pytest.CaptureFixture[str]) -> None:
    """The mount points are shown, and the read-only volumes are marked."""
    disks = tuple(
        VolumeDisk(volume_id="v" * 24, volume_name=name, size_bytes=GIB, mount_path=f"/{name}", readonly=readonly)
        for name, readonly in (("data", False), ("models", True))
    )
    vm = msgspec.structs.replace(instance("vm", State.STOPPED), machine=MachineSpec(volumes=disks))
    found = Inspection(instance=vm, fork_count=0, forks=(), directory="/x", disk_bytes=0, memory=None)
    assert run(FakeHost(inspect=found), "inspect", "vm") == 0
    assert "data at /data, models at /models (read-only)" in capsys.readouterr().out
