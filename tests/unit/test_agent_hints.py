"""A request that the guest refuses has a hint that fits the operation."""

from __future__ import annotations

import errno
from collections.abc import Awaitable, Callable
from pathlib import Path

import pytest

from agent_process import agent_session
from agent_requests import write_with
from coppice.agent.hints import hint_for
from coppice.agent.protocol import FrameType
from coppice.agent.session import Session
from coppice.errors import GuestRefused

STEPS = [
    "clock",
    "entropy",
    "hostname",
    "machine-id",
    "boot-id",
    "random-seed",
    "ssh-host-keys",
    "network",
    "volumes",
    "payload",
    "hook",
    "image",
    "process",
]


@pytest.mark.parametrize(
    ("step", "number", "words"),
    [
        ("random-seed", errno.EROFS, "mount -o remount,rw /"),
        ("ssh-host-keys", errno.EROFS, "mount -o remount,rw /"),
        ("ssh-host-keys", errno.ECANCELED, "ssh-keygen -A"),
        ("network", errno.EBUSY, "card"),
        ("hook", errno.ECANCELED, "sh -x /etc/coppice/on-fork"),
        ("hook", errno.ETIMEDOUT, "30 s"),
        ("hook", errno.ENOENT, "#!/bin/sh"),
        ("hook", errno.ENOEXEC, "#!/bin/sh"),
        ("volumes", errno.ENOTDIR, "--volume"),
        ("image", errno.ENOTDIR, "--workdir"),
        ("process", errno.ENOENT, "--user"),
    ],
)
def test_a_refused_identity_says_what_to_do_about_its_step(step: str, number: int, words: str) -> None:
    """The hint is about the step that failed."""
    assert words in hint_for(FrameType.IDENTITY, number, f"{step}: what happened")


@pytest.mark.parametrize("step", STEPS)
def test_no_refused_identity_mentions_the_path_or_program_of_a_request(step: str) -> None:
    """A caller of fork gave no path, so the hint must not mention one."""
    assert "request" not in hint_for(FrameType.IDENTITY, errno.EIO, f"{step}: input/output error")


@pytest.mark.parametrize("request_type", [kind for kind in FrameType if 16 <= kind < 80])
def test_an_agent_that_does_not_know_a_request_is_an_older_one(request_type: FrameType) -> None:
    """A machine captured with an older agent gets a new one when it is started, so the hint says to
    start it.
    """
    assert "`coppice start NAME`" in hint_for(request_type, errno.ENOSYS, "unknown")


OPERATIONS: dict[str, tuple[Callable[[Session, Path], Awaitable[object]], str]] = {
    "read": (lambda session, path: session.read_file(str(path / "none")), "ls -la"),
    "read a directory": (lambda session, path: session.read_file(str(path)), "coppice cp"),
    "stat": (lambda session, path: session.stat(str(path / "none")), "ls -la"),
    "write": (lambda session, path: write_with(session, str(path / "none/file"), b"", 0), "mkdir -p"),
    "unpack": (lambda session, path: session.tree_in(str(path / "none"), b""), "mkdir -p"),
}


@pytest.mark.parametrize("operation", list(OPERATIONS))
async def test_each_operation_has_its_own_hint(operation: str, tmp_path: Path) -> None:
    """Each refusal by the real agent has a hint that concerns the requested operation."""
    work, words = OPERATIONS[operation]
    async with agent_session() as session:
        with pytest.raises(GuestRefused) as caught:
            await work(session, tmp_path)
    assert words in (caught.value.hint or "")
