"""Use cases of images and kernels, and the check of the host."""

from __future__ import annotations

import asyncio
from collections.abc import Sequence
from functools import partial
from pathlib import Path

from coppice.completion import complete, in_thread
from coppice.doctor import run_checks
from coppice.errors import NotFound, Refused
from coppice.guest.kernel import Kernel
from coppice.host.base import HostBase
from coppice.images.catalog import BuildOptions
from coppice.model import Check, Image, ProgressSink, no_progress
from coppice.ownership import owns, require_operator


class Images(HostBase):
    """What machines are made of."""

    async def image_build(
        self,
        name: str,
        *,
        suite: str = "bookworm",
        include: Sequence[str] = (),
        public: bool = False,
        progress: ProgressSink = no_progress,
    ) -> Image:
        """Build an image of a Debian suite with extra packages. A `public` one may be run by other owners too.

        :raises MissingTool: mmdebstrap is not installed
        :raises ImageError: the suite or a package is not to be had
        """
        options = BuildOptions(owner=self.owner, public=public)
        return await self.rooms.images.build_suite(
            name, suite=suite, include=list(include), options=options, progress=progress
        )

    async def image_import(
        self,
        name: str,
        path: Path | str,
        *,
        tag: str | None = None,
        public: bool = False,
        progress: ProgressSink = no_progress,
    ) -> Image:
        """Make an image of a root file system tar, a `docker save` archive or an OCI layout (directory or tar); it is recognised.

        `tag` chooses where several images are in it: a tag in a `docker save` archive, in a layout a reference or a digest. A `public` one may be run by
        other owners too.

        :raises UsageError: there is no such path
        :raises ImageError: it is corrupt, truncated or unsafe, or has several images and `tag` is none of them
        """
        options = BuildOptions(owner=self.owner, public=public)
        return await self.rooms.images.import_any(name, Path(path), tag, options=options, progress=progress)

    async def image_ls(self) -> list[Image]:
        """The images that this host's owner may run, its own and public ones. The operator sees all."""
        images = await asyncio.to_thread(self.rooms.images.list)
        return [image for image in images if self._usable(image)]

    async def image_inspect(self, reference: str) -> Image:
        """One image, by name, digest or unique prefix of a digest.

        :raises NotFound: there is none
        """
        return await asyncio.to_thread(self.rooms.images.get, reference, self._usable)

    async def image_tag(self, reference: str, name: str, *, public: bool = False) -> Image:
        """Give an image another name, which is this owner's and, with `public`, for others too. Its own name anew changes whether it is public.

        :raises NameTaken: the name is another owner's
        """
        return await in_thread(
            self.rooms.images.tag, reference, name, owner=self.owner, public=public, allowed=self._usable
        )

    async def image_rm(self, reference: str) -> None:
        """Remove an image, or one of its names.

        :raises InUse: instances or snapshots have it as their root; the message names them
        :raises Refused: it is another owner's public image
        """
        in_use, own = self.rooms.store.users_of_image, partial(owns, self.owner)
        try:
            await in_thread(self.rooms.images.remove, reference, in_use, own)
        except NotFound:
            await self.image_inspect(reference)
            raise Refused(
                f"the image {reference!r} is another owner's", hint="it is public: it can be run and tagged"
            ) from None

    async def kernel_add(self, kernel: Path | str, modules: Path | str) -> Kernel:
        """Add a kernel of your own: the bzImage, and its directory of modules (`.../lib/modules/VERSION`)."""
        return await in_thread(self.rooms.kernels.add, Path(kernel), Path(modules))

    async def kernel_fetch(self, *, progress: ProgressSink = no_progress) -> Kernel:
        """Debian's cloud kernel, fetched and unpacked into the data directory where it is not there yet."""
        return await self.rooms.kernels.ensure_debian(progress)

    async def kernel_ls(self) -> list[Kernel]:
        """All kernels, the newest last."""
        return await asyncio.to_thread(self.rooms.kernels.kernels)

    async def kernel_rm(self, key: str) -> None:
        """Remove a kernel.

        :raises NotFound: there is none
        :raises InUse: instances or snapshots have it; the message names them
        :raises Refused: the host has an owner: kernels are everybody's
        """
        require_operator(self.owner, "kernel rm")
        unused = partial(self.rooms.store.retire_kernel, key)
        await complete(in_thread(self.rooms.kernels.remove, key, unused))

    async def doctor(self) -> list[Check]:
        """Check this host: each line with its cure."""
        return await run_checks(self.home)
