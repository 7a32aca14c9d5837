"""Host: inside of a guest."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path

from coppice.guest.control import Health
from coppice.host import LogSource, Reference
from coppice.model import MIB, ExecResult, FileStat, Instance, ProgressSink, no_progress
from coppice.sync.base import HostBase
from coppice.sync.session import ExecSession


class Guest(HostBase):
    """Commands, files and logs."""

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

    def cp_in(
        self, reference: Reference, host_path: Path | str, guest_path: str, *, progress: ProgressSink = no_progress
    ) -> int:
        return self._portal.call(self._host.cp_in(reference, host_path, guest_path, progress=progress))

    def cp_out(
        self, reference: Reference, guest_path: str, host_path: Path | str, *, progress: ProgressSink = no_progress
    ) -> int:
        return self._portal.call(self._host.cp_out(reference, guest_path, host_path, progress=progress))

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
