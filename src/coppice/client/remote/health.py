"""Ask a server that needs neither TLS nor a proxy whether it answers.

httpx takes longer to import than a command in a guest takes, which needs only a WebSocket.
"""

from __future__ import annotations

import asyncio
from collections.abc import Mapping
from typing import Final

from coppice.client.remote.address import Address
from coppice.client.remote.failures import unreachable

_CONNECT_S: Final = 10.0
_NEXT_ADDRESS_S: Final = 0.25  # of a name, if the first does not answer: as RFC 8305 recommends
_ANSWER_S: Final = 60.0
_STATUS: Final = len(b"HTTP/1.1 200")


async def check(address: Address, headers: Mapping[str, str]) -> None:
    """Check that a server answers.

    :param headers: of each request: a proxy before the server may ask for the token
    :raises HostCannot: it does not, or it is no server of Coppice
    """
    try:
        async with asyncio.timeout(_CONNECT_S):
            if address.socket is not None:
                reader, writer = await asyncio.open_unix_connection(address.socket)
            else:
                reader, writer = await asyncio.open_connection(
                    address.host, address.port, happy_eyeballs_delay=_NEXT_ADDRESS_S
                )
        try:
            fields = {"Host": address.authority, "Connection": "close", **headers}
            lines = (f"GET {address.path}/health HTTP/1.1", *map(": ".join, fields.items()), "", "")
            writer.write("\r\n".join(lines).encode())
            async with asyncio.timeout(_ANSWER_S):
                status = await reader.readexactly(_STATUS)
        finally:
            writer.transport.abort()
        if not (status.startswith(b"HTTP/1.") and status.endswith(b" 200")):
            raise ValueError(f"its answer is {status.decode(errors='replace')!r}")
    except asyncio.IncompleteReadError as error:
        raise unreachable(address, EOFError("it closed the connection")) from error
    except (OSError, ValueError) as error:
        raise unreachable(address, error) from error
