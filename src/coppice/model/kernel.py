"""A guest kernel."""

from pathlib import Path

from coppice.errors import NotFound
from coppice.model.record import Record


class Kernel(Record, frozen=True, kw_only=True):
    """One kernel of the store."""

    key: str
    version: str  # uname -r
    vmlinuz: Path | None = None  # the bzImage, if that was added
    vmlinux: Path | None = None  # the uncompressed kernel: added, or extracted from the bzImage
    modules: Path | None = None  # its lib/modules/VERSION; None if everything is built in
    config: Path | None = None  # how it was configured, if that is known
    config_from: str = ""  # where `config` was read
    acpi: bool = True  # whether it finds its devices through ACPI, not on its command line
    pvh: bool = True  # QEMU can enter it

    @property
    def boot_image(self) -> Path:
        """The file that boots fastest: the uncompressed kernel if there is one.

        :raises NotFound: the kernel has neither file
        """
        image = self.vmlinux or self.vmlinuz
        if image is None:
            raise NotFound(f"the kernel {self.key} has no image", hint="add it again with `coppice kernel add`")
        return image
