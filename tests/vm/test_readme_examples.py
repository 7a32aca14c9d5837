"""The README's Python and shell examples work as written."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest

from coppice.client import AsyncHost
from coppice.requests import LsRequest
from documentation import ROOT, blocks, environment, run, run_shell


@pytest.fixture
async def reader(host: AsyncHost, image: str, tmp_path: Path) -> dict[str, str]:
    """The environment of a reader with an image called `debian`."""
    await host.images.tag(image, "debian")
    return environment(host.home, tmp_path)


async def test_ten_lines_of_python(host: AsyncHost, reader: dict[str, str], tmp_path: Path) -> None:
    """The first example has at most ten lines, prints what the README says, and leaves nothing."""
    before = {instance.id for instance in await host.call(LsRequest())}
    (program,) = blocks("README.md", "python")
    assert len([line for line in program.splitlines() if line.strip()]) <= 10
    printed = await run(sys.executable, "-c", program, env=reader, directory=tmp_path, deadline_s=100)
    assert printed == blocks("README.md", "text")[0]
    assert {instance.id for instance in await host.call(LsRequest())} == before


async def test_the_same_from_a_shell(host: AsyncHost, reader: dict[str, str], tmp_path: Path) -> None:
    """The shell lines do what the Python does: the template's state is in a fork."""
    before = {instance.id for instance in await host.call(LsRequest())}
    script = "\n".join(blocks("README.md", "sh"))
    printed = await run_shell(script, env=reader, directory=tmp_path, deadline_s=100)
    assert "\nexpensive\n" in printed
    assert {instance.id for instance in await host.call(LsRequest())} == before


def test_the_make_targets_of_the_readme_exist() -> None:
    """`make demo` and `make test` exist, and CI runs `make test` and nothing else."""
    makefile = (ROOT / "Makefile").read_text()
    for line in blocks("README.md", "console")[0].splitlines():
        target = line.removeprefix("$ make ")
        assert f"\n{target}:" in makefile
    assert (ROOT / ".ci" / "run").read_text().rstrip().endswith("exec make test")
