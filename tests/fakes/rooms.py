"""An opened data directory in which only the VMM and the kernel are fake, and a seed directory that
is made once.
"""

from __future__ import annotations

import io
import os
import shutil
import tarfile
from functools import cached_property
from pathlib import Path

from coppice.boot.kernel import KernelStore
from coppice.content.overlay import OverlayStore
from coppice.errors import NotFound
from coppice.images.catalog import BuildOptions, ImageCatalog
from coppice.machine.rooms import Deadlines, Rooms
from coppice.model import ImageConfig, ProgressSink, no_progress
from coppice.model.kernel import Kernel
from coppice.state.layout import Layout
from coppice.state.store import Store
from coppice.vmm.driver import AgentDevice
from coppice.vmm.process import own_process
from coppice.vmm.registry import Drivers
from fakes.network import fake_networks
from fakes.records import OVERLAY_BYTES

IMAGE = "tiny"
KERNEL = "fake-kernel"

# Short enough to detect a silent machine in seconds, long enough for a loaded host.
DEADLINES = Deadlines(boot=10.0, ready=10.0, stop=5.0, lock=20.0)


class FakeKernels(KernelStore):
    """One kernel that no VMM could boot, also found under every key that has a directory."""

    def get(self, key: str) -> Kernel:
        """Return the one kernel."""
        if key != KERNEL and key not in {path.name for path in self.content.root.iterdir()}:
            raise NotFound(f"there is no kernel {key!r}", hint=f"ask for {KERNEL}")
        return Kernel(key=key, version="6.1.0", vmlinuz=self.content.root / "vmlinuz")

    def files(self, key: str) -> dict[str, Path]:
        """Return the files of the one kernel."""
        if key != KERNEL:
            return super().files(key)
        return {name: self.content.root / name for name in ("stub.initrd", "stub.kernel", "vmlinuz")}

    def stub(self, key: str) -> tuple[Path, Path]:
        """Return its stubs."""
        self.get(key)
        return self.content.root / "stub.kernel", self.content.root / "stub.initrd"

    async def ensure_debian(self, progress: ProgressSink = no_progress) -> Kernel:
        """Return the one kernel."""
        return self.get(KERNEL)


class FakeRooms(Rooms, frozen=True):
    """Rooms with one kernel and a prepared initramfs."""

    @cached_property
    def kernels(self) -> FakeKernels:
        """Return the store of the one kernel."""
        return FakeKernels(self.layout.kernels)

    def initrd(self, kernel: Kernel, device: AgentDevice) -> Path:
        """Return a file that no kernel reads."""
        return self.layout.kernels / "initrd"


def open_rooms(layout: Layout, drivers: Drivers, deadlines: Deadlines) -> Rooms:
    """Return rooms for `AsyncHost(open_rooms=...)`."""
    networks = fake_networks(layout.home)
    store = Store(layout.database, own_process(), networks.allocate)
    return FakeRooms(
        layout=layout,
        store=store,
        drivers=drivers,
        networks=networks,
        agent=layout.kernels / "agent",
        deadlines=deadlines,
    )


async def make_seed(home: Path) -> None:
    """Make a data directory with one tiny image, the fake kernel's files and a pristine overlay
    disk.
    """
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
    store = Store(layout.database, own_process())
    images = ImageCatalog(layout.images, store.images)
    await images.import_any(IMAGE, archive, options=BuildOptions(config=config))
    store.close()
    archive.unlink()


def plant(seed: Path, home: Path) -> None:
    """Make a data directory from a seed: link the immutable contents, copy the database."""
    shutil.copytree(seed, home, copy_function=_link_content)


def _link_content(source: str, destination: str) -> None:
    if Path(source).name.startswith("coppice.db"):
        shutil.copy2(source, destination)
    else:
        os.link(source, destination)
