"""Commands inside a running guest: exec, cp, logs."""

from __future__ import annotations

import os
import sys
import time
from typing import TYPE_CHECKING, Annotated, NoReturn

import click

from coppice.cli import complete, format, options, output, parse
from coppice.cli.context import Cli
from coppice.cli.declare import Argument, Option, ProgramExit, own_words
from coppice.cli.ending import Interrupted, OutputClosed
from coppice.errors import CoppiceError, UsageError

if TYPE_CHECKING:
    from collections.abc import AsyncIterator

    from coppice.cli.session import Captured
    from coppice.client.backend import Backend
    from coppice.model.guest import Exit

_STDIN, _STDOUT = 0, 1
_STREAM = "-"
_TIMED_OUT = 124  # the same as timeout(1)


@own_words
def exec_(
    ctx: click.Context,
    name: options.Name,
    command: Annotated[list[str], Argument(metavar="COMMAND", help="After `--`: the program and its arguments.")],
    interactive: Annotated[
        bool, Option("--interactive", "-i", help="Pass standard input on even if it is a terminal.")
    ] = False,
    tty: Annotated[
        bool, Option("--tty", "-t", help="Give the command a terminal; `~.` at a line's start leaves it.")
    ] = False,
    no_stdin: Annotated[bool, Option("--no-stdin", "-n", help="Leave standard input alone.")] = False,
    env: options.Env = None,
    workdir: Annotated[str | None, Option("--workdir", "-w", metavar="DIR", help="Working directory.")] = None,
    user: Annotated[str | None, Option("--user", "-u", help="A user name, UID, or UID:GID.")] = None,
    timeout: Annotated[
        float | None, Option("--timeout", metavar="SECONDS", help="Kill the command after this time.")
    ] = None,
    memory_limit: Annotated[
        str | None,
        Option("--memory-limit", metavar="SIZE", help="The most memory of all its processes; more kills them."),
    ] = None,
    pids_limit: Annotated[
        int | None, Option("--pids-limit", metavar="N", min=1, help="The most processes and threads that it may have.")
    ] = None,
    detach: Annotated[
        bool,
        Option(
            "--detach", "-d", help="Print the command's id and leave it; -i and -t keep its input open for `attach`."
        ),
    ] = False,
    command_id: Annotated[
        str | None, Option("--id", metavar="ID", help="With -d: an id of your choice, instead of a generated one.")
    ] = None,
    keep: Annotated[
        str | None,
        Option(
            "--keep", metavar="SIZE", help="With -d: how much of its latest output the guest keeps.  [default: 256K]"
        ),
    ] = None,
) -> None:
    """Run a command in a Running guest, as ssh does.

    Input, output, signals and the exit status are passed through. Standard input is passed on
    unless it is a terminal; -i or -t also pass a terminal on. Options go before NAME.

    If this program is killed, the command goes on: see `commands` and `attach`.

    Exit status: the command's, or 124 timed out, 126 cannot be started, 127 no such command in the
    guest.
    """
    from coppice.cli import session
    from coppice.model.guest import KEPT_BYTES
    from coppice.names import parse_size
    from coppice.requests import OpenExecRequest

    cli = Cli.of(ctx)
    argv = command[1:] if command[0] == "--" else command
    if not argv:
        raise UsageError("no command given", hint="write `coppice exec NAME -- COMMAND...`")
    if command[0].startswith("-") and command[0] != "--":
        raise UsageError(
            f"{command[0]!r} is not a command", hint="options of exec go before NAME, the command after `--`"
        )
    if tty and cli.json:
        raise UsageError("a terminal cannot be printed as JSON", hint="omit -t or --json")
    environment = parse.environment(env or ())
    memory_bytes = None if memory_limit is None else parse_size(memory_limit)
    if detach:
        from coppice.requests import CommandStartRequest

        started = cli.request(
            CommandStartRequest(
                instance=name,
                argv=argv,
                env=environment,
                workdir=workdir,
                user=user,
                tty=tty,
                size=session.window() if tty else None,
                term=os.environ.get("TERM", "xterm") if tty else None,
                stdin=interactive or tty,
                timeout_s=timeout,
                memory_limit_bytes=memory_bytes,
                pids_limit=pids_limit,
                command=command_id,
                keep_bytes=KEPT_BYTES if keep is None else parse_size(keep),
            )
        )
        cli.show(started, lambda: output.line(started.id))
        return
    if command_id is not None or keep is not None:
        raise UsageError("--id and --keep are for commands that are left", hint="add -d, or omit them")
    terminal = tty and os.isatty(0)
    stdin = not no_stdin and is_open(0) and (interactive or tty or not os.isatty(0))
    captured = session.Captured() if cli.json else None
    request = OpenExecRequest(
        instance=name,
        argv=argv,
        env=environment,
        workdir=workdir,
        user=user,
        tty=tty,
        size=session.window() if tty else None,
        term=os.environ.get("TERM", "xterm") if tty else None,
        stdin=stdin,
        timeout_s=timeout,
        memory_limit_bytes=memory_bytes,
        pids_limit=pids_limit,
    )

    async def work(host: Backend) -> Exit:
        async with host.stream(request) as opened:
            return await session.attach(opened, stdin=stdin, raw=stdin and terminal, forward=not tty, captured=captured)

    began = time.monotonic()
    ended = cli.call(work)
    limit = "its time limit" if timeout is None else f"{timeout:g} s"
    end(ended, captured, limit=limit, duration_ms=(time.monotonic() - began) * 1000)


