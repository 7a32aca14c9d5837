"""Loopback addresses of their own for instances that publish ports: none has another living instance's.

All of 127.0.0.0/8 is this host on Linux, so nobody has to configure them. A quarter of it is used, from where the instance's id points to: data directories,
which do not know of each other, seldom meet.
"""

from __future__ import annotations

import hashlib
import sqlite3
from collections.abc import Iterable
from ipaddress import IPv4Network

import msgspec

from coppice.errors import NoSpace
from coppice.model import OWN_ADDRESS, Instance

_POOL = IPv4Network("127.64.0.0/10")
_IN_USE = """
    SELECT DISTINCT json_extract(port.value, '$.host_address')
    FROM instances, json_each(CAST(record AS TEXT), '$.publish') AS port
"""


def with_addresses(connection: sqlite3.Connection, instances: Iterable[Instance]) -> list[Instance]:
    """New instances, with an address for each that asks for one of its own; inside of the transaction that records them.

    :raises NoSpace: all are in use
    """
    listed = list(instances)
    if not any(port.host_address == OWN_ADDRESS for instance in listed for port in instance.publish):
        return listed
    taken = {row[0] for row in connection.execute(_IN_USE)}
    return [_with_address(instance, taken) for instance in listed]


def _with_address(instance: Instance, taken: set[str]) -> Instance:
    if all(port.host_address != OWN_ADDRESS for port in instance.publish):
        return instance
    size = _POOL.num_addresses
    if len(taken) >= size:
        raise NoSpace("there is no loopback address left", hint="remove instances, or publish without `own`")
    number = int.from_bytes(hashlib.sha256(instance.id.encode()).digest()[:4]) % size
    while (address := str(_POOL[number])) in taken:
        number = (number + 1) % size
    taken.add(address)
    return msgspec.structs.replace(
        instance,
        publish=tuple(
            msgspec.structs.replace(port, host_address=address) if port.host_address == OWN_ADDRESS else port
            for port in instance.publish
        ),
    )
