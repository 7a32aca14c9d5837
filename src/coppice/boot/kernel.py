"""Guest kernels in the data directory: Debian's cloud kernel, fetched at first use, and users'
kernels.

Each kernel is one directory below the root, named by its key, and complete once it has this name:

    <key>/vmlinuz          the bzImage, unless an uncompressed kernel was added
    <key>/vmlinux          the uncompressed kernel: added, or extracted from the bzImage
    <key>/modules/         a copy of lib/modules/VERSION; missing if everything is built in
    <key>/config           its configuration, if that is known
    <key>/facts.json       other facts; missing if an older version of Coppice stored the kernel
    <key>/stub.kernel      the header of a bzImage, 64 KiB, for a VMM that only restores
    <key>/stub.initrd      512 zero bytes, for the same
"""

from __future__ import annotations

import contextlib
import errno
import hashlib
import re
import shutil
from collections.abc import Collection, Mapping
from pathlib import Path, PurePosixPath
from typing import TYPE_CHECKING

import msgspec

from coppice import stopping
from coppice.boot import bzimage
from coppice.boot.bzimage import STUB_BYTES, kernel_version
from coppice.completion import in_own_thread, in_thread
from coppice.content.store import ContentStore, Guard, Removed
from coppice.errors import ImageError, NotFound, Refused, UsageError
from coppice.linux.files import os_errors
from coppice.model import MIB, ProgressSink, Record, no_progress
from coppice.model.kernel import Kernel

if TYPE_CHECKING:
    from coppice.boot.prepare import NewKernel

_KEY = re.compile(r"(?:debian|custom)-[A-Za-z0-9][A-Za-z0-9._+~-]{0,99}-[0-9a-f]{8,64}")
_MAX_KERNEL_BYTES = 1024 * MIB  # a vmlinux with debug information has hundreds of megabytes
_MAX_CONFIG_BYTES = 4 * MIB
_STUB_INITRD_BYTES = 512
_KEY_DIGITS = 8
_NAMES = frozenset({"vmlinuz", "vmlinux", "modules", "config", "facts.json"})
_ADOPTED = frozenset({"stub.kernel", "stub.initrd"})


class _Facts(Record, frozen=True, kw_only=True):
    """Facts that take long to read from a kernel's files."""

    version: str
    acpi: bool = True
    pvh: bool = True
    config_from: str = ""


