"""The address of a server."""

from __future__ import annotations

import os
from typing import Final
from urllib.parse import urlsplit

from coppice.errors import UsageError
from coppice.model import Record

_SCHEMES: Final = {"http": "ws", "https": "wss"}
_PROXIES: Final = ("http_proxy", "all_proxy")


class Address(Record, frozen=True, kw_only=True):
    """A server's base URL, and its unix socket if it has one."""

    url: str  # without a slash at the end
    socket: str | None = None

    @property
    def websocket_url(self) -> str:
        """The base URL of WebSockets."""
        scheme, _, rest = self.url.partition("://")
        return f"{_SCHEMES[scheme]}://{rest}"

    @property
    def is_direct(self) -> bool:
        """Whether a plain request reaches the server: without TLS, a proxy that this process's environment names, a user
        in the URL, or a path that must be quoted.
        """
        proxies = {name for name in os.environ if name.lower() in _PROXIES}
        is_plain = self.url.isascii() and " " not in self.url and "@" not in self.url
        return self.socket is not None or (self.url.startswith("http:") and is_plain and not proxies)

    @property
    def host(self) -> str:
        """The host of the URL."""
        return urlsplit(self.url).hostname or ""

    @property
    def port(self) -> int:
        """The port of the URL, without TLS."""
        return urlsplit(self.url).port or 80

    @property
    def authority(self) -> str:
        """The host and the port of the URL, as in the header `Host`."""
        return urlsplit(self.url).netloc.rpartition("@")[2]

    @property
    def path(self) -> str:
        """The path of the URL, which a server behind a proxy may have."""
        return urlsplit(self.url).path


def parse_address(text: str) -> Address:
    """Return the address of `http://HOST[:PORT]`, `https://...` or `unix:PATH`.

    :raises UsageError: the text is none of these
    """
    if text.startswith("unix:"):
        path = text.removeprefix("unix:").removeprefix("//")
        if not path.startswith("/") or "\0" in path:
            raise UsageError(f"the socket {path!r} has no absolute path", hint="write unix:/run/coppice.sock")
        return Address(url="http://coppice", socket=path)
    if not _is_url(text):
        raise UsageError(
            f"{text!r} is not the address of a server", hint="write http://HOST:PORT or unix:/path/to/socket"
        )
    scheme, _, rest = text.partition("://")
    return Address(url=f"{scheme.lower()}://{rest}".rstrip("/"))


def _is_url(text: str) -> bool:
    try:
        parts = urlsplit(text)
        return text.isprintable() and parts.scheme in _SCHEMES and bool(parts.hostname) and parts.port != 0
    except ValueError:  # a port above 65535, or the brackets of an IPv6 address
        return False
