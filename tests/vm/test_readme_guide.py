"""The user guide keeps its word: its shell blocks are one story, and its Python is run."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest

from coppice.host import AsyncHost
from documentation import blocks, environment, run, run_shell


@pytest.mark.timeout(600)
async def test_the_guide_from_its_first_block_to_its_last(host: AsyncHost, image: str, tmp_path: Path) -> None:
    """Every `sh` block, in order, in one shell that stops at the first failure; at its end everything is removed, as it says."""
    before = {instance.id for instance in await host.ls()}
    reader = environment(host.home, tmp_path)
    printed = await run_shell(
        "\n".join(blocks("docs/user-guide.md", "sh")), env=reader, directory=tmp_path, deadline_s=580
    )
    for expected in ("SOME INPUT", "Linux 6.", "hello you", "worker-4"):
        assert expected in printed
    assert {instance.id for instance in await host.ls()} == before
    assert image in {kept.name for kept in await host.image_ls()}


async def test_the_guides_python(host: AsyncHost, image: str, tmp_path: Path) -> None:
    """Each `python` block is a program that ends well."""
    await host.image_tag(image, "debian")
    for program in blocks("docs/user-guide.md", "python"):
        await run(
            sys.executable, "-c", program, env=environment(host.home, tmp_path), directory=tmp_path, deadline_s=100
        )
