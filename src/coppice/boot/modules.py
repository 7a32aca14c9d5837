"""Kernel modules of a `lib/modules/VERSION` directory: the files for the wanted modules, in load
order.

Dependencies are read from the modules' `.modinfo` sections. Debian's packages have no
`modules.dep`: depmod makes it during an installation, and here nothing is installed.
"""

from __future__ import annotations

import gzip
import lzma
import re
import struct
import zlib
from collections.abc import Collection, Iterable
from graphlib import CycleError, TopologicalSorter
from pathlib import Path
from typing import IO, NamedTuple, cast

import zstandard

from coppice.errors import UsageError
from coppice.model import MIB

MAX_MODULE_BYTES = 64 * MIB

_MODULE_FILE = re.compile(r"(?P<stem>[A-Za-z0-9_-]+)\.ko(?:\.(?:gz|xz|zst))?")
_ELF64_LITTLE = b"\x7fELF\x02\x01"
_SECTION = struct.Struct("<IIQQQQIIQQ")  # Elf64_Shdr
_HINT = "give the directory lib/modules/VERSION that was built with the kernel"


class ModuleFile(NamedTuple):
    """One decompressed module. `stem` is the file's name on disk without suffixes."""

    stem: str
    image: bytes


def module_name(stem: str) -> str:
    """Return the kernel's name of a module: `virtio-rng` and `virtio_rng` are the same."""
    return stem.replace("-", "_")


def read_module(path: Path) -> bytes:
    """Return the ELF image in a `.ko`, `.ko.gz`, `.ko.xz` or `.ko.zst` file.

    :raises UsageError: it cannot be decompressed, or is larger than 64 MiB
    """
    try:
        with path.open("rb") as file, _decompressed(file, path.suffix) as stream:
            image = bytes(stream.read(MAX_MODULE_BYTES + 1))
    except (OSError, EOFError, zlib.error, lzma.LZMAError, zstandard.ZstdError) as error:
        raise UsageError(f"cannot read the kernel module {path}: {error}", hint=_HINT) from error
    if len(image) > MAX_MODULE_BYTES:
        raise UsageError(f"the kernel module {path} is larger than {MAX_MODULE_BYTES} bytes", hint=_HINT)
    return image


def _decompressed(file: IO[bytes], suffix: str) -> IO[bytes]:
    match suffix:
        case ".gz":
            return cast(IO[bytes], gzip.GzipFile(fileobj=file))
        case ".xz":
            return lzma.LZMAFile(file)
        case ".zst":
            return cast(IO[bytes], zstandard.ZstdDecompressor().stream_reader(file, read_across_frames=True))
        case _:
            return file


def parse_modinfo(image: bytes) -> dict[str, str]:
    """Return the `key=value` strings of a module's `.modinfo` section. The first of equal keys
    wins.

    :raises UsageError: the image is not a kernel module
    """
    try:
        if not image.startswith(_ELF64_LITTLE):
            raise ValueError("it is not a 64-bit little-endian ELF file")
        (table,) = struct.unpack_from("<Q", image, 0x28)
        size, count, names = struct.unpack_from("<HHH", image, 0x3A)
        if size != _SECTION.size:
            raise ValueError("its section headers have an unexpected size")
        sections = [_SECTION.unpack_from(image, table + index * size) for index in range(count)]
        strings = _contents(image, sections[names])
        for section in sections:
            if strings[section[0] :].startswith(b".modinfo\0"):
                return _pairs(_contents(image, section))
        raise ValueError("it has no .modinfo section")
    except (ValueError, IndexError, OverflowError, struct.error) as error:  # overflow: an offset that no file has
        raise UsageError(f"a file is not a kernel module: {error}", hint=_HINT) from error


def _contents(image: bytes, section: tuple[int, ...]) -> bytes:
    offset, size = section[4], section[5]
    return image[offset : offset + size]


def _pairs(contents: bytes) -> dict[str, str]:
    pairs: dict[str, str] = {}
    for entry in contents.split(b"\0"):
        key, separator, value = entry.decode("utf-8", "replace").partition("=")
        if separator:
            pairs.setdefault(key, value)
    return pairs


class ModuleTree:
    """The modules below one `lib/modules/VERSION` directory."""

    def __init__(self, directory: Path) -> None:
        self.directory = directory
        self.files: dict[str, Path] = {}
        for path in sorted(directory.rglob("*.ko*")):
            if (match := _MODULE_FILE.fullmatch(path.name)) and path.is_file():
                self.files.setdefault(module_name(match["stem"]), path)
        self._builtin = _read_builtin(directory / "modules.builtin")

    def __contains__(self, name: str) -> bool:
        """Return whether the kernel has the module, built in or as a file."""
        return name in self._builtin or name in self.files

    def resolve(self, wanted: Iterable[str]) -> list[ModuleFile]:
        """Return the wanted modules and their dependencies, dependencies first, without built-in
        ones.

        :raises UsageError: a module is missing or malformed, or the dependencies form a cycle
        """
        found: dict[str, ModuleFile] = {}
        needs: dict[str, Collection[str]] = {}
        todo = list(wanted)
        while todo:
            name = todo.pop(0)
            if name in needs or name in self._builtin:
                continue
            if name not in self.files:
                raise UsageError(f"the kernel has no module {name} in {self.directory}", hint=_HINT)
            path = self.files[name]
            found[name] = ModuleFile(path.name.partition(".ko")[0], read_module(path))
            info = parse_modinfo(found[name].image)
            hard = [module_name(other) for other in info.get("depends", "").split(",") if other]
            needs[name] = [*hard, *self._wanted_before(info.get("softdep", ""))]
            todo += needs[name]
        try:
            return [found[name] for name in TopologicalSorter(needs).static_order() if name in found]
        except CycleError as error:
            raise UsageError("the dependencies of kernel modules form a cycle", hint=_HINT) from error

    def _wanted_before(self, softdep: str) -> list[str]:
        """Return the modules of a softdep's `pre:` list (modprobe.d(5)), such as `pre:
        crypto-crc32c`.

        A module requests them at run time, so they must be loaded before it. The names may be
        algorithms, which are aliases of the generic modules. A missing one is built in, or not
        needed.
        """
        before = softdep.partition("post:")[0].replace("pre:", " ").split()
        names = [module_name(name).removeprefix("crypto_") for name in before]
        found = [other for name in names for other in (name, f"{name}_generic") if other in self.files]
        return [name for name in found if name not in self._builtin]


def _read_builtin(path: Path) -> frozenset[str]:
    try:
        lines = path.read_text(errors="replace").splitlines()
    except FileNotFoundError:
        return frozenset()
    return frozenset(module_name(Path(line).name.removesuffix(".ko")) for line in lines)
