"""The application: the global options, and every command in the order in which `--help` shows them."""

from __future__ import annotations

import logging
from importlib import import_module
from pathlib import Path
from typing import Annotated, Any, Literal

import typer
from typer.core import TyperGroup

from coppice.cli import guest, images, lifecycle, lineage, output, snapshots, view, volumes
from coppice.cli.context import Cli


class _Commands(TyperGroup):
    """The root group. `bench` is imported when it is run, not when it is listed."""

    def resolve_command(self, ctx: Any, args: list[str]) -> Any:
        name, command, rest = super().resolve_command(ctx, args)
        if name == "bench":
            command = typer.main.get_group(import_module("coppice.bench.cli").app)
            command.name, command.no_args_is_help = name, False  # a missing command is our kind of error
        return name, command, rest


app = typer.Typer(
    cls=_Commands,
    rich_markup_mode=None,
    pretty_exceptions_enable=False,
    context_settings={"help_option_names": ["--help", "-h"]},
)


def _version(wanted: bool) -> None:
    if wanted:
        from coppice import __version__

        output.line(f"coppice {__version__}")
        raise typer.Exit


@app.callback(invoke_without_command=True)
def options(
    ctx: typer.Context,
    home: Annotated[
        Path | None,
        typer.Option(
            "--home",
            metavar="DIR",
            envvar="COPPICE_HOME",
            help="Data directory. Default: /var/lib/coppice as root, else ~/.local/share/coppice.",
            file_okay=False,
        ),
    ] = None,
    accel: Annotated[
        Literal["auto", "kvm", "tcg"],
        typer.Option(
            "--accel",
            envvar="COPPICE_ACCEL",
            help="How guests are run: by KVM, or emulated (tcg); auto: by KVM where that can be.",
        ),
    ] = "auto",
    owner: Annotated[
        str | None,
        typer.Option(
            "--owner",
            metavar="NAME",
            envvar="COPPICE_OWNER",
            help="Make and see only what is this owner's. Default: all.",
        ),
    ] = None,
    as_json: Annotated[
        bool,
        typer.Option("--json", help="Print one JSON document, with exact numbers; errors too, on standard output."),
    ] = False,
    debug: Annotated[bool, typer.Option("--debug", help="Show a traceback for errors, and log what is done.")] = False,
    version: Annotated[
        bool, typer.Option("--version", help="Print the version.", callback=_version, is_eager=True)
    ] = False,
) -> None:
    """Grow many virtual machines from one: warm templates, and forks that share their memory.

    Exit status: 0 done, 1 failed, 2 wrong usage, 3 not found, 4 refused in this state, 5 this host cannot.
    """
    del version  # it has ended the program
    factory = ctx.obj
    ctx.obj = Cli(home=home, accel=accel, owner=owner or None, json=as_json, debug=debug, host_factory=factory)
    logging.basicConfig(
        level=logging.DEBUG if debug else logging.WARNING,
        format="coppice: %(name)s: %(message)s" if debug else "coppice: %(message)s",
    )
    if not debug:
        logging.getLogger("asyncio").setLevel(logging.CRITICAL)  # it speaks in tracebacks
    if ctx.invoked_subcommand is None:
        output.line(ctx.get_help())


app.command("doctor")(images.doctor)
app.add_typer(images.image_app, name="image", help="Build, import and list images.")
app.add_typer(images.kernel_app, name="kernel", help="Add, fetch, list and remove guest kernels.")
app.command("run")(lifecycle.run)
app.command("ls")(view.ls)
app.command("inspect")(view.inspect)
app.command("exec", context_settings={"allow_interspersed_args": False})(guest.exec_)
app.command("cp")(guest.cp)
app.command("logs")(guest.logs)
app.command("standby")(lifecycle.standby)
app.command("restore")(lifecycle.restore)
app.command("start")(lifecycle.start)
app.command("stop")(lifecycle.stop)
app.command("promote")(lifecycle.promote)
app.command("demote")(lifecycle.demote)
app.command("fork")(lineage.fork)
app.command("tree")(lineage.tree)
app.add_typer(snapshots.snapshot_app, name="snapshot", help="Keep moments of instances, and go back to them.")
app.add_typer(volumes.volume_app, name="volume", help="Make, list and remove disks that outlive instances.")
app.command("verify")(snapshots.verify)
app.command("stats")(view.stats)
app.command("rm")(lifecycle.rm)
app.command("gc")(view.gc)


@app.command("bench")
def bench() -> None:
    """Measure forks against cold boots and full copies."""
