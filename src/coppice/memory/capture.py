"""Capture of a guest that runs on a private mapping: what it wrote since its memory was captured.

A fork's RAM is its captured memory plus its private pages, so the files alone lack everything
written since. The guest is paused only for `PrivateCapture.collect`, which finds the private pages
and copies them aside (see `coppice.memory.staging`). `copy_ahead` copies them while the guest runs;
the pause is then for those alone that the guest writes meanwhile. Everything else is done before or
after the pause.

The pages become a new layer over the memory that the guest was restored from (see
`coppice.memory.layers`). If there would be too many layers, the new one takes in the others. If the
layers would be too large, if their map would be too long, or if the VMM cannot map layers, the
capture is a whole mem-file: a clone of the base, patched with everything that lies over it.
"""

from __future__ import annotations

import contextlib
import logging
import os
from bisect import bisect_right
from collections import Counter
from collections.abc import Sequence
from functools import partial
from pathlib import Path
from types import TracebackType
from typing import NamedTuple, Self

from coppice.errors import HostCannot, IntegrityError
from coppice.linux.clone import CloneResult, clone_file
from coppice.linux.files import os_errors, temporary_beside
from coppice.linux.maps import FileIdentity, Part, Vma, identify, private_parts, read_text, spans_of
from coppice.linux.pagemap import PrivateRange, private_ranges
from coppice.linux.written import WriteObserver
from coppice.memory import layers
from coppice.memory.layers import Extent, Kind, Memory, Plan, patch
from coppice.memory.memfile import check, freeze
from coppice.memory.staging import Staging
from coppice.model import MemFile, MemLayer

_WORTH_BYTES = 8 << 20  # of private pages; fewer are copied during the pause in the time that observing them takes
_PASSES = 3  # of `copy_ahead`, at most: a guest may write faster than its pages can be copied
_FEW_BYTES = 1 << 20  # written during a pass: another one is not worth its time

_log = logging.getLogger(__name__)


class CaptureStats(NamedTuple):
    """What one capture of a private mapping found and wrote."""

    dirty_bytes: int  # private pages of the guest
    written_bytes: (
        int  # bytes written to the new file: pages that are not all zeros, and what was copied from older files
    )
    base: CloneResult | None  # the clone of the base, for a whole mem-file
    kind: Kind


class Taken(NamedTuple):
    """A captured memory. One of its files is new: the topmost layer, or the mem-file if there is none."""

    mem_file: MemFile
    layers: tuple[MemLayer, ...]
    stats: CaptureStats


