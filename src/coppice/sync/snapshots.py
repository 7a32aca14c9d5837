"""Host: named moments of instances."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from coppice.host import Reference, SnapshotInspection, SnapshotReference
from coppice.model import ForkReport, Instance, ProgressSink, Publish, Snapshot, SnapshotKind, State, no_progress
from coppice.sync.base import HostBase


class Snapshots(HostBase):
    """Named moments of instances."""

    def snapshot_create(
        self,
        reference: Reference,
        *,
        name: str | None = None,
        kind: SnapshotKind | None = None,
        tags: Mapping[str, str] | None = None,
    ) -> Snapshot:
        return self._portal.call(self._host.snapshot_create(reference, name=name, kind=kind, tags=tags))

    def snapshot_ls(self, *, source: Reference | None = None, tags: Mapping[str, str] | None = None) -> list[Snapshot]:
        return self._portal.call(self._host.snapshot_ls(source=source, tags=tags))

    def snapshot_inspect(self, reference: SnapshotReference) -> SnapshotInspection:
        return self._portal.call(self._host.snapshot_inspect(reference))

    def snapshot_restore(self, reference: SnapshotReference, *, start: bool = False) -> Instance:
        return self._portal.call(self._host.snapshot_restore(reference, start=start))

    def snapshot_fork(
        self,
        reference: SnapshotReference,
        *,
        count: int = 1,
        names: Sequence[str] = (),
        target: State = State.RUNNING,
        atomic: bool = False,
        tags: Mapping[str, str] | None = None,
        publish: Sequence[Publish] = (),
        payload: bytes | None = None,
        payloads: Sequence[bytes] = (),
        progress: ProgressSink = no_progress,
    ) -> ForkReport:
        return self._portal.call(
            self._host.snapshot_fork(
                reference,
                count=count,
                names=names,
                target=target,
                atomic=atomic,
                tags=tags,
                publish=publish,
                payload=payload,
                payloads=payloads,
                progress=progress,
            )
        )

    def snapshot_rm(self, reference: SnapshotReference) -> None:
        self._portal.call(self._host.snapshot_rm(reference))
