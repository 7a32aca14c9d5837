"""Names and digests of images: the one place where they are checked before they become paths."""

from __future__ import annotations

import re

from coppice.errors import InvalidName

MAX_NAME = 255
MIN_PREFIX = 6

_NAME = re.compile(r"[a-z0-9](?:[a-z0-9._/-]*[a-z0-9])?(?::[A-Za-z0-9_][A-Za-z0-9._-]{0,127})?")
_HEX = re.compile(r"[0-9a-f]{64}")
_PREFIX = re.compile(rf"[0-9a-f]{{{MIN_PREFIX},64}}")


def check_name(name: str) -> str:
    """`name` itself, if it can name an image: `repository[:tag]` as OCI spells it, at most 255 characters.

    Raises InvalidName. What reads as a digest is refused, so that a reference never means two things.
    """
    if len(name) > MAX_NAME:
        raise InvalidName(f"an image name of {len(name)} characters is too long", hint=f"use at most {MAX_NAME}")
    if not _NAME.fullmatch(name) or ".." in name or "//" in name:
        raise InvalidName(
            f"{name!r} cannot name an image",
            hint="use lower-case letters, digits and . _ - / with an optional :tag, as in debian/python:3.11",
        )
    if name.startswith("sha256:") or _HEX.fullmatch(name):
        raise InvalidName(f"{name!r} reads as a digest, not as a name", hint="choose a name that is not a digest")
    return name


def digest_hex(reference: str) -> str | None:
    """The 64 hex digits of `sha256:<hex>`, or None where `reference` is something else. Raises InvalidName if cut."""
    algorithm, colon, digits = reference.partition(":")
    if algorithm != "sha256" or not colon:
        return None
    if not _HEX.fullmatch(digits):
        raise InvalidName(f"{reference!r} is not a whole digest", hint="give all 64 hex digits, or a prefix alone")
    return digits


def is_hex_digest(text: str) -> bool:
    """Whether `text` is exactly the hex of a SHA-256, as image directories are called."""
    return _HEX.fullmatch(text) is not None


def is_hex_prefix(text: str) -> bool:
    """Whether `text` is long enough, and hex enough, to be looked up as the beginning of a digest."""
    return _PREFIX.fullmatch(text) is not None