class PrivateCapture:
    """One capture, in the order `prepare`, `collect`, `finish`; a context manager that aborts an
    unfinished one.

    Not for use by two threads at once.
    """

    def __init__(
        self,
        base: Path,
        expected: MemFile,
        out: Path,
        below: Sequence[MemLayer] = (),
        *,
        layered: bool = False,
        observable: bool = False,
    ) -> None:
        """Make a capture of a guest that was restored from the mem-file `base` with the layers `below`.

        :param out: where the new file is made
        :param layered: whether the VMM can map layers
        :param observable: whether the VMM's writes can be observed (see `coppice.linux.written`)
        """
        self._base_path = base
        self._expected = expected
        self._out = out
        self._below = tuple(below)
        self._layered = layered
        self._observable = observable
        self._observer: WriteObserver | None = None
        self._temporary = temporary_beside(out)
        self._base: CloneResult | None = None
        self._map: list[Extent] = []
        self._identities: list[FileIdentity] = []
        self._offsets: dict[FileIdentity, list[tuple[int, int]]] = {}  # position and offset of each extent, by file
        self._staging: Staging | None = None
        self._ranges: list[PrivateRange] = []

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.abort()

    def prepare(self) -> None:
        """Check the captured memory; clone its base if a whole mem-file is wanted. The guest may run.

        Raises IntegrityError if a file has changed since its capture, NoSpace, HostCannot.
        """
        paths = [self._base_path, *(layers.path_of(self._base_path, number + 1) for number in range(len(self._below)))]
        for path, expected in zip(paths, (self._expected, *self._below), strict=True):
            check(path, expected)
        self._identities = [identify(path) for path in paths]
        self._map = layers.map_of(self._base_path, self._below)
        self._offsets = {identity: [] for identity in self._identities}
        for extent in sorted(self._map, key=lambda extent: extent.position):
            self._offsets[self._identities[extent.layer]].append((extent.position, extent.offset))
        self._staging = Staging(self._out)
        if not self._layered:
            self._base = clone_file(self._base_path, self._temporary, sync=False)

    def copy_ahead(self, pid: int) -> bool:
        """Copy the private pages of a process while its guest runs, and observe its writes from then
        on, so that `collect` copies only the pages written since. Best called again right before the
        pause.

        Return False if the writes cannot be observed, or if there are few private pages: `collect` then
        copies all of them.

        Raises what `collect` raises, but not HostCannot.
        """
        if not self._observable:
            return False
        staging = self._prepared()
        try:
            if self._observer is None:
                ram = self._guest_ram(pid)
                if _bytes(private_ranges(pid, ram)) < _WORTH_BYTES:
                    return False
                self._observer = WriteObserver(pid, ram)
            for _ in range(_PASSES):
                written = self._observer.written()
                staging.take(pid, written, last=False)
                if _bytes(written) <= _FEW_BYTES:
                    break
        except HostCannot as error:
            self._stop_observing(error)
        return self._observer is not None

    def collect(self, pid: int) -> int:
        """Copy aside all private pages of the process that `copy_ahead` has not copied, and return the
        bytes of all of them; the guest must be paused.

        Calling it again, at a later time, starts over.

        Raises IntegrityError if the process does not map the whole memory privately, VmmDied if it
        ended, NoSpace, HostCannot if reading its memory is not permitted.
        """
        staging = self._prepared()
        if self._observer is not None:
            try:
                self._ranges, changed = self._observer.final()
                staging.take(pid, changed)
            except HostCannot as error:
                self._stop_observing(error)
        if self._observer is None:
            self._ranges = private_ranges(pid, self._guest_ram(pid))
            staging.forget()
            staging.take(pid, self._ranges)
        return _bytes(self._ranges)

    def _guest_ram(self, pid: int) -> list[Vma]:
        parts = private_parts(read_text(pid, "maps"), self._identities)
        self._require_layers(pid, parts)
        return guest_ram(pid, spans_of(parts, self._offset_of), self._expected.size_bytes)

    def _stop_observing(self, error: HostCannot) -> None:
        _log.debug("all private pages are copied during the pause: %s", error)
        self._observable = False
        self._end_observation()
        self._prepared().forget()

    def _end_observation(self) -> None:
        if self._observer is not None:
            self._observer.close()
            self._observer = None

    def finish(self) -> Taken:
        """Write the new file, freeze it as `out`, and return the captured memory. The guest may run.

        Raises NoSpace or HostCannot.
        """
        staging = self._prepared()
        self._end_observation()
        size = self._expected.size_bytes
        plan = layers.plan(self._map, self._below, self._ranges, size, layered=self._layered)
        with os_errors(f"write the captured memory to {self._out}"):
            if plan.kind == "whole" and self._base is None:
                self._base = clone_file(self._base_path, self._temporary, sync=False)
            fd = os.open(self._temporary, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC | os.O_NOFOLLOW, 0o600)
            try:
                written = plan.begin(fd) if plan.kind != "whole" else 0
                written += self._copy(fd, plan)
                written += sum(
                    patch(fd, plan.position(offset), length, partial(staging.read, offset))
                    for offset, _, length in self._ranges
                )
            finally:
                os.close(fd)
        fresh = freeze(self._temporary, self._out)
        base = self._base
        self.abort()
        dirty, written = _bytes(self._ranges), written + (base.bytes_written if base else 0)
        stats = CaptureStats(dirty, written, base, plan.kind)
        if plan.kind == "whole":
            return Taken(fresh, (), stats)
        below = self._below if plan.kind == "layer" else ()
        return Taken(self._expected, (*below, plan.record(fresh)), stats)

    def _copy(self, fd: int, plan: Plan) -> int:
        """Copy what the new file has of the memory below; return the bytes written."""
        if not plan.copied:
            return 0
        with Memory(self._base_path, self._map, len(self._below)) as memory:
            return sum(
                patch(fd, plan.position(each.offset), each.length, partial(memory.read, each.offset))
                for each in plan.copied
            )

    def abort(self) -> None:
        """Remove everything temporary. Idempotent; does nothing after `finish`."""
        self._end_observation()
        if self._staging is not None:
            self._staging.close()
            self._staging = None
        with contextlib.suppress(FileNotFoundError):
            self._temporary.unlink()
        self._base = None

    def _offset_of(self, part: Part) -> int:
        """Return the offset in guest RAM of a mapping: a VMM may map an extent in several pieces."""
        if part.file == self._identities[0]:
            return part.offset
        extents = self._offsets[part.file]
        position, offset = extents[max(bisect_right(extents, (part.offset, 1 << 63)) - 1, 0)]
        return offset + part.offset - position

    def _require_layers(self, pid: int, parts: Sequence[Part]) -> None:
        """Refuse a process that maps the files of the memory, but not each where it belongs."""
        mapped = Counter[FileIdentity]()
        for part in parts:
            mapped[part.file] += part.end - part.start
        expected = Counter[FileIdentity]()
        for extent in self._map:
            expected[self._identities[extent.layer]] += extent.length
        if any(mapped[layer] != expected[layer] for layer in self._identities[1:]):
            raise IntegrityError(
                f"Process {pid} does not map the layers of its memory as they were captured",
                hint="keep its disk with `coppice snapshot create NAME --kind stopped`, or stop it",
            )

    def _prepared(self) -> Staging:
        if self._staging is None:
            raise RuntimeError("prepare() comes first, and abort() ends it")
        return self._staging


def _bytes(ranges: Sequence[PrivateRange]) -> int:
    return sum(found.length for found in ranges)


def guest_ram(pid: int, spans: Sequence[Vma], size_bytes: int) -> list[Vma]:
    """Return the private mappings of a memory in a process, in file order.

    Raises IntegrityError unless they cover the file exactly once: pages elsewhere would be lost
    silently.
    """
    vmas = sorted(spans, key=lambda vma: vma.offset)
    covered = 0
    for vma in vmas:
        if vma.offset != covered:
            break
        covered += vma.length
    if covered != size_bytes or covered != sum(vma.length for vma in vmas):
        raise IntegrityError(
            f"Process {pid} maps {covered} of {size_bytes} bytes of its mem-file privately",
            hint="keep its disk with `coppice snapshot create NAME --kind stopped`, or run `coppice stop NAME`",
        )
    return vmas
