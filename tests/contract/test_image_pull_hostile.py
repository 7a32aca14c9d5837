"""Images pulled from a registry that sends what it should not."""

from __future__ import annotations

import hashlib
import json
from pathlib import Path

import pytest

from coppice.errors import DigestMismatch, HostCannot, ImageError, NotFound
from coppice.images.workspace import Limits
from coppice.model import MIB
from image_archives import ARCHITECTURE, INDEX_TYPE, file, open_catalog, tar
from pulls import Hostile, diff_id, layers, pull

OTHER = "arm64" if ARCHITECTURE == "amd64" else "amd64"

pytestmark = pytest.mark.usefixtures("no_saved_logins")


async def test_content_that_does_not_match_is_refused(tmp_path: Path, hostile: Hostile) -> None:
    """Another blob, another manifest, a longer blob than announced: no image, and nothing cached
    under a false digest.
    """
    (good,) = layers(5000)
    hostile.image(hostile.blob(good, b"x" * len(good)), diff_id(good))
    with pytest.raises(DigestMismatch, match=hostile.server.address):
        await pull(tmp_path, hostile.name)
    hostile.image(hostile.blob(good, size=len(good) - 1000), diff_id(good))
    with pytest.raises(ImageError):
        await pull(tmp_path, hostile.name)
    hostile.image(hostile.blob(good), diff_id(b"other"))
    with pytest.raises(DigestMismatch):
        await pull(tmp_path, hostile.name)
    claimed = "sha256:" + "a" * 64
    hostile.server.answers[f"/v2/h/x/manifests/{claimed}"] = hostile.server.answers["/v2/h/x/manifests/1"]
    with pytest.raises(DigestMismatch):
        await pull(tmp_path, f"{hostile.server.address}/h/x@{claimed}")
    assert open_catalog(tmp_path).list() == []
    for path in (tmp_path / "blobs/_/blobs/sha256").iterdir():
        assert hashlib.sha256(path.read_bytes()).hexdigest() == path.name
    hostile.image(hostile.blob(good), diff_id(good))
    await pull(tmp_path, hostile.name)
    open_catalog(tmp_path).remove(hostile.name)
    del hostile.server.answers[f"/v2/h/x/blobs/{diff_id(good)}"]  # also a layer without compression is cached
    await pull(tmp_path, hostile.name)


async def test_limits_hold_before_anything_is_downloaded(tmp_path: Path, hostile: Hostile) -> None:
    """A huge manifest, too large or too many layers, layers that are no archives."""
    (good,) = layers(5000)
    hostile.manifest(b'{"schemaVersion": 2, "x": "' + b"x" * (8 * MIB) + b'"}')
    with pytest.raises(ImageError, match="is larger than"):
        await pull(tmp_path, hostile.name)
    hostile.image(hostile.blob(good, size=1 << 40), diff_id(good))
    with pytest.raises(ImageError, match=r"layers have .* bytes"):
        await pull(tmp_path, hostile.name)
    hostile.image(hostile.blob(good), diff_id(good))
    with pytest.raises(ImageError, match=r"layers have .* bytes"):
        await pull(tmp_path, hostile.name, limits=Limits(max_bytes=1000))
    for data in (b"[]", b"{", b'{"schemaVersion": 1}', b'{"schemaVersion": 2}', b"\xff"):
        hostile.manifest(data)
        with pytest.raises(ImageError):
            await pull(tmp_path, hostile.name)
    assert not hostile.server.begun


async def test_a_blob_that_does_not_end_is_cut_off(
    tmp_path: Path, hostile: Hostile, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The registry sends more than the manifest says: a file limit stops it."""
    monkeypatch.setattr("coppice.images.registry._LEAST_FILE_LIMIT", MIB)
    (good,) = layers(5000)
    hostile.image(hostile.blob(good, b"x" * (32 * MIB)), diff_id(good))
    with pytest.raises(ImageError):
        await pull(tmp_path, hostile.name)
    assert list((tmp_path / "images").iterdir()) == []


async def test_a_layer_bomb_meets_the_limits_of_images(tmp_path: Path, hostile: Hostile) -> None:
    """A small layer that unpacks to much is refused, as in an import."""
    import gzip

    bomb = tar(file("etc/zeros", bytes(64 * MIB)))
    hostile.image(hostile.blob(gzip.compress(bomb)), diff_id(bomb))
    with pytest.raises(ImageError, match="unpacks to more"):
        await pull(tmp_path, hostile.name, limits=Limits(max_bytes=16 * MIB))


async def test_an_index_that_nests_itself_ends(tmp_path: Path, hostile: Hostile) -> None:
    """Each level is one more request."""
    deeper = hostile.manifest(b'{"schemaVersion": 2}')
    for _ in range(8):
        entry = {
            "mediaType": INDEX_TYPE,
            "digest": deeper,
            "size": 1,
            "platform": {"os": "linux", "architecture": ARCHITECTURE},
        }
        index = {"schemaVersion": 2, "mediaType": INDEX_TYPE, "manifests": [entry]}
        deeper = hostile.manifest(json.dumps(index).encode(), INDEX_TYPE)
    with pytest.raises(ImageError, match="too deeply"):
        await pull(tmp_path, hostile.name)


async def test_owners_do_not_share_layers(tmp_path: Path, hostile: Hostile) -> None:
    """An owner cannot get the layer of another owner by listing its digest."""
    (private,) = layers(5000)
    hostile.image(hostile.blob(private), diff_id(private))
    await pull(tmp_path, hostile.name, owner="robin")
    digest = f"sha256:{hashlib.sha256(private).hexdigest()}"
    del hostile.server.answers[f"/v2/h/x/blobs/{digest}"]
    with pytest.raises((NotFound, ImageError, HostCannot)):
        await pull(tmp_path, hostile.name, owner="mallory", name="theirs")
