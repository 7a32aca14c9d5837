"""The catalog with all that makes images: each builder fills a tree, and one path writes, hashes and publishes it.

The work runs in a thread. When the caller is cancelled the thread is told, removes what it staged, and only then the
cancellation goes on: nothing half-made stays, and nothing runs on behind the caller's back.
"""

from __future__ import annotations

import errno
import tarfile
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Literal, TypeVar

import msgspec

from coppice.completion import in_stoppable_thread
from coppice.errors import ImageError, NoSpace
from coppice.images.archive import Archive, open_archive
from coppice.images.blobs import ArchiveBundle, DirectoryBundle
from coppice.images.erofs import write_erofs
from coppice.images.layer import apply_archive, prepare_for_guest
from coppice.images.oci import unpack_docker_archive, unpack_layout
from coppice.images.reference import check_name
from coppice.images.squashfs import write_squashfs
from coppice.images.store import ROOT_FILE, ImageStore
from coppice.images.suite import Suite, bootstrap, make_generic
from coppice.images.tree import FileTree
from coppice.images.workspace import Limits, Workspace, staging_directory
from coppice.model import Image, ImageConfig, ProgressSink, Record, no_progress
from coppice.names import as_recorded

T = TypeVar("T")
_ROOT_DIRECTORIES = ("bin", "sbin", "usr", "etc", "lib")  # any of them at the top makes it a root file system
_FULL = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)


class BuildOptions(Record, frozen=True):
    """What all builders take."""

    filesystem: Literal["erofs", "squashfs"] = "erofs"
    limits: Limits = Limits()
    config: ImageConfig | None = None  # instead of what the archive says
    owner: str | None = None
    public: bool = False
    tags: dict[str, str] = msgspec.field(default_factory=dict)


DEFAULTS = BuildOptions()
_Fill = Callable[[FileTree, Workspace], ImageConfig]


