"""Certificates and proxies of images and machines: recorded with them, and inherited by forks."""

from __future__ import annotations

from pathlib import Path

from company import make_authority
from coppice.client import AsyncHost
from coppice.requests import ForkRequest, ImageImportRequest, RunRequest, StandbyRequest
from coppice.trust import BUNDLE, certificates_in
from fakes.hosting import ask, boot
from fakes.records import MEMORY_BYTES, OVERLAY_BYTES
from image_archives import file, tar


async def test_an_image_and_a_machine_have_certificates(fake_host: AsyncHost, tmp_path: Path) -> None:
    """The machine trusts those of its image and its own; both survive in its forks."""
    texts = []
    for name in ("a", "b"):
        (tmp_path / name).mkdir()
        texts.append(make_authority(tmp_path / name).read_text())
    (tmp_path / "root.tar").write_bytes(tar(file("etc/os-release", b"NAME=tiny\n")))
    request = ImageImportRequest(name="trusting", path=str(tmp_path / "root.tar"), certificates=texts[:1])
    assert (await fake_host.call(request)).config.certificates == certificates_in(texts[:1])
    request_ = RunRequest(
        image="trusting",
        name="oak",
        memory_bytes=MEMORY_BYTES,
        overlay_bytes=OVERLAY_BYTES,
        certificates=texts,
        env={"PIP_CERT": "/mine"},
    )
    oak = await fake_host.call(request_)
    assert oak.process.certificates == certificates_in(texts)
    assert oak.process.env["SSL_CERT_FILE"] == BUNDLE
    assert oak.process.env["PIP_CERT"] == "/mine"
    await fake_host.call(StandbyRequest(instance="oak"))
    (elm,) = (await fake_host.call(ForkRequest(instance="oak", atomic=True))).instances
    assert elm.process == oak.process


async def test_a_proxy_is_in_the_environment(fake_host: AsyncHost) -> None:
    """A machine without either has none of the variables."""
    await boot(fake_host, "oak", proxy="http://p:1")
    said = await ask(fake_host, "oak", "env")
    assert "https_proxy=http://p:1" in said.splitlines()
    assert "SSL_CERT_FILE" not in said
    await boot(fake_host, "elm")
    assert "proxy" not in await ask(fake_host, "elm", "env")
