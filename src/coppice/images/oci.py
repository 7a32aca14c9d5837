"""OCI image layouts and `docker save` archives: from an index to the verified layers and config of
one image.

Follows the OCI image specification 1.1 (image-layout.md, image-index.md, manifest.md, config.md)
and Docker's image specification v1.2.
"""

from __future__ import annotations

import hashlib
import platform
import posixpath
import re
from collections.abc import Iterator, Sequence
from typing import TypeVar

import msgspec

from coppice.errors import DigestMismatch, ImageError
from coppice.images.archive import Archive
from coppice.images.blobs import (
    ArchiveBundle,
    Bundle,
    Descriptor,
    Platform,
    blob_name,
    read_blob,
    read_document,
    unpack_layer,
)
from coppice.images.layer import apply_archive
from coppice.images.tree import FileTree
from coppice.images.workspace import Limits, Workspace
from coppice.model import ImageConfig

_CURE = "fetch or make the archive again"
MAX_INDEX_DEPTH = 4
_REFERENCE = "org.opencontainers.image.ref.name"
_IMAGE_NAMES = (_REFERENCE, "io.containerd.image.name")
INDEX_TYPES = ("application/vnd.oci.image.index.v1+json", "application/vnd.docker.distribution.manifest.list.v2+json")
_MANIFEST_TYPES = (
    "application/vnd.oci.image.manifest.v1+json",
    "application/vnd.docker.distribution.manifest.v2+json",
    "",
)
_ARCHITECTURES = {"x86_64": "amd64", "aarch64": "arm64", "riscv64": "riscv64", "ppc64le": "ppc64le", "s390x": "s390x"}

T = TypeVar("T")


class Index(msgspec.Struct, frozen=True):
    """index.json, and each nested index."""

    manifests: tuple[Descriptor, ...]


class Manifest(msgspec.Struct, frozen=True):
    """One image: its config and its layers, the lowest first."""

    config: Descriptor
    layers: tuple[Descriptor, ...]


class RootFs(msgspec.Struct, frozen=True):
    """Digests of the uncompressed layers."""

    diff_ids: tuple[str, ...] = ()


class ProcessConfig(msgspec.Struct, frozen=True, rename="pascal"):
    """The `config` of an image config. Every field may be missing or null."""

    entrypoint: tuple[str, ...] | None = None
    cmd: tuple[str, ...] | None = None
    env: tuple[str, ...] | None = None
    working_dir: str | None = None
    user: str | None = None
    labels: dict[str, str] | None = None


class Config(msgspec.Struct, frozen=True):
    """The image config."""

    rootfs: RootFs
    architecture: str = ""
    os: str = ""
    config: ProcessConfig | None = None


class SavedImage(msgspec.Struct, frozen=True, rename="pascal"):
    """One entry of a Docker archive's manifest.json."""

    config: str
    layers: tuple[str, ...]
    repo_tags: tuple[str, ...] | None = None


def unpack_layout(bundle: Bundle, tree: FileTree, workspace: Workspace, reference: str | None) -> ImageConfig:
    """Apply the layers of an OCI layout's image for this machine to `tree`, and return its config.

    `reference` chooses among several images by their names in the layout. Raises ImageError if the
    layout is malformed, or has no such image for this architecture; DigestMismatch if a blob does
    not match its digest.
    """
    index = _decode(read_document(bundle, "index.json", workspace), _INDEX, "index.json")
    descriptor = _choose(bundle, _named(index.manifests, reference), workspace)
    manifest = decode_manifest(read_blob(bundle, descriptor, workspace))
    check_layers(manifest, workspace.limits)
    return unpack_manifest(bundle, manifest, tree, workspace)


def unpack_manifest(bundle: Bundle, manifest: Manifest, tree: FileTree, workspace: Workspace) -> ImageConfig:
    """Apply the layers of a manifest to `tree`, and return the image's config.

    Raises what `unpack_layout` raises.
    """
    config = _decode(read_blob(bundle, manifest.config, workspace), _CONFIG, "the image config")
    _check_platform(config)
    names = [(blob_name(layer), layer) for layer in manifest.layers]
    _apply_layers(bundle, names, config, tree, workspace)
    return image_config(config.config)


