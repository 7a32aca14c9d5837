"""OCI layouts and docker archives: the right image is chosen, and every byte of it is verified."""

from __future__ import annotations

import gzip
import hashlib
import json
import subprocess
import tarfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import zstandard
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from coppice.errors import DigestMismatch, ImageError
from coppice.images.archive import open_archive
from coppice.images.blobs import ArchiveBundle, DirectoryBundle
from coppice.images.oci import unpack_docker_archive, unpack_layout
from coppice.images.tree import FileTree
from coppice.images.workspace import Limits
from coppice.model import ImageConfig
from image_archives import (
    ARCHITECTURE,
    INDEX_TYPE,
    Layout,
    directory,
    docker_archive,
    file,
    names,
    symlink,
    tar,
    text,
    workspace,
)

ROOT = tar(directory("etc"), file("etc/hosts", b"lower"), file("bin/sh", b"#!", mode=0o755))
UPPER = tar(file("etc/hosts", b"upper"), file("bin/.wh.sh"), file("bin/new"))
OTHER = "arm64" if ARCHITECTURE == "amd64" else "amd64"


def layout_result(
    path: Path, reference: str | None = None, limits: Limits | None = None
) -> tuple[FileTree, ImageConfig]:
    """Return the tree and config of a layout, a directory or a tar archive."""
    tree = FileTree()
    (path.parent / "work").mkdir(exist_ok=True)
    with workspace(path.parent / "work", limits) as space:
        bundle = DirectoryBundle(path) if path.is_dir() else ArchiveBundle(open_archive(path, space))
        config = unpack_layout(bundle, tree, space, reference)
        contents = {name: text(tree, name.strip("/")) for name in names(tree) if name == "/etc/hosts"}
        assert contents.get("/etc/hosts") in (None, b"upper", b"lower")
    return tree, config


def docker_result(path: Path, tag: str | None = None) -> tuple[set[str], ImageConfig]:
    """Return the names and config of a docker archive."""
    tree = FileTree()
    with workspace(path.parent) as space:
        config = unpack_docker_archive(ArchiveBundle(open_archive(path, space)), tree, space, tag)
    return names(tree), config


def test_a_layouts_layers_and_config_are_read(tmp_path: Path) -> None:
    """Layers are applied in order, and the config defines the process."""
    layout = Layout(tmp_path / "oci")
    process: dict[str, object] = {
        "Entrypoint": ["/bin/run"],
        "Cmd": ["--all"],
        "Env": ["PATH=/bin", "EMPTY=", "INHERITED"],
        "WorkingDir": "srv/../app",
        "User": "web:80",
        "Labels": {"a": "b"},
        "ExposedPorts": {"80/tcp": {}},
    }
    layout.index(layout.image(ROOT, UPPER, process=process))
    tree, config = layout_result(layout.path)
    assert names(tree) == {"/etc", "/etc/hosts", "/bin", "/bin/new"}
    assert config == ImageConfig(
        entrypoint=("/bin/run",),
        cmd=("--all",),
        env={"PATH": "/bin", "EMPTY": ""},
        workdir="/app",
        user="web:80",
        labels={"a": "b"},
    )
    packed = layout.tar(tmp_path / "oci.tar")
    assert names(layout_result(packed)[0]) == names(tree)


def test_missing_parts_of_a_config_have_defaults(tmp_path: Path) -> None:
    """Null and absent fields have the same defaults: no process, root directory, no user."""
    layout = Layout(tmp_path / "oci")
    nothing: dict[str, object] = dict.fromkeys(["Entrypoint", "Cmd", "Env", "WorkingDir", "User", "Labels"])
    layout.index(layout.image(ROOT, process=nothing))
    assert layout_result(layout.path)[1] == ImageConfig()