class KernelStore:
    """The kernels below one directory. Any number of processes may use it at once."""

    def __init__(self, root: Path) -> None:
        self.content = ContentStore(root)

    def get(self, key: str) -> Kernel:
        """Return the kernel with this key. Blocks.

        :raises NotFound: the store has no such kernel
        """
        directory = self._directory(key)
        with os_errors(f"read the kernel {key}"):
            present = {path.name: path for path in directory.iterdir()}
            facts = _read_facts(present)
        return Kernel(
            key=key,
            version=facts.version,
            vmlinuz=present.get("vmlinuz"),
            vmlinux=present.get("vmlinux"),
            modules=present.get("modules"),
            config=present.get("config"),
            config_from=facts.config_from,
            acpi=facts.acpi,
            pvh=facts.pvh,
        )

    def kernels(self) -> list[Kernel]:
        """Return all kernels, the newest last: by version number, then by time of arrival.
        Blocks.
        """
        directories = [path for path in self.content.entries() if _KEY.fullmatch(path.name)]
        arrived = {path.name: path.stat().st_mtime_ns for path in directories}
        kernels = [self.get(path.name) for path in directories]
        return sorted(kernels, key=lambda kernel: (_numbers(kernel.version), arrived[kernel.key], kernel.key))

    def stub(self, key: str) -> tuple[Path, Path]:
        """Return stand-ins for a kernel and its initrd, for a VMM that only restores and never runs
        them. Blocks.

        :raises NotFound: the store has no such kernel
        """
        directory = self._directory(key)
        return directory / "stub.kernel", directory / "stub.initrd"

    def add(
        self,
        kernel: Path,
        modules: Path | None = None,
        *,
        config: Path | None = None,
        no_modules: bool = False,
        acpi: bool | None = None,
    ) -> Kernel:
        """Copy a kernel into the store, a bzImage or an uncompressed ELF file. Blocks.

        The same kernel is stored once. A configuration inside the kernel (CONFIG_IKCONFIG) takes
        precedence; `config`, `no_modules` and `acpi` give facts that it lacks.

        :raises UsageError: the file is not a kernel, the modules do not belong to it, or a fact is
            missing
        """
        from coppice.boot.prepare import NewKernel

        new = NewKernel.of(_read(kernel, "kernel", _MAX_KERNEL_BYTES), str(kernel))
        if config is not None:
            new = new.with_config(_read(config, "configuration", _MAX_CONFIG_BYTES), "the file given with --config")
        if modules is not None and no_modules:
            raise UsageError("a kernel without modules has no directory of modules", hint="omit --no-modules")
        if modules is not None:
            _check_modules(modules, new.version)
        elif not no_modules and new.config is None:
            raise UsageError(
                f"the kernel {kernel} does not say what is built in",
                hint="add its directory lib/modules/VERSION, or --config FILE, or --no-modules if all is built in",
            )
        has_acpi = new.has_acpi(acpi)
        with os_errors(f"copy the kernel {kernel} into {self.content.root}"), self.content.staging() as stage:
            copied = stage / "kernel"
            copied.mkdir()
            _write(new, copied, acpi=has_acpi)
            if modules is not None:
                shutil.copytree(modules, copied / "modules", ignore=_not_modules, copy_function=_copy)
            key = f"custom-{new.version}-{digest_of_files(_files_in(copied))[:_KEY_DIGITS]}"
            self.content.publish(copied, key)
            return self.get(key)

    async def ensure_debian(self, progress: ProgressSink = no_progress) -> Kernel:
        """Return the newest of Debian's cloud kernels in the store; fetch one if there is none.

        A fetch needs apt, a network and 250 MB. A failure leaves nothing behind.

        :param progress: called from a thread
        :raises MissingTool: apt is not installed
        :raises HostCannot: apt cannot fetch the kernel
        :raises NoSpace: the disk is full
        """
        present = [kernel for kernel in await in_thread(self.kernels) if kernel.key.startswith("debian-")]
        return present[-1] if present else await in_own_thread(self._fetch_debian, progress)

    def files(self, key: str) -> dict[str, Path]:
        """Return all files of a kernel by their names in its directory, such as "modules/modules.dep". Blocks.

        :raises NotFound: the store has no such kernel
        """
        return _files_in(self._directory(key))

    def same(self, key: str, sha256: str) -> str | None:
        """Return the key of a stored kernel with this digest of its files, or None. Blocks.

        :param key: its key on the host where the digest was computed
        """
        alike = (path.name for path in self.content.entries() if path.name.endswith(sha256[:_KEY_DIGITS]))
        for each in dict.fromkeys((key, *alike)):
            with contextlib.suppress(NotFound):
                if digest_of_files(self.files(each)) == sha256:
                    return each
        return None

    def adopt(self, staged: Path) -> str:
        """Move the files of another host's kernel into the store; return its key there. Blocks.

        The key is that of an added kernel: nothing proves that the files are of a Debian package.

        :raises ImageError: they are not the files of a kernel
        :raises Refused: another kernel has the key
        """
        names = {path.name for path in staged.iterdir()}
        if not _ADOPTED <= names <= _NAMES | _ADOPTED or not names & {"vmlinuz", "vmlinux"}:
            raise ImageError("the files are not those of a kernel", hint="export the template again")
        with os_errors(f"read the kernel in {staged}"):
            try:
                version = _read_facts({path.name: path for path in staged.iterdir()}).version
            except msgspec.MsgspecError as error:
                raise ImageError("the facts of the kernel are not valid", hint="export the template again") from error
        sha256 = digest_of_files(_files_in(staged))
        key = f"custom-{version}-{sha256[:_KEY_DIGITS]}"
        if not _KEY.fullmatch(key):
            raise ImageError(f"the kernel has an impossible version {version[:80]!r}", hint="export the template again")
        with os_errors(f"move a kernel into {self.content.root}"):
            self.content.publish(staged, key)
        if digest_of_files(self.files(key)) != sha256:
            raise Refused(f"another kernel has the key {key}", hint=f"remove it with `coppice kernel rm {key}`")
        return key

    def remove(self, key: str, unused: Guard, *, dry_run: bool = False) -> Removed:
        """Remove a kernel. Blocks.

        :param unused: calls the function it gets while nothing uses the kernel, or raises
        :raises NotFound: the store has no such kernel
        """
        self._directory(key)
        with os_errors(f"remove the kernel {key}"):
            return self.content.remove(key, unused, dry_run=dry_run)

    def fetched_except(self, keys: Collection[str]) -> list[str]:
        """Return the keys of Debian's kernels except `keys`. They can be fetched again. Blocks."""
        return [key for path in self.content.entries() if (key := path.name).startswith("debian-") and key not in keys]

    def _directory(self, key: str) -> Path:
        directory = self.content.find(key) if _KEY.fullmatch(key) else None
        if directory is None:
            raise NotFound(f"there is no kernel {key!r}", hint="list the kernels with `coppice kernel ls`")
        return directory

    def _fetch_debian(self, progress: ProgressSink) -> Kernel:
        with os_errors(f"fetch a kernel into {self.content.root}"), self.content.staging() as stage:
            from coppice.boot import debian
            from coppice.boot.prepare import NewKernel

            package = debian.fetch(stage, progress)
            prepared = stage / "kernel"
            prepared.mkdir()
            boot = package.tree / "boot"
            new = NewKernel.of((boot / f"vmlinuz-{package.release}").read_bytes(), package.release)
            new = new.with_config((boot / f"config-{package.release}").read_bytes(), "Debian's package")
            _write(new, prepared, acpi=new.has_acpi(None))
            (package.tree / "lib" / "modules" / package.release).rename(prepared / "modules")
            key = f"debian-{package.release}-{package.sha256[:_KEY_DIGITS]}"
            self.content.publish(prepared, key)
            return self.get(key)


