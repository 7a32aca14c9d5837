"""Images to pull: pushed to a registry, or offered by a hostile one."""

from __future__ import annotations

import hashlib
import json
import os
from pathlib import Path

from coppice.images.cache import LayerCache
from coppice.images.catalog import BuildOptions, ImageCatalog
from coppice.images.registry import Access
from coppice.images.workspace import Limits
from coppice.model import Image, ProgressSink, no_progress
from image_archives import ARCHITECTURE, MANIFEST_TYPE, Layout, file, open_catalog, tar
from registries import Answer, Front, push


def layers(*sizes: int) -> list[bytes]:
    """Return layers that no compression makes smaller, each with one file."""
    return [tar(file(f"etc/file{number}", os.urandom(size))) for number, size in enumerate(sizes)]


def fill(tmp_path: Path, target: str, *parts: bytes, login: str | None = None) -> str:
    """Push an image to a registry; return the digest of its manifest."""
    layout = Layout(tmp_path / f"layout-{os.urandom(4).hex()}")
    manifest = layout.image(*parts, process={"Cmd": ["/bin/app"]})
    push(layout.index(manifest), target, login=login)
    return str(manifest["digest"])


async def pull(
    home: Path,
    reference: str,
    *,
    access: Access | None = None,
    limits: Limits | None = None,
    name: str | None = None,
    catalog: ImageCatalog | None = None,
    progress: ProgressSink = no_progress,
    owner: str | None = None,
) -> Image:
    """Pull into the images of a data directory."""
    return await (catalog or open_catalog(home)).pull(
        reference,
        access=access or Access(),
        name=name,
        cache=LayerCache(home / "blobs", owner),
        options=BuildOptions(limits=limits or Limits(), owner=owner),
        progress=progress,
    )


class Hostile:
    """A registry whose one image `h/x:1` can be wrong in any part."""

    def __init__(self, server: Front) -> None:
        self.server = server
        self.name = f"{server.address}/h/x:1"

    def blob(self, data: bytes, sent: bytes | None = None, *, size: int | None = None) -> dict[str, object]:
        """Offer a blob, and return its descriptor. `sent` is what the registry sends."""
        digest = f"sha256:{hashlib.sha256(data).hexdigest()}"
        self.server.answers[f"/v2/h/x/blobs/{digest}"] = Answer(data if sent is None else sent)
        return {"digest": digest, "size": len(data) if size is None else size}

    def image(self, layer: dict[str, object], diff_id: str) -> None:
        """Offer the image."""
        config = {"architecture": ARCHITECTURE, "os": "linux", "rootfs": {"type": "layers", "diff_ids": [diff_id]}}
        kind = "application/vnd.oci.image"
        manifest = {
            "schemaVersion": 2,
            "mediaType": MANIFEST_TYPE,
            "config": {"mediaType": f"{kind}.config.v1+json", **self.blob(json.dumps(config).encode())},
            "layers": [{"mediaType": f"{kind}.layer.v1.tar", **layer}],
        }
        self.manifest(json.dumps(manifest).encode())

    def manifest(self, data: bytes, kind: str = MANIFEST_TYPE) -> str:
        """Offer a manifest under the tag and its digest, which is returned."""
        digest = f"sha256:{hashlib.sha256(data).hexdigest()}"
        for reference in ("1", digest):
            self.server.answers[f"/v2/h/x/manifests/{reference}"] = Answer(data, kind)
        return digest


def diff_id(layer: bytes) -> str:
    """Return the digest of a layer's plain bytes."""
    return f"sha256:{hashlib.sha256(layer).hexdigest()}"
