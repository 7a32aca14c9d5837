"""Names of images are checked once, at the boundary."""

from __future__ import annotations

import re

import pytest
from hypothesis import given
from hypothesis import strategies as st

from coppice.errors import InvalidName
from coppice.images.reference import check_name, digest_hex, full_name, is_hex_prefix, parse_reference

HEX = "0123456789abcdef" * 4


@pytest.mark.parametrize("name", ["a", "python:3.11", "example/debian:Bookworm_1", "a.b-c_d/e", "x" * 255, "cafe01"])
def test_ordinary_names_are_accepted(name: str) -> None:
    """Usual names of images are accepted unchanged."""
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
    """A name that could become a path, or looks like a digest, is refused."""
    with pytest.raises(InvalidName) as caught:
        check_name(name)
    assert caught.value.hint


@given(st.text())
def test_an_accepted_name_is_harmless(name: str) -> None:
    """An accepted name has no parent directory, absolute path, white space or control character."""
    try:
        check_name(name)
    except InvalidName:
        return
    assert not name.startswith("/")
    assert ".." not in name.split("/")
    assert name.isascii()
    assert name.isprintable()
    assert " " not in name


def test_digests_are_distinguished_from_names() -> None:
    """A whole digest gives its hex; a truncated one is refused, and does not become a name."""
    assert digest_hex(f"sha256:{HEX}") == HEX
    assert digest_hex("python:3.11") is None
    with pytest.raises(InvalidName):
        digest_hex("sha256:abc")
    assert is_hex_prefix("abcdef")
    assert not is_hex_prefix("abcde")


@pytest.mark.parametrize(
    ("typed", "full"),
    [
        ("alpine", "docker.io/library/alpine:latest"),
        ("alpine:3.20", "docker.io/library/alpine:3.20"),
        ("team/web", "docker.io/team/web:latest"),
        ("docker.io/alpine", "docker.io/library/alpine:latest"),
        ("index.docker.io/library/alpine:latest", "docker.io/library/alpine:latest"),
        ("localhost/web", "localhost/web:latest"),
        ("localhost:5000/a/b/c:1", "localhost:5000/a/b/c:1"),
        ("ghcr.io/org/app@sha256:" + "a" * 64, "ghcr.io/org/app@sha256:" + "a" * 64),
        ("ghcr.io/org/app:1@sha256:" + "a" * 64, "ghcr.io/org/app@sha256:" + "a" * 64),
    ],
)
def test_references_have_docker_s_full_form(typed: str, full: str) -> None:
    """Each is also a name that an image can have, and its full form stands for itself."""
    assert str(parse_reference(typed)) == full
    assert full_name(full) == full
    assert check_name(typed) == typed


@given(st.text(max_size=300))
def test_no_reference_becomes_an_option_or_another_transport(typed: str) -> None:
    """A reference is an argument of skopeo."""
    try:
        reference = str(parse_reference(typed))
    except InvalidName:
        return
    assert re.fullmatch(r"[a-z0-9][a-z0-9.-]*(:[0-9]+)?/[a-z0-9][^\s]*", reference)


def test_only_a_loopback_address_is_loopback() -> None:
    """Their connections need no TLS."""
    for name in ("localhost/a", "localhost:5000/a", "127.0.0.1:5000/a", "127.9.9.9/a"):
        assert parse_reference(name).is_loopback
    for name in ("localhost.example.org/a", "127.0.0.1.example.org/a", "10.0.0.1:5000/a", "alpine"):
        assert not parse_reference(name).is_loopback


def test_an_ipv6_address_is_no_registry() -> None:
    """skopeo takes none, and the hint says what to do."""
    with pytest.raises(InvalidName) as caught:
        parse_reference("[::1]:5000/app:1")
    assert "/etc/hosts" in (caught.value.hint or "")
