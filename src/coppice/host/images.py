"""Use cases of images and kernels, and the check of the host."""

from __future__ import annotations

from functools import partial
from pathlib import Path
from urllib.parse import urlsplit

from coppice.completion import complete, in_thread
from coppice.errors import NotFound, Refused
from coppice.host.base import UseCases
from coppice.images.catalog import BuildOptions
from coppice.model import Check, Image, ProgressSink
from coppice.model.kernel import Kernel
from coppice.model.ownership import owns, require_operator
from coppice.requests import (
    DoctorRequest,
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
from coppice.trust import certificates_in


class Images(UseCases):
    """The operations on images and kernels, and `doctor`."""

    async def image_build(self, request: ImageBuildRequest, progress: ProgressSink) -> Image:
        """Build the image with mmdebstrap."""
        from coppice.images.suite import Suite  # no other operation needs it

        if request.proxy is not None:
            await self._require_reach(urlsplit(request.proxy).hostname or "")
        wanted = Suite(suite=request.suite, include=tuple(request.include), proxy=request.proxy)
        options = self._options(request)
        return await self.rooms.images.build_suite(request.name, wanted, options=options, progress=progress)

    async def image_import(self, request: ImageImportRequest, progress: ProgressSink) -> Image:
        """Detect the format, and convert the content to an image."""
        return await self.rooms.images.import_any(
            request.name, Path(request.path), request.tag, options=self._options(request), progress=progress
        )

    async def image_pull(self, request: ImagePullRequest, progress: ProgressSink) -> Image:
        """Pull the image with skopeo."""
        return await self._pull(request, progress)

    def _options(self, request: ImageBuildRequest | ImageImportRequest) -> BuildOptions:
        certificates = certificates_in(request.certificates)
        return BuildOptions(owner=self.owner, public=request.public, certificates=certificates)

    async def image_ls(self, _: ImageLsRequest) -> list[Image]:
        """List the images that this host's owner may run."""
        images = await in_thread(self.rooms.images.list)
        return [image for image in images if self._usable(image)]

    async def image_inspect(self, request: ImageInspectRequest) -> Image:
        """Look the image up."""
        return await self._image(request.image)

    async def _image(self, key: str) -> Image:
        return await in_thread(self.rooms.images.get, key, self._usable)

    async def image_tag(self, request: ImageTagRequest) -> Image:
        """Add the name."""
        return await in_thread(
            self.rooms.images.tag,
            request.image,
            request.name,
            owner=self.owner,
            public=request.public,
            allowed=self._usable,
        )

    async def image_rm(self, request: ImageRmRequest) -> None:
        """Remove the name, and with its last name the image."""
        try:
            await in_thread(self.rooms.images.remove, request.image, partial(owns, self.owner))
        except NotFound:
            await self._image(request.image)
            raise Refused(
                f"cannot remove the image {request.image!r} of another owner",
                hint=f"it is public: `coppice run {request.image}` and `coppice image tag` work",
            ) from None

    async def kernel_add(self, request: KernelAddRequest) -> Kernel:
        """Copy the kernel into the data directory."""
        add = partial(
            self.rooms.kernels.add,
            modules=None if request.modules is None else Path(request.modules),
            config=None if request.config is None else Path(request.config),
            no_modules=request.no_modules,
            acpi=request.acpi,
        )
        return await in_thread(add, Path(request.kernel))

    async def kernel_fetch(self, _: KernelFetchRequest, progress: ProgressSink) -> Kernel:
        """Fetch the kernel unless it is stored already."""
        return await self.rooms.kernels.ensure_debian(progress)

    async def kernel_ls(self, _: KernelLsRequest) -> list[Kernel]:
        """List the stored kernels."""
        return await in_thread(self.rooms.kernels.kernels)

    async def kernel_rm(self, request: KernelRmRequest) -> None:
        """Remove the kernel unless a record needs it."""
        require_operator(self.owner, "kernel rm")
        unused = partial(self.rooms.store.retire_kernel, request.kernel)
        await complete(in_thread(self.rooms.kernels.remove, request.kernel, unused))

    async def doctor(self, _: DoctorRequest) -> list[Check]:
        """Run all checks."""
        from coppice.doctor import run_checks  # imports modules that no other operation needs

        return await run_checks(self._host.home, self._host.drivers)
