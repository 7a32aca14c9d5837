"""Work on qcow2 files by a QEMU without a machine: make an empty layer, merge layers, flatten a disk.

QEMU gets every file as an open descriptor, and no name in a qcow2 header is ever followed: the
chain of layers is given by the caller. Under root the process has no rights at all, because a guest
that controlled its VMM may have written the files.
"""

from __future__ import annotations

import contextlib
import json
import os
import socket
import subprocess
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, Final

from coppice import stopping
from coppice.errors import HostCannot, MissingTool, NoSpace, VmmTimeout
from coppice.linux.files import os_errors
from coppice.linux.tool import ends_with_us
from coppice.vmm.confinement import NOBODY
from coppice.vmm.qemu import host, releases

_ANSWER_S: Final = 30.0
_STALLED_S: Final = 120.0  # a job without progress
_POLL_S: Final = 0.002  # QEMU sends an event for a change of state, but none for progress
_MOST_POLL_S: Final = 0.1
_WITHOUT_RIGHTS: Final = (
    f"--reuid={NOBODY}", f"--regid={NOBODY}", "--clear-groups",
    "--no-new-privs", "--bounding-set=-all", "--inh-caps=-all",
)  # fmt: skip
_KEPT: Final = {"auto-dismiss": False}  # so that the result of a finished job can be read
_CURE: Final = "see the free space with `df`, and the kernel's messages with `dmesg`"


def create(path: Path, size_bytes: int) -> None:
    """Make an empty layer of a disk at a new path: all of its content comes from the file below it.

    :raises HostCannot: QEMU refuses
    :raises NoSpace: the disk is full
    """
    with opened([(path, os.O_RDWR | os.O_CREAT | os.O_EXCL)]) as (descriptor,), Tool([descriptor]) as tool:
        tool.execute("blockdev-add", tool.file(0, "layer-file", writable=True))
        options = {"driver": "qcow2", "file": "layer-file", "size": size_bytes, **releases.LAYER_OPTIONS}
        tool.run("blockdev-create", {"options": options})


def merge(base: Path, merged: Path, above: Sequence[Path]) -> None:
    """Write the content of the layers `above`, lowest first, into the layer `merged` below them, which nothing uses.

    Each part that a layer has is copied from it alone, so each is opened over `base`. A stream into
    the topmost layer would do the same, but QEMU 7.2 fails an assertion when a cluster of that layer
    is partly allocated (`bdrv_co_do_copy_on_readv`).

    :raises HostCannot: QEMU refuses, or a layer is damaged
    :raises NoSpace: the disk is full
    """
    wanted = [(base, os.O_RDONLY), (merged, os.O_RDWR), *((layer, os.O_RDONLY) for layer in above)]
    with opened(wanted) as descriptors, Tool(descriptors) as tool:
        tool.chain(2, writable=True)
        for number in range(2, len(wanted)):
            node = {"driver": "qcow2", "read-only": True, "file": tool.file(number), "backing": "part0"}
            tool.execute("blockdev-add", {**node, "node-name": f"above{number}"})
            copied = {"device": f"above{number}", "target": "disk", "sync": "top", "granularity": releases.LAYER_PART}
            tool.run("blockdev-mirror", {**copied, **_KEPT}, until="ready")
            tool.end_job()


def flatten(base: Path, layers: Sequence[Path], out: Path) -> None:
    """Write a whole disk as a raw file to the new path `out`, with holes for its zeros.

    :raises HostCannot: QEMU refuses, or a layer is damaged
    :raises NoSpace: the disk is full
    """
    wanted = [
        (base, os.O_RDONLY),
        *((layer, os.O_RDONLY) for layer in layers),
        (out, os.O_RDWR | os.O_CREAT | os.O_EXCL),
    ]
    with opened(wanted) as descriptors, Tool(descriptors) as tool:
        os.ftruncate(descriptors[-1], os.fstat(descriptors[0]).st_size)
        tool.chain(len(layers) + 1)
        target = {"driver": "raw", "node-name": "target", "discard": "unmap", "detect-zeroes": "unmap"}
        tool.execute("blockdev-add", {**target, "file": tool.file(len(layers) + 1, "target-file", writable=True)})
        tool.run("blockdev-mirror", {"device": "disk", "target": "target", "sync": "full", **_KEPT}, until="ready")


@contextlib.contextmanager
def opened(wanted: Sequence[tuple[Path, int]]) -> Iterator[list[int]]:
    with contextlib.ExitStack() as stack:
        descriptors = []
        for path, flags in wanted:
            with os_errors(f"open the disk {path}"):
                descriptor = os.open(path, flags | os.O_NOFOLLOW | os.O_NONBLOCK | os.O_CLOEXEC, 0o600)
            stack.callback(os.close, descriptor)
            descriptors.append(descriptor)
        yield descriptors