@pytest.mark.parametrize("compress", [gzip.compress, zstandard.ZstdCompressor().compress, lambda data: data])
def test_each_layer_compression_is_read(tmp_path: Path, compress: Callable[[bytes], bytes]) -> None:
    """Layers are tar, tar+gzip or tar+zstd; the diff_id is the plain tar's."""
    layout = Layout(tmp_path / "oci")
    diff_id = f"sha256:{hashlib.sha256(ROOT).hexdigest()}"
    layout.index(layout.image(compress(ROOT), compress=False, diff_ids=[diff_id]))
    assert "/bin/sh" in names(layout_result(layout.path)[0])


def test_the_image_for_this_machine_is_chosen(tmp_path: Path) -> None:
    """The host's platform is chosen in a nested index; attestations do not count as images."""
    layout = Layout(tmp_path / "oci")
    mine = {**layout.image(ROOT), "platform": {"architecture": ARCHITECTURE, "os": "linux"}}
    other = {
        **layout.image(UPPER, architecture=OTHER),
        "platform": {"architecture": OTHER, "os": "linux", "variant": "v8"},
    }
    attestation = {**layout.image(tar(file("x"))), "platform": {"architecture": "unknown", "os": "unknown"}}
    nested = layout.blob(json.dumps({"manifests": [other, mine, attestation]}).encode(), INDEX_TYPE)
    layout.index(nested)
    assert "/bin/sh" in names(layout_result(layout.path)[0])


def test_an_image_for_another_machine_is_refused(tmp_path: Path) -> None:
    """The architecture in the index, or only in the config, decides."""
    layout = Layout(tmp_path / "oci")
    descriptor = layout.image(ROOT, architecture=OTHER)
    layout.index(descriptor)
    with pytest.raises(ImageError, match=OTHER):
        layout_result(layout.path)
    layout.index({**descriptor, "platform": {"architecture": OTHER, "os": "linux"}})
    with pytest.raises(ImageError, match="no image for linux"):
        layout_result(layout.path)


def test_a_reference_chooses_the_image(tmp_path: Path) -> None:
    """With several images a reference is required, and the error lists the images."""
    layout = Layout(tmp_path / "oci")
    key = "org.opencontainers.image.ref.name"
    one = {**layout.image(ROOT), "annotations": {key: "one"}}
    two = {**layout.image(UPPER), "annotations": {key: "two"}}
    layout.index(one, two)
    assert "/bin/new" in names(layout_result(layout.path, "two")[0])
    with pytest.raises(ImageError, match="one, two"):
        layout_result(layout.path)
    with pytest.raises(ImageError, match="one, two"):
        layout_result(layout.path, "three")
    digest = str(one["digest"])
    assert "/bin/sh" in names(layout_result(layout.path, digest)[0])


def damaged(layout: Layout, change: Callable[[bytes], bytes], index: int) -> None:
    """Change the blob of the image that is the `index`-th largest."""
    blobs = sorted((layout.path / "blobs/sha256").iterdir(), key=lambda path: path.stat().st_size, reverse=True)
    blobs[index].write_bytes(change(blobs[index].read_bytes()))


@pytest.mark.parametrize("index", [0, 1, 2])
@pytest.mark.parametrize(
    "change",
    [lambda d: d[:-1], lambda d: d + b" ", lambda d: bytes([d[0] ^ 1]) + d[1:], lambda d: d[:-1] + b"?", lambda _: b""],
    ids=["short", "long", "first", "last", "empty"],
)
@pytest.mark.parametrize("compress", [True, False])
def test_every_blob_is_verified(tmp_path: Path, compress: bool, change: Callable[[bytes], bytes], index: int) -> None:
    """A manifest, config or layer with any change is a DigestMismatch."""
    layout = Layout(tmp_path / "oci")
    layout.index(layout.image(ROOT, compress=compress))
    damaged(layout, change, index)
    with pytest.raises(DigestMismatch):
        layout_result(layout.path)


def test_diff_ids_are_verified(tmp_path: Path) -> None:
    """A layer that matches its descriptor but not the config's diff_id is refused."""
    layout = Layout(tmp_path / "oci")
    layout.index(layout.image(ROOT, diff_ids=[f"sha256:{'0' * 64}"]))
    with pytest.raises(DigestMismatch):
        layout_result(layout.path)
    layout.index(layout.image(ROOT, diff_ids=[]))
    with pytest.raises(ImageError, match="1 layers, but"):
        layout_result(layout.path)


