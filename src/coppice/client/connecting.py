"""Connect to a server: the same managers and handles, whose requests another machine carries out."""

from __future__ import annotations

from typing import TYPE_CHECKING

from coppice.arguments import checked

if TYPE_CHECKING:
    from coppice.client.aio.host import AsyncHost
    from coppice.client.backend import Backend
    from coppice.client.blocking.host import Host


@checked
def connect(address: str, *, token: str | None = None) -> Host:
    """Return a host whose requests a server carries out.

        with coppice.connect("http://localhost:8080", token=TOKEN) as host:
            vm = host.run("debian")

    :param address: `http://HOST:PORT`, `https://HOST:PORT` or `unix:/path/to/socket`
    :param token: an access token. Default: the variable COPPICE_TOKEN
    :raises UsageError: the address is malformed
    """
    from coppice.client.blocking.host import Host

    return Host(backend=remote_backend(address, token))


@checked
def connect_async(address: str, *, token: str | None = None) -> AsyncHost:
    """Return the same host as `connect`, for asyncio.

    :param address: `http://HOST:PORT`, `https://HOST:PORT` or `unix:/path/to/socket`
    :param token: an access token. Default: the variable COPPICE_TOKEN
    :raises UsageError: the address is malformed
    """
    from coppice.client.aio.host import AsyncHost

    return AsyncHost(backend=remote_backend(address, token))


def remote_backend(address: str, token: str | None = None) -> Backend:
    """Return the backend of a server, to be opened before the first request. Parameters are as in
    `connect`.

    :raises UsageError: the address is malformed
    """
    from coppice.client.remote.backend import RemoteBackend

    return RemoteBackend(address, token=token)
