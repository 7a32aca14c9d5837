"""Names of images are checked once, at the boundary."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from coppice.errors import InvalidName
from coppice.images.reference import check_name, digest_hex, is_hex_prefix

HEX = "0123456789abcdef" * 4


@pytest.mark.parametrize("name", ["a", "python:3.11", "example/debian:Bookworm_1", "a.b-c_d/e", "x" * 255, "cafe01"])
def test_ordinary_names_are_taken(name: str) -> None:
    """What people call images is accepted unchanged."""
    assert check_name(name) == name


@pytest.mark.parametrize(
    "name",
    [
        "",
        "A",
        "a b",
        "../x",
        "a/../b",
        "a..b",
        "a//b",
        "/a",
        "a/",
        "-a",
        "a:",
        "a:b:c",
        "a:-t",
        "x" * 256,
        "a\n",
        "é",
        HEX,
        f"sha256:{HEX}",
        "sha256:abcdef",
    ],
)
def test_other_names_are_refused(name: str) -> None:
    """What could become a path, or reads as a digest, is refused."""
    with pytest.raises(InvalidName) as caught:
        check_name(name)
    assert caught.value.hint


@given(st.text())
def test_an_accepted_name_is_harmless(name: str) -> None:
    """No accepted name has a parent directory, an absolute path, white space or a control character in it."""
    try:
        check_name(name)
    except InvalidName:
        return
    assert not name.startswith("/")
    assert ".." not in name.split("/")
    assert name.isascii()
    assert name.isprintable()
    assert " " not in name


def test_digests_are_told_from_names() -> None:
    """A whole digest gives its hex, a cut one is refused rather than taken for a name."""
    assert digest_hex(f"sha256:{HEX}") == HEX
    assert digest_hex("python:3.11") is None
    with pytest.raises(InvalidName):
        digest_hex("sha256:abc")
    assert is_hex_prefix("abcdef")
    assert not is_hex_prefix("abcde")
