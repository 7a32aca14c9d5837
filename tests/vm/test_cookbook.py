"""The recipes of docs/cookbook work as written: each is followed from its first block to its last, on real
virtual machines.
"""

from __future__ import annotations

import re
from pathlib import Path

import pytest

from bench.cookbook import FOLDER, PAGES, environment, follow, recipe
from coppice.client import AsyncHost
from coppice.requests import LsRequest
from machines import RUNTIME_PACKAGES

DEADLINE_S = 480.0


@pytest.mark.timeout(600)
@pytest.mark.parametrize("page", PAGES)
async def test_a_recipe(page: str, host: AsyncHost, runtimes: str, tmp_path: Path) -> None:
    """Its blocks succeed in order, and leave no machine.

    One image with the packages of all recipes stands for that of each, because a build takes minutes.
    """
    followed = recipe(page)
    assert set(followed.packages) <= set(RUNTIME_PACKAGES)
    await host.images.tag(runtimes, followed.image)
    before = {instance.id for instance in await host.call(LsRequest())}
    work = tmp_path / "work"
    work.mkdir()
    printed, steps = await follow(followed, work, environment(host.home, tmp_path / "bin"), DEADLINE_S)
    assert "running machines see" in printed
    assert any(step.command.startswith("coppice fork") for step in steps)
    assert {instance.id for instance in await host.call(LsRequest())} == before


def test_all_recipes_are_tested() -> None:
    """The folder has no other page, and its index names each."""
    index = (FOLDER / "README.md").read_text()
    assert {page.stem for page in FOLDER.glob("*.md")} == {"README", *PAGES}
    assert re.findall(r"^\| \[.*?\]\((.*?)\.md\)", index, re.MULTILINE) == list(PAGES)
