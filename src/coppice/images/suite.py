"""Debian and Ubuntu suites: root file systems bootstrapped by mmdebstrap from the packages of a
mirror.
"""

from __future__ import annotations

import os
import pathlib
import re
import shutil
import tempfile
from collections.abc import Sequence
from typing import IO

from coppice.errors import HostCannot, ImageError, UsageError
from coppice.images.tree import Bytes, FileTree, Path
from coppice.images.workspace import Workspace
from coppice.linux.tool import run_tool
from coppice.model import Record
from coppice.trust import BUNDLE, proxy_environment

_SUITE = re.compile(r"[a-z0-9][a-z0-9.+-]*")
_PACKAGE = re.compile(r"[a-z0-9][A-Za-z0-9.+~:=/_-]*")
_POCKETS = ("", "-updates", "-security", "/updates")
_DISTRIBUTIONS = ("Debian", "Ubuntu")
_NEW_PACKAGES = re.compile(r"\d+ upgraded, (\d+) newly installed,")
_NO_NAMESPACES = re.compile(r"E: .*\bunshare\b")
_DEADLINE_S = 1800.0
_TERMINATION_GRACE_S = 20.0
_QUERY_DEADLINE_S = 60.0

# Files that would give machines of one image the same identity, or that come from the host. The
# guest gets its identity at each start.
_EMPTIED: tuple[Path, ...] = ((b"etc", b"machine-id"),)
_REMOVED: tuple[Path, ...] = (
    (b"etc", b"hostname"),
    (b"etc", b"resolv.conf"),
    (b"var", b"lib", b"dbus", b"machine-id"),
    (b"var", b"lib", b"systemd", b"random-seed"),
    (b"var", b"lib", b"urandom", b"random-seed"),
)
_HOST_KEY = re.compile(rb"ssh_host_.*_key(\.pub)?")

_COMPILE_PYTHON = (
    'test ! -x "$1/usr/bin/python3" || chroot "$1" sh -c '
    "'python3 -m compileall -qq /usr/lib/python3* /usr/local/lib/python3* || true'"
)


class Suite(Record, frozen=True):
    """What to bootstrap."""

    suite: str = "bookworm"
    include: tuple[str, ...] = ()  # packages, as apt names them
    proxy: str | None = None  # for the downloads

    def check(self) -> None:
        """Raise UsageError if a value is invalid: the values become arguments of mmdebstrap."""
        if not _SUITE.fullmatch(self.suite):
            raise UsageError(f"{self.suite!r} is not the name of a suite", hint="use a code name such as bookworm")
        for package in self.include:
            if not _PACKAGE.fullmatch(package):
                raise UsageError(f"{package!r} is not the name of a package", hint="name packages as apt install does")


def bootstrap(suite: Suite, certificates: Sequence[str], workspace: Workspace) -> IO[bytes]:
    """Run mmdebstrap; return the tar archive that it made, open at its beginning.

    :param certificates: PEM; mirrors that have one of these authorities are trusted

    Raises MissingTool, HostCannot at the deadline, ImageError with the end of its log if it fails.
    It runs in separate namespaces, so no process or mount remains in any case.
    """
    archive = workspace.new_file()
    environment = {key: value for key, value in os.environ.items() if key != "SOURCE_DATE_EPOCH"}
    environment["LC_ALL"] = "C.UTF-8"
    environment["PATH"] = f"{environment.get('PATH', os.defpath)}:/usr/sbin:/sbin"
    if os.geteuid() == 0:
        # Else the mapped user could not enter this directory, and mmdebstrap uses its own default.
        environment["TMPDIR"] = str(workspace.path)
        workspace.path.chmod(0o711)  # apt switches to its own user for downloads
    environment |= proxy_environment(suite.proxy)
    ran = run_tool(
        "mmdebstrap",
        *_trusting(certificates, workspace),
        *_arguments(suite),
        environment=environment,
        deadline_s=_DEADLINE_S,
        cure="run `apt-get install mmdebstrap`, or import an OCI image instead",
        output=archive,
        line=_Counter(workspace).read,
        grace_s=_TERMINATION_GRACE_S,  # on SIGTERM it removes its directory
    )
    if ran.status:
        if any(_NO_NAMESPACES.match(line) for line in ran.lines):
            raise HostCannot(
                f"mmdebstrap cannot create namespaces here: {ran.failure()}",
                hint="`coppice doctor` shows how to allow it; or import an image, which needs no namespaces",
            )
        raise ImageError(
            f"mmdebstrap could not make {suite.suite}: {ran.failure()}",
            hint="check the names of suite and packages, and that the mirror is reachable",
        )
    archive.seek(0)
    return archive


