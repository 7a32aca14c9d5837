"""The catalog is content-addressed, atomic and safe across processes, and holds nothing half-made."""

from __future__ import annotations

import asyncio
import errno
import hashlib
import multiprocessing
import os
import signal
import stat
import subprocess
import sys
from pathlib import Path

import msgspec
import pytest

from coppice.content.store import STAGING
from coppice.errors import (
    CoppiceError,
    DigestMismatch,
    ImageError,
    InUse,
    InvalidName,
    NoSpace,
    NotFound,
    UnsafePath,
    UsageError,
)
from coppice.images import BuildOptions, ImageCatalog, Limits
from coppice.model import Image, ImageConfig, Progress
from coppice.state.journal import JournalOperation
from coppice.state.store import Store
from coppice.vmm.process import own_process
from fakes.records import make_instance
from image_archives import Layout, directory, docker_archive, file, open_catalog, read_erofs, symlink, tar

ROOT = tar(directory("etc"), file("etc/hosts", b"here"), file("bin/sh", b"#!", mode=0o755), symlink("lib", "usr/lib"))


def rootfs(path: Path, data: bytes = ROOT) -> Path:
    """Write a file with this archive."""
    path.write_bytes(data)
    return path


@pytest.fixture
def catalog(tmp_path: Path) -> ImageCatalog:
    """Return an empty catalog."""
    return open_catalog(tmp_path)


def staged(catalog: ImageCatalog) -> list[str]:
    """Return the leftovers of builds."""
    return [path.name for path in catalog.content.root.iterdir() if path.name.startswith(STAGING)]


async def test_an_undecodable_file_name_is_recorded(catalog: ImageCatalog, tmp_path: Path) -> None:
    """File names are bytes, but records are text."""
    image = await catalog.import_any("demo", rootfs(tmp_path / os.fsdecode(b"r\xff.tar")))
    assert (catalog.get("demo").source, image.source) == ("r?.tar",) * 2


async def test_an_imported_image_is_complete_and_read_only(catalog: ImageCatalog, tmp_path: Path) -> None:
    """The file hashes to the image's digest, is read-only, and holds the archive and the guest's
    mount points.
    """
    seen: list[Progress] = []
    image = await catalog.import_any("demo:1", rootfs(tmp_path / "r.tar"), progress=seen.append)
    path = catalog.root_file(image)
    assert image.digest == f"sha256:{hashlib.sha256(path.read_bytes()).hexdigest()}"
    assert path == catalog.content.root / image.digest.removeprefix("sha256:") / "root.img"
    assert stat.S_IMODE(path.stat().st_mode) == 0o444
    assert (image.size_bytes, image.name) == (path.stat().st_size, "demo:1")
    found = read_erofs(path)
    assert (found["/etc/hosts"].data, found["/bin/sh"].permissions) == (b"here", 0o755)
    assert {"/proc", "/sys", "/dev", "/run", "/tmp"} <= set(found)
    assert seen[-1].stage == "write"
    assert seen[-1].done == seen[-1].total == image.size_bytes
    assert catalog.list() == [image]
    assert staged(catalog) == []


async def test_the_same_content_is_stored_once(catalog: ImageCatalog, tmp_path: Path) -> None:
    """Two imports of one content share a file, and each name keeps its own config."""
    path = rootfs(tmp_path / "r.tar")
    first = await catalog.import_any("one", path)
    inode = catalog.root_file(first).stat().st_ino
    changed = BuildOptions(config=ImageConfig(cmd=("/bin/sh",)), owner="me", tags={"k": "v"})
    second = await catalog.import_any("two", path, options=changed)
    assert (first.digest, second.owner, second.tags) == (second.digest, "me", {"k": "v"})
    assert catalog.root_file(second).stat().st_ino == inode
    assert catalog.get("one").config.cmd == ()
    assert catalog.get("two").config.cmd == ("/bin/sh",)
    assert staged(catalog) == []


async def test_an_image_is_found_by_name_or_digest(catalog: ImageCatalog, tmp_path: Path) -> None:
    """An image is found by name, digest or a unique prefix of it; any other word raises NotFound or
    InvalidName.
    """
    image = await catalog.import_any("demo", rootfs(tmp_path / "r.tar"))
    digits = image.digest.removeprefix("sha256:")
    for reference in ("demo", image.digest, digits, digits[:6]):
        assert catalog.get(reference).digest == image.digest
    for reference in ("other", digits[:5], "ffffff" if digits[0] != "f" else "000000", f"sha256:{'0' * 64}"):
        with pytest.raises(NotFound):
            catalog.get(reference)
    for reference in ("../demo", "sha256:123", "Demo"):
        with pytest.raises(InvalidName):
            catalog.get(reference)


