"""Host ports of instances: whether they are free before the VMM starts, and which one `auto` is."""

from __future__ import annotations

import errno
import socket
from pathlib import Path
from typing import Final

from coppice.errors import HostCannot, InUse
from coppice.model import ANY_PORT, Instance, Publish

_FIRST, _LAST = 20000, 32767
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


def pick_port(port: Publish) -> int:
    """Return a port that is free now in the caller's namespace. Blocks.

    It is outside the kernel's range of ephemeral ports. `nat` forwards a port and does not bind it,
    so the kernel could give a port of that range to another program.

    :raises HostCannot: no port is free, or the address is not this host's
    """
    first, last = map(int, _RANGE.read_text().split())
    able = [number for number in range(_FIRST, _LAST + 1) if not first <= number <= last]
    kind = socket.SOCK_DGRAM if port.protocol == "udp" else socket.SOCK_STREAM
    reason = "the kernel's ephemeral range has all of them"
    import random  # a command that lists machines does not need it

    for number in random.sample(able, min(_TRIES, len(able))):
        with socket.socket(socket.AF_INET6 if ":" in port.host_address else socket.AF_INET, kind) as probe:
            try:
                probe.bind((port.host_address, number))
            except OSError as error:
                reason = error.strerror or str(error)
            else:
                return number
    raise HostCannot(
        f"cannot pick a port of {port.host_address}: {reason}",
        hint="publish a port number of your choice, on an address of this host",
    )
