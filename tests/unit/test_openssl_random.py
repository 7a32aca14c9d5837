"""The provider of OpenSSL and its configuration, in processes of this host."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

from coppice.agent.random import guest_files

DRAW = """
import hashlib, ssl
large = ssl.RAND_bytes(1 << 20)
assert len(set(large)) == 256 and large != ssl.RAND_bytes(1 << 20) and ssl.RAND_status()
ssl.create_default_context().wrap_bio(ssl.MemoryBIO(), ssl.MemoryBIO(), server_hostname="x")
print("openssl-random.so" in open("/proc/self/maps").read(), hashlib.sha256(b"").hexdigest()[:8])
"""


def drawn(configuration: Path) -> str:
    """Return what a process with this configuration of OpenSSL prints."""
    done = subprocess.run(
        [sys.executable, "-c", DRAW],
        env={"OPENSSL_CONF": str(configuration)},
        capture_output=True,
        text=True,
        timeout=60,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    return done.stdout.strip()


@pytest.fixture
def installed(tmp_path: Path) -> Path:
    """The configuration, with the files of this directory instead of those of a guest."""
    files = {path.name: path for path in guest_files()}
    text = files["openssl.cnf"].read_text()
    assert "/run/coppice/openssl-random.so" in text
    assert ".include /etc/ssl/openssl.cnf" in text
    path = tmp_path / "openssl.cnf"
    text = text.replace("/run/coppice/openssl-random.so", str(files["openssl-random.so"]))
    path.write_text(text.replace("/etc/ssl/openssl.cnf", str(tmp_path / "distribution.cnf")))
    return path


@pytest.mark.parametrize(
    "distribution",
    [
        None,
        "openssl_conf = openssl_init\n[openssl_init]\nproviders = provider_sect\n[provider_sect]\ndefault = default_sect\n"
        "[default_sect]\n",
        "openssl_conf = openssl_init\n[openssl_init]\nssl_conf = ssl_sect\n[ssl_sect]\nsystem_default = tls\n"
        "[tls]\nMinProtocol = TLSv1.2\n",
    ],
    ids=["none", "debian", "policy"],
)
def test_openssl_asks_the_kernel(installed: Path, distribution: str | None) -> None:
    """The provider serves random numbers, the default one everything else, whatever file the
    distribution has.
    """
    if distribution is not None:
        (installed.parent / "distribution.cnf").write_text(distribution)
    assert drawn(installed) == "True e3b0c442"


def test_the_settings_of_a_distribution_win(installed: Path) -> None:
    """If its file names another section, OpenSSL keeps its own generator, and works."""
    (installed.parent / "distribution.cnf").write_text("openssl_conf = other\n[other]\n")
    assert drawn(installed) == "False e3b0c442"


def test_the_provider_needs_no_library() -> None:
    """It is loaded by programs of any C library."""
    (library,) = (path for path in guest_files() if path.suffix == ".so")
    done = subprocess.run(["readelf", "-d", str(library)], capture_output=True, text=True, check=True, timeout=60)
    assert "NEEDED" not in done.stdout
