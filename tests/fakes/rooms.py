"""The rooms of a data directory in which everything is real but the VMM and the kernel; and a data directory to start from, made once."""

from __future__ import annotations

import io
import os
import shutil
import tarfile
from pathlib import Path

from coppice.disk.overlay import OverlayStore
from coppice.errors import NotFound
from coppice.guest.kernel import Kernel, KernelStore
from coppice.images.catalog import BuildOptions, ImageCatalog
from coppice.instance.rooms import Deadlines, Rooms
from coppice.model import ImageConfig, ProgressSink, no_progress
from coppice.store.layout import Layout
from coppice.store.store import Store
from coppice.vmm.driver import VmmDriver
from coppice.vmm.process import own_process
from fakes.records import OVERLAY_BYTES

IMAGE = "tiny"
KERNEL = "fake-kernel"

# A machine that does not answer is noticed in seconds, and still no loaded host is too slow.
DEADLINES = Deadlines(boot=10.0, ready=10.0, stop=5.0, lock=20.0)


class FakeKernels(KernelStore):
    """One kernel that no VMM could boot, also under the keys that have a directory."""

    def get(self, key: str) -> Kernel:
        """The one kernel."""
        if key != KERNEL and not (self.root / key).is_dir():
            raise NotFound(f"there is no kernel {key!r}", hint=f"ask for {KERNEL}")
        return Kernel(key=key, version="6.1.0", vmlinuz=self.root / "vmlinuz", modules=self.root / "modules")

    def stub(self, kernel: Kernel) -> tuple[Path, Path]:
        """Its stand-ins."""
        return self.root / "stub.kernel", self.root / "stub.initrd"

    async def ensure_debian(self, progress: ProgressSink = no_progress) -> Kernel:
        """The one kernel again."""
        return self.get(KERNEL)


class FakeRooms(Rooms):
    """Rooms whose initramfs is made already."""

    def initrd(self, kernel: Kernel) -> Path:
        """A file that no kernel reads."""
        return self.layout.kernels / "initrd"


def open_rooms(layout: Layout, driver: VmmDriver, deadlines: Deadlines) -> Rooms:
    """What `AsyncHost(open_rooms=...)` takes."""
    return FakeRooms(
        layout=layout,
        store=Store(layout.database, own_process()),
        driver=driver,
        images=ImageCatalog(layout.images),
        kernels=FakeKernels(layout.kernels),
        overlays=OverlayStore(layout.overlays),
        agent=layout.kernels / "agent",
        deadlines=deadlines,
    )


async def make_seed(home: Path) -> None:
    """A data directory with one tiny image, the fake kernel's files and a pristine overlay disk."""
    layout = Layout(home)
    layout.create()
    for name in ("vmlinuz", "initrd", "stub.kernel", "stub.initrd"):
        (layout.kernels / name).write_bytes(name.encode())
        (layout.kernels / name).chmod(0o444)
    OverlayStore(layout.overlays).pristine(OVERLAY_BYTES)
    archive = home / "rootfs.tar"
    with tarfile.open(archive, "w") as tar:
        member = tarfile.TarInfo("etc/os-release")
        member.size = len(text := b"NAME=tiny\n")
        tar.addfile(member, io.BytesIO(text))
    config = ImageConfig(
        entrypoint=("/bin/init",), cmd=("--default",), env={"FROM": "image"}, workdir="/srv", user="app"
    )
    await ImageCatalog(layout.images).import_rootfs_tar(IMAGE, archive, options=BuildOptions(config=config))
    archive.unlink()


def plant(seed: Path, home: Path) -> None:
    """A new data directory from a seed: its files never change, so links do."""
    shutil.copytree(seed, home, copy_function=os.link)