def end(ended: Exit, captured: Captured | None, *, limit: str = "its time limit", **more: float) -> NoReturn:
    """Print how a command ended, and end the program with its status. `more` is for the JSON output."""
    if captured is not None:
        output.document(
            {
                "exit_code": status_of(ended),
                "timed_out": ended.timed_out,
                "out_of_memory": ended.out_of_memory,
                "stdout": captured.stdout.decode(errors="replace"),
                "stderr": captured.stderr.decode(errors="replace"),
                **more,
            }
        )
    elif ended.timed_out:
        output.complain(f"the command did not end within {limit}, and was killed")
    elif ended.out_of_memory:
        output.complain("the command used more memory than its limit, and was killed")
    raise ProgramExit(status_of(ended))


def status_of(ended: Exit) -> int:
    """Return the exit status of the program for the end of a command."""
    return _TIMED_OUT if ended.timed_out else ended.exit_code


def is_open(descriptor: int) -> bool:
    try:
        os.fstat(descriptor)
    except OSError:
        return False
    return True


def cp(
    ctx: click.Context,
    source: Annotated[
        str, Argument(metavar="SRC", help="PATH, NAME:PATH, or `-`: a tar archive.", autocompletion=complete.paths)
    ],
    target: Annotated[
        str, Argument(metavar="DST", help="PATH, NAME:PATH, or `-`: a tar archive.", autocompletion=complete.paths)
    ],
    archive: Annotated[
        bool, Option("--archive", "-a", help="Into a guest: keep the numeric owners, instead of root.")
    ] = False,
    outside_links: Annotated[
        bool, Option("--outside-links", help="From a guest: make links that lead out of the copy too.")
    ] = False,
    recursive: options.Recursive = False,
) -> None:
    """Copy files into or out of a Running guest, as `cp -r` does: into an existing directory, or to
    a new name.

    NAME:PATH goes on exactly one side. A DST that ends with a slash is a directory; DIR/. is a
    directory's content. Links stay links. Modes and times are kept, except unsafe ones, and extended
    attributes are not. The copy belongs to root in the guest, and to you on the host. It replaces
    files and links, but no device, pipe or socket. From a guest, a device, a pipe or a link that
    leads out of the copy is refused; an archive has it. With --outside-links such links are made: a
    program that reads the copy may then read files of yours through them.

    `coppice cp - NAME:DIR` unpacks a tar archive from standard input into a directory, with its owners.
    `coppice cp NAME:PATH -` writes one to standard output.
    """
    from coppice.requests import CpInRequest, CpOutRequest

    del recursive
    cli = Cli.of(ctx)
    name, path, into = parse.copy_ends(source, target)
    if _STREAM in (source, target):
        _stream(cli, name, path, into=into)
        return
    copied = cli.request(
        CpInRequest(instance=name, host_path=source, guest_path=path, keep_owners=archive)
        if into
        else CpOutRequest(instance=name, guest_path=path, host_path=target, outside_links=outside_links)
    )
    cli.show({"bytes": copied}, lambda: output.line(f"{format.size(copied)} copied"))


