"""Run the code blocks of the documents as a reader would."""

from __future__ import annotations

import asyncio
import os
import re
import shlex
import sys
from pathlib import Path

ROOT = Path(__file__).parents[1]
_BLOCK = re.compile(r"^```(\w+)\n(.*?)^```$", re.MULTILINE | re.DOTALL)


def blocks(page: str, language: str) -> list[str]:
    """Return all code blocks of a language, in order."""
    found = [text for marked, text in _BLOCK.findall((ROOT / page).read_text()) if marked == language]
    assert found, f"{page} has no {language} block"
    return found


def environment(home: Path, directory: Path) -> dict[str, str]:
    """Return the environment of a reader whose installed `coppice` is the code under test."""
    programs = directory / "bin"
    programs.mkdir(exist_ok=True)
    command = programs / "coppice"
    command.write_text(f'#!/bin/sh\nexec {shlex.quote(sys.executable)} -m coppice "$@"\n')
    command.chmod(0o755)
    return {
        **os.environ,
        "PATH": f"{programs}:{os.environ['PATH']}",
        "PYTHONPATH": f"{ROOT / 'src'}:{ROOT}",
        "COPPICE_HOME": str(home),
        "COLUMNS": "150",
    }


async def run(*argv: str, env: dict[str, str], directory: Path, deadline_s: float) -> str:
    """Run a program to its end and return its standard output. Its failure fails the document's
    test.
    """
    process = await asyncio.create_subprocess_exec(
        *argv,
        env=env,
        cwd=directory,
        stdin=asyncio.subprocess.DEVNULL,
        stdout=asyncio.subprocess.PIPE,
        stderr=asyncio.subprocess.PIPE,
    )
    try:
        out, err = await asyncio.wait_for(process.communicate(), deadline_s)
    except BaseException:
        process.kill()
        await process.wait()
        raise
    assert process.returncode == 0, f"exit status {process.returncode}\n{out.decode()}\n{err.decode()}"
    return out.decode()


async def run_shell(script: str, *, env: dict[str, str], directory: Path, deadline_s: float) -> str:
    """Run the lines of `sh` blocks. The first failure ends the run, and a trace shows the line."""
    return await run("bash", "-euxo", "pipefail", "-c", script, env=env, directory=directory, deadline_s=deadline_s)
