"""Commands that go on in a guest without a client: commands, attach, kill, wait."""

from __future__ import annotations

import contextlib
import os
import shlex
from typing import TYPE_CHECKING, Annotated

import click

from coppice.cli import complete, format, guest, options, output
from coppice.cli.context import Cli
from coppice.cli.declare import Argument, Option, ProgramExit
from coppice.cli.ending import Left
from coppice.errors import IllegalTransition, NotFound, UsageError

if TYPE_CHECKING:
    from coppice.client.backend import Backend
    from coppice.model.guest import Exit, GuestCommand

CommandId = Annotated[
    str, Argument(metavar="ID", help="Id of a command, as `commands` prints it.", autocompletion=complete.commands)
]


def commands(ctx: click.Context, name: options.Name, quiet: options.Quiet = False) -> None:
    """List the commands of a Running guest, oldest first: those that run, and the latest that have
    ended.

    OUTPUT is of both streams, in all. DROPPED is how much of it, at its beginning, the guest no
    longer keeps.
    """
    from coppice.requests import CommandLsRequest

    cli = Cli.of(ctx)
    found = cli.request(CommandLsRequest(instance=name))

    def human() -> None:
        if quiet:
            for each in found:
                output.line(each.id)
            return
        output.table(
            [("ID", "left"), ("STATE", "left"), ("AGE", "right"), ("OUTPUT", "right"), ("DROPPED", "right"), ("COMMAND", "left")],
            [
                [
                    each.id,
                    _state(each),
                    format.age(each.started_at),
                    format.size(each.output_bytes),
                    format.size(each.dropped_bytes) if each.dropped_bytes else "-",
                    output.printable(shlex.join(each.argv)),
                ]
                for each in found
            ],
            optional=("DROPPED",),
        )  # fmt: skip

    cli.show(found, human)


def _state(command: GuestCommand) -> str:
    if command.exit_code is None:
        return "Running (attached)" if command.attached else "Running"
    reason = ", timed out" if command.timed_out else ", out of memory" if command.out_of_memory else ""
    return f"Exited ({command.exit_code}{reason})"


def attach(
    ctx: click.Context,
    name: options.Name,
    command: CommandId,
    offset: Annotated[
        int, Option("--offset", metavar="BYTES", min=0, help="Begin with this byte of the output of both streams.")
    ] = 0,
    no_stdin: Annotated[
        bool, Option("--no-stdin", "-n", help="Only watch: pass neither input nor signals on.")
    ] = False,
) -> None:
    """Attach to a command in a Running guest: print its output from the beginning, and follow it.

    Input, signals and the exit status are passed through as by `exec`, also the end of the input,
    if the command was started with -i or -t. On a terminal, `~.` at a line's start leaves the
    command, which goes on. Without a terminal, Ctrl-C is for the command, and the third one
    leaves it; with -n, the first one does.
    """
    from coppice.cli import session
    from coppice.requests import CommandAttachRequest, CommandLsRequest

    cli = Cli.of(ctx)
    captured = session.Captured() if cli.json else None

    async def work(host: Backend) -> Exit:
        found = _named(await host.call(CommandLsRequest(instance=name)), name, command)
        stdin = found.stdin and found.exit_code is None and not no_stdin and guest.is_open(0)
        raw = stdin and found.tty and os.isatty(0)
        async with host.stream(
            CommandAttachRequest(instance=name, command=command, offset=offset, stdin=stdin)
        ) as opened:
            if raw:
                await opened.resize(*session.window())
            return await session.attach(
                opened, stdin=stdin, raw=raw, forward=not found.tty and not no_stdin, captured=captured
            )

    try:
        ended = cli.call(work)
    except Left:
        output.complain(f"left command {command}, which goes on: `coppice attach {name} {command}`")
        raise ProgramExit(0) from None
    guest.end(ended, captured)


def _named(found: list[GuestCommand], name: str, command: str) -> GuestCommand:
    for each in found:
        if each.id == command:
            return each
    raise NotFound(f"{name} has no command {command}", hint=f"`coppice commands {name}` lists them")


