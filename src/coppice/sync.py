"""Host: the blocking twin of AsyncHost, for programs that do not use asyncio.

Each Host has an event loop in a thread of its own (see `portal`); a call hands its work over and waits.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from types import TracebackType
from typing import Self

from coppice.guest.control import Health
from coppice.guest.kernel import Kernel
from coppice.guest.process import ExecSession as AsyncExecSession
from coppice.guest.process import Exit, Stream
from coppice.host import (
    AsyncHost,
    Inspection,
    LogSource,
    Reference,
    SnapshotInspection,
    SnapshotReference,
    VolumeInspection,
    VolumeReference,
)
from coppice.host.base import RoomsOpener
from coppice.instance.rooms import Deadlines
from coppice.model import (
    GIB,
    MIB,
    Budgets,
    BudgetUse,
    CaptureReport,
    Check,
    ExecResult,
    FileStat,
    ForkReport,
    GcReport,
    Image,
    Instance,
    MemoryReport,
    ProgressSink,
    Publish,
    Snapshot,
    SnapshotKind,
    State,
    TreeNode,
    VerifyReport,
    Volume,
    VolumeMount,
    no_progress,
)
from coppice.portal import Portal
from coppice.vmm.driver import VmmDriver


class ExecSession:
    """A running command. Iterate over it for its output; then `wait` says how it ended.

    Any thread may call it: one can send input while another takes the output. Output that nobody takes stops the command, as a pipe would.
    """

    def __init__(self, portal: Portal, session: AsyncExecSession) -> None:
        self._portal = portal
        self._session = session

    @property
    def pid(self) -> int:
        """Process id in the guest."""
        return self._session.pid

    def __iter__(self) -> Iterator[tuple[Stream, bytes]]:
        return self._portal.iterate(aiter(self._session))

    def send_stdin(self, data: bytes) -> None:
        """Give the command something to read; waits while it does not read. What is sent after its end is dropped."""
        self._portal.call(self._session.send_stdin(data))

    def eof(self) -> None:
        """Close the command's standard input."""
        self._portal.call(self._session.eof())

    def signal(self, number: int) -> None:
        """Send a signal to the command's process group."""
        self._portal.call(self._session.signal(number))

    def resize(self, rows: int, columns: int) -> None:
        """Tell the command's terminal its new size."""
        self._portal.call(self._session.resize(rows, columns))

    def collect(
        self,
        stdin: bytes | None = None,
        *,
        on_stdout: Callable[[bytes], None] | None = None,
        on_stderr: Callable[[bytes], None] | None = None,
        max_output_bytes: int = 64 * MIB,
    ) -> ExecResult:
        """Send all of `stdin`, take all output, and wait for the end. What has a sink goes there, in the host's thread.

        :raises GuestTimeout: it ran longer than its timeout, and was ended
        :raises GuestError: it wrote more than `max_output_bytes`
        """
        return self._portal.call(
            self._session.collect(stdin, on_stdout=on_stdout, on_stderr=on_stderr, max_output_bytes=max_output_bytes)
        )

    def wait(self) -> Exit:
        """Wait for the end. Output that was not taken is thrown away."""
        return self._portal.call(self._session.wait())


