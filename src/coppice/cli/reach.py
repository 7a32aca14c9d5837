"""Reach servers in a running guest: port-forward, connect."""

from __future__ import annotations

import re
from typing import Annotated

import click

from coppice.cli import options, output
from coppice.cli.context import Cli
from coppice.cli.declare import Argument, Option, ProgramExit
from coppice.cli.ending import Interrupted
from coppice.errors import UsageError

_FORWARD = re.compile(r"(?P<to>\d{1,5}|unix:.+?)(?::(?P<local>\d{1,5}))?", re.DOTALL)


def port_forward(
    ctx: click.Context,
    name: options.Name,
    ports: Annotated[
        list[str],
        Argument(
            metavar="PORT[:LOCAL]",
            help="A port of the guest, or unix:PATH:LOCAL for a unix socket, and the port of this machine. "
            "LOCAL: default the same number; 0: any free port.",
        ),
    ],
    address: Annotated[
        str, Option("--address", metavar="ADDRESS", help="The address of this machine to listen on.")
    ] = "127.0.0.1",
) -> None:
    """Forward ports of this machine to servers in a Running guest, until Ctrl-C.

    The guest needs no network: servers on its own loopback (127.0.0.1) are reached. The lines on
    standard output say which ports are forwarded. If a server cannot be reached, the client's
    connection is closed, and standard error says why once.
    """
    from coppice.cli import forwarding

    cli = Cli.of(ctx)
    wanted = [_forward(word) for word in ports]
    forwarding.check_address(address)
    try:
        cli.call(lambda host: forwarding.forward(host, name, wanted, address, as_json=cli.json))
    except Interrupted:
        raise ProgramExit(0) from None  # the only way to end it


def connect(
    ctx: click.Context,
    name: options.Name,
    to: Annotated[
        str,
        Argument(
            metavar="PORT|unix:PATH", help="A port of the guest, or a unix socket in it; unix:@NAME: an abstract one."
        ),
    ],
) -> None:
    """Connect standard input and output to a server in a Running guest.

    As a ProxyCommand it lets ssh, scp and rsync reach a guest that has no network:
    `ssh -o ProxyCommand='coppice connect NAME 22' root@NAME`.
    """
    from coppice.cli import forwarding

    cli = Cli.of(ctx)
    if cli.json:
        raise UsageError("a connection cannot be printed as JSON", hint="omit --json")
    target = _target(to)
    cli.call(lambda host: forwarding.connect(host, name, target))


def _target(word: str) -> int | str:
    return int(word) if word.isdecimal() and word.isascii() else word


def _forward(word: str) -> tuple[int | str, int]:
    """Return a port or socket of the guest, and the port of this machine.

    :raises UsageError: the word is malformed
    """
    found = _FORWARD.fullmatch(word)
    to = _target(found["to"]) if found else word
    local = int(found["local"]) if found and found["local"] else to
    if found is None or not isinstance(local, int) or local > 65535:
        raise UsageError(
            f"{output.printable(word)!r} is not a port to forward",
            hint="write PORT, PORT:LOCAL or unix:/path:LOCAL, such as unix:/run/app.sock:0",
        )
    return to, local
