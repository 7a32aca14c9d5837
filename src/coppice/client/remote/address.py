"""The address of a server."""

from __future__ import annotations

from typing import Final
from urllib.parse import urlsplit

import httpx

from coppice.errors import UsageError
from coppice.model import Record

_SCHEMES: Final = {"http": "ws", "https": "wss"}


class Address(Record, frozen=True, kw_only=True):
    """A server's base URL, and its unix socket if it has one."""

    url: str  # without a slash at the end
    socket: str | None = None

    @property
    def websocket_url(self) -> str:
        """The base URL of WebSockets."""
        scheme, _, rest = self.url.partition("://")
        return f"{_SCHEMES[scheme]}://{rest}"


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
    return Address(url=text.rstrip("/"))


def _is_url(text: str) -> bool:
    try:
        parts = urlsplit(text)
        httpx.URL(text)
        return parts.scheme in _SCHEMES and bool(parts.hostname) and parts.port != 0
    except (ValueError, httpx.InvalidURL):  # such as a port above 65535
        return False
