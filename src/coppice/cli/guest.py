"""Commands inside of a running guest: exec, cp, logs."""

from __future__ import annotations

import os
import sys
import time
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from coppice.cli import complete, format, options, output, parse
from coppice.cli.context import Cli
from coppice.cli.ending import OutputClosed
from coppice.errors import UsageError

if TYPE_CHECKING:
    from coppice.guest.process import Exit
    from coppice.host import AsyncHost

_STDOUT = 1
_TIMED_OUT = 124  # as timeout(1) has it


def exec_(
    ctx: typer.Context,
    name: options.Name,
    command: Annotated[list[str], typer.Argument(metavar="COMMAND", help="After `--`: the program and its arguments.")],
    interactive: Annotated[
        bool, typer.Option("--interactive", "-i", help="Pass standard input on although it is a terminal.")
    ] = False,
    tty: Annotated[
        bool, typer.Option("--tty", "-t", help="Give the command a terminal; `~.` at a line's start leaves it.")
    ] = False,
    no_stdin: Annotated[bool, typer.Option("--no-stdin", "-n", help="Leave standard input alone.")] = False,
    env: Annotated[
        list[str] | None,
        typer.Option(
            "--env",
            "-e",
            metavar="KEY=VALUE",
            help="A variable; repeatable. KEY alone: with the value that it has here.",
        ),
    ] = None,
    workdir: Annotated[str | None, typer.Option("--workdir", "-w", metavar="DIR", help="Working directory.")] = None,
    user: Annotated[str | None, typer.Option("--user", "-u", help="A user name, UID, or UID:GID.")] = None,
    timeout: Annotated[
        float | None, typer.Option("--timeout", metavar="SECONDS", help="End the command after so long.")
    ] = None,
) -> None:
    """Run a command in a Running guest, as ssh does.

    Input, output, signals and exit status are passed through. Standard input is passed on where it is no terminal, or with -i or -t.
    Options go before NAME. Exit status 124: the timeout ended it; 126: it cannot be started; 127: there is no such command in the guest.
    """
    from coppice.cli import session

    cli = Cli.of(ctx)
    argv = command[1:] if command[0] == "--" else command
    if not argv:
        raise UsageError("there is no command to run", hint="write `coppice exec NAME -- COMMAND...`")
    if command[0].startswith("-") and command[0] != "--":
        raise UsageError(
            f"{command[0]!r} is no command", hint="options of exec go before NAME, the command behind `--`"
        )
    if tty and cli.json:
        raise UsageError("a terminal cannot be printed as JSON", hint="leave out -t or --json")
    environment = parse.environment(env or ())
    terminal = tty and os.isatty(0)
    stdin = not no_stdin and _is_open(0) and (interactive or tty or not os.isatty(0))
    captured = session.Captured() if cli.json else None

    async def work(host: AsyncHost) -> Exit:
        async with host.open_exec(
            name,
            argv,
            env=environment,
            workdir=workdir,
            user=user,
            tty=tty,
            size=session.window() if tty else None,
            term=os.environ.get("TERM", "xterm") if tty else None,
            stdin=stdin,
            timeout_s=timeout,
        ) as opened:
            return await session.attach(opened, stdin=stdin, raw=stdin and terminal, forward=not tty, captured=captured)

    started = time.monotonic()
    ended = cli.call(work)
    status = _TIMED_OUT if ended.timed_out else ended.exit_code
    if captured is not None:
        output.document(
            {
                "exit_code": status,
                "timed_out": ended.timed_out,
                "stdout": captured.stdout.decode(errors="replace"),
                "stderr": captured.stderr.decode(errors="replace"),
                "duration_ms": (time.monotonic() - started) * 1000,
            }
        )
    elif ended.timed_out:
        output.complain(f"the command did not end within {timeout:g} s, and was ended")
    raise typer.Exit(status)


def _is_open(descriptor: int) -> bool:
    try:
        os.fstat(descriptor)
    except OSError:
        return False
    return True


def cp(
    ctx: typer.Context,
    source: Annotated[str, typer.Argument(metavar="SRC", help="PATH or NAME:PATH.", autocompletion=complete.paths)],
    target: Annotated[str, typer.Argument(metavar="DST", help="PATH or NAME:PATH.", autocompletion=complete.paths)],
) -> None:
    """Copy files into or out of a Running guest, as `cp -r` would: into a directory that is there, or under a new name.

    NAME:PATH on exactly one side. Links stay links; modes and times are kept, as far as that is safe. In the guest the copy is root's, on the host it is yours.
    """
    cli = Cli.of(ctx)
    name, path, into = parse.copy_ends(source, target)

    async def work(host: AsyncHost) -> int:
        with cli.progress() as progress:
            if into:
                return await host.cp_in(name, Path(source), path, progress=progress)
            return await host.cp_out(name, path, Path(target), progress=progress)

    copied = cli.call(work)
    cli.show({"bytes": copied}, lambda: output.line(f"{format.size(copied)} copied"))


def logs(
    ctx: typer.Context,
    name: options.Name,
    follow: Annotated[
        bool, typer.Option("--follow", "-f", help="Go on with new lines until the machine ends.")
    ] = False,
    lines: Annotated[int | None, typer.Option("--lines", "-n", min=0, help="Only the last so many lines.")] = None,
    vmm: Annotated[bool, typer.Option("--vmm", help="The VMM's own log instead of the guest's console.")] = False,
) -> None:
    """Print the console of a guest. On a terminal, control characters are made visible."""
    from coppice.cli import terminal

    cli = Cli.of(ctx)
    if follow and cli.json:
        raise UsageError("a log that is followed is no one document", hint="leave out -f or --json")
    collected: list[str] = []

    async def read(host: AsyncHost) -> None:
        on_terminal = sys.stdout.isatty()
        async for line in host.logs(name, source="vmm" if vmm else "console", tail=lines, follow=follow):
            if cli.json:
                collected.append(line.decode(errors="replace"))
            else:
                # The serial console ends its lines with CR LF.
                output.write((output.harmless(line.removesuffix(b"\r")) if on_terminal else line) + b"\n")

    try:
        cli.call(lambda host: terminal.while_read(_STDOUT, read(host)))
    except OutputClosed:
        if not follow:
            raise
        raise typer.Exit(0) from None  # `logs -f | grep -m1 ready` is an ordinary way to wait
    if cli.json:
        output.document({"lines": collected})
