"""The migration of image records from JSON files into the database.

images/<64 hex>/image.json      the image as it was first made, next to its root.img
images/names/<sha256>.json      one name: the image's record under that name
"""

from __future__ import annotations

import logging
import re
import sqlite3
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import msgspec

_log = logging.getLogger(__name__)
_HEX = r"[0-9a-f]{64}"


def take_over_images(connection: sqlite3.Connection) -> None:
    """Make the table of images, and import the JSON files next to the database.

    The files stay, but nothing reads them after the import. A record that cannot be read is skipped
    with a warning, so that the data directory can still be opened.
    """
    connection.execute(
        """
        CREATE TABLE images (
            digest     TEXT NOT NULL,
            name       TEXT NOT NULL,
            created_at REAL NOT NULL,
            record     BLOB NOT NULL,
            PRIMARY KEY (digest, name)
        ) STRICT
        """
    )
    connection.execute("CREATE UNIQUE INDEX images_name ON images (name) WHERE name <> ''")
    (_, _, database), *_ = connection.execute("PRAGMA database_list")
    root = Path(database).parent / "images"
    present = {f"sha256:{path.parent.name}" for path in root.glob("*/root.img") if re.fullmatch(_HEX, path.parent.name)}
    named = [image for image in _read(root.glob("names/*.json")) if image["digest"] in present and image["name"]]
    made = [image for image in _read(root.glob("*/image.json")) if image["digest"] in present]
    # If an image's own record is damaged, its oldest name stands for it.
    made += sorted(named, key=lambda image: float(image["created_at"]))
    for image in (*({**image, "name": ""} for image in made), *named):
        image.pop("filesystem", None)
        connection.execute(
            "INSERT OR IGNORE INTO images (digest, name, created_at, record) VALUES (?, ?, ?, ?)",
            (image["digest"], image["name"], image["created_at"], msgspec.json.encode(image)),
        )


def _read(paths: Iterable[Path]) -> list[dict[str, Any]]:
    found = []
    for path in sorted(paths):
        try:
            image = msgspec.json.decode(path.read_bytes())
            if not {"digest", "name", "size_bytes", "config", "source", "created_at"} <= image.keys():
                raise ValueError("not the record of an image")
            found.append(image)
        except (ValueError, AttributeError, OSError) as error:
            _log.warning("skipped the damaged image record %s: %s", path, error)
    return found
