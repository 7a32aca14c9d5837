"""Loopback addresses of instances. All of 127.0.0.0/8 is this host, so they need no configuration."""

from __future__ import annotations

import hashlib
import ipaddress
import sqlite3
from collections.abc import Sequence

import msgspec

from coppice.errors import NoSpace
from coppice.model import OWN_ADDRESS, Instance

# A quarter of the loopback addresses. The search starts at a hash of the instance's id: data
# directories, which do not know of each other, then seldom pick the same address.
_POOL = "127.64.0.0/10"
_IN_USE = """
    SELECT DISTINCT json_extract(port.value, '$.host_address')
    FROM instances, json_each(CAST(record AS TEXT), '$.publish') AS port
"""


def with_own_addresses(connection: sqlite3.Connection, instances: Sequence[Instance]) -> list[Instance]:
    """Return instances with a loopback address in place of each `own`. No recorded instance has it.

    :raises NoSpace: all addresses are in use
    """
    if not any(port.host_address == OWN_ADDRESS for instance in instances for port in instance.publish):
        return list(instances)
    taken = {row[0] for row in connection.execute(_IN_USE)}
    return [with_own_address(instance, taken) for instance in instances]


def with_own_address(instance: Instance, taken: set[str]) -> Instance:
    """Return an instance with a loopback address in place of each `own`, and add the address to
    `taken`.

    :raises NoSpace: all addresses are in use
    """
    if all(port.host_address != OWN_ADDRESS for port in instance.publish):
        return instance
    pool = ipaddress.IPv4Network(_POOL)
    size = pool.num_addresses
    if len(taken) >= size:
        raise NoSpace("no loopback address is left", hint="remove instances, or publish without `own`")
    number = int.from_bytes(hashlib.sha256(instance.id.encode()).digest()[:4]) % size
    while (address := str(pool[number])) in taken:
        number = (number + 1) % size
    taken.add(address)
    return msgspec.structs.replace(
        instance,
        publish=tuple(
            msgspec.structs.replace(port, host_address=address) if port.host_address == OWN_ADDRESS else port
            for port in instance.publish
        ),
    )
