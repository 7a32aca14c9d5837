"""The program: run a command line, and turn whatever comes out of it into an exit status."""

from __future__ import annotations

import sys
import traceback
from collections.abc import Sequence

import typer

from coppice.cli import output
from coppice.cli.app import app
from coppice.cli.context import HostFactory, open_host
from coppice.cli.ending import Interrupted, OutputClosed
from coppice.errors import CoppiceError, UsageError

_WITH_VALUE = ("--home", "--accel", "--owner")
_GLOBAL_OPTIONS = ("--json", "--debug", *_WITH_VALUE)
_BROKEN_PIPE = 141  # 128 + SIGPIPE, as a program has it that does not catch the signal


def run(arguments: Sequence[str] | None, host_factory: HostFactory | None) -> int:
    """Run one command line and return its exit status; see `coppice.cli.main`."""
    output.open_streams()
    words = list(sys.argv[1:] if arguments is None else arguments)
    ours = _global_options(words)
    try:
        status = typer.main.get_command(app).main(
            words, prog_name="coppice", standalone_mode=False, obj=host_factory or open_host
        )
    except OutputClosed:
        return _BROKEN_PIPE
    except Exception as error:
        if "--debug" in ours:
            traceback.print_exc()
        if isinstance(
            error, OSError
        ):  # not one of the work, which has made it the host's: the help could not be printed
            output.discard()
            error = output.unwritten(error)
        return _report(error, as_json="--json" in ours)
    return status if isinstance(status, int) else 0


def _global_options(words: Sequence[str]) -> list[str]:
    """The words before the command, which may be all that there is to go by when they cannot be parsed."""
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
    """Say what went wrong, to people or to a program. Returns the exit status."""
    if isinstance(error, Interrupted):
        fields, status = {"code": "interrupted", "message": f"ended by {error}", "hint": None}, error.exit_code
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
    if isinstance(error, typer.TyperException):
        return _misused(error)
    message = " ".join(f"{type(error).__name__}: {error}".split())
    return CoppiceError(f"internal error: {message}", hint="run again with --debug")


def _misused(error: typer.TyperException) -> UsageError:
    """An error of the command line's grammar, as ours."""
    context = getattr(error, "ctx", None)
    command = context.command_path if context is not None else "coppice"
    message = error.format_message().rstrip(".").replace(": Value error, ", ": ")
    message = message[:1].lower() + message[1:]
    if "\n" in message:  # a group without a command: its whole help
        message = "missing command"
    misplaced = getattr(error, "option_name", None)
    if misplaced in _GLOBAL_OPTIONS and command != "coppice":
        return UsageError(message, hint=f"it goes before the command: `coppice {misplaced} ...`")
    return UsageError(message, hint=f"`{command} --help` shows how")
