"""The transcripts of docs/api.md are run against `coppice serve`, and compared with what it answers."""

from __future__ import annotations

import asyncio
import doctest
import os
import re
import subprocess
from pathlib import Path

import pytest

from conftest import HostFactory
from documentation import blocks, environment
from fakes.rooms import IMAGE
from servers import Servers

PAGE = "docs/api.md"
SHOWN = "127.0.0.1:8080"
OPTIONS = doctest.ELLIPSIS | doctest.NORMALIZE_WHITESPACE
DEADLINE_S = 60.0
_MARK = "next transcript command"


def shell(commands: list[str], reader: dict[str, str], directory: Path) -> list[str]:
    """Run commands in one shell. Return the output of each."""
    script = "".join(f"{command}\necho '{_MARK}'\n" for command in commands)
    ran = subprocess.run(
        ["bash", "-euo", "pipefail", "-c", script],
        env=reader,
        cwd=directory,
        capture_output=True,
        text=True,
        timeout=DEADLINE_S,
        check=False,
    )
    assert ran.returncode == 0, ran.stderr
    return ran.stdout.split(f"{_MARK}\n")[:-1]


def commands_of(text: str) -> list[tuple[str, str]]:
    """Return the commands of a console block, each with its output."""
    parts = re.split(r"^\$ (.*)\n", text, flags=re.MULTILINE)
    assert parts[0] == ""
    return list(zip(parts[1::2], parts[2::2], strict=True))


async def test_the_transcripts(
    tcp_servers: Servers, make_host: HostFactory, fake_home: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """First those of curl, in one shell; then those of Python, each a session of its own."""
    async with make_host() as local:
        await local.images.tag(IMAGE, "debian")
    address = (await tcp_servers.start()).removeprefix("http://")
    reader = environment(fake_home, tmp_path)
    steps = [step for block in blocks(PAGE, "console") for step in commands_of(block.replace(SHOWN, address))]
    printed = await asyncio.to_thread(shell, [command for command, _ in steps], reader, tmp_path)
    checker = doctest.OutputChecker()
    for (command, wanted), got in zip(steps, printed, strict=True):
        found = got.replace("\r\n", "\n")
        assert checker.check_output(wanted, found + ("\n" if found[-1:] not in ("\n", "") else ""), OPTIONS), (
            f"$ {command}\n{found}\nis not\n{wanted}"
        )
    (token,) = await asyncio.to_thread(shell, ["coppice token create"], reader, tmp_path)
    monkeypatch.setitem(os.environ, "TOKEN", token.strip())
    for number, block in enumerate(blocks(PAGE, "pycon")):
        example = doctest.DocTestParser().get_doctest(block.replace(SHOWN, address), {}, f"{PAGE}:{number}", PAGE, 0)
        report: list[str] = []
        runner = doctest.DocTestRunner(optionflags=OPTIONS)
        await asyncio.to_thread(runner.run, example, out=report.append)
        assert not runner.failures, "".join(report)
        assert runner.tries
    async with make_host() as local:
        assert await local.ls() == []