class ImageCatalog(ImageStore):
    """The store, and everything that puts images into it.

    All builders: `name` is the image's name, and moves here if another image has it. `progress` is called from a
    thread. They raise InvalidName, NameTaken, NoSpace, ImageError and its kinds for bad input; on cancellation nothing stays
    behind.
    """

    async def build_suite(
        self,
        name: str,
        suite: str = "bookworm",
        include: Sequence[str] = (),
        mirror: Sequence[str] = (),
        *,
        variant: str = "minbase",
        components: Sequence[str] = ("main",),
        run: Sequence[Sequence[str]] = (),
        keyring: Path | None = None,
        source_date_epoch: int | None = None,
        timeout_s: float = 1800.0,
        options: BuildOptions = DEFAULTS,
        progress: ProgressSink = no_progress,
    ) -> Image:
        """Bootstrap a Debian or Ubuntu suite by mmdebstrap; what the parameters mean is said at `suite.Suite`.

        Raises also MissingTool, HostCannot when `timeout_s` passes, UsageError.
        """
        wanted = Suite(
            suite=suite,
            include=tuple(include),
            mirror=tuple(mirror),
            variant=variant,
            components=tuple(components),
            run=tuple(tuple(argv) for argv in run),
            keyring=keyring,
            source_date_epoch=source_date_epoch,
            timeout_s=timeout_s,
        )
        wanted.check()

        def fill(tree: FileTree, workspace: Workspace) -> ImageConfig:
            archive = Archive(bootstrap(wanted, workspace), workspace, must_end=True)
            apply_archive(tree, archive, workspace, whiteouts=False)
            make_generic(tree)
            return ImageConfig()

        packages = f" with {', '.join(wanted.include)}" if include else ""
        return await self._build(name, f"{suite} {variant}{packages}", fill, options, progress)

    async def import_rootfs_tar(
        self, name: str, path: Path, *, options: BuildOptions = DEFAULTS, progress: ProgressSink = no_progress
    ) -> Image:
        """A root file system as one tar archive: plain, or compressed by gzip, zstd, xz or bzip2."""

        def fill(tree: FileTree, workspace: Workspace) -> ImageConfig:
            apply_archive(tree, open_archive(path, workspace), workspace, whiteouts=False)
            return ImageConfig()

        return await self._build(name, f"rootfs archive {as_recorded(path.name)}", fill, options, progress)

    async def import_docker_archive(
        self,
        name: str,
        path: Path,
        tag: str | None = None,
        *,
        options: BuildOptions = DEFAULTS,
        progress: ProgressSink = no_progress,
    ) -> Image:
        """What `docker save` writes, in any of its forms. `tag` chooses where there are several images in it."""

        def fill(tree: FileTree, workspace: Workspace) -> ImageConfig:
            return unpack_docker_archive(ArchiveBundle(open_archive(path, workspace)), tree, workspace, tag)

        return await self._build(name, f"docker archive {as_recorded(path.name)}", fill, options, progress)

    async def import_oci_layout(
        self,
        name: str,
        path: Path,
        reference: str | None = None,
        *,
        options: BuildOptions = DEFAULTS,
        progress: ProgressSink = no_progress,
    ) -> Image:
        """An OCI image layout: a directory, or a tar archive of one. `reference` chooses where there are several
        images."""

        def fill(tree: FileTree, workspace: Workspace) -> ImageConfig:
            bundle = DirectoryBundle(path) if path.is_dir() else ArchiveBundle(open_archive(path, workspace))
            if not bundle.has("index.json"):
                raise ImageError(f"{path} has no index.json", hint="make it with skopeo copy ... oci:DIRECTORY")
            return unpack_layout(bundle, tree, workspace, reference)

        return await self._build(name, f"OCI layout {as_recorded(path.name)}", fill, options, progress)

    async def import_any(
        self,
        name: str,
        path: Path,
        reference: str | None = None,
        *,
        options: BuildOptions = DEFAULTS,
        progress: ProgressSink = no_progress,
    ) -> Image:
        """Whatever of these `path` is. `reference` is the tag or reference where there are several images in it."""
        if path.is_dir():
            return await self.import_oci_layout(name, path, reference, options=options, progress=progress)

        def fill(tree: FileTree, workspace: Workspace) -> ImageConfig:
            archive = open_archive(path, workspace)
            bundle = ArchiveBundle(archive)
            if bundle.has_top(_ROOT_DIRECTORIES):
                if reference is not None:
                    raise ImageError(f"{path} is one root file system: it has no tags", hint="leave out --tag")
                apply_archive(tree, archive, workspace, whiteouts=False)
                return ImageConfig()
            if bundle.has("manifest.json"):
                return unpack_docker_archive(bundle, tree, workspace, reference)
            if bundle.has("index.json"):
                return unpack_layout(bundle, tree, workspace, reference)
            raise ImageError(
                f"{path} is neither a root file system, a docker archive nor an OCI layout",
                hint="a root file system has directories such as /usr and /etc at its top",
            )

        return await self._build(name, as_recorded(path.name), fill, options, progress)

    async def _build(self, name: str, source: str, fill: _Fill, options: BuildOptions, progress: ProgressSink) -> Image:
        check_name(name)

        def work(cancelled: threading.Event) -> Image:
            with (
                as_image_errors(),
                staging_directory(self.root, self.lock_file) as directory,
                Workspace(directory, limits=options.limits, progress=progress, cancelled=cancelled) as workspace,
            ):
                tree = FileTree(max_nodes=options.limits.max_members)
                config = fill(tree, workspace)
                prepare_for_guest(tree)
                staged = directory / "image"
                staged.mkdir()
                digest = _write(tree, staged / ROOT_FILE, options, workspace)
                image = Image(
                    digest=f"sha256:{digest}",
                    name=name,
                    size_bytes=(staged / ROOT_FILE).stat().st_size,
                    filesystem=options.filesystem,
                    config=options.config or config,
                    source=source,
                    created_at=time.time(),
                    owner=options.owner,
                    public=options.public,
                    tags=options.tags,
                )
                workspace.check()
                return self.publish(staged, image)

        return await in_stoppable_thread(work)


def _write(tree: FileTree, path: Path, options: BuildOptions, workspace: Workspace) -> str:
    """Write the image file; the hex of its SHA-256."""

    def progress(done: int, total: int) -> None:
        workspace.report("write", done, total)

    if options.filesystem == "squashfs":
        return write_squashfs(tree, path, max_bytes=options.limits.max_bytes, progress=progress)
    with path.open("xb") as file:
        return write_erofs(tree, file, max_bytes=options.limits.max_bytes, progress=progress)


@contextmanager
def as_image_errors() -> Iterator[None]:
    """Turn a full disk into NoSpace, and what the tar reader finds while reading on into ImageError."""
    try:
        yield
    except OSError as error:
        if error.errno in _FULL:
            raise NoSpace("the disk is full before it was written", hint="free some space") from error
        raise
    except (tarfile.TarError, EOFError) as error:
        raise ImageError(f"the archive cannot be read: {error}", hint="fetch or make it again") from error
