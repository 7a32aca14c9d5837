"""The certificates and the proxy that a guest gets, so that it can reach servers from behind a
company's proxy.
"""

from __future__ import annotations

import re
from collections.abc import Iterable
from typing import Final
from urllib.parse import urlsplit

from coppice.errors import UsageError

BUNDLE: Final = "/etc/ssl/certs/ca-certificates.crt"
"""The guest's trusted certificates. The agent adds to it, and makes it if the image has none."""
MAX_CERTIFICATES: Final = 32
_MAX_TEXT: Final = 256 << 10
_PEM = r"-----BEGIN CERTIFICATE-----\s[A-Za-z0-9+/=\s]+-----END CERTIFICATE-----"
# Programs that do not read the bundle by themselves: they have certificates of their own, or look
# elsewhere.
_VARIABLES = ("SSL_CERT_FILE", "REQUESTS_CA_BUNDLE", "PIP_CERT", "CURL_CA_BUNDLE", "NODE_EXTRA_CA_CERTS")
_LOOPBACK = r"localhost|127\.[0-9.]+|::1"


def certificates_in(texts: Iterable[str]) -> tuple[str, ...]:
    """Return each certificate of PEM texts once, as PEM. Everything else, such as keys, is left out.

    :raises UsageError: a text has no certificate, a certificate is invalid, or there are too many
    """
    import ssl  # takes milliseconds, and few need it

    found: dict[str, None] = {}
    for text in texts:
        certificates = re.findall(_PEM, text[:_MAX_TEXT])
        if not certificates:
            raise UsageError(
                "the file of certificates has none in PEM format",
                hint="convert it with `openssl x509 -inform der -in FILE -out FILE.pem`",
            )
        for certificate in certificates:
            try:
                der = ssl.PEM_cert_to_DER_cert(certificate)
                ssl.create_default_context(cadata=der)
            except (ValueError, ssl.SSLError) as error:
                raise UsageError(
                    f"a certificate is invalid: {error}", hint="see it with `openssl x509 -text -in FILE`"
                ) from None
            found[ssl.DER_cert_to_PEM_cert(der)] = None
    if len(found) > MAX_CERTIFICATES:
        raise UsageError(
            f"{len(found)} certificates are too many (at most {MAX_CERTIFICATES})",
            hint="give the certificate of the authority alone, not the host's whole bundle",
        )
    return tuple(found)


def certificate_environment(certificates: Iterable[str]) -> dict[str, str]:
    """Return the variables that make programs trust the guest's bundle; none if nothing was added."""
    return dict.fromkeys(_VARIABLES, BUNDLE) if tuple(certificates) else {}


def check_proxy(url: str | None) -> None:
    """Check the URL of a proxy.

    :raises UsageError: it is no URL of an HTTP proxy
    """
    if url is None:
        return
    try:
        parts = urlsplit(url)
        valid = parts.scheme in ("http", "https") and bool(parts.hostname) and (parts.port or 1) > 0
    except ValueError:
        valid = False
    if not valid or not url.isprintable() or " " in url:
        raise UsageError("the proxy is not the URL of an HTTP proxy", hint="write it as http://proxy.example.org:3128")


def check_guest_proxy(url: str | None) -> None:
    """Check the URL of a proxy that a guest uses.

    :raises UsageError: as for `check_proxy`, or it names the guest's own loopback
    """
    check_proxy(url)
    if url is not None and re.fullmatch(_LOOPBACK, urlsplit(url).hostname or ""):
        raise UsageError(
            "in a guest, localhost is the guest itself",
            hint="on the network `user` this host's loopback is 10.0.2.2: write http://10.0.2.2:PORT",
        )


def proxy_environment(url: str | None) -> dict[str, str]:
    """Return the variables that name a proxy, in both spellings."""
    if url is None:
        return {}
    named = {"http_proxy": url, "https_proxy": url, "no_proxy": "localhost,127.0.0.1,::1"}
    return {**named, **{name.upper(): value for name, value in named.items()}}
