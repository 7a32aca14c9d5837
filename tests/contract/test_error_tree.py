"""Any error that a host raises belongs to the error tree: it has an exit code, a status and a hint,
and is no bare Python error.
"""

from __future__ import annotations

import asyncio
import math
import os
from collections.abc import AsyncIterable, Iterator
from pathlib import Path
from typing import Any

import msgspec
import pytest

from coppice import requests
from coppice.client import AsyncHost
from coppice.errors import CoppiceError, GuestTimeout, UsageError
from coppice.model import Publish, State, VolumeMount
from coppice.requests import Request, StreamRequest, WaitRequest
from coppice.requests.base import extra_of, fields_of
from fakes.hosting import boot, make

TEXTS = (
    "",
    "\0",
    "a\0b",
    "/",
    "..",
    "../../etc/passwd",
    "\udcff",
    "x" * 5000,
    "-",
    "oak",
    "NOT A NAME",
    "oak/elm",
    "sha256:0",
)
NUMBERS = (math.nan, math.inf, -math.inf, -1, 0, 1, 1 << 70)
# Odd values by the name of the parameter, for parameters that are not plain texts.
KINDS: dict[str, tuple[Any, ...]] = {
    "argv": ((), ("",), ("\0",), ("\udcff",), ("x" * 200_000,), "one string"),
    "command": (("\0",), ("\udcff",), "one string"),
    "include": (("\0",), ("-x",)),
    "names": (("\0",), ("oak",), ("oak", "oak"), ("NOT A NAME",)),
    "env": ({"": "x"}, {"A": "\0"}, {"=": "\udcff"}),
    "tags": ({"": "x"}, {"A": "\udcff"}, {"a": "x" * 5000}),
    "publish": (
        [Publish(host_port=70_000, guest_port=1)],
        [Publish(host_port=1, guest_port=1, host_address="nowhere")],
        [Publish(host_port=1, guest_port=1, host_address="\0")],
    ),
    "volumes": (
        [VolumeMount(volume="\0", mount_path="/data")],
        [VolumeMount(volume="data", mount_path="\0")],
        [VolumeMount(volume="data", mount_path="/\udcff")],
    ),
    "payload": (b"x" * (2 << 20),),
    "payloads": ((b"",) * 3, (b"x" * (2 << 20),)),
    "target": ("Nonsense", State.PAUSED),
    "state": ("Nonsense",),
    "size": ((0, 0), (-1, 1 << 20)),
    "max_bytes": NUMBERS,
    "mode": (-1, 1 << 20),
    "tail": (-1, 0, 1 << 70),
    "data": (b"",),
    "stdin": (b"x",),
    **dict.fromkeys(("deadline_s", "timeout_s", "grace_s", "count", "cpus", "memory_bytes", "overlay_bytes", "size_bytes", "max_output_bytes"), NUMBERS),
}  # fmt: skip
PLAIN: dict[str, Any] = {
    "reference": "oak",
    "image": "tiny",
    "name": "new",
    "argv": ["hostname"],
    "guest_path": "/tmp/there",
    "path": "/tmp/there",
    "count": 1,
    "deadline_s": 0.01,
    "data": b"x",
    "key": "debian-none",
}
# These operations build, fetch or query the outside, and have their own tests.
OUTSIDE = {"image_build", "kernel_fetch", "doctor"}
REQUESTS: list[type[Request[Any]]] = [
    kind
    for kind in (getattr(requests, name) for name in requests.__all__ if name.endswith("Request"))
    if kind not in (Request, StreamRequest) and kind.__struct_config__.tag not in OUTSIDE
]


@pytest.fixture
def paths(tmp_path: Path) -> tuple[Path | str, ...]:
    """Paths on the host that cannot be used as a file or an archive."""
    (tmp_path / "directory").mkdir()
    (tmp_path / "file").write_bytes(b"no archive")
    (tmp_path / "unreadable").write_bytes(b"")
    (tmp_path / "loop").symlink_to(tmp_path / "loop")
    os.mkfifo(tmp_path / "fifo")
    names = ("directory", "file", "loop", "fifo", "file/below", "nowhere/below", "x" * 300)
    return (*(tmp_path / name for name in names), *TEXTS[:3], "\udcff", "/dev/full")


async def outcome(host: AsyncHost, request: Request[Any]) -> None:
    """Carry out a request; read one line of a stream."""
    async with asyncio.timeout(30):
        if not isinstance(request, StreamRequest):
            await host.call(request)
            return
        async with host.stream(request) as opened:
            if not isinstance(opened, AsyncIterable):  # a session for copies
                return
            async for _ in opened:
                break


def attempts(kind: type[Request[Any]], paths: tuple[Path | str, ...]) -> Iterator[dict[str, Any]]:
    """Yield the fields of requests in which one value is odd and all others are plain."""
    needed = [field.name for field in msgspec.structs.fields(kind) if field.required or field.name == "deadline_s"]
    plain = {name: PLAIN.get(name, "oak") for name in needed}
    for name, annotation in fields_of(kind).items():
        of_host = extra_of(annotation).get("path")
        odd = KINDS.get(name, paths if of_host else () if "bool" in str(annotation) else TEXTS)
        for value in odd:
            yield plain | {name: value}


@pytest.mark.parametrize("kind", REQUESTS, ids=lambda kind: str(kind.__struct_config__.tag))
async def test_a_host_raises_only_errors_of_the_tree(
    fake_host: AsyncHost, kind: type[Request[Any]], paths: tuple[Path | str, ...]
) -> None:
    """Each operation is called with each of its parameters set to odd values."""
    await boot(fake_host)
    bare: list[str] = []
    for fields in attempts(kind, paths):
        try:
            await outcome(fake_host, kind(**fields))
        except CoppiceError:
            pass
        except BaseException as error:
            bare.append(f"{type(error).__name__}: {str(error)[:60]} from {str(fields)[:100]}")
    assert not bare, "\n".join(bare)


async def test_wait_raises_a_timeout_of_the_tree(fake_host: AsyncHost) -> None:
    """`wait` on a machine that runs on raises its own error, with an exit code and a status, when
    its deadline passes.
    """
    await boot(fake_host)
    with pytest.raises(GuestTimeout, match="oak") as late:
        await fake_host.call(WaitRequest(instance="oak", deadline_s=0.01))
    assert late.value.http_status == 504
    assert late.value.hint
    for nonsense in (math.nan, math.inf, -1.0):
        with pytest.raises(UsageError):
            await fake_host.call(WaitRequest(instance="oak", deadline_s=nonsense))
    stopped = await make(fake_host, State.STOPPED, "elm")
    assert await fake_host.call(WaitRequest(instance=stopped.id, deadline_s=1)) == stopped
