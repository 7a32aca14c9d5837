"""Guest kernels in the data directory: Debian's cloud kernel, fetched at the first use, and kernels that users add.

Below the root each kernel is one directory, named by its key and complete from the moment it has its name:

    <key>/vmlinuz          the bzImage
    <key>/vmlinux          the same, uncompressed, where it could be extracted
    <key>/modules/         what was lib/modules/VERSION
    <key>/config           how it was configured, where that is known
    <key>/stub.kernel      the first 64 KiB of the bzImage, for a VMM that only restores
    <key>/stub.initrd      512 zero bytes, for the same
"""

from __future__ import annotations

import contextlib
import errno
import fcntl
import hashlib
import os
import re
import secrets
import shutil
from asyncio import to_thread
from collections.abc import Callable, Collection, Iterator
from pathlib import Path

from coppice.completion import in_thread
from coppice.disk.atomic import os_errors, publish
from coppice.errors import NotFound, UsageError
from coppice.guest import debian
from coppice.guest.modules import ModuleTree, parse_modinfo, read_module
from coppice.guest.vmlinux import STUB_BYTES, extract_vmlinux, kernel_version
from coppice.model import MIB, ProgressSink, Record, no_progress

_KEY = re.compile(r"(?:debian|custom)-[A-Za-z0-9][A-Za-z0-9._+~-]{0,99}-[0-9a-f]{8,64}")
_STAGE_PREFIX = ".stage-"
_MAX_KERNEL_BYTES = 256 * MIB
_STUB_INITRD_BYTES = 512
_KEY_DIGITS = 8


class Kernel(Record, frozen=True, kw_only=True):
    """One kernel of the store."""

    key: str
    version: str  # uname -r
    vmlinuz: Path
    modules: Path
    vmlinux: Path | None = None

    @property
    def boot_image(self) -> Path:
        """What QEMU boots fastest: the uncompressed kernel where there is one."""
        return self.vmlinux or self.vmlinuz