def _stream(cli: Cli, name: str, path: str, *, into: bool) -> None:
    """Unpack an archive from standard input, or write one to standard output."""
    from coppice.agent.copy import archive_in, archive_out
    from coppice.cli import terminal
    from coppice.requests import OpenCopyRequest

    if into and sys.stdin.isatty():
        raise UsageError("an archive cannot be read from a terminal", hint="use a pipe, or `< FILE`")
    if not into and (cli.json or sys.stdout.isatty()):
        where = "JSON" if cli.json else "a terminal"
        raise UsageError(f"an archive cannot be written to {where}", hint="use a pipe, or `> FILE`")
    request = OpenCopyRequest(instance=name)

    async def read() -> AsyncIterator[bytes]:
        while data := await terminal.read(_STDIN):
            yield data

    async def receive(host: Backend) -> int:
        async with host.stream(request) as session:
            return (await archive_in(session, read(), path)).content_bytes

    async def send(host: Backend) -> None:
        async with host.stream(request) as session:
            await archive_out(session, path, lambda data: terminal.write(_STDOUT, data))

    if into:
        copied = cli.call(receive)
        cli.show({"bytes": copied}, lambda: output.line(f"{format.size(copied)} copied"))
    else:
        cli.call(lambda host: terminal.while_read(_STDOUT, send(host)))


def logs(
    ctx: click.Context,
    name: options.Name,
    follow: Annotated[bool, Option("--follow", "-f", help="Print new lines until the machine ends.")] = False,
    lines: Annotated[
        int | None, Option("--lines", "--tail", "-n", min=0, help="Print only the last lines, this many.")
    ] = None,
    vmm: Annotated[bool, Option("--vmm", help="Print the VMM's log instead of the guest's console.")] = False,
) -> None:
    """Print the console of a guest. On a terminal, control characters are escaped."""
    from coppice.cli import terminal
    from coppice.requests import LogsRequest

    cli = Cli.of(ctx)
    if follow and cli.json:
        raise UsageError("a followed log cannot be printed as one JSON document", hint="omit -f or --json")
    document = _LinesDocument() if cli.json else None
    request = LogsRequest(instance=name, source="vmm" if vmm else "console", tail=lines, follow=follow)

    async def read(host: Backend) -> None:
        on_terminal = sys.stdout.isatty()
        async with host.stream(request) as log:
            async for line in log:
                if document is not None:
                    document.add(line)
                else:
                    # The serial console ends its lines with CR LF.
                    output.write((output.harmless(line.removesuffix(b"\r")) if on_terminal else line) + b"\n")

    try:
        cli.call(lambda host: terminal.while_read(_STDOUT, read(host)))
    except OutputClosed:
        if not follow:
            raise
        raise ProgramExit(0) from None  # `logs -f | grep -m1 ready` is a normal way to wait
    except (CoppiceError, Interrupted) as error:
        if document is None or not document.begun:
            raise
        document.end(error)
        raise ProgramExit(error.exit_code) from error
    if document is not None:
        document.end()


class _LinesDocument:
    """`{"lines": [...]}`, printed line by line: a log may be larger than memory."""

    def __init__(self) -> None:
        self.begun = False

    def add(self, line: bytes) -> None:
        """Print the next line of the log."""
        from coppice.model import to_json

        output.write((b"," if self.begun else b'{"lines":[') + to_json(line.decode(errors="replace")))
        self.begun = True

    def end(self, error: CoppiceError | Interrupted | None = None) -> None:
        """End the document, with the error that ended the log early, if any."""
        from coppice.model import to_json

        fields = output.error_fields(error) if isinstance(error, CoppiceError) else error.fields() if error else None
        tail = b"" if fields is None else b',"error":' + to_json(fields)
        output.write((b"" if self.begun else b'{"lines":[') + b"]" + tail + b"}\n")
