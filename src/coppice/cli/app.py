"""The application: the global options, and all commands in the order of `--help`."""

from __future__ import annotations

import logging
from pathlib import Path
from typing import Annotated, Literal

import click

from coppice.cli import output
from coppice.cli.context import Cli
from coppice.cli.declare import Commands, Option, flag, parameters

_CLI = "coppice.cli"
_PLACES = {
    "doctor": f"{_CLI}.images:doctor",
    "run": f"{_CLI}.lifecycle:run",
    "ls": f"{_CLI}.view:ls",
    "inspect": f"{_CLI}.view:inspect",
    "exec": f"{_CLI}.guest:exec_",
    "commands": f"{_CLI}.commands:commands",
    "attach": f"{_CLI}.commands:attach",
    "kill": f"{_CLI}.commands:kill",
    "wait": f"{_CLI}.commands:wait",
    "forget": f"{_CLI}.commands:forget",
    "cp": f"{_CLI}.guest:cp",
    "files": f"{_CLI}.files:files_app",
    "logs": f"{_CLI}.guest:logs",
    "port-forward": f"{_CLI}.reach:port_forward",
    "connect": f"{_CLI}.reach:connect",
    "standby": f"{_CLI}.lifecycle:standby",
    "restore": f"{_CLI}.lifecycle:restore",
    "start": f"{_CLI}.lifecycle:start",
    "stop": f"{_CLI}.lifecycle:stop",
    "promote": f"{_CLI}.lifecycle:promote",
    "demote": f"{_CLI}.lifecycle:demote",
    "fork": f"{_CLI}.lineage:fork",
    "tree": f"{_CLI}.lineage:tree",
    "export": f"{_CLI}.archives:export",
    "import": f"{_CLI}.archives:import_",
    "verify": f"{_CLI}.snapshots:verify",
    "stats": f"{_CLI}.view:stats",
    "egress": f"{_CLI}.lifecycle:egress",
    "update": f"{_CLI}.lifecycle:update",
    "auto-standby": f"{_CLI}.automation:auto_standby_app",
    "ready": f"{_CLI}.lifecycle:ready",
    "rm": f"{_CLI}.lifecycle:rm",
    "events": f"{_CLI}.events:events",
    "gc": f"{_CLI}.view:gc",
    "pull": f"{_CLI}.images:pull",
    "image": f"{_CLI}.images:image_app",
    "kernel": f"{_CLI}.images:kernel_app",
    "snapshot": f"{_CLI}.snapshots:snapshot_app",
    "volume": f"{_CLI}.volumes:volume_app",
    "storage": f"{_CLI}.storage:storage_app",
    "serve": f"{_CLI}.serve:serve",
    "token": f"{_CLI}.serve:token_app",
    "completion": f"{_CLI}.complete:completion",
}


def _version(_: click.Context) -> None:
    from coppice import __version__

    output.line(f"coppice {__version__}")


def options(
    ctx: click.Context,
    home: Annotated[
        Path | None,
        Option(
            "--home",
            metavar="DIR",
            envvar="COPPICE_HOME",
            help="Data directory. Default: /var/lib/coppice as root, else ~/.local/share/coppice.",
        ),
    ] = None,
    vmm: Annotated[
        str | None,
        Option(
            "--vmm",
            metavar="NAME",
            envvar="COPPICE_VMM",
            help="The VMM of new machines. Existing machines keep theirs. Default: qemu.",
        ),
    ] = None,
    accel: Annotated[
        Literal["auto", "kvm", "tcg"],
        Option(
            "--accel",
            envvar="COPPICE_ACCEL",
            help="Accelerator: kvm, tcg (emulation), or auto: kvm if this host supports it.",
        ),
    ] = "auto",
    owner: Annotated[
        str | None,
        Option(
            "--owner",
            metavar="NAME",
            envvar="COPPICE_OWNER",
            help="See only this owner's machines, images and so on, and own new ones. Default: see all.",
        ),
    ] = None,
    host: Annotated[
        str | None,
        Option(
            "--host",
            metavar="URL",
            envvar="COPPICE_HOST",
            help="Use the server at http://HOST:PORT or unix:PATH instead of this machine. Its token is in "
            "COPPICE_TOKEN.",
        ),
    ] = None,
    as_json: Annotated[
        bool,
        Option("--json", help="Print one JSON document with exact numbers on standard output, also for errors."),
    ] = False,
    debug: Annotated[bool, Option("--debug", help="Show tracebacks and a debug log.")] = False,
) -> None:
    """Grow many virtual machines from one: warm templates, and forks that share their memory.

    Exit status: 0 success, 1 failure, 2 wrong usage, 3 not found, 4 refused in this state, 5 not
    possible on this host.
    """
    factory = ctx.obj
    ctx.obj = Cli(
        home=home,
        vmm=vmm,
        accel=accel,
        owner=owner or None,
        server=host or None,
        json=as_json,
        debug=debug,
        host_factory=factory,
    )
    logging.basicConfig(
        level=logging.DEBUG if debug else logging.WARNING,
        format="coppice: %(name)s: %(message)s" if debug else "coppice: %(message)s",
    )
    if not debug:
        logging.getLogger("asyncio").setLevel(logging.CRITICAL)  # it logs tracebacks
    if ctx.invoked_subcommand is None:
        output.line(ctx.get_help())


app = Commands(
    "coppice",
    _PLACES,
    params=[
        *parameters(options),
        flag("--version", help="Print the version.", action=_version),
    ],
    callback=click.pass_context(options),
    help=options.__doc__,
    invoke_without_command=True,
)
