"""The image store together with the builders of images.

Each builder fills a tree; one code path writes, hashes and publishes it.

The work runs in a thread. If the caller is cancelled, the thread first removes its staged files,
and then the cancellation is raised, so neither files nor work remain. Builders import what only
they need: every command opens the catalog, and few build.
"""

from __future__ import annotations

import contextlib
import errno
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, TypeVar

import msgspec

from coppice import stopping
from coppice.completion import in_own_thread, in_thread
from coppice.errors import ImageError, NoSpace, NotFound
from coppice.images.cache import LayerCache
from coppice.images.reference import check_name, parse_reference
from coppice.images.store import ROOT_FILE, ImageStore
from coppice.images.workspace import Limits, Workspace
from coppice.model import Image, ImageConfig, ProgressSink, Record, no_progress
from coppice.names import as_recorded

if TYPE_CHECKING:
    from coppice.images.registry import Access
    from coppice.images.suite import Suite
    from coppice.images.tree import FileTree

T = TypeVar("T")
_ROOT_DIRECTORIES = ("bin", "sbin", "usr", "etc", "lib")  # an archive with any of them at its top is a root file system
_FULL = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)


class BuildOptions(Record, frozen=True):
    """The options of all builders."""

    limits: Limits = Limits()
    config: ImageConfig | None = None  # replaces the archive's config
    owner: str | None = None
    public: bool = False
    tags: dict[str, str] = msgspec.field(default_factory=dict)
    manifest_digest: str | None = None
    certificates: tuple[str, ...] = ()  # PEM; machines of the image trust them


DEFAULTS = BuildOptions()
_Fill = Callable[["FileTree", Workspace], ImageConfig]


