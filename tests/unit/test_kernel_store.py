"""The kernel store: kernels are complete and read-only, and are found again."""

from __future__ import annotations

import asyncio
import gzip
import os
import shutil
import stat
import threading
from collections.abc import Callable
from pathlib import Path

import pytest

from coppice.boot import debian
from coppice.boot.kernel import KernelStore, digest_of_files
from coppice.content import store as content_store
from coppice.errors import HostCannot, ImageError, InUse, MissingTool, NotFound, UsageError
from coppice.model import Progress
from kernel_files import RELEASE, bzimage, module_tree, vmlinux

NEWER = "6.1.0-10-cloud-amd64"


@pytest.fixture
def store(tmp_path: Path) -> KernelStore:
    return KernelStore(tmp_path / "kernels")


def built(directory: Path, release: str = RELEASE) -> tuple[Path, Path]:
    """Make a kernel and its modules, as a build leaves them."""
    modules = module_tree(directory / release, release=release)
    image = directory / f"bzImage-{release}"
    image.write_bytes(bzimage(gzip.compress(vmlinux(), mtime=0), release=release))
    return image, modules


def test_an_added_kernel_is_complete_and_read_only(store: KernelStore, tmp_path: Path) -> None:
    """Files that VMs map and link never change: they are copies with mode 0444, without links out
    of the store.
    """
    image, modules = built(tmp_path)
    kernel = store.add(image, modules)
    assert kernel.version == RELEASE
    assert kernel.vmlinuz is not None
    assert kernel.vmlinuz.read_bytes() == image.read_bytes()
    assert kernel.vmlinux is not None
    assert kernel.modules is not None
    assert kernel.boot_image.read_bytes() == vmlinux()
    assert (kernel.modules / "kernel/fs/erofs/erofs.ko").is_file()
    assert not (kernel.modules / "build").is_symlink()
    files = [path for path in (store.content.root / kernel.key).rglob("*") if path.is_file()]
    assert {stat.S_IMODE(path.stat().st_mode) for path in files} == {0o444}
    assert store.get(kernel.key) == kernel


def test_without_an_uncompressed_kernel_the_bzimage_boots(store: KernelStore, tmp_path: Path) -> None:
    """A kernel that cannot be decompressed here is used unchanged."""
    image, modules = built(tmp_path)
    image.write_bytes(bzimage())
    kernel = store.add(image, modules)
    assert kernel.vmlinux is None
    assert kernel.boot_image == kernel.vmlinuz


def test_the_same_kernel_is_stored_once(store: KernelStore, tmp_path: Path) -> None:
    """Adding is idempotent; a different module makes a different kernel."""
    image, modules = built(tmp_path)
    first = store.add(image, modules)
    assert store.add(image, modules) == first
    (modules / "kernel/fs/erofs/more.ko").write_bytes((modules / "kernel/fs/erofs/erofs.ko").read_bytes())
    assert store.add(image, modules) != first
    assert len(store.kernels()) == 2


def test_the_kernel_of_another_host_is_recognised_or_adopted(store: KernelStore, tmp_path: Path) -> None:
    """It is the same kernel if all its files are, whatever its key. It never gets the key of a Debian kernel."""
    image, modules = built(tmp_path)
    kernel = store.add(image, modules)
    sha256 = digest_of_files(store.files(kernel.key))
    assert store.same("debian-6.1-0badc0de", sha256) == kernel.key
    assert store.same(kernel.key, "0" * 64) is None
    other = KernelStore(tmp_path / "other")
    other.content.root.mkdir()
    assert other.same(kernel.key, sha256) is None
    for wrong in ("evil", "vmlinuz"):
        copied = shutil.copytree(store.content.root / kernel.key, tmp_path / f"copied-{wrong}")
        copied.chmod(0o700)
        (copied / "modules").chmod(0o700)
        if wrong == "evil":
            (copied / "evil").write_bytes(b"")
            with pytest.raises(ImageError, match="not those of a kernel"):
                other.adopt(copied)
        else:
            assert other.adopt(copied) == kernel.key
    assert digest_of_files(other.files(kernel.key)) == sha256


def test_only_an_unused_kernel_is_removed(store: KernelStore, tmp_path: Path) -> None:
    """The guard decides, and the removal is all or nothing: an error after the guard leaves no
    part.
    """
    kernel = store.add(*built(tmp_path))

    def in_use(_: object) -> None:
        raise InUse("the kernel is used", hint="")

    with pytest.raises(InUse):
        store.remove(kernel.key, in_use)
    assert store.kernels() == [kernel]

    def killed(retire: Callable[[], None]) -> None:
        retire()
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        store.remove(kernel.key, killed)
    assert store.kernels() == []
    assert list(store.content.root.iterdir()) == []
    store.add(*built(tmp_path / "again"))
    store.remove(kernel.key, lambda retire: retire())
    assert list(store.content.root.iterdir()) == []
    with pytest.raises(NotFound):
        store.remove(kernel.key, lambda retire: retire())


