"""Debian and Ubuntu suites: a root file system bootstrapped by mmdebstrap from the packages of a mirror."""

from __future__ import annotations

import os
import pathlib
import re
import selectors
import shlex
import shutil
import signal
import subprocess
import time
from collections import deque
from typing import IO

from coppice.errors import HostCannot, ImageError, MissingTool, UsageError
from coppice.images.tree import Bytes, FileTree, Path
from coppice.images.workspace import CHUNK, Workspace
from coppice.model import Record

_SUITE = re.compile(r"[a-z0-9][a-z0-9.+-]*")
_PACKAGE = re.compile(r"[a-z0-9][A-Za-z0-9.+~:=/_-]*")
_VARIANTS = ("essential", "apt", "minbase", "buildd", "important", "standard")
_POCKETS = ("", "-updates", "-security", "/updates")
_DISTRIBUTIONS = ("Debian", "Ubuntu")
_NEW_PACKAGES = re.compile(r"\d+ upgraded, (\d+) newly installed,")
_NO_NAMESPACES = re.compile(r"E: .*\bunshare\b")
_TERMINATION_GRACE_S = 20.0
_POLL_S = 0.25
_QUERY_DEADLINE_S = 60.0

# What makes two machines of one image look alike, and what the host leaked into it. The guest's identity comes at each
# start.
_EMPTIED: tuple[Path, ...] = ((b"etc", b"machine-id"),)
_REMOVED: tuple[Path, ...] = (
    (b"etc", b"hostname"),
    (b"etc", b"resolv.conf"),
    (b"var", b"lib", b"dbus", b"machine-id"),
    (b"var", b"lib", b"systemd", b"random-seed"),
    (b"var", b"lib", b"urandom", b"random-seed"),
)
_HOST_KEY = re.compile(rb"ssh_host_.*_key(\.pub)?")

# Python's own check of its bytecode is by the source's time, so the times must be final first: tar clamps them later.
# Hash-checked bytecode, which the packages' scripts make when SOURCE_DATE_EPOCH is set, would read and hash every
# source at import.
_COMPILE_PYTHON = (
    'test ! -x "$1/usr/bin/python3" || chroot "$1" sh -c \''
    '[ -z "$SOURCE_DATE_EPOCH" ] || find /usr/lib/python3* /usr/local/lib -name "*.py" '
    '-newermt "@$SOURCE_DATE_EPOCH" -exec touch -h -d "@$SOURCE_DATE_EPOCH" {} +; '
    "unset SOURCE_DATE_EPOCH; python3 -m compileall -qq /usr/lib/python3* /usr/local/lib/python3* || true'"
)


class Suite(Record, frozen=True):
    """What to bootstrap."""

    suite: str = "bookworm"
    include: tuple[str, ...] = ()  # packages, as apt names them
    mirror: tuple[str, ...] = ()  # URIs or whole lines of sources.list; default: the host's own for this suite
    variant: str = "minbase"
    components: tuple[str, ...] = ("main",)
    run: tuple[tuple[str, ...], ...] = ()  # commands run in the finished root, in order
    keyring: pathlib.Path | None = None  # default: what the host's apt trusts
    source_date_epoch: int | None = None  # seconds; the same packages then give the same image
    timeout_s: float = 1800.0

    def check(self) -> None:
        """Raises UsageError where a value is not what it should be: they become arguments of mmdebstrap."""
        if not _SUITE.fullmatch(self.suite):
            raise UsageError(f"{self.suite!r} is not the name of a suite", hint="use a code name such as bookworm")
        for package in (*self.include, *self.components):
            if not _PACKAGE.fullmatch(package):
                raise UsageError(f"{package!r} is not the name of a package", hint="name packages as apt install does")
        if self.variant not in _VARIANTS:
            raise UsageError(f"{self.variant!r} is not a variant", hint=f"use one of: {', '.join(_VARIANTS)}")
        for mirror in self.mirror:
            if not re.match(r"(deb )|[a-z]+://", mirror) or "\n" in mirror:
                raise UsageError(f"{mirror!r} is not a mirror", hint="give a URI, or a line as in sources.list")
        if any(not argv or any("\0" in word for word in argv) for argv in self.run):
            raise UsageError("a command to run in the image is empty", hint="give a program and its arguments")