class ImageCatalog(ImageStore):
    """The store with everything that adds images to it.

    In all builders, `name` is the image's name, which moves here if another image has it.
    `progress` is called from a thread. They raise InvalidName, NameTaken, NoSpace, and ImageError
    and its subclasses for bad input. A cancellation leaves nothing behind.
    """

    async def build_suite(
        self,
        name: str,
        wanted: Suite,
        *,
        options: BuildOptions = DEFAULTS,
        progress: ProgressSink = no_progress,
    ) -> Image:
        """Bootstrap a Debian or Ubuntu suite by mmdebstrap.

        Also raises MissingTool, HostCannot at the deadline, and UsageError.
        """
        from coppice.images.archive import Archive
        from coppice.images.layer import apply_archive
        from coppice.images.suite import bootstrap, make_generic

        wanted.check()

        def fill(tree: FileTree, workspace: Workspace) -> ImageConfig:
            archive = Archive(bootstrap(wanted, options.certificates, workspace), workspace, must_end=True)
            apply_archive(tree, archive, whiteouts=False)
            make_generic(tree)
            return ImageConfig()

        packages = f" with {', '.join(wanted.include)}" if wanted.include else ""
        return await self._build(name, f"{wanted.suite} minbase{packages}", fill, options, progress)

    async def import_any(
        self,
        name: str,
        path: Path,
        reference: str | None = None,
        *,
        options: BuildOptions = DEFAULTS,
        progress: ProgressSink = no_progress,
    ) -> Image:
        """Import a root file system or a container image.

        The input is a root file system as a tar archive, the output of `docker save` in any of its
        forms, or an OCI layout as a directory or a tar archive. Archives may be compressed by gzip,
        zstd, xz or bzip2. `reference` is the tag or reference to choose if there are several
        images.
        """

        from coppice.images.archive import open_archive
        from coppice.images.blobs import ArchiveBundle, DirectoryBundle
        from coppice.images.layer import apply_archive
        from coppice.images.oci import unpack_docker_archive, unpack_layout

        def fill(tree: FileTree, workspace: Workspace) -> ImageConfig:
            if path.is_dir():
                directory = DirectoryBundle(path)
                if not directory.has("index.json"):
                    raise ImageError(f"{path} has no index.json", hint="make it with skopeo copy ... oci:DIRECTORY")
                return unpack_layout(directory, tree, workspace, reference)
            archive = open_archive(path, workspace)
            bundle = ArchiveBundle(archive)
            if bundle.has_top(_ROOT_DIRECTORIES):
                if reference is not None:
                    raise ImageError(f"{path} is a plain root file system, without tags", hint="omit --tag")
                apply_archive(tree, archive, whiteouts=False)
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

    async def pull(
        self,
        reference: str,
        *,
        access: Access,
        name: str | None,
        cache: LayerCache,
        options: BuildOptions = DEFAULTS,
        progress: ProgressSink = no_progress,
    ) -> Image:
        """Pull an image from a registry: read its manifest, fetch the layers that `cache` lacks,
        and apply them.

        If the owner has already pulled this manifest, nothing is fetched. The other spellings of
        the image's name that the owner has move to the new image too.
        """
        from coppice.images.blobs import DirectoryBundle
        from coppice.images.oci import unpack_manifest
        from coppice.images.registry import download, resolve

        access.check()
        wanted = parse_reference(reference)
        name = check_name(name or reference)
        await in_thread(self.records.refuse_taken, name, options.owner)
        resolved = await in_own_thread(self._with_workspace, partial(resolve, wanted, access), options, progress)

        def fill(tree: FileTree, workspace: Workspace) -> ImageConfig:
            download(wanted, resolved, access, cache.blobs, workspace)
            return unpack_manifest(DirectoryBundle(cache.directory), resolved.manifest, tree, workspace)

        async with cache.hold(resolved.digest, str(wanted)):
            image = await in_thread(self._pulled, resolved.digest, name, options)
            if image is None:
                pulled = msgspec.structs.replace(options, manifest_digest=resolved.digest)
                image = await self._build(name, str(wanted), fill, pulled, progress)
        await in_thread(self._move_spellings, image)
        return image

    def _with_workspace(self, work: Callable[[Workspace], T], options: BuildOptions, progress: ProgressSink) -> T:
        with (
            as_image_errors(),
            self.content.staging() as directory,
            Workspace(directory, limits=options.limits, progress=progress) as workspace,
        ):
            return work(workspace)

    def _pulled(self, digest: str, name: str, options: BuildOptions) -> Image | None:
        """Name an image that the owner has pulled before, or return None."""
        for image in self.records.all():
            if image.name and image.manifest_digest == digest and image.owner == options.owner:
                with contextlib.suppress(NotFound):  # removed meanwhile
                    self.root_file(image)
                    named = msgspec.structs.replace(
                        image, name=name, public=options.public, tags=options.tags, created_at=time.time()
                    )
                    self.records.tag(named)
                    return named
        return None

    def _move_spellings(self, image: Image) -> None:
        for other in self.called(image.name, lambda each: each.owner == image.owner):
            if other.name != image.name and other.digest != image.digest:
                self.records.tag(msgspec.structs.replace(image, name=other.name, public=other.public))

    async def _build(self, name: str, source: str, fill: _Fill, options: BuildOptions, progress: ProgressSink) -> Image:
        from coppice.images.erofs import write_erofs
        from coppice.images.layer import prepare_for_guest
        from coppice.images.tree import FileTree

        check_name(name)

        def work(workspace: Workspace) -> Image:
            tree = FileTree(max_nodes=options.limits.max_members)
            config = fill(tree, workspace)
            prepare_for_guest(tree)
            staged = workspace.path / "image"
            staged.mkdir()
            with (staged / ROOT_FILE).open("xb") as file:
                write = partial(workspace.report, "write")
                digest = write_erofs(tree, file, max_bytes=options.limits.max_bytes, progress=write)
            image = Image(
                digest=f"sha256:{digest}",
                name=name,
                size_bytes=(staged / ROOT_FILE).stat().st_size,
                config=msgspec.structs.replace(options.config or config, certificates=options.certificates),
                source=source,
                created_at=time.time(),
                owner=options.owner,
                public=options.public,
                tags=options.tags,
                manifest_digest=options.manifest_digest,
            )
            stopping.check()
            self.publish(staged, image)
            return image

        return await in_own_thread(self._with_workspace, work, options, progress)


@contextmanager
def as_image_errors() -> Iterator[None]:
    """Turn a full disk into NoSpace, and late errors of the tar reader into ImageError."""
    import tarfile

    try:
        yield
    except OSError as error:
        if error.errno in _FULL:
            raise NoSpace("the disk became full while the image was written", hint="free disk space") from error
        raise
    except (tarfile.TarError, EOFError) as error:
        raise ImageError(f"cannot read the archive: {error}", hint="fetch or make it again") from error
