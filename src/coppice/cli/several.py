"""Commands with several names: carry out the operation for each, even if it fails for others."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import TYPE_CHECKING, TypeVar

from coppice.cli import output
from coppice.cli.context import Cli, of_the_host
from coppice.cli.declare import ProgramExit
from coppice.errors import CoppiceError, NotFound

if TYPE_CHECKING:
    from coppice.client.backend import Backend
    from coppice.model import Instance
    from coppice.requests import Request

T = TypeVar("T")
Ask = Callable[[str], "Request[T]"]
"""Makes the request for one name."""


def is_now(instance: Instance) -> str:
    """Return the line that reports a changed instance."""
    return f"{instance.name} is {instance.state}"


def change(cli: Cli, names: Sequence[str], ask: Ask[T], line: Callable[[T], str]) -> None:
    """Change each in parallel, and print a `line` for each.

    With --json and one name, print the result. With several names, print `done`, a list of results,
    and `failed`, a list of errors with their names.
    """
    done, failed = _each(cli, names, ask)
    if len(names) == 1:
        _raise_first(failed)
        cli.show(done[0], lambda: output.line(line(done[0])))
        return
    _show(cli, "done", done, failed, line)


def inspect(cli: Cli, names: Sequence[str], ask: Ask[T], details: Callable[[T], Iterable[output.Field]]) -> None:
    """Print all fields of each: with --json as a list, else as the `details` of one after the
    other.
    """
    found, failed = _each(cli, names, ask)
    if len(names) == 1:
        _raise_first(failed)
    if cli.json and failed:
        _show(cli, "found", found, failed, str)

    def human() -> None:
        for number, inspection in enumerate(found):
            if number:
                output.line("")
            output.fields(details(inspection))

    cli.show(found, human)
    _end(cli, failed)


def remove(cli: Cli, names: Sequence[str], ask: Ask[None], *, force: bool = False, title: str = "removed") -> None:
    """Remove each. With `force` a missing name counts as removed. `title` is the word for it in JSON."""
    _, failed = _each(cli, names, ask)
    if force:
        failed = {name: error for name, error in failed.items() if not isinstance(error, NotFound)}
    _show(cli, title, [name for name in dict.fromkeys(names) if name not in failed], failed, str)


def show_removal(cli: Cli, removed: Sequence[str], failed: Mapping[str, CoppiceError]) -> None:
    """Print the removed names and the failures. End the program with the status of the first
    failure.
    """
    _show(cli, "removed", removed, failed, str)


def _each(cli: Cli, names: Sequence[str], ask: Ask[T]) -> tuple[list[T], dict[str, CoppiceError]]:
    """Carry out the request for each name; return the results, and the errors by name."""
    wanted = list(dict.fromkeys(names))

    async def work(host: Backend) -> list[T | BaseException]:
        from coppice.completion import each_of

        async def one(name: str) -> T:
            try:
                return await cli.carry_out(host, ask(name))
            except OSError as error:
                raise of_the_host(error) from error

        return await each_of(map(one, wanted))

    done: list[T] = []
    failed: dict[str, CoppiceError] = {}
    for name, outcome in zip(wanted, cli.call(work), strict=True):
        if isinstance(outcome, CoppiceError):
            failed[name] = outcome
        elif isinstance(outcome, BaseException):
            raise outcome
        else:
            done.append(outcome)
    return done, failed


def _show(
    cli: Cli, title: str, done: Sequence[T], failed: Mapping[str, CoppiceError], line: Callable[[T], str]
) -> None:
    if cli.json:
        failures = [output.error_fields(failure) | {"name": name} for name, failure in failed.items()]
        document: dict[str, object] = {title: done, "failed": failures}
        first = next(iter(failed.values()), None)
        output.document(document if first is None else document | {"error": output.error_fields(first)})
    else:
        for each in done:
            output.line(line(each))
    _end(cli, failed)


def _end(cli: Cli, failed: Mapping[str, CoppiceError]) -> None:
    """Print the failures. If there are any, end the program with the status of the first one."""
    if not cli.json:
        for failure in failed.values():
            output.complain(str(failure))
    if failed:
        raise ProgramExit(next(iter(failed.values())).exit_code)


def _raise_first(failed: Mapping[str, CoppiceError]) -> None:
    for failure in failed.values():
        raise failure
