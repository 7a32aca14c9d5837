"""A kernel to be added to the store: its kind of file, and the facts that the file contains."""

from __future__ import annotations

from dataclasses import dataclass, replace

from coppice.boot import bzimage, elf
from coppice.boot.config import COMMAND_LINE_DEVICES, embedded_config, parse_config
from coppice.boot.vmlinux import extract_vmlinux
from coppice.errors import UsageError

ITSELF = "the kernel itself"
_ADD_AGAIN = "omit the option: the kernel's own configuration has it"


@dataclass(frozen=True)
class NewKernel:
    """The image of a kernel, and the known facts about it."""

    name: str  # for messages: its path
    version: str
    vmlinuz: bytes | None
    vmlinux: bytes | None
    config: bytes | None = None
    config_from: str = ""

    @classmethod
    def of(cls, image: bytes, name: str) -> NewKernel:
        """Recognise a bzImage or an uncompressed ELF file; read its version and embedded
        configuration.

        :raises UsageError: it is neither, or has no version
        """
        is_elf = image.startswith(elf.MAGIC)
        version = elf.vmlinux_version(image) if is_elf else bzimage.kernel_version(image)
        vmlinux = image if is_elf else extract_vmlinux(image)
        config = None if vmlinux is None else embedded_config(vmlinux)
        return cls(name, version, None if is_elf else image, vmlinux, config, "" if config is None else ITSELF)

    @property
    def pvh(self) -> bool:
        """Whether QEMU can enter it: always for a bzImage, by its PVH entry point for an ELF
        file.
        """
        return self.vmlinuz is not None or (self.vmlinux is not None and elf.has_pvh_entry(self.vmlinux))

    @property
    def options(self) -> dict[str, str] | None:
        """The options of its configuration that are on; None if that is not known."""
        return None if self.config is None else parse_config(self.config.decode(errors="replace"))

    def with_config(self, config: bytes, where: str) -> NewKernel:
        """Return a copy with a configuration from another source.

        :raises UsageError: it has no options, or the kernel carries another one
        """
        given = parse_config(config.decode(errors="replace"))
        if not given:
            raise UsageError(
                f"{where} is not a kernel configuration: it has no line such as CONFIG_EXT4_FS=y",
                hint="give the file .config of the kernel's build, or /boot/config-VERSION",
            )
        if self.options not in (None, given):
            raise UsageError(f"the kernel {self.name} contains another configuration than {where}", hint=_ADD_AGAIN)
        return self if self.config is not None else replace(self, config=config, config_from=where)

    def has_acpi(self, given: bool | None) -> bool:
        """Return whether the kernel finds its devices through ACPI.

        :param given: the user's statement, if any
        :raises UsageError: it is unknown, contradicts the configuration, or there is no other way
            either
        """
        options = self.options
        if options is None:
            if given is None and self.vmlinuz is None:
                raise UsageError(
                    f"the kernel {self.name} does not say whether it has ACPI",
                    hint="add --acpi or --no-acpi, or --config FILE",
                )
            return given is not False  # kernels of distributions have it
        has = "ACPI" in options
        if given not in (None, has):
            said = "has" if has else "has no"
            raise UsageError(f"the kernel {self.name} {said} ACPI, says {self.config_from}", hint=_ADD_AGAIN)
        if not has and COMMAND_LINE_DEVICES.name not in options:
            raise UsageError(
                f"the kernel {self.name} cannot find its devices: it lacks CONFIG_ACPI and "
                f"CONFIG_{COMMAND_LINE_DEVICES.name}, says {self.config_from}",
                hint="build it with one of the two",
            )
        return has