class Tool:
    """A QEMU without a machine, and its control protocol; a context manager."""

    def __init__(self, descriptors: Sequence[int]) -> None:
        """`descriptors` are the files that it may use. They are known by their positions."""
        self._descriptors = list(descriptors)

    def __enter__(self) -> Tool:
        ours, theirs = socket.socketpair()
        try:
            argv = [
                *ends_with_us(*(_WITHOUT_RIGHTS if os.geteuid() == 0 else ())), host.program(),
                "-M", "none", "-nodefaults", "-no-user-config", "-display", "none", "-S",
                "-sandbox", "on,obsolete=deny,elevateprivileges=deny,spawn=deny,resourcecontrol=deny",
                "-chardev", f"socket,id=qmp,fd={theirs.fileno()}", "-qmp", "chardev:qmp",
                *(word for number, fd in enumerate(self._descriptors) for word in ("-add-fd", f"fd={fd},set={number}")),
            ]  # fmt: skip
            try:
                self._process = subprocess.Popen(
                    argv,
                    stdin=subprocess.DEVNULL,
                    stdout=subprocess.DEVNULL,
                    stderr=subprocess.PIPE,
                    pass_fds=(theirs.fileno(), *self._descriptors),
                )
            except FileNotFoundError as error:
                raise MissingTool("setpriv is not installed", hint="install the package util-linux") from error
        except BaseException:
            ours.close()
            raise
        finally:
            theirs.close()
        ours.settimeout(_ANSWER_S)
        self._socket, self._lines = ours, ours.makefile("rb")
        try:
            self._read()  # the greeting
            self.execute("qmp_capabilities")
        except BaseException:
            self._end()
            raise
        return self

    def __exit__(self, kind: type[BaseException] | None, *_: object) -> None:
        try:
            if kind is None:
                self.execute("quit")  # closes the files, so that their metadata is written
                with contextlib.suppress(ConnectionError, HostCannot):
                    while True:
                        self._read()
        finally:
            self._end()

    def _end(self) -> None:
        self._process.kill()
        if self._process.stderr is not None:
            self._process.stderr.close()
        self._process.wait()
        self._lines.close()
        self._socket.close()

    def file(self, number: int, name: str | None = None, *, writable: bool = False) -> dict[str, Any]:
        """Return the node of a file, known by its position."""
        node = {"driver": "file", "filename": f"/dev/fdset/{number}", "locking": "off", "read-only": not writable}
        return node if name is None else {**node, "node-name": name}

    def chain(self, count: int | None = None, *, writable: bool = False) -> None:
        """Open the first `count` files, the base and its layers, as the node `disk`.

        :param writable: the topmost one can be written to
        """
        last = len(self._descriptors) - 1 if count is None else count - 1
        for number in range(last + 1):
            top = number == last
            node = {
                "driver": "qcow2" if number else "raw",
                "node-name": "disk" if top else f"part{number}",
                "read-only": not (top and writable),
                "file": self.file(number, writable=top and writable),
                **({"backing": f"part{number - 1}"} if number else {}),
            }
            self.execute("blockdev-add", node)

    def run(self, command: str, arguments: dict[str, Any], *, until: str = "concluded") -> None:
        """Start a job, and wait until it has the status `until`.

        :raises HostCannot: the job failed
        :raises VmmTimeout: it makes no progress
        """
        self.execute(command, {"job-id": "job", **arguments})
        self._await_job(command, until)

    def _await_job(self, command: str, until: str) -> None:
        progress, since, wait_s = -1, time.monotonic(), _POLL_S
        while True:
            stopping.check()
            (job,) = [each for each in self.execute("query-jobs") if each["id"] == "job"]
            if job["status"] in (until, "concluded"):
                if "error" in job:
                    raise self._failed(command, str(job["error"]))
                return
            if job["current-progress"] != progress:
                progress, since = job["current-progress"], time.monotonic()
            elif time.monotonic() - since > _STALLED_S:
                raise VmmTimeout(f"QEMU's {command} made no progress for {_STALLED_S:g} s", hint=_CURE)
            time.sleep(wait_s)
            wait_s = min(2 * wait_s, _MOST_POLL_S)

    def end_job(self) -> None:
        """End a mirror that is ready: its target has all that its source has. The job's name is free again.

        :raises HostCannot: the job failed at last
        """
        self.execute("block-job-cancel", {"device": "job"})
        self._await_job("mirror", "concluded")
        self.execute("job-dismiss", {"id": "job"})

    def execute(self, command: str, arguments: dict[str, Any] | None = None) -> Any:
        """Run one command and return its result.

        :raises HostCannot: QEMU refused it, or ended
        """
        try:
            self._socket.sendall(json.dumps({"execute": command, "arguments": arguments or {}}).encode() + b"\n")
        except ConnectionError as error:
            raise self._ended() from error
        while True:
            answer = self._read()
            if "error" in answer:
                raise self._failed(command, str(answer["error"]["desc"]))
            if "return" in answer:
                return answer["return"]

    def _read(self) -> dict[str, Any]:
        try:
            line = self._lines.readline()
        except TimeoutError as error:
            raise VmmTimeout(f"QEMU did not answer within {_ANSWER_S:g} s", hint=_CURE) from error
        except ConnectionError as error:
            raise self._ended() from error
        if not line:
            raise self._ended()
        answer: dict[str, Any] = json.loads(line)
        return answer

    def _ended(self) -> HostCannot:
        self._process.kill()
        said = (self._process.stderr.read() if self._process.stderr else b"").decode(errors="replace").strip()
        return HostCannot(f"QEMU ended while it worked on a disk: {said or 'no reason given'}", hint=_CURE)

    def _failed(self, command: str, said: str) -> HostCannot:
        if any(os.fstatvfs(descriptor).f_bavail == 0 for descriptor in self._descriptors):
            return NoSpace(f"the disk is full: QEMU's {command} failed: {said}", hint="free disk space")
        return HostCannot(f"QEMU's {command} failed: {said}", hint=_CURE)
