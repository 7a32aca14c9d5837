"""Host: the life of an instance."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Mapping, Sequence

from coppice.host import Reference
from coppice.model import (
    GIB,
    MIB,
    CaptureReport,
    ForkReport,
    Instance,
    ProgressSink,
    Publish,
    State,
    VolumeMount,
    no_progress,
)
from coppice.sync.base import HostBase


class Lifecycle(HostBase):
    """The life of an instance."""

    def run(
        self,
        image: str,
        command: Sequence[str] = (),
        *,
        name: str | None = None,
        cpus: int = 1,
        memory_bytes: int = 512 * MIB,
        overlay_bytes: int = 2 * GIB,
        env: Mapping[str, str] | None = None,
        workdir: str | None = None,
        user: str | None = None,
        hostname: str | None = None,
        tags: Mapping[str, str] | None = None,
        publish: Sequence[Publish] = (),
        volumes: Sequence[VolumeMount] = (),
        kernel: str | None = None,
        start: bool = True,
        progress: ProgressSink = no_progress,
    ) -> Instance:
        return self._portal.call(
            self._host.run(
                image,
                command,
                name=name,
                cpus=cpus,
                memory_bytes=memory_bytes,
                overlay_bytes=overlay_bytes,
                env=env,
                workdir=workdir,
                user=user,
                hostname=hostname,
                tags=tags,
                publish=publish,
                volumes=volumes,
                kernel=kernel,
                start=start,
                progress=progress,
            )
        )

    def start(self, reference: Reference, *, progress: ProgressSink = no_progress) -> Instance:
        return self._portal.call(self._host.start(reference, progress=progress))

    def restore(self, reference: Reference) -> Instance:
        return self._portal.call(self._host.restore(reference))

    def stop(self, reference: Reference, *, grace_s: float | None = None) -> Instance:
        return self._portal.call(self._host.stop(reference, grace_s=grace_s))

    def standby(self, reference: Reference) -> tuple[Instance, CaptureReport]:
        return self._portal.call(self._host.standby(reference))

    def promote(self, reference: Reference, *, public: bool | None = None) -> Instance:
        return self._portal.call(self._host.promote(reference, public=public))

    def demote(self, reference: Reference) -> Instance:
        return self._portal.call(self._host.demote(reference))

    def fork(
        self,
        reference: Reference,
        *,
        count: int = 1,
        names: Sequence[str] = (),
        target: State = State.RUNNING,
        atomic: bool = False,
        tags: Mapping[str, str] | None = None,
        publish: Sequence[Publish] = (),
        from_running: bool = False,
        payload: bytes | None = None,
        payloads: Sequence[bytes] = (),
        progress: ProgressSink = no_progress,
    ) -> ForkReport:
        return self._portal.call(
            self._host.fork(
                reference,
                count=count,
                names=names,
                target=target,
                atomic=atomic,
                tags=tags,
                publish=publish,
                from_running=from_running,
                payload=payload,
                payloads=payloads,
                progress=progress,
            )
        )

    def start_ahead(self, reference: Reference, count: int = 1) -> int:
        return self._portal.call(self._host.start_ahead(reference, count))

    def rm(self, reference: Reference) -> None:
        self._portal.call(self._host.rm(reference))

    @contextlib.contextmanager
    def machine(self, image: str, command: Sequence[str] = (), *, memory_bytes: int = 512 * MIB) -> Iterator[Instance]:
        with self._portal.within(self._host.machine(image, command, memory_bytes=memory_bytes)) as instance:
            yield instance

    @contextlib.contextmanager
    def forks(self, reference: Reference, count: int) -> Iterator[tuple[Instance, ...]]:
        with self._portal.within(self._host.forks(reference, count)) as instances:
            yield instances
