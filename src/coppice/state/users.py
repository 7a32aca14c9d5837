"""A separate user id for each VMM.

A VMM that root starts runs under its own user id, so that no VMM can signal or trace another.

An id is allocated in the transaction that records the instance, and freed in the one that forgets
it. So ids are unique in a data directory, also those of VMMs that were started ahead. Two data
directories of one host do not know of each other: the search for a free id starts at a hash of the
instance's id, in a range of a billion. With n and m instances, the chance that they share an id is
n*m in a billion.
"""

from __future__ import annotations

import hashlib
import sqlite3

from coppice.errors import NoSpace

FIRST = 0x41000000  # far above the ids of distributions, containers and systemd; older versions used ids below
COUNT = 0x7FFFFFFF - FIRST  # of signed 32 bits: some programs take no larger user ids


def allocate(connection: sqlite3.Connection, instance_id: str) -> int:
    """Return the user id of an instance, allocating it if it has none yet, in an open transaction.

    :raises NoSpace: all are in use
    """
    mine = connection.execute("SELECT number FROM vmm_users WHERE instance = ?", (instance_id,)).fetchone()
    if mine is not None:  # allocated for a VMM that was started ahead
        return int(mine[0])
    offset = int.from_bytes(hashlib.sha256(instance_id.encode()).digest()[:4])
    for step in range(COUNT):
        number = FIRST + (offset + step) % COUNT
        if not connection.execute("SELECT 1 FROM vmm_users WHERE number = ?", (number,)).fetchone():
            connection.execute("INSERT INTO vmm_users (number, instance) VALUES (?, ?)", (number, instance_id))
            return number
    raise NoSpace("no user id is left for another VMM", hint="remove instances with `coppice rm`")


def release(connection: sqlite3.Connection, instance_id: str) -> None:
    """Free the user id of an instance in an open transaction. Idempotent."""
    connection.execute("DELETE FROM vmm_users WHERE instance = ?", (instance_id,))
