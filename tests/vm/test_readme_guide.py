"""The user guide works as written: its shell blocks run as one script, and its Python runs."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest

from coppice.client import AsyncHost
from coppice.requests import LsRequest
from documentation import blocks, environment, run, run_shell


@pytest.mark.timeout(600)
async def test_the_shell_blocks_of_the_guide(host: AsyncHost, image: str, tmp_path: Path) -> None:
    """Every `sh` block runs in order, in one shell that stops at the first failure, and at the end
    everything is removed.
    """
    before = {instance.id for instance in await host.call(LsRequest())}
    reader = environment(host.home, tmp_path)
    printed = await run_shell(
        "\n".join(blocks("docs/user-guide.md", "sh")), env=reader, directory=tmp_path, deadline_s=580
    )
    for expected in ("SOME INPUT", "Linux 6.", "hello you", "worker-4"):
        assert expected in printed
    assert {instance.id for instance in await host.call(LsRequest())} == before
    assert image in {kept.name for kept in await host.images.ls()}


async def test_the_python_of_the_guide(host: AsyncHost, image: str, tmp_path: Path) -> None:
    """Each `python` block is a program that succeeds."""
    await host.images.tag(image, "debian")
    for program in blocks("docs/user-guide.md", "python"):
        await run(
            sys.executable, "-c", program, env=environment(host.home, tmp_path), directory=tmp_path, deadline_s=100
        )
