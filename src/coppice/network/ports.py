"""Host ports of instances: whether they are free before the VMM starts, and which one `auto` is."""

from __future__ import annotations

import errno
import random
import socket
import sqlite3
from collections.abc import Container, Sequence
from contextlib import closing
from pathlib import Path
from typing import Final

import msgspec

from coppice.errors import HostCannot, InUse
from coppice.model import ANY_PORT, OWN_ADDRESS, Instance, Publish

_PREFERRED: Final = range(20000, 32768)
_ABLE: Final = range(10000, 65536)
_OF_THE_KERNEL: Final = 0
_TRIES: Final = 256
_RANGE: Final = Path("/proc/sys/net/ipv4/ip_local_port_range")


def require_free(instance: Instance) -> None:
    """Check that the ports are free now, so that the error can name one in use. Blocks.

    Only the VMM binds them: another program may be first.

    :raises InUse: another program uses one
    :raises HostCannot: an address is not this host's, or this user may not bind a port
    """
    for port in instance.publish:
        if port.host_port != ANY_PORT:
            _require_free(instance, port)


def require_local(ports: Sequence[Publish]) -> None:
    """Check that the addresses are this host's, as far as its kernel can tell: it may permit others
    (`net.ipv4.ip_nonlocal_bind`).

    :raises HostCannot: the kernel says that it does not have one of them
    """
    for address in {port.host_address for port in ports} - {OWN_ADDRESS}:
        with socket.socket(socket.AF_INET6 if ":" in address else socket.AF_INET, socket.SOCK_DGRAM) as probe:
            try:
                probe.bind((address, 0))
            except OSError as error:
                if error.errno == errno.EADDRNOTAVAIL:
                    raise HostCannot(
                        f"cannot publish ports on {address}: it is not an address of this host",
                        hint="choose one that `ip address` lists; 0.0.0.0 is all of them, also those that come later",
                    ) from error


def _require_free(instance: Instance, port: Publish) -> None:
    kind = socket.SOCK_DGRAM if port.protocol == "udp" else socket.SOCK_STREAM
    shown = f"the port {port.host_address}:{port.host_port}/{port.protocol}"
    try:
        with socket.socket(socket.AF_INET6 if ":" in port.host_address else socket.AF_INET, kind) as probe:
            if port.protocol == "tcp":  # as the VMM does: connections that are still closing do not matter
                probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            probe.bind((port.host_address, port.host_port))
    except OSError as error:
        if error.errno == errno.EADDRINUSE:
            raise InUse(
                f"{instance.name} cannot publish {shown}: it is in use",
                hint="end the program that uses it (see `ss -lnp`), or make a fork that publishes another port, such as `auto:PORT`",
            ) from error
        raise HostCannot(
            f"{instance.name} cannot publish {shown}: {error.strerror}",
            hint="publish on an address of this host; ports up to 1023 need root",
        ) from error


class Picks:
    """The ports of `auto` that were picked for machines which start, until their VMMs have them.

    A picked port is held: this process has bound a TCP socket to it, and does not listen. A VMM can
    listen on it, because it sets SO_REUSEADDR, and no other pick of any process finds it free. The
    socket holds the UDP port of that number too, which QEMU binds without SO_REUSEADDR.
    """

    def __init__(self, database: Path | None = None) -> None:
        """`database` has records of instances, whose ports are not picked. None: there is none."""
        self._database = database
        self._held: dict[str, tuple[tuple[Publish, ...], list[socket.socket]]] = {}

    def hold(self, instance: Instance) -> tuple[Publish, ...]:
        """Return the ports of an instance, with a number in place of each `auto`. Idempotent. Blocks.

        :raises HostCannot: no port is free, or an address is not this host's
        """
        if instance.id not in self._held:
            taken = {port.host_port for port in instance.publish}
            ports, held = [], []
            try:
                for port in instance.publish:
                    if port.host_port == ANY_PORT:
                        held.append(pick(port, self._database, taken))
                        port = msgspec.structs.replace(port, host_port=held[-1].getsockname()[1])
                        taken.add(port.host_port)
                    ports.append(port)
            except BaseException:
                for each in held:
                    each.close()
                raise
            self._held[instance.id] = tuple(ports), held
        return self._held[instance.id][0]

    def release(self, instance_id: str) -> tuple[Publish, ...] | None:
        """Hold the ports of an instance no longer. Return them; None if none were held. Idempotent."""
        ports, held = self._held.pop(instance_id, (None, []))
        for each in held:
            each.close()
        return ports


def pick(port: Publish, database: Path | None, taken: Container[int] = ()) -> socket.socket:
    """Return a socket that holds a port which is free now in the caller's namespace. Blocks.

    The port is outside the kernel's range of ephemeral ports, if any is: the kernel could give a port
    of that range to any program while the machine is at rest. It is neither `taken` nor that of a
    recorded instance, which may be at rest too.

    :raises HostCannot: no port is free, or the address is not this host's
    """
    first, last = map(int, _RANGE.read_text().split())
    able = next((found for ports in (_PREFERRED, _ABLE) if (found := [n for n in ports if not first <= n <= last])), [])
    family = socket.AF_INET6 if ":" in port.host_address else socket.AF_INET
    reason = "all of them are in use"
    for number in [*random.sample(able, min(_TRIES, len(able))), *[_OF_THE_KERNEL] * _TRIES]:
        held = socket.socket(family, socket.SOCK_STREAM)
        try:
            held.bind((port.host_address, number))  # without SO_REUSEADDR, because others hold their ports
            held.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            found = held.getsockname()[1]
            if port.protocol == "udp":
                with socket.socket(family, socket.SOCK_DGRAM) as probe:
                    probe.bind((port.host_address, found))
            if found not in taken and not (database and _is_recorded(database, found)):
                return held
        except OSError as error:
            reason = error.strerror or str(error)
        held.close()
    raise HostCannot(
        f"cannot pick a port of {port.host_address}: {reason}",
        hint="publish a port number of your choice, on an address of this host",
    )


def _is_recorded(database: Path, number: int) -> bool:
    """Return whether an instance has this port, on any address."""
    if not database.exists():
        return False
    words = [f'"host_port":{number}{end}'.encode() for end in ",}"]
    with closing(sqlite3.connect(f"{database.absolute().as_uri()}?mode=ro", uri=True)) as connection:
        found = connection.execute("SELECT 1 FROM instances WHERE instr(record, ?) OR instr(record, ?)", words)
        return found.fetchone() is not None
