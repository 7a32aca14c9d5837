# Written by tools/generate_client.py: change coppice.requests, then run it.

"""Managers of images and kernels."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from coppice.client.aio.base import Bound, key_of, text_of
from coppice.model import (
    Image,
    ProgressSink,
    no_progress,
)
from coppice.model.kernel import Kernel
from coppice.requests import (
    ImageBuildRequest,
    ImageImportRequest,
    ImageInspectRequest,
    ImageLsRequest,
    ImagePullRequest,
    ImageRmRequest,
    ImageTagRequest,
    KernelAddRequest,
    KernelFetchRequest,
    KernelLsRequest,
    KernelRmRequest,
)

if TYPE_CHECKING:
    pass


class AsyncImages(Bound):
    """The images of a host."""

    async def build(
        self,
        name: str,
        *,
        suite: str = "bookworm",
        include: Sequence[str] = (),
        certificates: Sequence[str] = (),
        proxy: str | None = None,
        public: bool = False,
        progress: ProgressSink = no_progress,
    ) -> Image:
        """Build an image of a Debian suite with extra packages.

        :param name: Name for the image, such as `web` or `team/web:1`.
        :param suite: The Debian suite.
        :param include: Packages to add.
        :param certificates: PEM texts of authorities to trust, besides those of the image, such as
            a company's.
        :param proxy: URL of a proxy for the downloads. The image does not keep it.
        :param public: Other owners may run it too.
        :param progress: Called with each step of the work.
        :raises MissingTool: mmdebstrap is not installed
        :raises ImageError: the suite or a package is not available
        """
        return await self._backend.call(
            ImageBuildRequest(
                name=name, suite=suite, include=include, certificates=certificates, proxy=proxy, public=public
            ),
            progress,
        )

    async def import_(
        self,
        name: str,
        path: Path | str,
        *,
        tag: str | None = None,
        certificates: Sequence[str] = (),
        public: bool = False,
        progress: ProgressSink = no_progress,
    ) -> Image:
        """Make an image of a root file system tar, a `docker save` archive or an OCI layout (directory
        or tar).

        The format is detected.

        :param name: Name for the image, such as `web` or `team/web:1`.
        :param path: The archive or directory, on this machine.
        :param tag: Selects one of several images: a tag of a `docker save` archive, a reference or
            digest of a layout.
        :param certificates: PEM texts of authorities to trust, besides those of the image, such as
            a company's.
        :param public: Other owners may run it too.
        :param progress: Called with each step of the work.
        :raises UsageError: there is no such path
        :raises ImageError: the archive is corrupt, truncated or unsafe, or `tag` does not name one
            of its images
        """
        return await self._backend.call(
            ImageImportRequest(name=name, path=text_of(path), tag=tag, certificates=certificates, public=public),
            progress,
        )

    async def pull(
        self,
        reference: str,
        *,
        name: str | None = None,
        platform: str | None = None,
        credentials: str | None = None,
        tls_verify: bool | None = None,
        public: bool = False,
        tags: Mapping[str, str] | None = None,
        progress: ProgressSink = no_progress,
    ) -> Image:
        """Pull an image from a registry. It gets the name `reference`, as typed, unless `name` is
        given.

        `alpine` means docker.io/library/alpine:latest, and is found by both names. Layers of
        earlier pulls are not fetched again. The operator uses the logins that `skopeo login` and
        `docker login` have saved on the host; an owner uses `credentials` only.

        :param reference: The image: `[REGISTRY/]NAME[:TAG][@DIGEST]`.
        :param name: Name for the image. Default: the reference.
        :param platform: `OS/ARCHITECTURE[/VARIANT]` of a multi-platform image. Default: this
            machine's.
        :param credentials: `USER:PASSWORD` for the registry.
        :param tls_verify: Require HTTPS with a trusted certificate. Default: unless the registry is
            on a loopback address.
        :param public: Other owners may run it too.
        :param tags: Tags of the new records.
        :param progress: Called with each step of the work.
        :raises MissingTool: skopeo is not installed
        :raises NotFound: the registry has no such image, or none for this machine
        :raises Refused: the registry refuses the credentials, or wants some
        :raises Forbidden: the token's owner may not have the server ask this registry
        :raises HostCannot: the registry cannot be reached, or its certificate is not trusted
        :raises ImageError: the image exceeds a limit, or its content does not match its digests
        """
        return await self._backend.call(
            ImagePullRequest(
                reference=reference,
                name=name,
                platform=platform,
                credentials=credentials,
                tls_verify=tls_verify,
                public=public,
                tags={} if tags is None else tags,
            ),
            progress,
        )

    async def ls(self) -> list[Image]:
        """Return the images that this host's owner may run: its own and public ones. The operator sees
        all.
        """
        return await self._backend.call(ImageLsRequest())

    async def inspect(self, image: Image | str) -> Image:
        """Return one image.

        :param image: Name, digest or unique prefix of the digest of an image.
        :raises NotFound: there is no such image
        """
        return await self._backend.call(ImageInspectRequest(image=key_of(image)))

    async def tag(self, image: Image | str, name: str, *, public: bool = False) -> Image:
        """Give an image another name, which belongs to this owner.

        If the image already has the name, only `public` changes.

        :param image: Name, digest or unique prefix of the digest of an image.
        :param name: Name for the image, such as `web` or `team/web:1`.
        :param public: Other owners may run it too.
        :raises NameTaken: the name belongs to another owner
        """
        return await self._backend.call(ImageTagRequest(image=key_of(image), name=name, public=public))

    async def rm(self, image: Image | str) -> None:
        """Remove an image, or one of its names.

        :param image: Name, digest or unique prefix of the digest of an image.
        :raises InUse: instances or snapshots use the image as their root; the message names them
        :raises Refused: the image is public and belongs to another owner
        """
        await self._backend.call(ImageRmRequest(image=key_of(image)))


class AsyncKernels(Bound):
    """The kernels of a host."""

    async def add(
        self,
        kernel: Path | str,
        modules: Path | str | None = None,
        *,
        config: Path | str | None = None,
        no_modules: bool = False,
        acpi: bool | None = None,
    ) -> Kernel:
        """Add your own kernel.

        A kernel with CONFIG_IKCONFIG contains its configuration. For another kernel, the other
        parameters describe it.

        :param kernel: The bzImage or the uncompressed vmlinux, on this machine.
        :param modules: Directory of its modules: .../lib/modules/VERSION.
        :param config: The file .config that it was built with.
        :param no_modules: All drivers that a guest needs are built in.
        :param acpi: Whether it supports ACPI. Without ACPI, devices are listed on its command line.
        :raises UsageError: the file is not a kernel, or its configuration is unknown; the hint
            names a parameter
        """
        return await self._backend.call(
            KernelAddRequest(
                kernel=text_of(kernel),
                modules=None if modules is None else text_of(modules),
                config=None if config is None else text_of(config),
                no_modules=no_modules,
                acpi=acpi,
            )
        )

    async def fetch(self, *, progress: ProgressSink = no_progress) -> Kernel:
        """Return Debian's cloud kernel. Fetch it into the data directory if it is missing.

        :param progress: Called with each step of the work.
        """
        return await self._backend.call(KernelFetchRequest(), progress)

    async def ls(self) -> list[Kernel]:
        """Return all kernels, newest last."""
        return await self._backend.call(KernelLsRequest())

    async def rm(self, kernel: Kernel | str) -> None:
        """Remove a kernel.

        :param kernel: Key of the kernel.
        :raises NotFound: there is no such kernel
        :raises InUse: instances or snapshots use the kernel; the message names them
        :raises Refused: the host has an owner; only the operator may remove kernels, which all
            owners share
        """
        await self._backend.call(KernelRmRequest(kernel=key_of(kernel)))
