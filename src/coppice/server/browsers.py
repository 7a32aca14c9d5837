"""What requests of browsers need besides a token in a header: a token on WebSockets, and protection
of a server without tokens from the pages of other servers.
"""

from __future__ import annotations

import ipaddress
from typing import Any, Final
from urllib.parse import urlsplit

from litestar import WebSocket
from litestar.connection import ASGIConnection

from coppice.errors import Forbidden

PROTOCOL: Final = "coppice"
"""The subprotocol that a client offers together with its token, and that the server chooses."""
TOKEN_PREFIX: Final = "coppice.token."  # noqa: S105 - the beginning of an offered subprotocol

_Connection = ASGIConnection[Any, Any, Any, Any]


def authorization_of(connection: _Connection) -> str | None:
    """Return the `Authorization` header of a request.

    A page cannot set headers of a WebSocket. It offers the token as a subprotocol instead: unlike
    the URL, subprotocols are not part of logs and histories.
    """
    offered = _offered(connection)
    token = next((each.removeprefix(TOKEN_PREFIX) for each in offered if each.startswith(TOKEN_PREFIX)), None)
    return connection.headers.get("authorization") or (f"Bearer {token}" if token else None)


async def accept(socket: WebSocket[Any, Any, Any]) -> None:
    """Accept a WebSocket. Browsers close one whose subprotocols were offered and not answered."""
    await socket.accept(subprotocols=PROTOCOL if PROTOCOL in _offered(socket) else None)


def _offered(connection: _Connection) -> list[str]:
    """Return the subprotocols that the client of a WebSocket offers."""
    subprotocols: Any = connection.scope.get("subprotocols")
    return list(subprotocols or [])


def require_own_page(connection: _Connection) -> None:
    """Refuse a request that a page of another server made, for a server without tokens.

    Any page that the user visits can send requests to loopback, and open WebSockets. Browsers name
    the page in `Origin`. A page can also change its own name's address to loopback (DNS rebinding).
    Then `Host` has that name, which has a dot.

    :raises Forbidden: the page is of another server, or the request is to a name of another server
    """
    host = connection.headers.get("host", "")
    origin = connection.headers.get("origin")
    if origin is not None and urlsplit(origin).netloc.lower() != host.lower():
        raise Forbidden(
            f"a page of {origin[:100]!r} must not use this server", hint=f"open http://{host}/ in the browser"
        )
    if not _is_local(urlsplit(f"//{host}").hostname or ""):
        raise Forbidden(
            f"a server without tokens must not be called {host[:100]!r}", hint="use its IP address, or localhost"
        )


def _is_local(name: str) -> bool:
    """Return whether no public DNS entry can have this name."""
    if "." not in name or name.endswith(".localhost"):
        return True
    try:
        ipaddress.ip_address(name)
    except ValueError:
        return False
    return True
