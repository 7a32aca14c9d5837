"""The catalog: content-addressed, atomic, safe among processes, and nothing half-made in it."""

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

import pytest

from coppice.errors import (
    CoppiceError,
    DigestMismatch,
    ImageError,
    IntegrityError,
    InUse,
    InvalidName,
    NoSpace,
    NotFound,
    UnsafePath,
    UsageError,
)
from coppice.images import BuildOptions, ImageCatalog, Limits
from coppice.images.workspace import PREFIX
from coppice.model import Image, ImageConfig, Progress
from image_archives import Layout, directory, docker_archive, file, read_erofs, symlink, tar

ROOT = tar(directory("etc"), file("etc/hosts", b"here"), file("bin/sh", b"#!", mode=0o755), symlink("lib", "usr/lib"))


def rootfs(path: Path, data: bytes = ROOT) -> Path:
    """A file with this archive."""
    path.write_bytes(data)
    return path


def unused(_: str) -> list[str]:
    """Nobody uses any image."""
    return []


def used(_: str) -> list[str]:
    """Somebody uses every image."""
    return ["vm1"]


@pytest.fixture
def catalog(tmp_path: Path) -> ImageCatalog:
    """An empty catalog."""
    return ImageCatalog(tmp_path / "images")


def staged(catalog: ImageCatalog) -> list[str]:
    """What builds left behind."""
    return [path.name for path in catalog.root.iterdir() if path.name.startswith(PREFIX)]


async def test_a_file_whose_name_is_no_text(catalog: ImageCatalog, tmp_path: Path) -> None:
    """File names are bytes, and records are text."""
    image = await catalog.import_any("demo", rootfs(tmp_path / os.fsdecode(b"r\xff.tar")))
    assert (catalog.get("demo").source, image.source) == ("r?.tar",) * 2


async def test_an_imported_image(catalog: ImageCatalog, tmp_path: Path) -> None:
    """The file hashes to the image's digest, is read-only, and holds the archive plus the guest's mount points."""
    seen: list[Progress] = []
    image = await catalog.import_rootfs_tar("demo:1", rootfs(tmp_path / "r.tar"), progress=seen.append)
    path = catalog.root_file(image)
    assert image.digest == f"sha256:{hashlib.sha256(path.read_bytes()).hexdigest()}"
    assert path == catalog.root / image.digest.removeprefix("sha256:") / "root.img"
    assert stat.S_IMODE(path.stat().st_mode) == 0o444
    assert (image.size_bytes, image.name, image.filesystem) == (path.stat().st_size, "demo:1", "erofs")
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
    first = await catalog.import_rootfs_tar("one", path)
    inode = catalog.root_file(first).stat().st_ino
    changed = BuildOptions(config=ImageConfig(cmd=("/bin/sh",)), owner="me", tags={"k": "v"})
    second = await catalog.import_rootfs_tar("two", path, options=changed)
    assert (first.digest, second.owner, second.tags) == (second.digest, "me", {"k": "v"})
    assert catalog.root_file(second).stat().st_ino == inode
    assert catalog.get("one").config.cmd == ()
    assert catalog.get("two").config.cmd == ("/bin/sh",)
    assert staged(catalog) == []


async def test_lookup(catalog: ImageCatalog, tmp_path: Path) -> None:
    """An image is found by name, digest or a unique beginning of it; else NotFound or InvalidName."""
    image = await catalog.import_rootfs_tar("demo", rootfs(tmp_path / "r.tar"))
    digits = image.digest.removeprefix("sha256:")
    for reference in ("demo", image.digest, digits, digits[:6]):
        assert catalog.get(reference).digest == image.digest
    for reference in ("other", digits[:5], "ffffff" if digits[0] != "f" else "000000", f"sha256:{'0' * 64}"):
        with pytest.raises(NotFound):
            catalog.get(reference)
    for reference in ("../demo", "sha256:123", "Demo"):
        with pytest.raises(InvalidName):
            catalog.get(reference)


