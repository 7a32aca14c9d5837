"""The agent's C sources call each other one way."""

from __future__ import annotations

import shutil
import subprocess
from graphlib import TopologicalSorter
from pathlib import Path

from agent_process import SOURCE


def calls(directory: Path) -> dict[str, set[str]]:
    """Return, for each file, the files whose functions or data it uses, according to the compiler."""
    compiler = shutil.which("gcc") or shutil.which("cc")
    assert compiler
    sources = sorted(SOURCE.glob("*.c"))
    subprocess.run([compiler, "-std=gnu11", "-O0", "-c", *map(str, sources)], cwd=directory, check=True)
    defined: dict[str, str] = {}
    wanted: dict[str, set[str]] = {}
    for source in sources:
        table = subprocess.run(
            ["nm", f"{source.stem}.o"], cwd=directory, capture_output=True, text=True, check=True
        ).stdout
        for *_, kind, symbol in (line.split() for line in table.splitlines()):
            if kind == "U":
                wanted.setdefault(source.stem, set()).add(symbol)
            elif kind.isupper():
                defined[symbol] = source.stem
    return {
        source.stem: {defined[symbol] for symbol in wanted[source.stem] if symbol in defined} - {source.stem}
        for source in sources
    }


def test_calls_go_one_way(tmp_path: Path) -> None:
    """No two files call each other, directly or through others."""
    used = calls(tmp_path)
    assert not used["base"]
    assert list(TopologicalSorter(used).static_order())[-1] == "main"