def test_sizes_are_verified(tmp_path: Path) -> None:
    """A descriptor with a wrong size is refused, even if its digest is right."""
    layout = Layout(tmp_path / "oci")
    descriptor = layout.image(ROOT)
    for size in (0, 1, 10**6):
        layout.index({**descriptor, "size": size})
        with pytest.raises(DigestMismatch):
            layout_result(layout.path)


@pytest.mark.parametrize(
    "digest", ["sha256:../../../etc/passwd", "md5:" + "0" * 32, "sha256:" + "A" * 64, "", "sha256:" + "0" * 63]
)
def test_digests_do_not_become_paths(tmp_path: Path, digest: str) -> None:
    """A malformed digest never reaches the file system."""
    layout = Layout(tmp_path / "oci")
    layout.index({**layout.image(ROOT), "digest": digest})
    with pytest.raises(ImageError, match="not a digest"):
        layout_result(layout.path)


def test_artifacts_are_not_images(tmp_path: Path) -> None:
    """A layout without a file system is recognised and refused."""
    layout = Layout(tmp_path / "oci")
    chart = layout.blob(ROOT, "application/vnd.cncf.helm.chart.content.v1")
    config = {"architecture": ARCHITECTURE, "os": "linux", "rootfs": {"diff_ids": [chart["digest"]]}}
    manifest = {"config": layout.blob(json.dumps(config).encode(), "application/json"), "layers": [chart]}
    layout.index(layout.blob(json.dumps(manifest).encode(), "application/vnd.oci.image.manifest.v1+json"))
    with pytest.raises(ImageError, match="helm"):
        layout_result(layout.path)


def test_nesting_and_documents_are_bounded(tmp_path: Path) -> None:
    """An index nested too deep and a manifest too large are refused."""
    layout = Layout(tmp_path / "oci")
    descriptor = layout.image(ROOT)
    for _ in range(6):
        descriptor = layout.blob(json.dumps({"manifests": [descriptor]}).encode(), INDEX_TYPE)
    layout.index(descriptor)
    with pytest.raises(ImageError, match="nests"):
        layout_result(layout.path)
    layout.index(layout.image(ROOT))
    with pytest.raises(ImageError, match="larger"):
        layout_result(layout.path, limits=Limits(max_document_bytes=50))
    layout.index(layout.image(*[ROOT] * 3))
    with pytest.raises(ImageError, match="3 layers"):
        layout_result(layout.path, limits=Limits(max_layers=2))


_JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.text(max_size=8),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=8), inner, max_size=3),
    max_leaves=8,
)
_KEYS = ["manifests", "mediaType", "digest", "size", "platform", "annotations"]


@settings(suppress_health_check=[HealthCheck.function_scoped_fixture], max_examples=80, deadline=None)
@given(st.one_of(_JSON, st.fixed_dictionaries({"manifests": st.lists(st.dictionaries(st.sampled_from(_KEYS), _JSON))})))
def test_any_index_is_an_image_error(tmp_path: Path, document: Any) -> None:
    """Any JSON in place of an index gives an ImageError."""
    (tmp_path / "oci").mkdir(exist_ok=True)
    (tmp_path / "oci" / "index.json").write_text(json.dumps(document))
    with pytest.raises(ImageError):
        layout_result(tmp_path / "oci")


def test_repeated_layers_of_a_docker_archive_are_read(tmp_path: Path) -> None:
    """In the legacy form a repeated layer is a symlink to the first one; the config is read too."""
    path = docker_archive(tmp_path / "d.tar", ROOT, UPPER, ROOT, Cmd=["sh"], Env=["A=b=c"])
    found, config = docker_result(path)
    assert found == {"/etc", "/etc/hosts", "/bin", "/bin/sh", "/bin/new"}
    assert (config.cmd, config.env) == (("sh",), {"A": "b=c"})