def make_generic(tree: FileTree) -> None:
    """Remove what belongs to one machine only: ids, keys, seeds, and the host's name and
    resolver.
    """
    for path in _EMPTIED:
        node = tree.find(path)
        if node is not None and node.content is not None:
            node.content = Bytes(b"")
    for path in _REMOVED:
        tree.remove(path)
    ssh = tree.find((b"etc", b"ssh"))
    for name in list(ssh.children) if ssh else ():
        if _HOST_KEY.fullmatch(name):
            tree.remove((b"etc", b"ssh", name))


def host_mirrors(suite: str) -> list[str]:
    """Return lines of sources.list for `suite` and its updates from the host's apt configuration;
    empty if it has none.

    The lines come from apt itself, so both of its configuration formats work. Third parties'
    repositories are skipped.
    """
    if shutil.which("apt-get") is None:
        return []
    fields = "$(CREATED_BY)|$(ORIGIN)|$(REPO_URI)|$(RELEASE)|$(COMPONENT)"
    wanted = {suite + pocket for pocket in _POCKETS}
    # The origin of a repository is known only after its lists were downloaded. A machine without
    # lists usually has only the distribution's repositories.
    for known in ([], ["--no-release-info"]):
        found: dict[str, None] = {}
        with tempfile.TemporaryFile() as output:
            run_tool(
                "apt-get",
                *("indextargets", *known, "--format", fields),
                environment=os.environ,
                deadline_s=_QUERY_DEADLINE_S,
                cure="install the package apt",
                output=output,
            )
            output.seek(0)
            lines = output.read().decode("utf-8", "replace").splitlines()
        for line in lines:
            maker, origin, uri, release, component = [*line.split("|"), "", "", "", ""][:5]
            if maker != "Packages" or release not in wanted or component != "main":
                continue
            if known or origin in _DISTRIBUTIONS:
                found[f"{uri} {release}"] = None
        if found:
            return list(found)
    return []


def _trusting(certificates: Sequence[str], workspace: Workspace) -> list[str]:
    """Return the arguments that make apt trust the certificates besides the host's, in the
    build alone.
    """
    if not certificates:
        return []
    bundle = workspace.path / "certificates.pem"
    host = pathlib.Path(BUNDLE)
    bundle.write_text((host.read_text() if host.exists() else "") + "".join(certificates))
    bundle.chmod(0o444)
    return [
        f'--aptopt=Acquire::https::CAInfo "{bundle}"',
        '--customize-hook=rm "$1/etc/apt/apt.conf.d/99mmdebstrap"',  # where mmdebstrap keeps the option
    ]


def _arguments(suite: Suite) -> list[str]:
    arguments = ["--mode=unshare", "--variant=minbase", "--format=tar", "--verbose", "--components=main"]
    if suite.include:
        arguments.append(f"--include={','.join(suite.include)}")
    arguments.append(f"--customize-hook={_COMPILE_PYTHON}")
    return [*arguments, suite.suite, "-", *(f"deb {line} main" for line in host_mirrors(suite.suite))]


class _Counter:
    """Progress from the output of apt and dpkg."""

    def __init__(self, workspace: Workspace) -> None:
        self._workspace = workspace
        self._downloaded = self._installed = self._total = 0

    def read(self, line: str) -> None:
        if match := _NEW_PACKAGES.match(line):
            self._total += int(match[1])
        elif line.startswith("Get:"):
            self._downloaded += 1
            self._workspace.report("download", self._downloaded, unit="items")
        elif line.startswith("Setting up "):
            self._installed += 1
            self._workspace.report("install", self._installed, max(self._total, self._installed), "items")
