"""A network card in every fake guest, as its kernel shows it."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from pathlib import Path
from unittest.mock import patch

from agent_process import agent_binary
from coppice.host import traffic
from fakes.relay import files_below

CARD = "ens3"
_HEADER = "Inter-|   Receive                                                |  Transmit\n face |bytes ...\n"


def table(**counts: tuple[object, object]) -> str:
    """Return the text of /proc/net/dev: the bytes that each interface has received and sent."""
    rows = (f"  {name}: {got} 2 0 0 0 0 0 0 {sent} 3 0 0 0 0 0 0\n" for name, (got, sent) in counts.items())
    return _HEADER + "".join(rows)


@contextlib.contextmanager
def cards(directory: Path) -> Iterator[Path]:
    """Give fake guests a loopback, a bridge and a card, for a block. Yield the file of their counters."""
    links, counters = directory / "links", directory / "counters"
    links.mkdir()
    for name, where in (("lo", "virtual/net"), ("docker0", "virtual/net"), (CARD, "platform/virtio0/net")):
        (links / name).symlink_to(f"../../devices/{where}/{name}")
    counters.write_text(table(lo=(5, 5), docker0=(7, 7), **{CARD: (1200, 340)}))
    agent_binary("static")  # the first call compiles it, which can take as long as a deadline
    with (
        patch.object(traffic, "LINKS", str(links)),
        patch.object(traffic, "COUNTERS", str(counters)),
        files_below(directory),
    ):
        yield counters