class KernelStore:
    """The kernels below one directory. Any number of processes may use it at once."""

    def __init__(self, root: Path) -> None:
        self.root = root

    def get(self, key: str) -> Kernel:
        """The kernel with that key. Blocks. Raises NotFound."""
        directory = self._directory(key)
        vmlinuz, vmlinux = directory / "vmlinuz", directory / "vmlinux"
        with os_errors(f"read {vmlinuz}"), vmlinuz.open("rb") as file:
            version = kernel_version(file.read(STUB_BYTES))
        return Kernel(
            key=key,
            version=version,
            vmlinuz=vmlinuz,
            modules=directory / "modules",
            vmlinux=vmlinux if vmlinux.is_file() else None,
        )

    def kernels(self) -> list[Kernel]:
        """All kernels, the newest last: by version number, then by when they came. Blocks."""
        try:
            directories = [path for path in self.root.iterdir() if _KEY.fullmatch(path.name)]
        except FileNotFoundError:
            return []
        arrived = {path.name: path.stat().st_mtime_ns for path in directories}
        kernels = [self.get(path.name) for path in directories]
        return sorted(kernels, key=lambda kernel: (_numbers(kernel.version), arrived[kernel.key], kernel.key))

    def stub(self, kernel: Kernel) -> tuple[Path, Path]:
        """Stand-ins for kernel and initrd, enough for a VMM that only restores: it never runs them."""
        directory = self.root / kernel.key
        return directory / "stub.kernel", directory / "stub.initrd"

    def add(self, kernel: Path, modules: Path) -> Kernel:
        """Copy a bzImage and its `lib/modules/VERSION` directory into the store; the same ones are stored once. Blocks.

        Raises UsageError where the kernel is no bzImage or the modules are not its own, NoSpace or HostCannot.
        """
        image = _read_kernel(kernel)
        version = kernel_version(image)
        _check_modules(modules, version)
        with self._staging() as stage:
            with os_errors(f"copy the kernel {kernel} into {self.root}"):
                copied = stage / "kernel"
                copied.mkdir()
                (copied / "vmlinuz").write_bytes(image)
                shutil.copytree(modules, copied / "modules", ignore=_not_modules)
            return self._admit(copied, f"custom-{version}-{_tree_digest(copied)[:_KEY_DIGITS]}")

    async def ensure_debian(self, progress: ProgressSink = no_progress) -> Kernel:
        """Debian's cloud kernel: the newest that is in the store, else fetched; needs apt, a network and 250 MB.

        Raises MissingTool, HostCannot (the hint says what apt lacks), NoSpace. Nothing is left behind by a failure.
        """
        present = [kernel for kernel in await to_thread(self.kernels) if kernel.key.startswith("debian-")]
        if present:
            return present[-1]
        with self._staging() as stage:
            package = await debian.fetch(stage, progress)
            return await in_thread(self._admit_debian, package, stage / "kernel")

    def remove(self, key: str, unused: Callable[[Callable[[], None]], None]) -> None:
        """Remove a kernel. Blocks. `unused` calls what it is given while nothing uses the kernel, or raises.

        Raises NotFound, or what `unused` raises.
        """
        directory = self._directory(key)
        doomed = self.root / f"{_STAGE_PREFIX}{secrets.token_hex(8)}"  # what is left of it is swept
        with os_errors(f"remove the kernel {key}"):
            unused(lambda: publish(directory, doomed))
        shutil.rmtree(doomed, ignore_errors=True)

    def sweep(self) -> tuple[str, ...]:
        """Remove what killed processes left half made; returns the names. Blocks. Idempotent."""
        stale = self.stale_staging()
        for path in stale:
            shutil.rmtree(path, ignore_errors=True)
        return tuple(path.name for path in stale)

    def stale_staging(self) -> list[Path]:
        """What killed processes left half made. A directory without its process never gets another one. Blocks."""
        stale = []
        with contextlib.suppress(FileNotFoundError), _held(self.root):
            for path in sorted(self.root.glob(f"{_STAGE_PREFIX}*")):
                with contextlib.suppress(FileNotFoundError, BlockingIOError), _held(path, wait=False):
                    stale.append(path)
        return stale

    def fetched_except(self, keys: Collection[str]) -> list[Path]:
        """Directories of Debian's kernels with other keys than these: they can be fetched again, as those that users added cannot. Blocks."""
        fetched = [path for path in self.root.glob("debian-*") if _KEY.fullmatch(path.name)]
        return sorted(path for path in fetched if path.name not in keys)

    def _directory(self, key: str) -> Path:
        directory = self.root / key
        if not _KEY.fullmatch(key) or not directory.is_dir():
            raise NotFound(f"there is no kernel {key!r}", hint="list the kernels with `coppice kernel ls`")
        return directory

    def _admit_debian(self, package: debian.Package, prepared: Path) -> Kernel:
        with os_errors(f"take over the package of kernel {package.release}"):
            prepared.mkdir()
            boot = package.tree / "boot"
            (boot / f"vmlinuz-{package.release}").rename(prepared / "vmlinuz")
            (boot / f"config-{package.release}").rename(prepared / "config")
            (package.tree / "lib" / "modules" / package.release).rename(prepared / "modules")
        return self._admit(prepared, f"debian-{package.release}-{package.sha256[:_KEY_DIGITS]}")

    def _admit(self, prepared: Path, key: str) -> Kernel:
        """Complete a prepared directory and give it its name; where the name is taken, the content is the same."""
        with os_errors(f"store the kernel {key}"):
            image = (prepared / "vmlinuz").read_bytes()
            kernel_version(image)
            (prepared / "stub.kernel").write_bytes(image[:STUB_BYTES])
            (prepared / "stub.initrd").write_bytes(bytes(_STUB_INITRD_BYTES))
            if (vmlinux := extract_vmlinux(image)) is not None:
                (prepared / "vmlinux").write_bytes(vmlinux)
            _freeze(prepared)
            try:
                publish(prepared, self.root / key)
            except OSError as error:
                if error.errno not in (errno.ENOTEMPTY, errno.EEXIST):
                    raise
        return self.get(key)

    @contextlib.contextmanager
    def _staging(self) -> Iterator[Path]:
        """A directory of this process, gone when the block ends. Its lock tells `sweep` that it is in use."""
        stage = self.root / f"{_STAGE_PREFIX}{secrets.token_hex(8)}"
        with contextlib.ExitStack() as stack:
            with os_errors(f"make a directory in {self.root}"):
                self.root.mkdir(mode=0o700, parents=True, exist_ok=True)
                with _held(self.root):  # or `sweep` could come between the two
                    stage.mkdir(mode=0o700)
                    stack.enter_context(_held(stage))
            stack.callback(shutil.rmtree, stage, ignore_errors=True)
            yield stage


