"""Host: what machines are made of."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from coppice.guest.kernel import Kernel
from coppice.model import Check, Image, ProgressSink, no_progress
from coppice.sync.base import HostBase


class Images(HostBase):
    """Images, kernels, and the host itself."""

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
        self,
        name: str,
        path: Path | str,
        *,
        tag: str | None = None,
        public: bool = False,
        progress: ProgressSink = no_progress,
    ) -> Image:
        return self._portal.call(self._host.image_import(name, path, tag=tag, public=public, progress=progress))

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

    def kernel_rm(self, key: str) -> None:
        self._portal.call(self._host.kernel_rm(key))

    def doctor(self) -> list[Check]:
        return self._portal.call(self._host.doctor())
