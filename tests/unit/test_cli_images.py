"""Images, kernels and doctor: what they ask of the host, what they print for people and for programs."""

from __future__ import annotations

from pathlib import Path

import pytest

from cli_host import DIGEST, FakeHost
from cli_lines import document, output_of, run
from coppice.guest.kernel import Kernel
from coppice.model import MIB, Check, Image, ImageConfig

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
    output_of(capsys, host, "image", "import", "debian", "a.tar", "--tag", "app:2")
    assert host.calls[-1][2]["tag"] == "app:2"
    assert output_of(capsys, host, "image", "tag", "debian", "other") == line
    assert host.asked("image_tag") == {"0": "debian", "1": "other", "public": False}
    assert "bookworm minbase" in output_of(capsys, host, "image", "ls")
    assert output_of(capsys, host, "image", "ls", "-q") == "debian\n"
    assert "PATH=/bin" in output_of(capsys, host, "image", "inspect", "debian")
    assert document(capsys, host, "image", "inspect", "debian")["digest"] == DIGEST
    assert document(capsys, host, "image", "rm", "debian") == {"removed": ["debian"]}


def test_kernel_commands(capsys: pytest.CaptureFixture[str]) -> None:
    """add, fetch and ls print keys, which `run --kernel` and rm take."""
    host = FakeHost(kernel_add=KERNEL, kernel_fetch=KERNEL, kernel_ls=[KERNEL], kernel_rm=None)
    assert output_of(capsys, host, "kernel", "add", "bzImage", "modules") == f"{KERNEL.key}\n"
    assert host.asked("kernel_add") == {"0": Path("bzImage"), "1": Path("modules")}
    assert output_of(capsys, host, "kernel", "fetch") == f"{KERNEL.key}\n"
    assert KERNEL.key in output_of(capsys, host, "kernel", "ls")
    assert document(capsys, host, "kernel", "ls")[0]["vmlinuz"] == "/k/vmlinuz"
    assert document(capsys, host, "kernel", "rm", KERNEL.key) == {"removed": [KERNEL.key]}
    assert host.asked("kernel_rm") == {"0": KERNEL.key}


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
