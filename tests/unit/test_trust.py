"""Certificates and proxies from outside: what is accepted, and what becomes of it."""

from __future__ import annotations

from pathlib import Path

import pytest

from company import make_authority
from coppice.errors import UsageError
from coppice.requests import ImageBuildRequest, RunRequest
from coppice.trust import (
    BUNDLE,
    certificate_environment,
    certificates_in,
    check_guest_proxy,
    check_proxy,
    proxy_environment,
)


@pytest.fixture(scope="module")
def authority(tmp_path_factory: pytest.TempPathFactory) -> tuple[str, str]:
    """A certificate and its private key, as PEM."""
    directory: Path = tmp_path_factory.mktemp("authority")
    certificate = make_authority(directory).read_text()
    return certificate, (directory / "ca.key").read_text()


def test_only_certificates_are_taken(authority: tuple[str, str]) -> None:
    """Each once, without the text around it. A private key in the file never reaches a guest."""
    certificate, key = authority
    (found,) = certificates_in([f"# our company\r\n{key}{certificate}\nmore text\n{certificate}", certificate])
    assert found.split() == certificate.split()
    assert "PRIVATE" not in found
    assert certificates_in([]) == ()
    assert certificate_environment([found])["PIP_CERT"] == BUNDLE
    assert certificate_environment([]) == {}


def test_files_that_are_no_certificates_are_refused(authority: tuple[str, str]) -> None:
    """An empty file, a key alone, a binary certificate, a damaged one."""
    certificate, key = authority
    lines = certificate.splitlines()
    damaged = "\n".join([*lines[:2], lines[3], lines[2], *lines[4:]])
    for text in ("", key, "0\x82\x01", damaged):
        with pytest.raises(UsageError) as refused:
            RunRequest(image="debian", certificates=[text])
        assert refused.value.hint
        with pytest.raises(UsageError):
            ImageBuildRequest(name="debian", certificates=[text])


@pytest.mark.parametrize("url", ["", "proxy:3128", "socks5://proxy:1080", "http://", "http://a:99999", "http://a b"])
def test_a_proxy_is_an_http_url(url: str) -> None:
    """The hint has an example, and the message does not repeat a password."""
    with pytest.raises(UsageError, match="URL of an HTTP proxy") as refused:
        check_proxy(url)
    assert "http://" in (refused.value.hint or "")


@pytest.mark.parametrize("host", ["localhost", "127.0.0.1", "[::1]"])
def test_a_guest_cannot_use_its_own_loopback(host: str) -> None:
    """It would find nobody there; a build on this host does."""
    check_proxy(f"http://{host}:3128")
    with pytest.raises(UsageError) as refused:
        check_guest_proxy(f"http://{host}:3128")
    assert "10.0.2.2" in (refused.value.hint or "")


def test_programs_get_the_proxy_in_both_spellings() -> None:
    """curl reads http_proxy, others HTTP_PROXY; the guest's own servers are not behind it."""
    found = proxy_environment("http://p:1")
    assert {found[name] for name in ("http_proxy", "HTTP_PROXY", "https_proxy", "HTTPS_PROXY")} == {"http://p:1"}
    assert found["no_proxy"] == found["NO_PROXY"] == "localhost,127.0.0.1,::1"
    assert proxy_environment(None) == {}
    assert "secret" not in repr(RunRequest(image="debian", proxy="http://me:secret@p:1"))
