"""What commands do alike with several things of a kind: show them, and remove them."""

from __future__ import annotations

from collections.abc import Awaitable, Callable, Iterable, Mapping, Sequence
from typing import TYPE_CHECKING, TypeVar

import typer

from coppice.cli import output
from coppice.cli.context import Cli
from coppice.errors import CoppiceError

if TYPE_CHECKING:
    from coppice.host import AsyncHost

T = TypeVar("T")


def inspect(
    cli: Cli,
    names: Sequence[str],
    ask: Callable[[AsyncHost, str], Awaitable[T]],
    details: Callable[[T], Iterable[output.Field]],
) -> None:
    """Print all that is known of each: for programs a list, for people their `details` one below the other."""

    async def work(host: AsyncHost) -> list[T]:
        import asyncio

        return list(await asyncio.gather(*(ask(host, name) for name in names)))

    found = cli.call(work)

    def human() -> None:
        for number, inspection in enumerate(found):
            if number:
                output.line("")
            output.fields(details(inspection))

    cli.show(found, human)


def remove(cli: Cli, names: Sequence[str], ask: Callable[[AsyncHost, str], Awaitable[None]]) -> None:
    """Remove each, one after the other. One that cannot be removed does not keep the others."""

    async def work(host: AsyncHost) -> tuple[list[str], dict[str, CoppiceError]]:
        removed: list[str] = []
        failed: dict[str, CoppiceError] = {}
        for name in dict.fromkeys(names):
            try:
                await ask(host, name)
                removed.append(name)
            except CoppiceError as error:
                failed[name] = error
        return removed, failed

    show_removal(cli, *cli.call(work))


def show_removal(cli: Cli, removed: Sequence[str], failed: Mapping[str, CoppiceError]) -> None:
    """Print what was removed and what could not be; the program ends with the first failure's status."""
    first = next(iter(failed.values()), None)
    if cli.json:
        failures = [output.error_fields(failure) | {"name": name} for name, failure in failed.items()]
        document: dict[str, object] = {"removed": removed, "failed": failures}
        output.document(document if first is None else document | {"error": output.error_fields(first)})
    else:
        for name in removed:
            output.line(name)
        for failure in failed.values():
            output.complain(str(failure))
    if first is not None:
        raise typer.Exit(first.exit_code)
