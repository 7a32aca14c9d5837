"""The ports that an instance publishes: can they be had before it starts."""

from __future__ import annotations

import errno
import socket

from coppice.errors import HostCannot, InUse
from coppice.model import ANY_PORT, Instance, Publish


def require_free(instance: Instance) -> None:
    """Look whether the host's ports can be had now, so that the refusal can say which one cannot. The VMM takes them: another program may be quicker. Blocks.

    :raises InUse: another program has one
    :raises HostCannot: an address is not this host's, or a port not this user's
    """
    for port in instance.publish:
        if port.host_port != ANY_PORT:
            _require_free(instance, port)


def _require_free(instance: Instance, port: Publish) -> None:
    kind = socket.SOCK_DGRAM if port.protocol == "udp" else socket.SOCK_STREAM
    shown = f"the port {port.host_address}:{port.host_port}/{port.protocol}"
    try:
        with socket.socket(socket.AF_INET6 if ":" in port.host_address else socket.AF_INET, kind) as probe:
            if port.protocol == "tcp":  # as the VMM does: connections that are not quite over yet are no obstacle
                probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            probe.bind((port.host_address, port.host_port))
    except OSError as error:
        if error.errno == errno.EADDRINUSE:
            raise InUse(
                f"{instance.name} cannot have {shown}: it is in use",
                hint="end what has it (`ss -lnp` shows that), or make a fork that publishes another, such as `auto:PORT`",
            ) from error
        raise HostCannot(
            f"{instance.name} cannot have {shown}: {error.strerror}",
            hint="publish on an address of this host, and as another user than root above 1023",
        ) from error