class Host:
    """One data directory and what can be done in it: AsyncHost, blocking.

    with Host() as host:
        vm = host.run("debian", ["sleep", "infinity"])

    Any thread may call it. Methods, parameters, results and errors are AsyncHost's.
    """

    def __init__(
        self,
        home: Path | str | None = None,
        *,
        accel: str = "auto",
        owner: str | None = None,
        driver: VmmDriver | None = None,
        deadlines: Deadlines | None = None,
        budgets: Budgets | None = None,
        open_rooms: RoomsOpener | None = None,
    ) -> None:
        self._host = AsyncHost(
            home,
            accel=accel,
            owner=owner,
            driver=driver,
            deadlines=deadlines,
            budgets=budgets,
            open_rooms=open_rooms,
        )
        self._portal = Portal()

    @property
    def home(self) -> Path:
        return self._host.home

    @property
    def owner(self) -> str | None:
        return self._host.owner

    @property
    def budgets(self) -> Budgets:
        return self._host.budgets

    def open(self) -> Self:
        self._portal.call(self._host.open())
        return self

    def close(self) -> None:
        self._portal.call(self._host.close())
        self._portal.close()

    def __enter__(self) -> Self:
        try:
            return self.open()
        except BaseException:
            self._portal.close()
            raise

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    # The life of an instance

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

    # Snapshots

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

    # Volumes

    def volume_create(self, name: str, *, size_bytes: int = GIB, tags: Mapping[str, str] | None = None) -> Volume:
        return self._portal.call(self._host.volume_create(name, size_bytes=size_bytes, tags=tags))

    def volume_ls(self, *, tags: Mapping[str, str] | None = None) -> list[Volume]:
        return self._portal.call(self._host.volume_ls(tags=tags))

    def volume_inspect(self, reference: VolumeReference) -> VolumeInspection:
        return self._portal.call(self._host.volume_inspect(reference))

    def volume_rm(self, reference: VolumeReference) -> None:
        self._portal.call(self._host.volume_rm(reference))

    # Inside of a guest

    def exec(
        self,
        reference: Reference,
        argv: Sequence[str],
        *,
        env: Mapping[str, str] | None = None,
        workdir: str | None = None,
        user: str | None = None,
        stdin: bytes | None = None,
        timeout_s: float | None = None,
        max_output_bytes: int = 64 * MIB,
    ) -> ExecResult:
        return self._portal.call(
            self._host.exec(
                reference,
                argv,
                env=env,
                workdir=workdir,
                user=user,
                stdin=stdin,
                timeout_s=timeout_s,
                max_output_bytes=max_output_bytes,
            )
        )

    @contextlib.contextmanager
    def open_exec(
        self,
        reference: Reference,
        argv: Sequence[str],
        *,
        env: Mapping[str, str] | None = None,
        workdir: str | None = None,
        user: str | None = None,
        tty: bool = False,
        size: tuple[int, int] | None = None,
        term: str | None = None,
        stdin: bool = True,
        timeout_s: float | None = None,
    ) -> Iterator[ExecSession]:
        opened = self._host.open_exec(
            reference,
            argv,
            env=env,
            workdir=workdir,
            user=user,
            tty=tty,
            size=size,
            term=term,
            stdin=stdin,
            timeout_s=timeout_s,
        )
        with self._portal.within(opened) as session:
            yield ExecSession(self._portal, session)

    def cp_in(self, reference: Reference, host_path: Path | str, guest_path: str) -> int:
        return self._portal.call(self._host.cp_in(reference, host_path, guest_path))

    def cp_out(self, reference: Reference, guest_path: str, host_path: Path | str) -> int:
        return self._portal.call(self._host.cp_out(reference, guest_path, host_path))

    def read_file(self, reference: Reference, path: str, *, max_bytes: int = 64 * MIB) -> bytes:
        return self._portal.call(self._host.read_file(reference, path, max_bytes=max_bytes))

    def write_file(self, reference: Reference, path: str, data: bytes, *, mode: int = 0o644) -> None:
        self._portal.call(self._host.write_file(reference, path, data, mode=mode))

    def stat(self, reference: Reference, path: str, *, follow_links: bool = False) -> FileStat:
        return self._portal.call(self._host.stat(reference, path, follow_links=follow_links))

    def health(self, reference: Reference) -> Health:
        return self._portal.call(self._host.health(reference))

    def logs(
        self, reference: Reference, *, source: LogSource = "console", tail: int | None = None, follow: bool = False
    ) -> Iterator[bytes]:
        return self._portal.iterate(self._host.logs(reference, source=source, tail=tail, follow=follow))

    def wait(self, reference: Reference, *, deadline_s: float) -> Instance:
        return self._portal.call(self._host.wait(reference, deadline_s=deadline_s))

    # Looking

    def get(self, reference: Reference) -> Instance:
        return self._portal.call(self._host.get(reference))

    def ls(self, *, state: State | None = None, tags: Mapping[str, str] | None = None) -> list[Instance]:
        return self._portal.call(self._host.ls(state=state, tags=tags))

    def inspect(self, reference: Reference) -> Inspection:
        return self._portal.call(self._host.inspect(reference))

    def stats(self, reference: Reference | None = None) -> dict[str, MemoryReport]:
        return self._portal.call(self._host.stats(reference))

    def budget(self) -> BudgetUse:
        return self._portal.call(self._host.budget())

    def tree(self, reference: Reference | None = None) -> list[TreeNode]:
        return self._portal.call(self._host.tree(reference))

    def verify(self, *, progress: ProgressSink = no_progress) -> VerifyReport:
        return self._portal.call(self._host.verify(progress=progress))

    def gc(self, *, dry_run: bool = False, caches: bool = False) -> GcReport:
        return self._portal.call(self._host.gc(dry_run=dry_run, caches=caches))

    # What machines are made of

    def image_build(
        self,
        name: str,
        *,
        suite: str = "bookworm",
        include: Sequence[str] = (),
        public: bool = False,
        progress: ProgressSink = no_progress,
    ) -> Image:
        return self._portal.call(
            self._host.image_build(name, suite=suite, include=include, public=public, progress=progress)
        )

    def image_import(
        self, name: str, path: Path | str, *, public: bool = False, progress: ProgressSink = no_progress
    ) -> Image:
        return self._portal.call(self._host.image_import(name, path, public=public, progress=progress))

    def image_ls(self) -> list[Image]:
        return self._portal.call(self._host.image_ls())

    def image_inspect(self, reference: str) -> Image:
        return self._portal.call(self._host.image_inspect(reference))

    def image_tag(self, reference: str, name: str, *, public: bool = False) -> Image:
        return self._portal.call(self._host.image_tag(reference, name, public=public))

    def image_rm(self, reference: str) -> None:
        self._portal.call(self._host.image_rm(reference))

    def kernel_add(self, kernel: Path | str, modules: Path | str) -> Kernel:
        return self._portal.call(self._host.kernel_add(kernel, modules))

    def kernel_fetch(self, *, progress: ProgressSink = no_progress) -> Kernel:
        return self._portal.call(self._host.kernel_fetch(progress=progress))

    def kernel_ls(self) -> list[Kernel]:
        return self._portal.call(self._host.kernel_ls())

    def doctor(self) -> list[Check]:
        return self._portal.call(self._host.doctor())


for _name, _member in vars(Host).items():  # one text for both
    if not _name.startswith("_"):
        _member.__doc__ = getattr(AsyncHost, _name).__doc__
