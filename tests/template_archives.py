"""Archives of templates in tests: their content, and changed ones."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from coppice.archive.format import BLOCK, MANIFEST, header, member_of, padding


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
