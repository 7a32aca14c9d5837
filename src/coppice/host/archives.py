"""Use cases that move templates between data directories: export and import."""

from __future__ import annotations

import contextlib
import sys
import time
from collections.abc import AsyncIterable, AsyncIterator, Iterator, Sequence

from coppice.archive import files as local
from coppice.archive.format import LARGEST_TOTAL, Manifest, data_bytes, total_bytes
from coppice.archive.writer import Source, archive, source_of
from coppice.boot.kernel import digest_of_files
from coppice.completion import in_thread
from coppice.errors import NotSupported
from coppice.host.receiving import Receiving
from coppice.linux.files import untranslated
from coppice.machine import directory as directories
from coppice.machine import portable
from coppice.model import Image, ImageConfig, Instance, ProgressSink
from coppice.model.archive import ExportSession, ImportSession
from coppice.model.lifecycle import Operation
from coppice.requests import ExportRequest, ImportTemplateRequest, OpenExportRequest, OpenImportRequest
from coppice.vmm import driver as files


class Archives(Receiving):
    """The operations on archives."""

    @contextlib.asynccontextmanager
    async def open_export(self, request: OpenExportRequest) -> AsyncIterator[ExportSession]:
        """Hold the instance's lock shared, as a fork does, while its archive is read."""
        async with self._hold(request.instance, Operation.EXPORT, shared=True) as (instance, _):
            if instance.machine.volumes:
                raise NotSupported(
                    f"cannot export {instance.name}: it has volumes, which an archive does not contain",
                    hint="make a template without volumes: keep its data in the image or on its own disk",
                )
            yield _Export(*await in_thread(self._contents, instance, bare=request.bare))

    async def export(self, request: ExportRequest, progress: ProgressSink) -> int:
        """Write the stream to the file."""
        async with self.open_export(OpenExportRequest(instance=request.instance, bare=request.bare)) as session:
            return await local.save(session, request.path, progress)

    def _contents(self, instance: Instance, *, bare: bool) -> tuple[Manifest, list[Source]]:
        directory = self.rooms.directory(instance.id)
        if instance.capture is None:
            raise AssertionError("an instance at rest has a capture")
        directories.require_current(directory, instance)
        directories.check_memory(directory, instance.capture)
        known = portable.digests(instance.capture)
        sources = [source_of(path, path.name, known.get(path.name)) for path in portable.paths(directory, instance)]
        kernel = self.rooms.kernels.files(instance.machine.kernel)
        root = source_of(directory / files.ROOT_DISK, "image", instance.image.removeprefix("sha256:"))
        if not bare:
            sources += [root, *(source_of(path, f"kernel/{name}") for name, path in kernel.items())]
        manifest = Manifest(
            coppice=str(sys.modules["coppice"].__version__),  # an import of it would be a cycle,
            exported_at=time.time(),
            template=portable.record(instance),
            image=self._image_of(instance, root.file.size_bytes),
            kernel_sha256=digest_of_files(kernel),
            files=tuple(source.file for source in sources),
        )
        if total_bytes(manifest.files) > LARGEST_TOTAL:
            raise NotSupported(f"{instance.name} is too large for an archive", hint="make its disk smaller")
        return manifest, sources

    def _image_of(self, instance: Instance, size_bytes: int) -> Image:
        """Return the record of an instance's image, without its owner. It may have records that the caller must not see."""
        usable = [each for each in self.rooms.images.list() if each.digest == instance.image and self._usable(each)]
        named = [each for each in usable if each.name == instance.image_name]
        config = (named or usable)[0].config if usable else ImageConfig()
        return Image(
            digest=instance.image,
            name=instance.image_name,
            size_bytes=size_bytes,
            config=config,
            source="",
            created_at=instance.created_at,
        )

    @contextlib.asynccontextmanager
    async def open_import(self, request: OpenImportRequest) -> AsyncIterator[ImportSession]:
        """Return the session. It does all its work in `receive`."""
        yield _Import(self, request.name)

    async def import_template(self, request: ImportTemplateRequest, progress: ProgressSink) -> Instance:
        """Receive the content of the file."""
        async with (
            self.open_import(OpenImportRequest(name=request.name)) as session,
            contextlib.aclosing(local.content_of(request.path, progress)) as content,
        ):
            return await session.receive(content)


class _Export:
    """The archive of an instance, whose lock the caller holds."""

    def __init__(self, manifest: Manifest, sources: Sequence[Source]) -> None:
        self._pieces: Iterator[bytes] = archive(manifest, sources)
        self.most_bytes = data_bytes(manifest.files)

    async def __aiter__(self) -> AsyncIterator[bytes]:
        while piece := await in_thread(self._next):
            yield piece

    def _next(self) -> bytes:
        return next(self._pieces, b"")


class _Import:
    """A template that is being made of an archive."""

    def __init__(self, archives: Archives, name: str | None) -> None:
        self._archives = archives
        self._name = name

    async def receive(self, archive: AsyncIterable[bytes]) -> Instance:
        """Take an archive, and return the template."""
        with untranslated("import a template"):
            return await self._archives.receive(archive, self._name)