def names_of(catalog: ImageCatalog, image: Image) -> list[str]:
    """Return all names of an image, sorted."""
    return sorted(each.name for each in catalog.records.all() if each.digest == image.digest)


async def test_an_image_is_removed_with_its_last_name(catalog: ImageCatalog, tmp_path: Path) -> None:
    """Removing one of several names leaves the image; removing the last one removes the image,
    unless it is used.
    """
    image = await catalog.import_any("a", rootfs(tmp_path / "r.tar"))
    assert catalog.tag("a", "b/c:2").digest == image.digest
    assert names_of(catalog, image) == ["a", "b/c:2"]
    store = Store(tmp_path / "coppice.db", own_process())
    users = [msgspec.structs.replace(make_instance(name), image=image.digest) for name in ("vm1", "vm2")]
    store.create(users, JournalOperation.RUN)
    catalog.remove("a")
    assert [found.name for found in catalog.list()] == ["b/c:2"]
    with pytest.raises(InUse, match="vm1, vm2"):
        catalog.remove("b/c:2")
    assert catalog.root_file(catalog.get("b/c:2")).exists()
    for user in users:
        store.forget(user.id)
    catalog.remove("b/c:2")
    assert catalog.list() == []
    with pytest.raises(NotFound):
        catalog.root_file(image)
    with pytest.raises(NotFound):
        catalog.remove("b/c:2")
    assert list(catalog.content.root.iterdir()) == []


async def test_an_image_without_a_name_stays(catalog: ImageCatalog, tmp_path: Path) -> None:
    """If a name moves to new content, the old image stays without a name until it is removed by
    digest.
    """
    old = await catalog.import_any("a", rootfs(tmp_path / "r.tar"))
    new = await catalog.import_any("a", rootfs(tmp_path / "s.tar", tar(file("etc/other"))))
    assert [(image.digest, image.name) for image in catalog.list()] == [(old.digest, ""), (new.digest, "a")]
    assert catalog.get(old.digest).name == ""
    catalog.tag(old.digest, "old")
    assert catalog.get("old").digest == old.digest
    catalog.remove(old.digest)
    assert catalog.list() == [new]


async def test_import_any_recognises_each_kind_of_source(catalog: ImageCatalog, tmp_path: Path) -> None:
    """A root file system, a docker archive and an OCI layout, packed or not, are recognised by
    their contents.
    """
    layout = Layout(tmp_path / "oci")
    layout.index(layout.image(ROOT, process={"Cmd": ["x"]}))
    paths = {
        "rootfs": rootfs(tmp_path / "r"),
        "docker": docker_archive(tmp_path / "d", ROOT, Cmd=["x"]),
        "layout": layout.path,
        "packed": layout.tar(tmp_path / "o"),
    }
    images = {name: await catalog.import_any(name, path) for name, path in paths.items()}
    assert len({image.digest for image in images.values()}) == 1
    assert {name: image.config.cmd for name, image in images.items()} == {
        "rootfs": (),
        "docker": ("x",),
        "layout": ("x",),
        "packed": ("x",),
    }
    for number, data in enumerate([tar(file("readme")), bytes(10240), b"text"]):
        with pytest.raises(ImageError):
            await catalog.import_any(f"no{number}", rootfs(tmp_path / f"no{number}", data))
    with pytest.raises(ImageError):
        await catalog.import_any("no", tmp_path)
    with pytest.raises(UsageError):
        await catalog.import_any("no", tmp_path / "missing")
    with pytest.raises(ImageError, match="without tags"):
        await catalog.import_any("no", paths["rootfs"], "latest")


@pytest.mark.parametrize(
    ("data", "error"),
    [
        (ROOT[:700], ImageError),
        (tar(file("etc/y"), file("../x")), UnsafePath),
        (b"", ImageError),
        (bytes(10240), ImageError),
    ],
)
async def test_a_failed_import_leaves_nothing(
    catalog: ImageCatalog, tmp_path: Path, data: bytes, error: type[CoppiceError]
) -> None:
    """No image, name or staging directory stays, whatever the failure."""
    with pytest.raises(error) as caught:
        await catalog.import_any("x", rootfs(tmp_path / "r", data))
    assert caught.value.hint
    assert catalog.list() == []
    assert list(catalog.content.root.iterdir()) == []


async def test_a_bad_layer_leaves_nothing(catalog: ImageCatalog, tmp_path: Path) -> None:
    """An OCI layout with a damaged second layer leaves nothing either."""
    layout = Layout(tmp_path / "oci")
    layout.index(layout.image(ROOT, tar(file("big", os.urandom(100_000)))))
    largest = max((layout.path / "blobs/sha256").iterdir(), key=lambda path: path.stat().st_size)
    largest.write_bytes(largest.read_bytes()[:-100])
    with pytest.raises(DigestMismatch):
        await catalog.import_any("x", layout.path)
    assert list(catalog.content.root.iterdir()) == []


