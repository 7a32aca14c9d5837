"""`coppice serve` and `coppice token`."""

from __future__ import annotations

import os
import shlex
import socket
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Literal

import click

from coppice.cli import output
from coppice.cli.context import Cli
from coppice.cli.declare import Commands, Option
from coppice.cli.parse import duration
from coppice.errors import MissingTool, UsageError

if TYPE_CHECKING:
    from coppice.host import LocalBackend

_NEEDED = "coppice-vm[server]"

token_app = Commands("token", help="Make access tokens for a server.")


def serve(
    context: click.Context,
    listen: Annotated[
        str, Option("--listen", metavar="ADDRESS:PORT|unix:PATH", help="Where to listen.")
    ] = "127.0.0.1:8080",
    insecure_no_auth: Annotated[
        bool, Option("--insecure-no-auth", help="Accept requests without a token. Only on loopback or a unix socket.")
    ] = False,
    tls_cert: Annotated[Path | None, Option("--tls-cert", metavar="FILE", help="Certificate chain, PEM.")] = None,
    tls_key: Annotated[Path | None, Option("--tls-key", metavar="FILE", help="Its private key, PEM.")] = None,
    spares: Annotated[
        int | None,
        Option(
            "--spares",
            metavar="N",
            min=0,
            help="VMMs started ahead for each template that is forked often. Default: as many as forks of it were "
            "requested within one second lately, at most 16.",
        ),
    ] = None,
    rate_limit: Annotated[
        int | None,
        Option("--rate-limit", metavar="N", min=1, help="Requests a minute of each owner. Default: no limit."),
    ] = None,
    max_operations: Annotated[
        int, Option("--max-operations", metavar="N", min=1, help="Operations at once, of all owners together.")
    ] = 4000,
    max_operations_per_owner: Annotated[
        int, Option("--max-operations-per-owner", metavar="N", min=1, help="Operations at once, of one owner.")
    ] = 1000,
    allow_registry: Annotated[
        list[str],
        Option(
            "--allow-registry",
            metavar="HOST[:PORT]",
            help="Let tokens with an owner pull from this host, though its address is not public; repeat.",
        ),
    ] = [],  # noqa: B006 - click copies it
    log_format: Annotated[
        Literal["text", "json"],
        Option(
            "--log-format",
            help="The log on standard error: text with warnings, or lines of JSON with a line for each request.",
        ),
    ] = "text",
    print_unit: Annotated[
        bool, Option("--print-unit", help="Print a unit of systemd that runs this command, and end.")
    ] = False,
) -> None:
    """Serve the operations of this data directory over HTTP.

    On TCP each request needs a token (`coppice token create`). A unix socket belongs to this user.
    The web page is at /, and the API document at /openapi.
    """
    cli = Cli.of(context)
    if cli.server is not None:
        raise UsageError("a server cannot use another server", hint="leave out --host, and unset COPPICE_HOST")
    if print_unit:
        output.line(_unit(sys.argv))
        return
    import asyncio

    from coppice.cli import start

    start.collect_again()
    try:
        from coppice.server.app import make_app
        from coppice.server.auth import load_key
        from coppice.server.logs import log_json
        from coppice.server.running import Limits
        from coppice.server.serving import LOOPBACK, Listening
        from coppice.server.serving import serve as serve_app
        from coppice.server.tracing import traces_of
    except ModuleNotFoundError as error:
        raise MissingTool(f"a server needs the package {error.name}", hint=f"run `pip install '{_NEEDED}'`") from error
    from coppice.host import LocalBackend
    from coppice.images.reach import PublicHosts
    from coppice.state.layout import data_directory

    if log_format == "json":
        log_json()
    path, address, port = _where(listen)
    where = Listening(socket=path, address=address, port=port, certificate=tls_cert, key=tls_key)
    if insecure_no_auth and where.socket is None and where.address not in LOOPBACK:
        raise UsageError("a server without tokens must not listen to other machines", hint="listen on 127.0.0.1")
    key = None if insecure_no_auth or where.socket is not None else load_key(data_directory(cli.home))

    def host(owner: str | None) -> LocalBackend:
        made = LocalBackend(cli.home, vmm=cli.vmm, accel=cli.accel, owner=owner or cli.owner, spares=spares)
        made.reach = PublicHosts(tuple(allow_registry)) if owner else None
        return made

    limits = Limits(of_owner=max_operations_per_owner, of_all=max_operations)
    ending = asyncio.Event()
    app = make_app(host, key, limits=limits, per_minute=rate_limit, ending=ending, traces=traces_of(os.environ))
    asyncio.run(serve_app(app, where, ready=_ready, ending=ending))


_UNIT = """\
[Unit]
Description=Coppice server
Wants=network-online.target
After=network-online.target

[Service]
Type=notify
ExecStart={command}
Restart=always
# Machines live on when the server ends.
KillMode=process
TimeoutStopSec=60
LimitNOFILE=65536

[Install]
WantedBy=multi-user.target"""


def _unit(command: list[str]) -> str:
    """Return a unit for a command line, without its option `--print-unit`."""
    program = Path(command[0]).absolute()
    arguments = [str(program), *(each for each in command[1:] if each != "--print-unit")]
    if program.name == "__main__.py":  # python -m coppice
        arguments[:1] = [sys.executable, "-m", "coppice"]
    quoted = (each.replace("%", "%%").replace("$", "$$") for each in map(shlex.quote, arguments))
    return _UNIT.format(command=" ".join(quoted))


def _where(listen: str) -> tuple[Path | None, str, int]:
    """Return the socket, or the address and the port, that `--listen` names."""
    if listen.startswith("unix:"):
        return Path(listen.removeprefix("unix:")).absolute(), "", 0
    address, colon, port = listen.rpartition(":")
    if not colon or not port.isdecimal() or int(port) > 65535:
        raise UsageError(
            f"cannot listen on {listen!r}", hint="write 127.0.0.1:8080, [::1]:8080 or unix:/path/to/socket"
        )
    return None, address.strip("[]") or "127.0.0.1", int(port)


def _ready(url: str) -> None:
    """Say that the server listens: to the user, and to systemd (sd_notify(3)) if it started us."""
    output.line(f"listening on {url}")
    notify = os.environ.get("NOTIFY_SOCKET")
    if notify:
        with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM | socket.SOCK_CLOEXEC) as client:
            client.sendto(b"READY=1", "\0" + notify[1:] if notify.startswith("@") else notify)


@token_app.declare("create")
def create(
    context: click.Context,
    owner: Annotated[
        str | None,
        Option("--for", metavar="OWNER", help="The token's owner. Default: --owner, else the operator, who sees all."),
    ] = None,
    scope: Annotated[
        list[str],
        Option("--scope", metavar="SCOPE", help="Allow only this, such as instance:read; repeat. Default: all."),
    ] = [],  # noqa: B006 - click copies it
    ttl: Annotated[
        str | None, Option("--ttl", metavar="TIME", help="Lifetime, such as 8h or 30d. Default: no end.")
    ] = None,
) -> None:
    """Make a token for `coppice serve` of the same data directory, and print it."""
    try:
        from coppice.server.auth import load_key, make_token
    except ModuleNotFoundError as error:
        raise MissingTool(f"a token needs the package {error.name}", hint=f"run `pip install '{_NEEDED}'`") from error
    from coppice.state.layout import data_directory

    cli = Cli.of(context)
    key = load_key(data_directory(cli.home))
    token = make_token(key, owner=owner or cli.owner, scopes=scope, ttl_s=None if ttl is None else duration(ttl))
    cli.show({"token": token}, lambda: output.line(token))