def bootstrap(suite: Suite, workspace: Workspace) -> IO[bytes]:
    """Run mmdebstrap, and return the tar archive that it made, open at its beginning.

    Raises MissingTool, HostCannot when the deadline passes, ImageError with the end of its log when it fails. Whatever
    happens, no process and no mount of it stays: it runs in name spaces of its own.
    """
    tool = shutil.which("mmdebstrap")
    if tool is None:
        raise MissingTool(
            "mmdebstrap is not installed", hint="run `apt-get install mmdebstrap`, or import an OCI image instead"
        )
    archive = workspace.new_file()
    environment = {key: value for key, value in os.environ.items() if key != "SOURCE_DATE_EPOCH"}
    environment["LC_ALL"] = "C.UTF-8"
    environment["PATH"] = f"{environment.get('PATH', os.defpath)}:/usr/sbin:/sbin"
    if suite.source_date_epoch is not None:
        environment["SOURCE_DATE_EPOCH"] = str(suite.source_date_epoch)
    if os.geteuid() == 0:
        # Otherwise the mapped user could not enter our directory, and mmdebstrap's own default has to do.
        environment["TMPDIR"] = str(workspace.path)
        workspace.path.chmod(0o711)  # apt drops to a user of its own for downloads
    process = subprocess.Popen(
        [tool, *_arguments(suite)],
        stdin=subprocess.DEVNULL,
        stdout=archive,
        stderr=subprocess.PIPE,
        env=environment,
        start_new_session=True,
    )
    try:
        log = _follow(process, workspace, time.monotonic() + suite.timeout_s)
    finally:
        _end(process)
    if process.returncode:
        errors = [line for line in log if line.startswith("E:")] or list(log)
        said = " / ".join(errors[-4:]) or "it said nothing"
        if any(_NO_NAMESPACES.match(line) for line in errors):
            raise HostCannot(
                f"mmdebstrap may not have namespaces of its own here: {said}",
                hint="`coppice doctor` has the cure; or import an image, which needs none",
            )
        raise ImageError(
            f"mmdebstrap could not make {suite.suite}: {said}",
            hint="check the names of suite and packages, and whether the mirror can be reached",
        )
    archive.seek(0)
    return archive


def make_generic(tree: FileTree) -> None:
    """Take out what belongs to one machine only: ids, keys, seeds, and the host's name and resolver."""
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
    """Lines of sources.list for `suite` and its updates, as the host's own apt is configured; empty where it is not.

    apt itself is asked, so both formats of its configuration are understood. Third parties' repositories are left out.
    """
    tool = shutil.which("apt-get")
    if tool is None:
        return []
    fields = "$(CREATED_BY)|$(ORIGIN)|$(REPO_URI)|$(RELEASE)|$(COMPONENT)"
    wanted = {suite + pocket for pocket in _POCKETS}
    # Who is behind a repository is known only after its lists were downloaded. A machine without lists has, as a rule,
    # no others.
    for known in ([], ["--no-release-info"]):
        done = subprocess.run(
            [tool, "indextargets", *known, "--format", fields],
            capture_output=True,
            text=True,
            timeout=_QUERY_DEADLINE_S,
            check=False,
        )
        found: dict[str, None] = {}
        for line in done.stdout.splitlines():
            maker, origin, uri, release, component = [*line.split("|"), "", "", "", ""][:5]
            if maker != "Packages" or release not in wanted or component != "main":
                continue
            if known or origin in _DISTRIBUTIONS:
                found[f"{uri} {release}"] = None
        if found:
            return list(found)
    return []


def _arguments(suite: Suite) -> list[str]:
    arguments = ["--mode=unshare", f"--variant={suite.variant}", "--format=tar", "--verbose"]
    arguments.append(f"--components={','.join(suite.components)}")
    if suite.include:
        arguments.append(f"--include={','.join(suite.include)}")
    if suite.keyring:
        arguments.append(f"--keyring={suite.keyring}")
    # A hook is a shell script by mmdebstrap's contract; shlex keeps each argument one word.
    arguments += [f'--customize-hook=chroot "$1" {shlex.join(argv)}' for argv in suite.run]
    arguments.append(f"--customize-hook={_COMPILE_PYTHON}")
    components = " ".join(suite.components)
    mirrors = suite.mirror or tuple(f"deb {line} {components}" for line in host_mirrors(suite.suite))
    return [*arguments, suite.suite, "-", *mirrors]


def _follow(process: subprocess.Popen[bytes], workspace: Workspace, deadline: float) -> deque[str]:
    """Read the log to its end, and report progress from it; the last lines."""
    assert process.stderr is not None  # noqa: S101 - it is a pipe
    lines: deque[str] = deque(maxlen=40)
    rest = b""
    counter = _Counter(workspace)
    with selectors.DefaultSelector() as selector, process.stderr as stderr:
        selector.register(stderr, selectors.EVENT_READ)
        while True:
            if time.monotonic() > deadline:
                raise HostCannot(
                    f"mmdebstrap did not finish in time; it last said: {lines[-1] if lines else 'nothing'}",
                    hint="see whether the mirror can be reached, then try again",
                )
            workspace.check()
            if not selector.select(_POLL_S):
                continue
            data = os.read(stderr.fileno(), CHUNK)
            if not data:
                break
            *complete, rest = (rest + data).split(b"\n")
            rest = rest[-CHUNK:]
            for line in (raw.decode("utf-8", "replace").rstrip() for raw in complete):
                lines.append(line)
                counter.read(line)
    try:
        process.wait(max(1.0, deadline - time.monotonic()))
    except subprocess.TimeoutExpired as error:
        raise HostCannot(
            "mmdebstrap did not end in time", hint="see how busy this machine is, then try again"
        ) from error
    return lines


class _Counter:
    """Progress out of what apt and dpkg say."""

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


def _end(process: subprocess.Popen[bytes]) -> None:
    """End the process group if it still runs: politely first, for mmdebstrap removes its directory then."""
    for number, patience in ((signal.SIGTERM, _TERMINATION_GRACE_S), (signal.SIGKILL, None)):
        if process.poll() is not None:
            return
        os.killpg(process.pid, number)
        try:
            process.wait(patience)
        except subprocess.TimeoutExpired:
            continue