async def test_a_bad_name_fails_before_any_work(catalog: ImageCatalog, tmp_path: Path) -> None:
    """The name is checked before the archive is read."""
    with pytest.raises(InvalidName):
        await catalog.import_any("Bad Name", tmp_path / "missing")


async def test_limits_apply(catalog: ImageCatalog, tmp_path: Path) -> None:
    """The caller's limits apply to the image as well as to the archive."""
    with pytest.raises(ImageError, match="more than allowed"):
        await catalog.import_any(
            "x",
            rootfs(tmp_path / "r", tar(file("etc/a", bytes(9000)))),
            options=BuildOptions(limits=Limits(max_bytes=8192)),
        )
    assert staged(catalog) == []


async def test_a_full_disk_raises_no_space(
    catalog: ImageCatalog, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """ENOSPC from the file system becomes NoSpace, and the written files are removed."""

    def full(*_: object, **__: object) -> str:
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr("coppice.images.erofs.write_erofs", full)
    with pytest.raises(NoSpace):
        await catalog.import_any("x", rootfs(tmp_path / "r"))
    assert staged(catalog) == []


async def test_cancellation_cleans_up(catalog: ImageCatalog, tmp_path: Path) -> None:
    """A cancelled import ends at its next step; nothing of it is left when the cancellation is
    raised.
    """
    loop = asyncio.get_running_loop()
    writing = asyncio.Event()

    def progress(_: Progress) -> None:
        loop.call_soon_threadsafe(writing.set)

    path = rootfs(tmp_path / "r", tar(*(file(f"etc/f{n}", os.urandom(1 << 20)) for n in range(64))))
    task = asyncio.create_task(catalog.import_any("x", path, progress=progress))
    await writing.wait()
    assert len(staged(catalog)) == 1
    task.cancel()
    with pytest.raises(asyncio.CancelledError):
        await task
    assert staged(catalog) == []
    assert catalog.list() == []


def test_leftovers_are_told_from_running_builds(catalog: ImageCatalog, tmp_path: Path) -> None:
    """A staging directory is stale only if its process is gone."""
    code = (
        "import sys; from pathlib import Path; from coppice.content.store import ContentStore\n"
        "with ContentStore(Path(sys.argv[1])).staging() as path:\n"
        "    print(path, flush=True); sys.stdin.read()\n"
    )
    argv = [sys.executable, "-c", code, str(catalog.content.root)]
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(sys.path)}
    with subprocess.Popen(argv, stdin=subprocess.PIPE, stdout=subprocess.PIPE, env=environment) as process:
        assert process.stdout is not None
        path = Path(process.stdout.readline().decode().strip())
        assert path.is_dir()
        assert catalog.sweep() == []
        process.send_signal(signal.SIGKILL)
        process.wait(20)
    assert [removed.path for removed in catalog.sweep()] == [path]
    assert not path.exists()


def _tag_often(root: str, digest: str, worker: int) -> None:
    catalog = open_catalog(Path(root))
    for number in range(20):
        catalog.tag(digest, f"shared:{number % 3}")
        catalog.tag(digest, f"own{worker}:{number}")
        assert catalog.get(f"shared:{number % 3}").digest == digest


async def test_processes_do_not_corrupt_names(catalog: ImageCatalog, tmp_path: Path) -> None:
    """Processes that set tags concurrently lose no name, and a reader never sees a half-written
    one.
    """
    image = await catalog.import_any("a", rootfs(tmp_path / "r"))
    context = multiprocessing.get_context("spawn")
    workers = [context.Process(target=_tag_often, args=(str(tmp_path), image.digest, number)) for number in range(3)]
    for worker in workers:
        worker.start()
    while any(worker.is_alive() for worker in workers):
        found: list[Image] = await asyncio.to_thread(catalog.list)
        assert {image.digest for image in found} == {image.digest}
    for worker in workers:
        worker.join(60)
        assert worker.exitcode == 0
    assert len(names_of(catalog, image)) == 1 + 3 + 3 * 20


async def test_simultaneous_imports(catalog: ImageCatalog, tmp_path: Path) -> None:
    """Concurrent imports of the same and of different content all succeed."""
    same, different = rootfs(tmp_path / "r"), rootfs(tmp_path / "s", tar(file("etc/x")))
    jobs = [catalog.import_any(f"n{n}", different if n % 2 else same) for n in range(6)]
    images = await asyncio.gather(*jobs)
    assert len({image.digest for image in images}) == 2
    assert len(catalog.list()) == 6
    assert staged(catalog) == []
