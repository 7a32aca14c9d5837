"""Validate names and digests of images before they become paths, and read references to images in
registries.
"""

from __future__ import annotations

import re
from typing import NamedTuple

from coppice.errors import InvalidName

MAX_NAME = 255
MIN_PREFIX = 6

_HOST = r"[a-z0-9](?:[a-z0-9.-]*[a-z0-9])?"
_TAG = r"[A-Za-z0-9_][A-Za-z0-9._-]{0,127}"
_DIGEST = r"sha256:[0-9a-f]{64}"
_NAME = re.compile(rf"(?:{_HOST}:[0-9]{{1,5}}/)?[a-z0-9](?:[a-z0-9._/-]*[a-z0-9])?(?::{_TAG})?(?:@{_DIGEST})?")
_PART = r"[a-z0-9]+(?:(?:\.|_{1,2}|-+)[a-z0-9]+)*"
_REFERENCE = re.compile(rf"({_HOST}(?::[0-9]{{1,5}})?)/({_PART}(?:/{_PART})*)(?::({_TAG}))?(?:@({_DIGEST}))?")
_LOOPBACK = re.compile(r"(?:localhost|127(?:\.[0-9]{1,3}){3})(?::[0-9]+)?")
_DOCKER_HUB = "docker.io"
_HEX = re.compile(r"[0-9a-f]{64}")
_PREFIX = re.compile(rf"[0-9a-f]{{{MIN_PREFIX},64}}")


def check_name(name: str) -> str:
    """Return `name` if it can name an image: `repository[:tag]` in OCI's spelling, at most 255
    characters.

    Raises InvalidName. A name that looks like a digest is refused, so that references are
    unambiguous.
    """
    if len(name) > MAX_NAME:
        raise InvalidName(f"an image name of {len(name)} characters is too long", hint=f"use at most {MAX_NAME}")
    if not _NAME.fullmatch(name) or ".." in name or "//" in name:
        raise InvalidName(
            f"{name!r} cannot name an image",
            hint="use lower-case letters, digits and . _ - / with an optional :tag, as in debian/python:3.11",
        )
    if name.startswith("sha256:") or _HEX.fullmatch(name):
        raise InvalidName(f"{name!r} looks like a digest, not a name", hint="choose a name that is not a digest")
    return name


def digest_hex(reference: str) -> str | None:
    """Return the 64 hex digits of `sha256:<hex>`, or None for any other text.

    Raises InvalidName if digits are missing.
    """
    algorithm, colon, digits = reference.partition(":")
    if algorithm != "sha256" or not colon:
        return None
    if not _HEX.fullmatch(digits):
        raise InvalidName(f"{reference!r} is not a whole digest", hint="give all 64 hex digits, or a prefix alone")
    return digits


def is_hex_digest(text: str) -> bool:
    """Return whether `text` is exactly the hex of a SHA-256, the form of image directories."""
    return _HEX.fullmatch(text) is not None


def is_hex_prefix(text: str) -> bool:
    """Return whether `text` is hex of sufficient length to be looked up as the beginning of a
    digest.
    """
    return _PREFIX.fullmatch(text) is not None


class Reference(NamedTuple):
    """An image in a registry, in its full form: `docker.io/library/alpine:latest`."""

    registry: str
    repository: str
    tag: str
    digest: str | None

    @property
    def repository_name(self) -> str:
        """Registry and repository."""
        return f"{self.registry}/{self.repository}"

    @property
    def version(self) -> str:
        """The end of the reference that selects the manifest: `@sha256:...`, or `:tag`."""
        return f"@{self.digest}" if self.digest else f":{self.tag}"

    @property
    def is_loopback(self) -> bool:
        """Whether the registry is on this machine, by its address."""
        return _LOOPBACK.fullmatch(self.registry) is not None

    def __str__(self) -> str:
        return f"{self.repository_name}{self.version}"


def names_registry(name: str) -> bool:
    """Return whether a name begins with a registry, by docker's rule: the part before the first
    slash has a dot or a colon, or is `localhost`.
    """
    first, slash, _ = name.partition("/")
    return bool(slash) and ("." in first or ":" in first or first == "localhost")


def parse_reference(text: str) -> Reference:
    """Read a reference as docker does: `alpine` is `docker.io/library/alpine:latest`.

    Raises InvalidName.
    """
    whole = text if names_registry(text) else f"{_DOCKER_HUB}/{text}"
    registry, _, rest = whole.partition("/")
    if registry == f"index.{_DOCKER_HUB}":
        registry = _DOCKER_HUB
    if registry == _DOCKER_HUB and "/" not in rest:
        rest = f"library/{rest}"
    found = _REFERENCE.fullmatch(f"{registry}/{rest}")
    if found is None or len(text) > MAX_NAME or _HEX.fullmatch(text):
        raise InvalidName(f"{text[:MAX_NAME]!r} does not name an image in a registry", hint=_hint(text))
    return Reference(found[1], found[2], found[3] or "latest", found[4])


def _hint(text: str) -> str:
    if text.startswith("["):
        return "skopeo takes no IPv6 address; give the registry a name, such as one in /etc/hosts"
    return "write [REGISTRY/]NAME[:TAG], as in alpine:3.20 or localhost:5000/team/web@sha256:..."


def full_name(name: str) -> str:
    """Return the full form of an image's name, by which two spellings of one name are compared."""
    try:
        return str(parse_reference(name))
    except InvalidName:
        return name