def decode_manifest(data: bytes) -> Manifest:
    """Read a manifest. Raises ImageError."""
    return _decode(data, _MANIFEST, "the manifest")


def decode_index(data: bytes) -> Index:
    """Read an index. Raises ImageError."""
    return _decode(data, _INDEX, "the index")


def check_layers(manifest: Manifest, limits: Limits) -> None:
    """Raise ImageError if a layer is not a tar archive, or the layers are too many or too large."""
    for layer in manifest.layers:
        if layer.media_type and ".tar" not in layer.media_type:
            raise ImageError(
                f"a layer is {layer.media_type!r}, not a tar archive",
                hint="give a container image",
            )
    if not 0 < len(manifest.layers) <= limits.max_layers:
        raise ImageError(
            f"the image has {len(manifest.layers)} layers", hint=f"between 1 and {limits.max_layers} can be applied"
        )
    if (total := sum(layer.size for layer in manifest.layers)) > limits.max_bytes:
        raise ImageError(
            f"the image's layers have {total} bytes (at most {limits.max_bytes} are allowed)",
            hint="make it smaller; if it should be small, do not trust it",
        )


def unpack_docker_archive(bundle: ArchiveBundle, tree: FileTree, workspace: Workspace, tag: str | None) -> ImageConfig:
    """Apply the layers of an image in a `docker save` archive of any version to `tree`, and return
    its config.

    `tag` chooses among several images. Raises what `unpack_layout` raises.
    """
    if not bundle.has("manifest.json"):
        raise ImageError("the archive has no manifest.json", hint="make it with docker save, Docker 1.10 or later")
    images = _decode(read_document(bundle, "manifest.json", workspace), _SAVED_IMAGES, "manifest.json")
    saved = _choose_saved(images, tag)
    raw_config = read_document(bundle, saved.config, workspace)
    named = re.fullmatch(r"(?:.*/)?([0-9a-f]{64})(?:\.json)?", saved.config)
    if named and hashlib.sha256(raw_config).hexdigest() != named[1]:
        raise DigestMismatch("the image config does not hash to the digest that names it", hint=_CURE)
    config = _decode(raw_config, _CONFIG, "the image config")
    _check_platform(config)
    _apply_layers(bundle, [(name, None) for name in saved.layers], config, tree, workspace)
    return image_config(config.config)


def image_config(process: ProcessConfig | None) -> ImageConfig:
    """Return the reduced config that an image keeps.

    Raises ImageError for an invalid environment.
    """
    process = process or ProcessConfig()
    env: dict[str, str] = {}
    for line in process.env or ():
        key, equals, value = line.partition("=")
        if key and equals:  # without a value it means the builder's value, which is unknown here
            env[key] = value
    strings = (*(process.entrypoint or ()), *(process.cmd or ()), *env, *env.values(), process.user or "")
    if any("\0" in text for text in (*strings, process.working_dir or "")):
        raise ImageError("the image config has a zero byte in a string", hint="do not trust this image")
    return ImageConfig(
        entrypoint=process.entrypoint or (),
        cmd=process.cmd or (),
        env=env,
        workdir=posixpath.normpath("/" + (process.working_dir or "").lstrip("/")),
        user=process.user or "",
        labels=process.labels or {},
    )


def _named(manifests: tuple[Descriptor, ...], reference: str | None) -> list[Descriptor]:
    """Return the descriptors named `reference`, or all of them."""
    if reference is None:
        return list(manifests)
    found = [
        descriptor
        for descriptor in manifests
        if reference == descriptor.digest
        or reference in (descriptor.annotations or {}).get(_REFERENCE, "").split()
        or reference in [(descriptor.annotations or {}).get(name) for name in _IMAGE_NAMES]
    ]
    if not found:
        raise ImageError(
            f"the layout has no image called {reference!r}",
            hint=f"choose another with --tag, one of: {_names_of(manifests)}",
        )
    return found


def _choose(bundle: Bundle, descriptors: list[Descriptor], workspace: Workspace) -> Descriptor:
    """Return the one image manifest for this machine among `descriptors` and their nested
    indexes.
    """
    found = {descriptor.digest: descriptor for descriptor in _manifests(bundle, descriptors, workspace, 0)}
    if len(found) == 1:
        return next(iter(found.values()))
    if not found:
        raise ImageError(
            f"the layout has no image for linux/{host_architecture()}", hint="get the image for this architecture"
        )
    raise ImageError(
        f"the layout has {len(found)} images for this machine",
        hint=f"choose one with --tag: {_names_of(descriptors)}",
    )


