"""tools/setup, a new user's first minute: it waits for another apt, and no step is silent."""

from __future__ import annotations

import fcntl
import os
import shutil
import subprocess
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
_APT = """#!/bin/sh
case "$*" in
    *update*) exec /usr/bin/apt-get -o Dir::State::lists={lists} -o Dir::Etc::sourcelist=/dev/null -o Dir::Etc::sourceparts=/dev/null "$@" ;;
    *) echo "asked: $*"; echo "Setting up everything"; exit ${{APT_STATUS:-0}} ;;
esac
"""


def stub(path: Path, text: str) -> None:
    """Write a program of that name."""
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(text)
    path.chmod(0o755)


@pytest.fixture
def checkout(tmp_path: Path) -> Path:
    """Return a checkout without any installed dependency, on a system whose apt installs nothing."""
    (tmp_path / "tools").mkdir()
    shutil.copy(ROOT / "tools/setup", tmp_path / "tools/setup")
    for name in ("agent/c", "vmm/launcher"):
        (tmp_path / "src/coppice" / name).mkdir(parents=True)
    for name in ("pyproject.toml", "hatch_build.py"):
        (tmp_path / name).touch()
    (tmp_path / "lists/partial").mkdir(parents=True)
    stub(tmp_path / "bin/dpkg-query", "#!/bin/sh\nexit 1\n")
    stub(tmp_path / "bin/apt-cache", "#!/bin/sh\nexit 0\n")
    stub(tmp_path / "bin/sudo", '#!/bin/sh\nexec "$@"\n')
    stub(tmp_path / "bin/apt-get", _APT.format(lists=tmp_path / "lists"))
    stub(tmp_path / ".venv/bin/python", '#!/bin/sh\necho "Collecting what $* needs"\nexit ${PIP_STATUS:-0}\n')
    return tmp_path


def setup(checkout: Path, **env: str) -> subprocess.Popen[str]:
    """Start the script."""
    path = f"{checkout}/bin:{os.environ['PATH']}"
    return subprocess.Popen(
        ["sh", checkout / "tools/setup", "demo"],
        env={**os.environ, "PATH": path, **env},
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    )


@pytest.fixture
def lock(checkout: Path) -> Iterator[object]:
    """Hold the lock of apt's lists, as another apt does while it reads them."""
    with (checkout / "lists/lock").open("w") as file:
        fcntl.lockf(file, fcntl.LOCK_EX)
        yield file


def test_the_script_waits_for_another_apt(checkout: Path, lock: object) -> None:
    """The real apt-get fails at once if its lists are locked; the script names the holder and
    continues when the lock is free.
    """
    with setup(checkout) as running:
        assert running.stdout is not None
        for line in running.stdout:
            if "waiting" in line:
                assert f"process {os.getpid()}" in line
                fcntl.lockf(lock, fcntl.LOCK_UN)  # type: ignore[arg-type]  # the fixture's file
                break
        else:
            pytest.fail("the script did not say that it waits")
        assert "Setting up everything" in running.stdout.read()
    assert running.returncode == 0
    assert (checkout / ".venv/.installed-demo").exists()


def test_the_wait_for_another_apt_has_a_deadline(checkout: Path, lock: object) -> None:
    """The script stops waiting for an apt that hangs, and names the lock."""
    out, _ = setup(checkout, LOCK_SECONDS="2").communicate(timeout=60)
    assert "lists/lock" in out
    assert "Setting up everything" not in out


def test_each_step_is_announced(checkout: Path) -> None:
    """The long steps, apt-get install and pip install, show their progress; apt itself waits for
    dpkg's lock.
    """
    running = setup(checkout)
    out, _ = running.communicate(timeout=60)
    assert running.returncode == 0
    lines = [line for line in out.splitlines() if line.startswith("==> ")]
    assert [line.split()[1] for line in lines] == ["apt-get", "apt-get", "pip", "pip"]
    assert "Setting up everything" in out
    assert out.count("Collecting what") == 2
    assert "-o DPkg::Lock::Timeout=" in out


@pytest.mark.parametrize("variable", ["APT_STATUS", "PIP_STATUS"])
def test_a_failed_step_ends_the_script(checkout: Path, variable: str) -> None:
    """The script prints the step's output and exits with its status; the next run tries again."""
    running = setup(checkout, **{variable: "7"})
    out, _ = running.communicate(timeout=60)
    assert running.returncode == 7
    assert ("Setting up" if variable == "APT_STATUS" else "Collecting") in out
    assert not (checkout / ".venv/.installed-demo").exists()