async def test_names_move_and_images_go(catalog: ImageCatalog, tmp_path: Path) -> None:
    """Removing one of several names drops the name only; with the last one the image goes, unless it is used."""
    image = await catalog.import_rootfs_tar("a", rootfs(tmp_path / "r.tar"))
    assert catalog.tag("a", "b/c:2").digest == image.digest
    assert catalog.names(image.digest) == ["a", "b/c:2"]
    catalog.remove("a", used)
    assert [found.name for found in catalog.list()] == ["b/c:2"]
    with pytest.raises(InUse, match="vm1, vm2"):
        catalog.remove("b/c:2", lambda digest: ["vm1", "vm2"] if digest == image.digest else [])
    assert catalog.root_file(catalog.get("b/c:2")).exists()
    catalog.remove("b/c:2", unused)
    assert catalog.list() == []
    with pytest.raises(NotFound):
        catalog.root_file(image)
    with pytest.raises(NotFound):
        catalog.remove("b/c:2", unused)
    assert sorted(path.name for path in catalog.root.iterdir()) == [".lock", "names"]


async def test_an_image_that_lost_its_name(catalog: ImageCatalog, tmp_path: Path) -> None:
    """When a name moves to new content the old image stays, nameless, until it is removed by digest."""
    old = await catalog.import_rootfs_tar("a", rootfs(tmp_path / "r.tar"))
    new = await catalog.import_rootfs_tar("a", rootfs(tmp_path / "s.tar", tar(file("other"))))
    assert [(image.digest, image.name) for image in catalog.list()] == [(old.digest, ""), (new.digest, "a")]
    assert catalog.get(old.digest).name == ""
    catalog.tag(old.digest, "old")
    assert catalog.get("old").digest == old.digest
    catalog.remove(old.digest, unused)
    assert catalog.list() == [new]


async def test_import_any_recognises(catalog: ImageCatalog, tmp_path: Path) -> None:
    """A root file system, a docker archive and an OCI layout, packed or not, are told apart by what is in them."""
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
    with pytest.raises(ImageError, match="no tags"):
        await catalog.import_any("no", paths["rootfs"], "latest")


async def test_squashfs_on_request(catalog: ImageCatalog, tmp_path: Path) -> None:
    """The other file system is another image, with another digest."""
    options = BuildOptions(filesystem="squashfs")
    image = await catalog.import_rootfs_tar("s", rootfs(tmp_path / "r.tar"), options=options)
    assert image.filesystem == "squashfs"
    path = catalog.root_file(image)
    assert path.read_bytes()[:4] == b"hsqs"
    assert sorted(file.name for file in path.parent.iterdir()) == ["image.json", "root.img"]


@pytest.mark.parametrize(
    ("data", "error"),
    [
        (ROOT[:700], ImageError),
        (tar(file("../x")), UnsafePath),
        (b"", ImageError),
        (bytes(10240), ImageError),
    ],
)
async def test_a_failed_import_leaves_nothing(
    catalog: ImageCatalog, tmp_path: Path, data: bytes, error: type[CoppiceError]
) -> None:
    """Whatever is wrong, no image, no name and no staging directory stays."""
    with pytest.raises(error) as caught:
        await catalog.import_rootfs_tar("x", rootfs(tmp_path / "r", data))
    assert caught.value.hint
    assert catalog.list() == []
    assert sorted(path.name for path in catalog.root.iterdir()) == [".lock", "names"]


async def test_a_bad_layer_leaves_nothing(catalog: ImageCatalog, tmp_path: Path) -> None:
    """The same for an OCI layout whose second layer is damaged."""
    layout = Layout(tmp_path / "oci")
    layout.index(layout.image(ROOT, tar(file("big", os.urandom(100_000)))))
    largest = max((layout.path / "blobs/sha256").iterdir(), key=lambda path: path.stat().st_size)
    largest.write_bytes(largest.read_bytes()[:-100])
    with pytest.raises(DigestMismatch):
        await catalog.import_oci_layout("x", layout.path)
    assert sorted(path.name for path in catalog.root.iterdir()) == [".lock", "names"]


async def test_a_bad_name_fails_before_any_work(catalog: ImageCatalog, tmp_path: Path) -> None:
    """The name is checked first."""
    with pytest.raises(InvalidName):
        await catalog.import_rootfs_tar("Bad Name", tmp_path / "missing")


async def test_limits_apply(catalog: ImageCatalog, tmp_path: Path) -> None:
    """The caller's limits bound the image as well as the archive."""
    with pytest.raises(ImageError, match="more than is allowed"):
        await catalog.import_rootfs_tar(
            "x",
            rootfs(tmp_path / "r", tar(file("a", bytes(9000)))),
            options=BuildOptions(limits=Limits(max_bytes=8192)),
        )
    assert staged(catalog) == []