@contextlib.contextmanager
def _held(directory: Path, *, wait: bool = True) -> Iterator[None]:
    """Hold a directory's lock. Raises FileNotFoundError, and without `wait` BlockingIOError where another holds it."""
    fd = os.open(directory, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
    try:
        fcntl.flock(fd, fcntl.LOCK_EX if wait else fcntl.LOCK_EX | fcntl.LOCK_NB)
        yield
    finally:
        os.close(fd)


def _read_kernel(path: Path) -> bytes:
    try:
        with path.open("rb") as file:
            image = file.read(_MAX_KERNEL_BYTES + 1)
    except OSError as error:
        raise UsageError(
            f"the kernel {path} cannot be read: {error.strerror}", hint="give the path of a bzImage"
        ) from error
    if len(image) > _MAX_KERNEL_BYTES:
        raise UsageError(f"the kernel {path} is larger than {_MAX_KERNEL_BYTES} bytes", hint="give a bzImage")
    return image


def _check_modules(directory: Path, version: str) -> None:
    """Raises UsageError unless the directory is one of modules (or of none, all built in) for this very kernel."""
    hint = f"give the directory lib/modules/{version} that was built with the kernel"
    if not (directory / "modules.builtin").is_file():
        raise UsageError(f"{directory} is no directory of kernel modules: it has no modules.builtin", hint=hint)
    for path in ModuleTree(directory).files.values():
        built_for = parse_modinfo(read_module(path)).get("vermagic", "").partition(" ")[0]
        if built_for != version:
            raise UsageError(f"the modules are of kernel {built_for!r}, and the kernel is {version!r}", hint=hint)
        return


def _not_modules(directory: str, names: list[str]) -> set[str]:
    """For copytree: links (build and source lead into the kernel's build tree), and files that are of no use to a guest."""
    return {
        name
        for name in names
        if (path := Path(directory, name)).is_symlink()
        or not (path.is_dir() or (path.is_file() and (".ko" in name or name in ("modules.builtin", "modules.order"))))
    }


def _tree_digest(directory: Path) -> str:
    """SHA-256 over the names and contents of all files."""
    total = hashlib.sha256()
    for path in sorted(path for path in directory.rglob("*") if path.is_file()):
        contents = hashlib.sha256(path.read_bytes()).hexdigest()
        total.update(f"{contents} {path.relative_to(directory)}\n".encode())
    return total.hexdigest()


def _freeze(directory: Path) -> None:
    """Make every file read-only, and all of the tree durable."""
    for path in (directory, *directory.rglob("*")):
        if path.is_symlink():
            path.unlink()
            continue
        path.chmod(0o755 if path.is_dir() else 0o444)
        fd = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
        try:
            os.fsync(fd)
        finally:
            os.close(fd)


def _numbers(version: str) -> tuple[int, ...]:
    """6.1.0-56 after 6.1.0-9: the numbers of a version, to sort by."""
    return tuple(int(digits) for digits in re.findall(r"\d+", version))
