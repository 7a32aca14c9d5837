"""The wheel has the right contents, and runs on a machine with only Python."""

from __future__ import annotations

import json
import os
import re
import shutil
import subprocess
import sys
import tarfile
import zipfile
from pathlib import Path

import pytest

from documentation import ROOT

BUILT_FROM = ("pyproject.toml", "hatch_build.py", "README.md", "CHANGELOG.md", "LICENSE", "src")
AGENT = "coppice/agent/c/coppice-agent"
LAUNCHER = "coppice/vmm/launcher/coppice-launcher"
GUEST = {f"coppice/agent/random/{name}" for name in ("openssl-random.so", "openssl.cnf", "node-random.js")}
PAGE = "coppice/server/web"
DEADLINE_S = 100

pytestmark = pytest.mark.timeout(240)


def run(*argv: str | Path, directory: Path, path: str = os.defpath) -> subprocess.CompletedProcess[str]:
    """Run a program to its end, without this process's Python path and Coppice settings."""
    own = {key: value for key, value in os.environ.items() if not key.startswith(("PYTHON", "COPPICE_"))}
    return subprocess.run(
        [str(word) for word in argv],
        cwd=directory,
        env={**own, "PATH": path, "HOME": str(directory)},
        stdin=subprocess.DEVNULL,
        capture_output=True,
        text=True,
        timeout=DEADLINE_S,
        check=False,
    )


def build(source: Path, target: str, into: Path) -> Path:
    """Build one file of a source tree, in the environment of the tests."""
    done = run(sys.executable, "-m", "hatchling", "build", "-t", target, "-d", into, directory=source)
    assert done.returncode == 0, done.stdout + done.stderr
    (built,) = into.iterdir()
    return built


@pytest.fixture(scope="module")
def sources(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Copy the checkout as a clone would have it: nothing is compiled in it."""
    copy = tmp_path_factory.mktemp("checkout")
    for name in BUILT_FROM:
        if (ROOT / name).is_dir():
            compiled = ("coppice-agent", "coppice-launcher", "openssl-random.so")
            left_out = shutil.ignore_patterns("__pycache__", *compiled)
            shutil.copytree(ROOT / name, copy / name, ignore=left_out)
        else:
            shutil.copy2(ROOT / name, copy / name)
    return copy


@pytest.fixture(scope="module")
def sdist(sources: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Build the source distribution."""
    return build(sources, "sdist", tmp_path_factory.mktemp("sdist"))


@pytest.fixture(scope="module")
def wheel(sources: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Build the wheel."""
    return build(sources, "wheel", tmp_path_factory.mktemp("wheel"))


def contents(wheel: Path) -> dict[str, bytes]:
    """Return all files of a wheel."""
    with zipfile.ZipFile(wheel) as archive:
        return {entry.filename: archive.read(entry) for entry in archive.infolist()}


def test_the_wheel_has_only_the_package_and_its_compiled_programs(wheel: Path) -> None:
    """It has no benchmarks, tests, C sources or objects, and a tag that every Linux on x86-64
    accepts.
    """
    assert re.search(r"-py3-none-manylinux_2_17_x86_64\.musllinux_1_1_x86_64\.whl$", wheel.name)
    names = {name for name in contents(wheel) if ".dist-info/" not in name}
    package = ROOT / "src"
    page = {str(path.relative_to(package)) for path in (package / PAGE).rglob("*") if path.is_file()}
    assert {f"{PAGE}/index.html", f"{PAGE}/vendor/xterm/xterm.mjs", f"{PAGE}/vendor/xterm/LICENSE"} <= page
    assert {name for name in names if not name.endswith(".py")} == {AGENT, LAUNCHER, "coppice/py.typed", *GUEST, *page}
    modules = {str(path.relative_to(package)) for path in (package / "coppice").rglob("*.py")}
    assert {name for name in names if name.endswith(".py")} == modules


def test_the_sdist_builds_the_same_wheel(sdist: Path, wheel: Path, tmp_path: Path) -> None:
    """An installation from source equals one from the wheel, the compiled agent included."""
    with tarfile.open(sdist) as archive:
        archive.extractall(tmp_path, filter="data")
    (unpacked,) = tmp_path.iterdir()
    again = build(unpacked, "wheel", tmp_path / "dist")
    assert again.name == wheel.name
    assert contents(again) == contents(wheel)


def test_the_wheel_runs_without_a_compiler(wheel: Path, tmp_path: Path) -> None:
    """Like `pipx install`, the test installs the wheel and its dependencies into a new environment.
    PATH has only that environment.
    """
    made = run(sys.executable, "-m", "venv", tmp_path / "venv", directory=tmp_path)
    assert made.returncode == 0, made.stderr
    bin_ = tmp_path / "venv" / "bin"

    def installed(*argv: str) -> subprocess.CompletedProcess[str]:
        return run(bin_ / argv[0], *argv[1:], directory=tmp_path, path=str(bin_))

    done = installed("python", "-m", "pip", "install", "--quiet", "--only-binary", ":all:", str(wheel))
    assert done.returncode == 0, done.stderr
    assert installed("coppice", "--version").stdout == f"coppice {wheel.name.split('-')[1]}\n"
    assert "fork" in installed("coppice", "--help").stdout
    doctor = installed("coppice", "--home", str(tmp_path / "home"), "--json", "doctor")
    assert doctor.returncode == 5, doctor.stderr
    checks = {check["name"]: check for check in json.loads(doctor.stdout)}
    assert checks["qemu"]["status"] == "fail"
    code = (
        "import coppice, subprocess; from coppice.agent.c import agent_binary; "
        "print(coppice.__file__); raise SystemExit(subprocess.run([agent_binary()]).returncode)"
    )
    agent = installed("python", "-c", code)
    assert agent.stdout.startswith(str(tmp_path / "venv"))
    assert (agent.returncode, agent.stderr.split(" --")[0]) == (2, "usage: coppice-agent")