def test_concurrent_additions_do_not_collide(store: KernelStore, tmp_path: Path) -> None:
    """Several processes may add the same kernel: all get it, and nothing half-made stays."""
    image, modules = built(tmp_path)
    keys: list[str] = []
    threads = [threading.Thread(target=lambda: keys.append(store.add(image, modules).key)) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(keys) == 4
    assert [path.name for path in store.content.root.iterdir()] == [keys[0]]


def test_versions_sort_by_their_numbers(store: KernelStore, tmp_path: Path) -> None:
    """The newest kernel is 6.1.0-10, and not 6.1.0-9."""
    store.add(*built(tmp_path, NEWER))
    store.add(*built(tmp_path, RELEASE))
    assert [kernel.version for kernel in store.kernels()] == [RELEASE, NEWER]


def test_modules_of_another_kernel_are_refused(store: KernelStore, tmp_path: Path) -> None:
    """Modules that the kernel would not load are detected before any guest boots."""
    image, _ = built(tmp_path, RELEASE)
    _, modules = built(tmp_path, NEWER)
    with pytest.raises(UsageError, match=NEWER):
        store.add(image, modules)
    assert store.kernels() == []


@pytest.mark.parametrize("wrong", ["no kernel", "no modules", "not a kernel"])
def test_wrong_paths_are_usage_errors(store: KernelStore, tmp_path: Path, wrong: str) -> None:
    """Each wrong argument is a usage error with a hint, and leaves nothing."""
    image, modules = built(tmp_path)
    if wrong == "not a kernel":
        image.write_bytes(b"text")
    paths = (
        image.parent / "none" if wrong == "no kernel" else image,
        modules / "none" if wrong == "no modules" else modules,
    )
    with pytest.raises(UsageError) as caught:
        store.add(*paths)
    assert caught.value.hint
    assert store.kernels() == []


@pytest.mark.parametrize("key", ["", "..", "custom-x", "../custom-x-00000000", "custom-6.1.0-00000000", ".stage-0123"])
def test_unknown_keys_are_not_found(store: KernelStore, key: str) -> None:
    """A key from outside becomes a path only if it has the form of a key."""
    with pytest.raises(NotFound):
        store.get(key)


def test_stubs_are_small_and_valid(store: KernelStore, tmp_path: Path) -> None:
    """A VMM that only restores gets 64 KiB with the real header, and an initrd of 512 bytes."""
    kernel = store.add(*built(tmp_path))
    stub, initrd = store.stub(kernel.key)
    assert kernel.vmlinuz is not None
    assert stub.read_bytes() == kernel.vmlinuz.read_bytes()[: 64 << 10]
    assert initrd.stat().st_size == 512
    assert {stat.S_IMODE(path.stat().st_mode) for path in (stub, initrd)} == {0o444}


def test_a_sweep_removes_only_leftovers(store: KernelStore, tmp_path: Path) -> None:
    """Leftovers of a killed process are removed; the staging directory of a living one, and
    finished kernels, stay.
    """
    kernel = store.add(*built(tmp_path))
    (store.content.root / ".stage-dead" / "kernel").mkdir(parents=True)
    with store.content.staging() as alive:
        assert [removed.path.name for removed in store.content.sweep()] == [".stage-dead"]
        assert alive.is_dir()
    assert store.content.sweep() == []
    assert store.kernels() == [kernel]


def test_a_sweep_of_a_missing_store_does_nothing(store: KernelStore) -> None:
    """The first start on a new machine has nothing to sweep."""
    assert store.content.sweep() == []


APT_CACHE = """#!/bin/sh
case "$3" in
linux-image-cloud-amd64) echo "Package: $3"; echo "Depends: {depends}"; exit {status};;
*) echo "Package: $3"; echo "Size: 12"; echo; echo "Package: older";;
esac
"""
APT_GET = """#!/bin/sh
echo started > {started}
{wait}
echo "W: harmless" >&2
[ {status} = 0 ] || {{ echo "E: Unable to locate package" >&2; exit {status}; }}
echo package > "$3_1_amd64.deb"
"""
DPKG_DEB = """#!/bin/sh
cp -r {tree} "$3"
"""


class FakeApt:
    """Stand-ins for apt-cache, apt-get and dpkg-deb in a separate directory."""

    def __init__(self, directory: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        self.directory = directory / "bin"
        self.directory.mkdir()
        self.started = directory / "started"
        self._tree = directory / "tree"
        image, modules = built(directory)
        for name, source in (("boot", image), ("lib/modules", modules)):
            (self._tree / name).mkdir(parents=True)
            source.rename(self._tree / name / (RELEASE if name != "boot" else f"vmlinuz-{RELEASE}"))
        (self._tree / "boot" / f"config-{RELEASE}").write_text("CONFIG_ACPI=y\nCONFIG_VIRTIO=m\n")
        monkeypatch.setitem(debian._ENVIRONMENT, "PATH", f"{self.directory}:/usr/bin:/bin")
        self.install()

    def install(
        self, *, depends: str = f"linux-image-{RELEASE} (= 1)", cache: int = 0, get: int = 0, wait: str = ""
    ) -> None:
        self._write("apt-cache", APT_CACHE.format(depends=depends, status=cache))
        self._write("apt-get", APT_GET.format(status=get, wait=wait, started=self.started))
        self._write("dpkg-deb", DPKG_DEB.format(tree=self._tree))

    def _write(self, name: str, text: str) -> None:
        file = self.directory / name
        file.write_text(text)
        file.chmod(0o755)


@pytest.fixture
def apt(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> FakeApt:
    return FakeApt(tmp_path, monkeypatch)


async def test_debian_kernel_is_fetched_once(store: KernelStore, apt: FakeApt) -> None:
    """The first call fetches, unpacks and reports progress; the second finds the kernel without any
    tool or network.
    """
    seen: list[Progress] = []
    kernel = await store.ensure_debian(seen.append)
    assert kernel.key.startswith(f"debian-{RELEASE}-")
    assert (store.content.root / kernel.key / "config").is_file()
    assert {step.stage for step in seen} == {"download kernel", "unpack kernel"}
    assert seen[0].total == 12
    apt.install(cache=1, get=1)
    assert await store.ensure_debian() == kernel
    assert [path.name for path in store.content.root.iterdir()] == [kernel.key]


@pytest.mark.parametrize("broken", ["lists", "download", "no dependency"])
async def test_apt_failures_have_a_hint(store: KernelStore, apt: FakeApt, broken: str) -> None:
    """Without package lists, or with old ones, the error says to run apt-get update; nothing is
    left.
    """
    if broken == "no dependency":
        apt.install(depends="kmod, linux-base")
    else:
        apt.install(cache=100 if broken == "lists" else 0, get=100 if broken == "download" else 0)
    with pytest.raises(HostCannot) as caught:
        await store.ensure_debian()
    assert "apt-get update" in (caught.value.hint or "")
    assert list(store.content.root.iterdir()) == []


async def test_without_apt_a_kernel_can_be_added(
    store: KernelStore, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    """On another distribution the error names the missing tool and an alternative."""
    monkeypatch.setitem(debian._ENVIRONMENT, "PATH", str(tmp_path))
    with pytest.raises(MissingTool, match="apt-cache"):
        await store.ensure_debian()


async def test_cancelling_a_download_leaves_nothing(store: KernelStore, apt: FakeApt) -> None:
    """A cancelled fetch kills apt-get with its children and removes its directory."""
    os.mkfifo(apt.started)
    apt.install(wait="sleep 600 & wait")
    task = asyncio.create_task(store.ensure_debian())
    await asyncio.to_thread(apt.started.read_text)
    task.cancel()
    with pytest.raises(asyncio.CancelledError):
        await task
    assert list(store.content.root.iterdir()) == []


async def test_cancelling_the_last_step_waits_for_it(
    store: KernelStore, apt: FakeApt, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A directory must not be removed while a thread works in it: it could get its final name with
    half of its modules gone.
    """
    started, proceed = threading.Event(), threading.Event()
    freeze = content_store._freeze

    def slow(directory: Path) -> None:
        started.set()
        proceed.wait(30)
        freeze(directory)

    monkeypatch.setattr(content_store, "_freeze", slow)
    task = asyncio.create_task(store.ensure_debian())
    assert await asyncio.to_thread(started.wait, 30)
    task.cancel()
    for _ in range(10):
        await asyncio.sleep(0)
    ended = task.done()
    proceed.set()
    with pytest.raises(asyncio.CancelledError):
        await task
    assert not ended
    assert list(store.content.root.iterdir()) == []


def test_the_first_stanza_is_read() -> None:
    """Of several versions the first one is read, which apt would install; long descriptions do not
    confuse the parser.
    """
    text = "Package: a\nDescription: short\n Depends: not a field\nSize: 1\n\nPackage: b\nSize: 2\n"
    assert debian.parse_stanza(text) == {"Package": "a", "Description": "short", "Size": "1"}


@pytest.mark.parametrize(
    ("depends", "expected"),
    [
        ("linux-image-6.1.0-56-cloud-amd64 (= 6.1.192-2)", "linux-image-6.1.0-56-cloud-amd64"),
        ("kmod, linux-image-6.12.9+deb13-cloud-amd64", "linux-image-6.12.9+deb13-cloud-amd64"),
        ("linux-image-cloud-amd64", None),
        ("my-linux-image-6.1", None),
        ("", None),
    ],
)
def test_the_image_package_is_found_among_dependencies(depends: str, expected: str | None) -> None:
    """Only a versioned kernel image counts, because its name becomes a path and an argument."""
    assert debian.image_package(depends) == expected
