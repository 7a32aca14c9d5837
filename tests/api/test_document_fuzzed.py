"""Requests that schemathesis derives from the served API document, valid and invalid ones."""

from __future__ import annotations

import asyncio
import os
import sys
from pathlib import Path

import pytest

from conftest import HostFactory
from coppice.model import State
from coppice.requests import SnapshotRequest
from coppice.server.auth import make_token
from fakes.hosting import boot, make
from servers import KEY

EXAMPLES = int(os.environ.get("COPPICE_FUZZ_EXAMPLES", "0"))
"""Random requests of each route, besides those that cover each constraint of its parameters. None by
default, since they take minutes.
"""
DEADLINE_S = 800.0
SLOWEST_S = 60  # answer; fake machines need less than a second


@pytest.fixture
def failing_tools(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Replace the programs that would use the network by one that fails."""
    directory = tmp_path / "programs"
    directory.mkdir()
    for name in ("mmdebstrap", "skopeo", "apt-get", "apt-cache"):
        program = directory / name
        program.write_text("#!/bin/sh\necho no network >&2\nexit 1\n")
        program.chmod(0o755)
    monkeypatch.setenv("PATH", f"{directory}{os.pathsep}{os.environ['PATH']}")


@pytest.mark.timeout(DEADLINE_S + 60)
@pytest.mark.usefixtures("failing_tools")
async def test_each_answer_is_as_the_document_says(tcp_address: str, make_host: HostFactory, tmp_path: Path) -> None:
    """No answer is a 5xx but 501, each has a documented status, content type and schema, each
    invalid request is refused, and each route wants a token.
    """
    async with make_host() as local:
        await boot(local)
        await make(local, State.TEMPLATE, "stump")
        await local.call(SnapshotRequest(instance="stump", name="seed"))
    arguments = [
        *("--config-file", str(Path(__file__).with_name("schemathesis.toml"))),
        *("run", f"{tcp_address}/openapi/openapi.json"),
        *("--header", f"Authorization: Bearer {make_token(KEY, owner=None)}"),
        *("--exclude-path", "/call/doctor"),  # it has no parameters, and takes seconds
        *("--phases", "coverage,fuzzing" if EXAMPLES else "coverage", "--max-examples", str(EXAMPLES or 1)),
        *("--workers", "1"),  # Python 3.11 counts the depth of two parsers in one variable: SystemError
        *("--continue-on-failure", "--no-shrink", "--warnings", "off", "--seed", "1"),
        *("--request-timeout", str(SLOWEST_S)),
    ]
    tool = await asyncio.create_subprocess_exec(
        *(sys.executable, "-m", "schemathesis.cli", *arguments),
        cwd=tmp_path,
        env=os.environ | {"NO_COLOR": "1"},
        stdout=asyncio.subprocess.PIPE,
        stderr=asyncio.subprocess.STDOUT,
    )
    try:
        async with asyncio.timeout(DEADLINE_S):
            output, _ = await tool.communicate()
    finally:
        if tool.returncode is None:
            tool.kill()
            await tool.wait()
    assert tool.returncode == 0, output.decode()[-20_000:]
