"""Commands with several names: carry out the operation for each, even if it fails for others."""

from __future__ import annotations

from collections.abc import Awaitable, Callable, Iterable, Mapping, Sequence
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


def itself(_: str, result: object) -> object:
    """Return a result as its own document."""
    return result


def is_now(instance: Instance) -> str:
    """Return the line that reports a changed instance."""
    return f"{instance.name} is {instance.state}"


def change(
    cli: Cli,
    names: Sequence[str],
    ask: Ask[T],
    line: Callable[[T], str],
    *,
    title: str = "done",
    document: Callable[[str, T], object] = itself,
) -> None:
    """Carry out the request for each in parallel, and print a `line` for each; see `show`."""
    show(cli, names, _asking(cli, ask), lambda done: _lines(map(line, done.values())), title=title, document=document)


def show(
    cli: Cli,
    names: Sequence[str],
    work: Callable[[Backend, str], Awaitable[T]],
    human: Callable[[Mapping[str, T]], None],
    *,
    title: str = "done",
    document: Callable[[str, T], object] = itself,
    in_order: bool = False,
) -> None:
    """Do the work for each, in parallel or `in_order`, and print the results by name as `human` does.

    With --json and one name, print the `document` of the result. With several names, print `title`, a
    list of documents, and `failed`, a list of errors with their names.
    """
    done, failed = _each(cli, names, work, in_order=in_order)
    documents = [document(name, result) for name, result in done.items()]
    if len(names) == 1:
        _raise_first(failed)
        cli.show(documents[0], lambda: human(done))
        return
    _show(cli, title, documents, failed, lambda: human(done))


def inspect(cli: Cli, names: Sequence[str], ask: Ask[T], details: Callable[[T], Iterable[output.Field]]) -> None:
    """Print all fields of each: with --json as a list, else as the `details` of one after the
    other.
    """
    done, failed = _each(cli, names, _asking(cli, ask))
    found = list(done.values())
    if len(names) == 1:
        _raise_first(failed)

    def human() -> None:
        for number, inspection in enumerate(found):
            if number:
                output.line("")
            output.fields(details(inspection))

    if cli.json and failed:
        _show(cli, "found", found, failed, human)
    cli.show(found, human)
    _end(cli, failed)


def remove(cli: Cli, names: Sequence[str], ask: Ask[None], *, force: bool = False, title: str = "removed") -> None:
    """Remove each. With `force` a missing name is no error. `title` is the word for the removed ones in JSON."""
    done, failed = _each(cli, names, _asking(cli, ask))
    if force:
        failed = {name: error for name, error in failed.items() if not isinstance(error, NotFound)}
    _show(cli, title, list(done), failed, lambda: _lines(done))


def show_removal(cli: Cli, removed: Sequence[str], failed: Mapping[str, CoppiceError]) -> None:
    """Print the removed names and the failures. End the program with the status of the first
    failure.
    """
    _show(cli, "removed", removed, failed, lambda: _lines(removed))


def _asking(cli: Cli, ask: Ask[T]) -> Callable[[Backend, str], Awaitable[T]]:
    return lambda host, name: cli.carry_out(host, ask(name))


def _lines(texts: Iterable[str]) -> None:
    for text in texts:
        output.line(text)


def _each(
    cli: Cli, names: Sequence[str], do: Callable[[Backend, str], Awaitable[T]], *, in_order: bool = False
) -> tuple[dict[str, T], dict[str, CoppiceError]]:
    """Do something for each name; return the results and the errors by name."""
    wanted = list(dict.fromkeys(names))

    async def work(host: Backend) -> list[T | BaseException]:
        from coppice.completion import each_of

        async def one(name: str) -> T:
            try:
                return await do(host, name)
            except OSError as error:
                raise of_the_host(error) from error

        if in_order:
            return [outcome for name in wanted for outcome in await each_of([one(name)])]
        return await each_of(map(one, wanted))

    done: dict[str, T] = {}
    failed: dict[str, CoppiceError] = {}
    for name, outcome in zip(wanted, cli.call(work), strict=True):
        if isinstance(outcome, CoppiceError):
            failed[name] = outcome
        elif isinstance(outcome, BaseException):
            raise outcome
        else:
            done[name] = outcome
    return done, failed


def _show(
    cli: Cli, title: str, done: Sequence[object], failed: Mapping[str, CoppiceError], human: Callable[[], None]
) -> None:
    if cli.json:
        failures = [output.error_fields(failure) | {"name": name} for name, failure in failed.items()]
        document: dict[str, object] = {title: done, "failed": failures}
        first = next(iter(failed.values()), None)
        output.document(document if first is None else document | {"error": output.error_fields(first)})
    else:
        human()
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