def _manifests(bundle: Bundle, descriptors: list[Descriptor], workspace: Workspace, depth: int) -> Iterator[Descriptor]:
    if depth > MAX_INDEX_DEPTH:
        raise ImageError("the layout nests its indexes too deeply", hint="do not trust this layout")
    for descriptor in descriptors:
        workspace.spend_member(0)
        if descriptor.media_type in INDEX_TYPES:
            nested = _decode(read_blob(bundle, descriptor, workspace), _INDEX, "a nested index")
            yield from _manifests(bundle, list(nested.manifests), workspace, depth + 1)
        elif descriptor.media_type in _MANIFEST_TYPES and _is_for_host(descriptor.platform):
            yield descriptor


def _choose_saved(images: tuple[SavedImage, ...], tag: str | None) -> SavedImage:
    tags = ", ".join(tag for image in images for tag in image.repo_tags or ()) or "none"
    if tag is None:
        if len(images) == 1:
            return images[0]
        raise ImageError(f"the archive has {len(images)} images", hint=f"choose one with --tag: {tags}")
    for image in images:
        if _familiar(tag) in map(_familiar, image.repo_tags or ()):
            return image
    raise ImageError(
        f"the archive has no image with the tag {tag!r}", hint=f"choose another with --tag, one of: {tags}"
    )


def _familiar(tag: str) -> str:
    """Return a tag without the parts that Docker adds: `docker.io/library/demo:latest` is
    `demo`.
    """
    return tag.removeprefix("docker.io/").removeprefix("library/").removesuffix(":latest")


def _apply_layers(
    bundle: Bundle,
    layers: Sequence[tuple[str, Descriptor | None]],
    config: Config,
    tree: FileTree,
    workspace: Workspace,
) -> None:
    diff_ids = config.rootfs.diff_ids
    if len(layers) != len(diff_ids):
        raise ImageError(f"the image has {len(layers)} layers, but its config lists {len(diff_ids)}", hint=_CURE)
    if not 0 < len(layers) <= workspace.limits.max_layers:
        raise ImageError(
            f"the image has {len(layers)} layers", hint=f"between 1 and {workspace.limits.max_layers} can be applied"
        )
    for (name, descriptor), diff_id in zip(layers, diff_ids, strict=True):
        with bundle.open(name) as blob:
            plain = unpack_layer(blob, descriptor, diff_id, workspace)
        apply_archive(tree, Archive(plain, workspace, must_end=False), whiteouts=True)


# Made at import, in one thread: imports run in threads, and two threads that first decode a type at
# once can crash msgspec.
_INDEX = msgspec.json.Decoder(Index)
_MANIFEST = msgspec.json.Decoder(Manifest)
_CONFIG = msgspec.json.Decoder(Config)
_SAVED_IMAGES = msgspec.json.Decoder(tuple[SavedImage, ...])


def _decode(data: bytes, decoder: msgspec.json.Decoder[T], what: str) -> T:
    try:
        return decoder.decode(data)
    except (msgspec.MsgspecError, UnicodeDecodeError, RecursionError) as error:
        raise ImageError(f"{what} is invalid: {error}", hint=_CURE) from error


def host_architecture() -> str:
    machine = platform.machine()
    return _ARCHITECTURES.get(machine, machine)


def _is_for_host(wanted: Platform | None) -> bool:
    return wanted is None or (wanted.architecture == host_architecture() and wanted.os == "linux")


def _check_platform(config: Config) -> None:
    architecture = config.architecture or host_architecture()
    if architecture != host_architecture() or (config.os or "linux") != "linux":
        raise ImageError(
            f"the image is for {config.os or 'linux'}/{architecture}, this machine is linux/{host_architecture()}",
            hint="get the image for this machine",
        )


def _names_of(descriptors: list[Descriptor] | tuple[Descriptor, ...]) -> str:
    names = [name for d in descriptors for key in _IMAGE_NAMES if (name := (d.annotations or {}).get(key))]
    return ", ".join(dict.fromkeys(names)) or "the images have no names: use a digest"