def _write(new: NewKernel, directory: Path, *, acpi: bool) -> None:
    """Write the files of a kernel except its modules."""
    files = {"vmlinuz": new.vmlinuz, "vmlinux": new.vmlinux, "config": new.config}
    for name, contents in files.items():
        if contents is not None:
            (directory / name).write_bytes(contents)
    facts = _Facts(version=new.version, acpi=acpi, pvh=new.pvh, config_from=new.config_from)
    (directory / "facts.json").write_bytes(msgspec.json.encode(facts))
    stub = bzimage.stub() if new.vmlinuz is None else new.vmlinuz[:STUB_BYTES]
    (directory / "stub.kernel").write_bytes(stub)
    (directory / "stub.initrd").write_bytes(bytes(_STUB_INITRD_BYTES))


def _read_facts(present: dict[str, Path]) -> _Facts:
    if (facts := present.get("facts.json")) is not None:
        return msgspec.json.decode(facts.read_bytes(), type=_Facts)
    with present["vmlinuz"].open("rb") as file:
        return _Facts(version=kernel_version(file.read(STUB_BYTES)))


def _read(path: Path, what: str, largest: int) -> bytes:
    try:
        if path.is_fifo():
            raise OSError(errno.EINVAL, "it is a FIFO, not a regular file")
        with path.open("rb") as file:
            contents = file.read(largest + 1)
    except OSError as error:
        raise UsageError(
            f"cannot read the {what} {path}: {error.strerror}", hint="give the path of a file of this host"
        ) from error
    if len(contents) > largest:
        raise UsageError(f"the {what} {path} is larger than {largest} bytes", hint=f"give the path of a {what}")
    return contents


def _check_modules(directory: Path, version: str) -> None:
    """Require a directory of modules for exactly this kernel; it may be empty if all are built in.

    :raises UsageError: it is no such directory, or belongs to another kernel
    """
    from coppice.boot.modules import ModuleTree, parse_modinfo, read_module

    hint = f"give the directory lib/modules/{version} that was built with the kernel"
    if not (directory / "modules.builtin").is_file():
        raise UsageError(f"{directory} is not a directory of kernel modules: it has no modules.builtin", hint=hint)
    for path in ModuleTree(directory).files.values():
        built_for = parse_modinfo(read_module(path)).get("vermagic", "").partition(" ")[0]
        if built_for != version:
            raise UsageError(f"the modules are for kernel {built_for!r}, but the kernel is {version!r}", hint=hint)
        return


def _not_modules(directory: str, names: list[str]) -> set[str]:
    """Return the names that copytree skips: files useless to a guest, and links to the build
    tree.
    """
    return {
        name
        for name in names
        if (path := Path(directory, name)).is_symlink()
        or not (path.is_dir() or (path.is_file() and (".ko" in name or name in ("modules.builtin", "modules.order"))))
    }


def _files_in(directory: Path) -> dict[str, Path]:
    files = sorted(path for path in directory.rglob("*") if path.is_file())
    return {str(path.relative_to(directory)): path for path in files}


def digest_of_files(files: Mapping[str, Path]) -> str:
    """Return `digest_of` files. Blocks."""
    return digest_of({name: _sha256(path) for name, path in files.items()})


def digest_of(contents: Mapping[str, str]) -> str:
    """Return the SHA-256 over the names and digests of files, in the order of their paths."""
    total = hashlib.sha256()
    for name in sorted(contents, key=PurePosixPath):
        total.update(f"{contents[name]} {name}\n".encode())
    return total.hexdigest()


def _sha256(path: Path) -> str:
    stopping.check()
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def _copy(source: str, destination: str) -> str:
    stopping.check()
    return shutil.copy2(source, destination)


def _numbers(version: str) -> tuple[int, ...]:
    """Return the numbers of a version, to sort 6.1.0-56 after 6.1.0-9."""
    return tuple(int(digits) for digits in re.findall(r"\d+", version))
