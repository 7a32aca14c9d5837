"""Run the recipes of docs/cookbook, and write how long each step took to benchmarks/cookbook.json.

python -m bench.cookbook --home DIR [PAGE...]
python -m bench.insert_results                   write the tables of the recipes

The images of the recipes are built if DIR has none. The tests run the same scripts
(tests/vm/test_cookbook.py).
"""

from __future__ import annotations

import argparse
import asyncio
import contextlib
import itertools
import os
import re
import shlex
import signal
import sys
import tempfile
from collections.abc import Mapping
from pathlib import Path

import msgspec

from bench.accounting import host_facts
from bench.records import HostFacts
from coppice.client import AsyncHost
from coppice.errors import NotFound

ROOT = Path(__file__).resolve().parent.parent
FOLDER = ROOT / "docs/cookbook"
PAGES = ("postgresql", "chromium", "nodejs", "python-worker")
RESULTS = ROOT / "benchmarks/cookbook.json"
_BLOCK = re.compile(r"^```(\w+)\n(.*?)^```$", re.MULTILINE | re.DOTALL)
_FILE = re.compile(r"(?:#|//|--|<!--) ([\w.-]+\.\w+)(?: -->)?\n")
_BUILD = re.compile(r"coppice image build (\S+) --include (\S+)\n")
_TREE = re.compile(r"^NAME +STATE +FORKS .*?running machines see .*?$", re.MULTILINE | re.DOTALL)
_TRACE = re.compile(r"^\++@([\d.]+)@ (.*)$", re.MULTILINE)
DEADLINE_S = 900.0


class Recipe(msgspec.Struct, frozen=True):
    """A page, as a reader follows it."""

    image: str
    packages: tuple[str, ...]
    files: dict[str, str]
    script: str  # all that follows the build of the image


class Step(msgspec.Struct, frozen=True):
    """A command of a recipe."""

    command: str
    seconds: float


class Cost(msgspec.Struct, frozen=True):
    """The steps of a recipe, and the tree that it printed."""

    page: str
    host: HostFacts
    steps: list[Step]
    tree: str


class CookbookReport(msgspec.Struct, frozen=True):
    """A run of each recipe."""

    costs: list[Cost]


def recipe(page: str) -> Recipe:
    """Read a recipe. Its first `sh` block builds the image; blocks that begin with a file's name are files."""
    files: dict[str, str] = {}
    script: list[str] = []
    for language, text in _BLOCK.findall((FOLDER / f"{page}.md").read_text()):
        if named := _FILE.match(text):
            files[named[1]] = text
        elif language == "sh":
            script.append(text)
    build = _BUILD.fullmatch(script[0])
    if build is None:
        raise AssertionError(f"{page}: the first sh block builds the image")
    return Recipe(image=build[1], packages=tuple(build[2].split(",")), files=files, script="".join(script[1:]))


async def follow(recipe: Recipe, directory: Path, env: Mapping[str, str], deadline_s: float) -> tuple[str, list[Step]]:
    """Run a recipe in an empty directory. Return its output, and its commands with their times.

    :raises AssertionError: a line failed; the message has all output
    """
    for name, text in recipe.files.items():
        (directory / name).write_text(text)
    with tempfile.TemporaryFile("w+") as out, tempfile.TemporaryFile("w+") as err:
        process = await asyncio.create_subprocess_exec(
            *("bash", "-euxo", "pipefail", "-c", f"PS4='+@$EPOCHREALTIME@ '\n{recipe.script}\n: end"),
            env=env,
            cwd=directory,
            stdin=asyncio.subprocess.DEVNULL,
            stdout=out,
            stderr=err,
            start_new_session=True,
        )
        ended = "in time"
        try:
            await asyncio.wait_for(process.wait(), deadline_s)
        except TimeoutError:
            ended = f"after {deadline_s:g} s"
        finally:
            with contextlib.suppress(ProcessLookupError):
                os.killpg(process.pid, signal.SIGKILL)  # with what a failed line left in the background
            await process.wait()
        out.seek(0)
        err.seek(0)
        printed, trace = out.read(), err.read()
    if process.returncode:
        raise AssertionError(f"exit status {process.returncode}, {ended}\n{printed}\n{trace}")
    lines = _TRACE.findall(trace)
    steps = [
        Step(command=command, seconds=float(following[0]) - float(begin))
        for (begin, command), following in itertools.pairwise(lines)
        if command.startswith(("coppice ", "python3 "))
    ]
    return printed, steps


def environment(home: Path, programs: Path) -> dict[str, str]:
    """Return the environment of a reader whose `coppice` and `python3` are those of this checkout."""
    programs.mkdir(exist_ok=True)
    for name, words in (("coppice", "-m coppice "), ("python3", "")):
        (programs / name).write_text(f'#!/bin/sh\nexec {shlex.quote(sys.executable)} {words}"$@"\n')
        (programs / name).chmod(0o755)
    return {
        **os.environ,
        "PATH": f"{programs}:{os.environ['PATH']}",
        "PYTHONPATH": f"{ROOT / 'src'}:{ROOT}",
        "COPPICE_HOME": str(home),
        "COLUMNS": "120",
    }


async def measure(home: Path, page: str) -> Cost:
    """Run a recipe, after its image is built if it is missing."""
    read = recipe(page)
    async with AsyncHost(home) as host:
        facts = await host_facts(host)
        await host.kernels.fetch()
        try:
            await host.images.inspect(read.image)
        except NotFound:
            await host.images.build(read.image, include=list(read.packages))
    with tempfile.TemporaryDirectory() as name:
        env = environment(home, Path(name, "bin"))
        printed, steps = await follow(read, Path(name), env, DEADLINE_S)
    tree = _TREE.search(printed)
    return Cost(page=page, host=facts, steps=steps, tree=tree[0] if tree else "")


def main() -> None:
    """Measure, and write the results."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--home", type=Path, required=True)
    parser.add_argument("pages", nargs="*", default=list(PAGES))
    options = parser.parse_args()
    for page in options.pages:
        measured = asyncio.run(measure(options.home, page))
        before = msgspec.json.decode(RESULTS.read_bytes(), type=CookbookReport).costs if RESULTS.exists() else []
        costs = {cost.page: cost for cost in (*before, measured)}
        report = CookbookReport(costs=[costs[page] for page in PAGES if page in costs])
        RESULTS.write_bytes(msgspec.json.format(msgspec.json.encode(report)) + b"\n")


if __name__ == "__main__":
    main()
