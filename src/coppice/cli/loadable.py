"""Marks, in lists, for captures that can no longer be loaded here."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any, Final

from coppice.cli import output, table

if TYPE_CHECKING:
    from coppice.model import Instance, Snapshot

MARK = "!"
_MOST_NAMED: Final = 8


def state(text: str, holder: Instance | Snapshot, reasons: Mapping[str, str]) -> str:
    """Return a coloured state, with a mark if its capture cannot be loaded."""
    return table.Styled(f"{text} {MARK}", table.BAD) if holder.id in reasons else table.state(text)


def marked(holder: Instance | Snapshot, reasons: Mapping[str, str]) -> dict[str, Any]:
    """Return the fields of a record for JSON, with the reason or null as `unloadable`."""
    import msgspec

    fields: dict[str, Any] = msgspec.to_builtins(holder)
    return fields | {"unloadable": reasons.get(holder.id)}


def explain(holders: Mapping[str, str], reasons: Mapping[str, str]) -> None:
    """Print the reasons of the marks below a list. `holders` has the names by id."""
    for reason in dict.fromkeys(reasons.values()):
        names = [holders[each] for each in holders if reasons.get(each) == reason]
        more = f" and {len(names) - _MOST_NAMED} more" if len(names) > _MOST_NAMED else ""
        output.complain(
            f"{MARK} can no longer be loaded here: {', '.join(names[:_MOST_NAMED])}{more} ({reason}); "
            "`coppice fork NAME --target stopped` keeps the disk"
        )
