"""The program: run a command line, and turn its outcome into an exit status."""

from __future__ import annotations

import os
import signal
import sys
import traceback
from collections.abc import Sequence

import click

from coppice.cli import output
from coppice.cli.app import app
from coppice.cli.context import HostFactory, of_the_host, open_host
from coppice.cli.ending import Interrupted, OutputClosed
from coppice.cli.habits import argument_advice, option_advice
from coppice.errors import CoppiceError, UsageError

_WITH_VALUE = ("--home", "--vmm", "--accel", "--owner", "--host")
_GLOBAL_OPTIONS = ("--json", "--debug", *_WITH_VALUE)
_COMPLETE = "_COPPICE_COMPLETE"  # set when the shell asks for completions
_BROKEN_PIPE = 141  # 128 + SIGPIPE, the status of a program that the signal ends


def run(arguments: Sequence[str] | None, host_factory: HostFactory | None) -> int:
    """Run one command line and return its exit status; see `coppice.cli.main`."""
    output.open_streams()
    words = list(sys.argv[1:] if arguments is None else arguments)
    ours = _global_options(words)
    try:
        if _COMPLETE in os.environ:
            from coppice.cli import complete

            complete.register()
        status = app.main(words, prog_name="coppice", standalone_mode=False, obj=host_factory or open_host)
    except OutputClosed:
        return _BROKEN_PIPE
    except Exception as error:
        if isinstance(error.__cause__, KeyboardInterrupt):  # click's Abort: Ctrl-C before the operation, or after it
            error = Interrupted(signal.SIGINT)
        if "--debug" in ours:
            traceback.print_exc()
        if isinstance(error, OSError):
            error = of_the_host(error)
        return _report(error, as_json="--json" in ours)
    return status if isinstance(status, int) else 0


def _global_options(words: Sequence[str]) -> list[str]:
    """Return the words before the command. They are needed even if parsing fails."""
    found: list[str] = []
    rest = iter(words)
    for word in rest:
        if not word.startswith("-") or word == "--":
            break
        found.append(word)
        if word in _WITH_VALUE:
            next(rest, None)
    return found


def _report(error: Exception, *, as_json: bool) -> int:
    """Print an error as JSON or text. Return the exit status."""
    if isinstance(error, Interrupted):
        fields, status = error.fields(), error.exit_code
    else:
        known = _known(error)
        fields, status = output.error_fields(known), known.exit_code
    if as_json and not isinstance(error, output.OutputLost):
        try:
            output.document({"error": fields})
        except OutputClosed:
            return _BROKEN_PIPE
        except output.OutputLost as lost:
            return _report(lost, as_json=False)
    elif not isinstance(error, Interrupted):
        output.complain("; ".join(part for part in (fields["message"], fields["hint"]) if part))
    return status


def _known(error: Exception) -> CoppiceError:
    if isinstance(error, CoppiceError):
        return error
    if isinstance(error, click.ClickException):
        return _misused(error)
    message = " ".join(f"{type(error).__name__}: {error}".split())
    return CoppiceError(f"internal error: {message}", hint="run again with --debug")


def _misused(error: click.ClickException) -> UsageError:
    """Return click's error about the command line as a UsageError."""
    context = getattr(error, "ctx", None)
    command = context.command_path if context is not None else "coppice"
    message = " ".join(error.format_message().split()).rstrip(".").replace(": Value error, ", ": ")
    message = message[:1].lower() + message[1:]
    misplaced = getattr(error, "option_name", None)
    if misplaced in _GLOBAL_OPTIONS and command != "coppice":
        return UsageError(message, hint=f"it goes before the command: `coppice {misplaced} ...`")
    command_name = command.removeprefix("coppice ")
    if misplaced and (meant := option_advice(command_name, misplaced)):
        return UsageError(f"no such option {misplaced!r}", hint=meant)
    if isinstance(error, click.MissingParameter) and error.param is not None:
        meant = argument_advice(command_name, error.param.name or "")
        if meant is not None:
            return UsageError(message, hint=meant)
    return UsageError(message, hint=f"`{command} --help` shows how")
