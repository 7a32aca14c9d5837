"""The types of the public API, as a user's type checker sees them, are complete, precise, and equal
in mypy and pyright.
"""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
SCRIPTS = sorted((ROOT / "tests" / "typing").glob("*.py"))


@pytest.mark.parametrize(
    "checker", [["mypy", "--strict"], ["pyright", "--pythonpath", sys.executable]], ids=["mypy", "pyright"]
)
def test_a_users_script_passes_the_type_checkers(checker: list[str], tmp_path: Path) -> None:
    """Each call's result has the type that the script states, outside the project and without its
    settings.
    """
    env = {**os.environ, "MYPYPATH": str(ROOT / "src"), "PYTHONPATH": str(ROOT / "src")}
    if checker[0] == "pyright":
        (tmp_path / "pyrightconfig.json").write_text(
            f'{{"extraPaths": ["{ROOT / "src"}"], "typeCheckingMode": "strict"}}'
        )
    for script in SCRIPTS:
        (tmp_path / script.name).write_text(script.read_text())
    command = [sys.executable, "-m", *checker, *(str(tmp_path / script.name) for script in SCRIPTS)]
    done = subprocess.run(command, cwd=tmp_path, env=env, capture_output=True, text=True, check=False, timeout=110)
    assert done.returncode == 0, done.stdout + done.stderr
