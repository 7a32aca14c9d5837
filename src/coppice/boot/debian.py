"""Debian's cloud kernel package, fetched by apt and unpacked without being installed.

apt checks the package against the archive's signature, and the host's configuration names the
archive.
"""

from __future__ import annotations

import hashlib
import os
import re
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

from coppice.errors import HostCannot
from coppice.linux.tool import run_tool
from coppice.model import Progress, ProgressSink

META_PACKAGE = "linux-image-cloud-amd64"

_QUERY_DEADLINE_S = 60.0
_DOWNLOAD_DEADLINE_S = 900.0
_UNPACK_DEADLINE_S = 300.0
_HINT = f"run `apt-get update`, and see that `apt-cache policy {META_PACKAGE}` has a candidate; or bring a kernel with `coppice kernel add`"
_ENVIRONMENT = {"PATH": "/usr/sbin:/usr/bin:/sbin:/bin", "LC_ALL": "C", "DEBIAN_FRONTEND": "noninteractive"}
_PASSED_ON = ("APT_CONFIG", "HOME", "TMPDIR", "http_proxy", "https_proxy", "no_proxy")


class Package(NamedTuple):
    """An unpacked package: its release, digest and directory."""

    release: str  # as in linux-image-<release>
    sha256: str
    tree: Path


def parse_stanza(text: str) -> dict[str, str]:
    """Return the fields of the first stanza of `apt-cache show`, without continuation lines."""
    fields: dict[str, str] = {}
    for line in text.strip().partition("\n\n")[0].splitlines():
        name, separator, value = line.partition(":")
        if separator and not name.startswith((" ", "\t")):
            fields.setdefault(name, value.strip())
    return fields


def image_package(depends: str) -> str | None:
    """Return the kernel image package among the dependencies of the meta package."""
    match = re.search(r"(?<![\w.+-])linux-image-\d[a-z0-9.+~-]*", depends)
    return match[0] if match else None


def fetch(directory: Path, progress: ProgressSink) -> Package:
    """Download the package that the meta package depends on, and unpack it in `directory`. Blocks.

    :raises MissingTool: apt-get or dpkg-deb is not installed
    :raises HostCannot: the package cannot be downloaded or unpacked
    """
    meta = parse_stanza(_apt_cache(META_PACKAGE))
    name = image_package(meta.get("Depends", ""))
    if name is None:
        raise HostCannot(f"the package {META_PACKAGE} does not name a kernel", hint=_HINT)
    size = parse_stanza(_apt_cache(name)).get("Size", "")
    total = int(size) if size.isdecimal() else None

    def report() -> None:  # apt-get reports progress only to a terminal
        done = sum(entry.stat().st_size for entry in directory.glob("*.deb"))
        progress(Progress(stage="download kernel", done=done, total=total, unit="bytes"))

    _run("apt-get", "-q", "download", name, cwd=directory, deadline_s=_DOWNLOAD_DEADLINE_S, tick=report)
    found = list(directory.glob("*.deb"))
    if len(found) != 1:
        raise HostCannot(f"apt-get left {len(found)} packages instead of one", hint=_HINT)
    progress(Progress(stage="unpack kernel"))
    tree = directory / "tree"
    _run("dpkg-deb", "-x", found[0].name, tree.name, cwd=directory, deadline_s=_UNPACK_DEADLINE_S)
    with found[0].open("rb") as file:
        digest = hashlib.file_digest(file, "sha256").hexdigest()
    return Package(name.removeprefix("linux-image-"), digest, tree)


def _apt_cache(name: str) -> str:
    return _run("apt-cache", "show", "--no-all-versions", name, deadline_s=_QUERY_DEADLINE_S)


def _run(
    program: str,
    *arguments: str,
    cwd: Path | None = None,
    deadline_s: float,
    tick: Callable[[], None] = lambda: None,
) -> str:
    """Run a program to its end and return its standard output."""
    with tempfile.TemporaryFile() as output:
        ran = run_tool(
            program,
            *arguments,
            environment=_ENVIRONMENT | {name: os.environ[name] for name in _PASSED_ON if name in os.environ},
            deadline_s=deadline_s,
            cure="install it: Debian's kernel is fetched with it; or bring a kernel with `coppice kernel add`",
            cwd=cwd,
            output=output,
            tick=tick,
        )
        if ran.status != 0:
            raise HostCannot(f"{program} failed: {ran.failure()}", hint=_HINT)
        output.seek(0)
        return output.read().decode("utf-8", "replace")
