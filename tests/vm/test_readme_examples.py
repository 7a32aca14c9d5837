"""The README keeps its word: its Python and its shell lines are run as they stand there."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest

from coppice.host import AsyncHost
from documentation import ROOT, blocks, environment, run, run_shell


@pytest.fixture
async def reader(host: AsyncHost, image: str, tmp_path: Path) -> dict[str, str]:
    """The environment of a reader with an image called `debian`."""
    await host.image_tag(image, "debian")
    return environment(host.home, tmp_path)


async def test_ten_lines_of_python(host: AsyncHost, reader: dict[str, str], tmp_path: Path) -> None:
    """The first example is at most ten lines, prints exactly what the README says, and leaves nothing behind."""
    before = {instance.id for instance in await host.ls()}
    (program,) = blocks("README.md", "python")
    assert len([line for line in program.splitlines() if line.strip()]) <= 10
    printed = await run(sys.executable, "-c", program, env=reader, directory=tmp_path, deadline_s=100)
    assert printed == blocks("README.md", "text")[0]
    assert {instance.id for instance in await host.ls()} == before


async def test_the_same_from_a_shell(host: AsyncHost, reader: dict[str, str], tmp_path: Path) -> None:
    """The shell lines do what the Python does: the state of the template is in a fork."""
    before = {instance.id for instance in await host.ls()}
    script = "\n".join(blocks("README.md", "sh"))
    printed = await run_shell(script, env=reader, directory=tmp_path, deadline_s=100)
    assert "\nexpensive\n" in printed
    assert {instance.id for instance in await host.ls()} == before


def test_the_commands_of_the_readme_are_there() -> None:
    """`make demo` and `make test` exist, and CI runs the second and nothing else."""
    makefile = (ROOT / "Makefile").read_text()
    for line in blocks("README.md", "console")[0].splitlines():
        target = line.removeprefix("$ make ")
        assert f"\n{target}:" in makefile
    assert (ROOT / ".ci" / "run").read_text().rstrip().endswith("exec make test")