async def test_a_full_disk_is_no_space(catalog: ImageCatalog, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """ENOSPC from the file system becomes NoSpace, and what was written is removed."""

    def full(*_: object, **__: object) -> str:
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr("coppice.images.catalog.write_erofs", full)
    with pytest.raises(NoSpace):
        await catalog.import_rootfs_tar("x", rootfs(tmp_path / "r"))
    assert staged(catalog) == []


async def test_cancellation_cleans_up(catalog: ImageCatalog, tmp_path: Path) -> None:
    """A cancelled import ends at its next step; when the cancellation arrives nothing of it is left."""
    loop = asyncio.get_running_loop()
    writing = asyncio.Event()

    def progress(_: Progress) -> None:
        loop.call_soon_threadsafe(writing.set)

    path = rootfs(tmp_path / "r", tar(*(file(f"f{n}", os.urandom(1 << 20)) for n in range(64))))
    task = asyncio.create_task(catalog.import_rootfs_tar("x", path, progress=progress))
    await writing.wait()
    assert len(staged(catalog)) == 1
    task.cancel()
    with pytest.raises(asyncio.CancelledError):
        await task
    assert staged(catalog) == []
    assert catalog.list() == []


def test_leftovers_are_told_from_running_builds(catalog: ImageCatalog, tmp_path: Path) -> None:
    """A staging directory is stale when its process is gone, and only then."""
    code = (
        "import sys; from pathlib import Path; from coppice.images.workspace import staging_directory\n"
        "with staging_directory(Path(sys.argv[1]), Path(sys.argv[1]) / '.lock') as path:\n"
        "    print(path, flush=True); sys.stdin.read()\n"
    )
    argv = [sys.executable, "-c", code, str(catalog.root)]
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(sys.path)}
    with subprocess.Popen(argv, stdin=subprocess.PIPE, stdout=subprocess.PIPE, env=environment) as process:
        assert process.stdout is not None
        path = Path(process.stdout.readline().decode().strip())
        assert path.is_dir()
        assert catalog.stale_staging() == []
        process.send_signal(signal.SIGKILL)
        process.wait(20)
    assert catalog.stale_staging() == [path]


async def test_a_damaged_record_is_named(catalog: ImageCatalog, tmp_path: Path) -> None:
    """A record that cannot be read is an IntegrityError that names the file."""
    image = await catalog.import_rootfs_tar("a", rootfs(tmp_path / "r"))
    record = catalog.root / image.digest.removeprefix("sha256:") / "image.json"
    record.write_bytes(b"{")
    with pytest.raises(IntegrityError, match="image\\.json"):
        catalog.get(image.digest)


def _tag_often(root: str, digest: str, worker: int) -> None:
    catalog = ImageCatalog(Path(root))
    for number in range(20):
        catalog.tag(digest, f"shared:{number % 3}")
        catalog.tag(digest, f"own{worker}:{number}")
        assert catalog.get(f"shared:{number % 3}").digest == digest


async def test_processes_do_not_corrupt_names(catalog: ImageCatalog, tmp_path: Path) -> None:
    """Several processes that tag at once lose no name, and no reader sees a half-written one."""
    image = await catalog.import_rootfs_tar("a", rootfs(tmp_path / "r"))
    context = multiprocessing.get_context("spawn")
    workers = [
        context.Process(target=_tag_often, args=(str(catalog.root), image.digest, number)) for number in range(3)
    ]
    for worker in workers:
        worker.start()
    while any(worker.is_alive() for worker in workers):
        found: list[Image] = await asyncio.to_thread(catalog.list)
        assert {image.digest for image in found} == {image.digest}
    for worker in workers:
        worker.join(60)
        assert worker.exitcode == 0
    assert len(catalog.names(image.digest)) == 1 + 3 + 3 * 20


async def test_simultaneous_imports(catalog: ImageCatalog, tmp_path: Path) -> None:
    """Imports of the same and of different content at once all succeed."""
    same, different = rootfs(tmp_path / "r"), rootfs(tmp_path / "s", tar(file("x")))
    jobs = [catalog.import_rootfs_tar(f"n{n}", different if n % 2 else same) for n in range(6)]
    images = await asyncio.gather(*jobs)
    assert len({image.digest for image in images}) == 2
    assert len(catalog.list()) == 6
    assert staged(catalog) == []
