"""Archives of templates in tests: their content, and changed ones."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from coppice.archive.format import BLOCK, MANIFEST, header, member_of, padding
from coppice.client import AsyncHost
from coppice.model import Instance, State
from coppice.requests import ForkRequest, PromoteRequest, RmRequest, StandbyRequest
from fakes.hosting import ask, boot


def fingerprints(paths: Iterable[Path]) -> dict[str, tuple[int, str]]:
    """Return of each file its size and its digest."""
    return {path.name: (path.stat().st_size, _digest(path)) for path in paths}


def _digest(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def rewritten(
    archive: Path, changed: Path, template: dict[str, Any] | None = None, *, path: str = "", **values: Any
) -> Path:
    """Write an archive with another manifest, and return its path.

    :param template: new values of the template's record, by their places, such as `machine.cpus`
    :param path: of the first file. The sizes of the first file can be changed too
    """
    content = archive.read_bytes()
    size = member_of(content[:BLOCK]).size
    manifest = json.loads(content[BLOCK : BLOCK + size])
    for place, value in (template or {}).items():
        *above, last = place.split(".")
        record = manifest["template"]
        for each in above:
            record = record[each]
        record[last] = value
    if path:
        manifest["files"][0]["path"] = path
    for name, value in values.items():
        (manifest["files"][0] if name.endswith("_bytes") else manifest)[name] = value
    text = json.dumps(manifest).encode()
    rest = content[BLOCK + size + len(padding(size)) :]
    changed.write_bytes(header(MANIFEST, len(text)) + text + padding(len(text)) + rest)
    return changed


async def template(host: AsyncHost, *, layered: bool = False) -> Instance:
    """Return the template `oak`, which has something in its memory and on its disk."""
    await boot(host, "stump")
    await ask(host, "stump", "remember", "own", "rings")
    await ask(host, "stump", "save", "bark")
    parked = (await host.call(StandbyRequest(instance="stump"))).instance
    if layered:
        await host.call(ForkRequest(instance=parked.id, names=["oak"], atomic=True))
        await ask(host, "oak", "remember", "more", "leaves")
        await host.call(StandbyRequest(instance="oak"))
    else:
        await host.call(ForkRequest(instance=parked.id, names=["oak"], target=State.STANDBY, atomic=True))
    await host.call(RmRequest(instance="stump"))
    return await host.call(PromoteRequest(instance="oak"))