def kill(
    ctx: click.Context,
    name: options.Name,
    ids: Annotated[
        list[str] | None,
        Argument(metavar="ID", help="Ids of commands, as `commands` prints them.", autocompletion=complete.commands),
    ] = None,
    signal: Annotated[
        str | None, Option("--signal", "-s", metavar="SIGNAL", help="Send this signal, such as INT or 2, and no other.")
    ] = None,
) -> None:
    """End commands in a Running guest, with all processes that they have started.

    Each process gets SIGTERM, and half a second later SIGKILL. With --signal, only the process group of
    the command gets that signal.
    """
    from coppice.cli import several
    from coppice.requests import CommandKillRequest

    if not ids:
        raise UsageError(
            "no command given",
            hint=f"`coppice commands {name}` lists commands; `coppice stop --grace 0 {name}` ends the machine at once",
        )
    number = None if signal is None else _signal(signal)
    several.remove(
        Cli.of(ctx),
        ids,
        lambda command: CommandKillRequest(instance=name, command=command, signal=number),
        title="killed",
    )


def _signal(text: str) -> int:
    """Return the number of a signal: `15`, `TERM` or `SIGTERM`."""
    import signal

    if text.isdecimal():
        return int(text)
    word = text.upper()
    try:
        return int(signal.Signals[word if word.startswith("SIG") else f"SIG{word}"])
    except KeyError:
        raise UsageError(f"there is no signal {text!r}", hint="write a name or a number, such as INT or 2") from None


def forget(
    ctx: click.Context,
    name: options.Name,
    ids: Annotated[
        list[str] | None,
        Argument(metavar="ID", help="Ids of commands, as `commands` prints them.", autocompletion=complete.commands),
    ] = None,
    everything: Annotated[bool, Option("--all", help="All commands that have ended.")] = False,
) -> None:
    """Forget commands of a Running guest that have ended, with their output.

    A guest forgets the oldest of more than 64 by itself.
    """
    from coppice.cli import several
    from coppice.commands import PROCESS
    from coppice.requests import CommandForgetRequest, CommandLsRequest

    if bool(ids) == everything:
        raise UsageError("forget needs ids or --all", hint=f"`coppice commands {name}` lists commands")
    cli = Cli.of(ctx)
    if everything:
        found = cli.request(CommandLsRequest(instance=name))
        ids = [each.id for each in found if each.exit_code is not None and each.id != PROCESS]
    several.remove(
        cli,
        ids or [],
        lambda command: CommandForgetRequest(instance=name, command=command),
        title="forgotten",
    )


def wait(
    ctx: click.Context,
    name: options.Name,
    command: Annotated[
        str | None,
        Argument(
            metavar="ID",
            help="Id of a command, as `commands` prints it. Default: the machine's process.",
            autocompletion=complete.commands,
        ),
    ] = None,
    timeout: Annotated[
        float | None, Option("--timeout", metavar="SECONDS", help="Fail if it still runs after this time.")
    ] = None,
) -> None:
    """Wait for the end of the machine's process, or of a command in it.

    Without ID, print the exit status of the machine's process, as `docker wait` does. If the
    machine ends before its process tells one, that is 0, or 1 after a failure. The exit status
    of `wait` is that of the process or command, as with `exec`.
    """
    from coppice.requests import WaitProcessRequest

    cli = Cli.of(ctx)
    if command is not None:
        ended = cli.call(lambda host: _end_of(host, name, command, timeout))
        if cli.json:
            output.document(ended)
        raise ProgramExit(guest.status_of(ended))
    instance = cli.request(WaitProcessRequest(instance=name, deadline_s=timeout))
    end = instance.process_end
    status = int(instance.ending == "failed") if end is None else end.exit_code
    if end is None and not cli.json:
        output.complain(f"{instance.name} has ended: {output.printable(instance.exit_reason or 'it was stopped')}")
    cli.show({"exit_code": status, "process_end": end, "state": instance.state}, lambda: output.line(str(status)))
    raise ProgramExit(status)


async def _end_of(host: Backend, name: str, command: str, timeout_s: float | None) -> Exit:
    """Wait for the end of a command.

    A hint is for users who mean two machines, as with `docker wait`.
    """
    from coppice.requests import CommandWaitRequest, GetRequest

    try:
        return await host.call(CommandWaitRequest(instance=name, command=command, deadline_s=timeout_s))
    except (NotFound, IllegalTransition) as error:
        with contextlib.suppress(NotFound):
            other = await host.call(GetRequest(instance=command))
            error.hint = (
                f"{other.name!r} is a machine, and the second word a command's id: "
                f"`coppice wait {name}`, then `coppice wait {other.name}`, waits for both machines"
            )
        raise
