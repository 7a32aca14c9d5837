"""Images, kernels and doctor: their requests to the host, and their output for people and for
programs.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import msgspec
import pytest

from cli_host import DIGEST, FakeHost
from cli_lines import document, output_of, run
from coppice.model import MIB, Check, Image, ImageConfig
from coppice.model.kernel import Kernel

IMAGE = Image(
    digest=DIGEST,
    name="debian",
    size_bytes=200 * MIB,
    config=ImageConfig(cmd=("bash",), env={"PATH": "/bin"}),
    source="bookworm minbase",
    created_at=1_700_000_000.0,
)
KERNEL = Kernel(key="custom-6.1-0011aabb", version="6.1", vmlinuz=Path("/k/vmlinuz"), modules=Path("/k/modules"))


def test_image_commands(capsys: pytest.CaptureFixture[str]) -> None:
    """build, import, ls, inspect, tag and rm request exactly the operation that was typed."""
    host = FakeHost(
        image_build=IMAGE, image_import=IMAGE, image_ls=[IMAGE], image_inspect=IMAGE, image_tag=IMAGE, image_rm=None
    )
    line = f"debian is {DIGEST}, 200.0 MiB\n"
    assert output_of(capsys, host, "image", "build", "debian", "--include", "python3,curl", "--include", "git") == line
    built = host.asked("image_build")
    assert (built["name"], built["suite"], built["include"]) == ("debian", "bookworm", ("python3", "curl", "git"))
    assert output_of(capsys, host, "image", "import", "debian", "a.tar") == line
    assert host.asked("image_import")["path"] == "a.tar"
    output_of(capsys, host, "image", "import", "debian", "a.tar", "--tag", "app:2")
    assert msgspec.structs.asdict(host.calls[-1])["tag"] == "app:2"
    assert output_of(capsys, host, "image", "tag", "debian", "other") == line
    assert host.asked("image_tag") == {"image": "debian", "name": "other", "public": False}
    assert "bookworm minbase" in output_of(capsys, host, "image", "ls")
    assert output_of(capsys, host, "image", "ls", "-q") == "debian\n"
    assert "PATH=/bin" in output_of(capsys, host, "image", "inspect", "debian")
    assert document(capsys, host, "image", "inspect", "debian")[0]["digest"] == DIGEST
    assert document(capsys, host, "image", "rm", "debian") == {"removed": ["debian"], "failed": []}


def test_pull(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """`pull` and `image pull` are one command. Credentials come from a file or the environment."""
    monkeypatch.delenv("COPPICE_REGISTRY_CREDS", raising=False)
    line = f"debian is {DIGEST}, 200.0 MiB\n"
    asked: dict[str, Any] = {
        "reference": "alpine",
        "name": None,
        "platform": None,
        "tls_verify": None,
        "public": False,
        "tags": {},
    }
    for words in (("pull",), ("image", "pull")):
        host = FakeHost(image_pull=IMAGE)
        assert output_of(capsys, host, *words, "alpine") == line
        assert host.asked("image_pull") == {**asked, "credentials": None}
    monkeypatch.setenv("COPPICE_REGISTRY_CREDS", "user:of-environment")
    host = FakeHost(image_pull=IMAGE)
    output_of(
        capsys, host, "pull", "alpine", "--no-tls-verify", "--platform", "linux/amd64", "--name", "mine", "--tag", "a=b"
    )
    given = {
        "tags": {"a": "b"},
        "tls_verify": False,
        "platform": "linux/amd64",
        "name": "mine",
        "credentials": "user:of-environment",
    }
    assert host.asked("image_pull") == asked | given
    creds = tmp_path / "creds"
    creds.write_text("user:of:file\n")
    host = FakeHost(image_pull=IMAGE)
    output_of(capsys, host, "pull", "alpine", "--creds-file", str(creds))
    assert host.asked("image_pull") == {**asked, "credentials": "user:of:file"}
    for text in ("", "user", "user:", "a:b\nc:d"):
        creds.write_text(text)
        assert run(host, "pull", "alpine", "--creds-file", str(creds)) == 2
        assert "USER:PASSWORD" in capsys.readouterr().err
    assert run(host, "pull", "alpine", "--creds-file", str(tmp_path / "none")) == 2


def test_kernel_commands(capsys: pytest.CaptureFixture[str]) -> None:
    """add, fetch and ls print keys that `run --kernel` and rm accept."""
    host = FakeHost(kernel_add=KERNEL, kernel_fetch=KERNEL, kernel_ls=[KERNEL], kernel_rm=None)
    assert output_of(capsys, host, "kernel", "add", "bzImage", "modules") == f"{KERNEL.key}\n"
    asked = {"kernel": "bzImage", "modules": "modules", "config": None, "no_modules": False, "acpi": None}
    assert host.asked("kernel_add") == asked
    words = ["kernel", "add", "vmlinux", "--config", ".config", "--no-modules", "--no-acpi"]
    host = FakeHost(kernel_add=KERNEL, kernel_fetch=KERNEL, kernel_ls=[KERNEL], kernel_rm=None)
    output_of(capsys, host, *words)
    asked = {"kernel": "vmlinux", "modules": None, "config": ".config", "no_modules": True, "acpi": False}
    assert host.asked("kernel_add") == asked
    assert output_of(capsys, host, "kernel", "fetch") == f"{KERNEL.key}\n"
    assert KERNEL.key in output_of(capsys, host, "kernel", "ls")
    assert document(capsys, host, "kernel", "ls")[0]["vmlinuz"] == "/k/vmlinuz"
    assert document(capsys, host, "kernel", "rm", KERNEL.key) == {"removed": [KERNEL.key], "failed": []}
    assert host.asked("kernel_rm") == {"kernel": KERNEL.key}


def test_doctor_prints_a_remedy_for_each_failure(capsys: pytest.CaptureFixture[str]) -> None:
    """Each failed check has a remedy to type. The data directory is not opened, because it may be
    the broken part.
    """
    good = Check(name="memory", status="ok", detail="8 GiB", cure="never shown")
    bad = Check(name="qemu", status="fail", detail="not found", cure="apt-get install qemu-system-x86")
    host = FakeHost(doctor=[good])
    assert "cure" not in output_of(capsys, host, "doctor")
    assert not host.opened
    host = FakeHost(doctor=[good, bad])
    assert run(host, "doctor") == 5
    assert "-> apt-get install qemu-system-x86" in capsys.readouterr().out
    assert document(capsys, host, "doctor", status=5)[1]["status"] == "fail"
