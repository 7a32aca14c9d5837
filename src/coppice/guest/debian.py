"""Debian's cloud kernel package, fetched by apt and unpacked without being installed.

apt checks the package against the archive's signature; which archive is the host's own configuration.
"""

from __future__ import annotations

import asyncio
import contextlib
import hashlib
import os
import re
import shutil
import signal
from collections.abc import AsyncIterator
from pathlib import Path
from typing import NamedTuple

from coppice.completion import complete
from coppice.errors import CoppiceError, HostCannot, MissingTool
from coppice.model import Progress, ProgressSink

META_PACKAGE = "linux-image-cloud-amd64"

_QUERY_DEADLINE_S = 60.0
_DOWNLOAD_DEADLINE_S = 900.0
_UNPACK_DEADLINE_S = 300.0
_POLL_S = 0.2
_HINT = f"run `apt-get update`, and see that `apt-cache policy {META_PACKAGE}` has a candidate; or bring a kernel with `coppice kernel add`"
_ENVIRONMENT = {"PATH": "/usr/sbin:/usr/bin:/sbin:/bin", "LC_ALL": "C", "DEBIAN_FRONTEND": "noninteractive"}
_PASSED_ON = ("APT_CONFIG", "HOME", "TMPDIR", "http_proxy", "https_proxy", "no_proxy")


class Package(NamedTuple):
    """An unpacked package: where it is, and what names its contents."""

    release: str  # as in linux-image-<release>
    sha256: str
    tree: Path


def parse_stanza(text: str) -> dict[str, str]:
    """The fields of the first stanza that `apt-cache show` prints, continuation lines left out."""
    fields: dict[str, str] = {}
    for line in text.strip().partition("\n\n")[0].splitlines():
        name, separator, value = line.partition(":")
        if separator and not name.startswith((" ", "\t")):
            fields.setdefault(name, value.strip())
    return fields


def image_package(depends: str) -> str | None:
    """The kernel image package among the dependencies of the meta package."""
    match = re.search(r"(?<![\w.+-])linux-image-\d[a-z0-9.+~-]*", depends)
    return match[0] if match else None


async def fetch(directory: Path, progress: ProgressSink) -> Package:
    """Download the package that the meta package stands for, and unpack it below `directory`, which is the caller's.

    Raises MissingTool without apt-get or dpkg-deb, HostCannot where the package is not to be had.
    """
    meta = parse_stanza(await _apt_cache(META_PACKAGE))
    name = image_package(meta.get("Depends", ""))
    if name is None:
        raise HostCannot(f"the package {META_PACKAGE} does not name a kernel", hint=_HINT)
    size = parse_stanza(await _apt_cache(name)).get("Size", "")
    async with _reporting(directory, int(size) if size.isdecimal() else None, progress):
        await _run("apt-get", "-q", "download", name, cwd=directory, deadline_s=_DOWNLOAD_DEADLINE_S)
    found = list(directory.glob("*.deb"))
    if len(found) != 1:
        raise HostCannot(f"apt-get left {len(found)} packages where one was asked for", hint=_HINT)
    progress(Progress(stage="unpack kernel"))
    tree = directory / "tree"
    await _run("dpkg-deb", "-x", found[0].name, tree.name, cwd=directory, deadline_s=_UNPACK_DEADLINE_S)
    digest = await asyncio.to_thread(lambda: hashlib.sha256(found[0].read_bytes()).hexdigest())
    return Package(name.removeprefix("linux-image-"), digest, tree)


async def _apt_cache(name: str) -> str:
    return await _run("apt-cache", "show", "--no-all-versions", name, deadline_s=_QUERY_DEADLINE_S)


@contextlib.asynccontextmanager
async def _reporting(directory: Path, total: int | None, progress: ProgressSink) -> AsyncIterator[None]:
    """Report the growth of the files in `directory` while the block runs: apt-get itself tells it only to a terminal."""

    async def watch() -> None:
        while True:
            done = sum(entry.stat().st_size for entry in directory.glob("*.deb"))
            progress(Progress(stage="download kernel", done=done, total=total, unit="bytes"))
            await asyncio.sleep(_POLL_S)

    watcher = asyncio.create_task(watch())
    try:
        yield
    finally:
        watcher.cancel()
        await asyncio.gather(watcher, return_exceptions=True)


async def _run(program: str, *arguments: str, cwd: Path | None = None, deadline_s: float) -> str:
    """Run a program to its end and return what it printed; it is killed with its children when the caller gives up."""
    path = shutil.which(program, path=_ENVIRONMENT["PATH"])
    if path is None:
        raise MissingTool(
            f"{program} is not installed, and Debian's kernel is fetched with it",
            hint="install it, or bring a kernel with `coppice kernel add`",
        )
    starting = asyncio.ensure_future(
        asyncio.create_subprocess_exec(
            path,
            *arguments,
            cwd=cwd,
            env=_ENVIRONMENT | {name: os.environ[name] for name in _PASSED_ON if name in os.environ},
            stdin=asyncio.subprocess.DEVNULL,
            stdout=asyncio.subprocess.PIPE,
            stderr=asyncio.subprocess.PIPE,
            start_new_session=True,
        )
    )
    try:
        await complete(starting)
    except asyncio.CancelledError:
        # asyncio would kill the program alone, and then wait for its children to close their ends of the pipes.
        if not starting.cancelled() and starting.exception() is None:
            await complete(_end(starting.result()))
        raise
    process = starting.result()
    try:
        output, errors = await asyncio.wait_for(process.communicate(), deadline_s)
    except TimeoutError as error:
        raise HostCannot(
            f"{program} did not end within {deadline_s:.0f} s", hint="see whether the network works"
        ) from error
    finally:
        await _end(process)
    if process.returncode != 0:
        raise _failure(program, errors.decode("utf-8", "replace"))
    return output.decode("utf-8", "replace")


async def _end(process: asyncio.subprocess.Process) -> None:
    """End a program and its children, where it runs."""
    if process.returncode is None:
        with contextlib.suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGKILL)
        await process.wait()


def _failure(program: str, errors: str) -> CoppiceError:
    """The last line that says E:, else the last line."""
    lines = [line.strip() for line in errors.splitlines() if line.strip()] or ["no reason given"]
    said = [line.removeprefix("E:").strip() for line in lines if line.startswith("E:")] or lines
    return HostCannot(f"{program} failed: {said[-1]}", hint=_HINT)
