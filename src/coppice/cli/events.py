"""`coppice events`."""

from __future__ import annotations

from typing import TYPE_CHECKING, Annotated

import click

from coppice.cli import format, output
from coppice.cli.context import Cli
from coppice.cli.declare import Option

if TYPE_CHECKING:
    from coppice.client.backend import Backend
    from coppice.model.events import Event


def events(
    ctx: click.Context,
    follow: Annotated[bool, Option("--follow", "-f", help="Print new events until a signal.")] = False,
    after: Annotated[
        int | None,
        Option("--after", metavar="ID", min=0, help="Begin after this event. Default: all; with -f only new ones."),
    ] = None,
) -> None:
    """Print what happened to instances: made, changed state, removed.

    With --json and --follow: one JSON document per line.
    """
    from coppice.requests import EventsRequest

    cli = Cli.of(ctx)
    kept: list[Event] = []

    async def read(host: Backend) -> None:
        async with host.stream(EventsRequest(after=after, follow=follow)) as found:
            async for event in found:
                if not cli.json:
                    output.line(_text(event))
                elif follow:
                    output.line(_json(event))
                else:
                    kept.append(event)

    cli.call(read)
    if cli.json and not follow:
        output.document(kept)


def _json(event: Event) -> str:
    from coppice.model import to_json

    return to_json(event).decode()


def _text(event: Event) -> str:
    if event.kind == "lost":
        return f"{event.id}  older events are no longer kept"
    state = f"  {event.state}" if event.state and event.kind != "removed" else ""
    detail = f"  {output.printable(event.detail)}" if event.detail else ""
    return f"{event.id}  {format.moment(event.at)}  {event.kind}  {event.name}{state}{detail}"