def test_a_tag_chooses_the_docker_image(tmp_path: Path) -> None:
    """A tag is found with or without :latest; the error for a wrong tag lists the tags."""
    path = docker_archive(tmp_path / "d.tar", ROOT, tags=("demo:latest", "demo:1"))
    for tag in (None, "demo", "demo:1", "demo:latest"):
        assert "/bin/sh" in docker_result(path, tag)[0]
    with pytest.raises(ImageError, match="demo:1"):
        docker_result(path, "other")


def test_a_changed_docker_archive_is_refused(tmp_path: Path) -> None:
    """A docker archive has no digests except the config's name and the diff_ids, and these are
    verified.
    """
    path = docker_archive(tmp_path / "d.tar", ROOT)
    members = {}
    with tarfile.open(path) as archive:
        for member in archive.getmembers():
            found = archive.extractfile(member)
            assert found is not None
            members[member.name] = found.read()
    for change in members:
        if change == "manifest.json":
            continue
        data = {**members, change: members[change].replace(b"linux", b"linuX").replace(b"lower", b"LOWER")}
        path.write_bytes(tar(*(file(name, content) for name, content in data.items())))
        with pytest.raises(DigestMismatch):
            docker_result(path)


@pytest.mark.parametrize("target", ["../../../etc/passwd", "/etc/passwd", "loop/layer.tar", "../missing"])
def test_links_out_of_a_docker_archive_are_not_followed(tmp_path: Path, target: str) -> None:
    """A layer that is a symlink out of the archive, or to itself, counts as missing."""
    manifest = [{"Config": "c.json", "Layers": ["loop/layer.tar"]}]
    config = {"rootfs": {"diff_ids": [f"sha256:{'0' * 64}"]}}
    members = [file("manifest.json", json.dumps(manifest).encode()), file("c.json", json.dumps(config).encode())]
    path = tmp_path / "d.tar"
    path.write_bytes(tar(*members, symlink("loop/layer.tar", target)))
    with pytest.raises(ImageError, match="which is missing"):
        docker_result(path)


def test_archives_made_by_skopeo_and_umoci(tmp_path: Path) -> None:
    """Archives of common tools are read: umoci's layers, and skopeo's docker archive and OCI layout
    of them.
    """
    root = tmp_path / "bundle"
    layout = f"{tmp_path}/made:v1"

    def run(*argv: str) -> None:
        subprocess.run(argv, check=True, capture_output=True, timeout=60)

    run("umoci", "init", "--layout", f"{tmp_path}/made")
    run("umoci", "new", "--image", layout)
    run("umoci", "unpack", "--rootless", "--image", layout, str(root))
    (root / "rootfs/etc").mkdir()
    (root / "rootfs/etc/hosts").write_bytes(b"lower")
    (root / "rootfs/old").write_bytes(b"old")
    run("umoci", "repack", "--image", layout, str(root))
    (root / "rootfs/old").unlink()
    (root / "rootfs/etc/hosts").write_bytes(b"upper")
    run("umoci", "repack", "--image", layout, str(root))
    run("umoci", "config", "--image", layout, "--config.cmd", "/bin/x", "--config.env", "K=v")
    run("skopeo", "--insecure-policy", "copy", f"oci:{layout}", f"docker-archive:{tmp_path}/docker.tar:demo:v1")
    run("skopeo", "--insecure-policy", "copy", f"oci:{layout}", f"oci-archive:{tmp_path}/oci.tar:v1")
    expected = {"/etc", "/etc/hosts"}
    for path in (tmp_path / "made", tmp_path / "oci.tar"):
        tree, config = layout_result(path, "v1")
        assert (names(tree), config.cmd, config.env["K"]) == (expected, ("/bin/x",), "v")
    found, config = docker_result(tmp_path / "docker.tar", "demo:v1")
    assert (found, config.cmd) == (expected, ("/bin/x",))
