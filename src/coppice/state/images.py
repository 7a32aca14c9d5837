"""Records of images and their names.

The table has one row without a name for each image, made with the image, and one row per name,
which holds the image's record under that name. Names are unique across owners. Every change is one
transaction.
"""

from __future__ import annotations

import sqlite3
from collections.abc import Callable

import msgspec

from coppice.completion import QuickCalls
from coppice.errors import InUse, NameTaken, NotFound
from coppice.model import Image
from coppice.state.database import Database
from coppice.state.volumes import SHOWN_NAME

_encode = msgspec.json.Encoder().encode
# Made at import, in one thread: two threads that first decode a type at once can crash msgspec.
_decode = msgspec.json.Decoder(Image).decode

Allowed = Callable[[Image], bool]
"""Whether a caller may see an image."""


def everyone(_: Image) -> bool:
    """Allow all images."""
    return True


class ImageRecords(QuickCalls):
    """All methods block; see `Database`."""

    def __init__(self, database: Database) -> None:
        self._db = database

    def all(self) -> list[Image]:
        """Return the image of each name, and each image without a name (`name` is empty), oldest
        first.
        """
        with self._db.read() as connection:
            rows = connection.execute(
                """
                SELECT record FROM images AS image
                WHERE name <> '' OR NOT EXISTS (SELECT 1 FROM images WHERE digest = image.digest AND name <> '')
                ORDER BY created_at, name
                """
            ).fetchall()
        return [_decode(row[0]) for row in rows]

    def named(self, name: str) -> Image | None:
        """Return the image with this name, or None."""
        with self._db.read() as connection:
            return _named(connection, name)

    def add(self, image: Image, place: Callable[[], None]) -> None:
        """Record a new image and its name.

        `place` moves the content to its final path inside the transaction. If the process is killed
        in between, the content has no record.

        :raises NameTaken: another owner has the name
        """
        with self._db.write(durable=True) as connection:
            _refuse_taken(connection, image.name, image.owner)
            place()
            _insert(connection, msgspec.structs.replace(image, name=""), "OR IGNORE")
            _move_name(connection, image)

    def refuse_taken(self, name: str, owner: str | None) -> None:
        """Raise NameTaken if another owner has the name."""
        with self._db.read() as connection:
            _refuse_taken(connection, name, owner)

    def tag(self, image: Image) -> None:
        """Give a recorded image the name in `image`, taking the name from any other image.

        :raises NotFound: the image is gone
        :raises NameTaken: another owner has the name
        """
        with self._db.write(durable=True) as connection:
            if not _is_recorded(connection, image.digest):
                raise _gone(image.digest)
            _refuse_taken(connection, image.name, image.owner)
            _move_name(connection, image)

    def remove(self, digest: str, name: str | None, allowed: Allowed) -> bool:
        """Remove one name, or all allowed names if `name` is None, and with the last name the
        image's record.

        Return whether the record was removed.

        :raises NotFound: the image is gone, or no longer has this name
        :raises InUse: instances or snapshots use it; the message names them
        """
        with self._db.write() as connection:
            names = _names(connection, digest)
            if not _is_recorded(connection, digest) or (name is not None and name not in names):
                raise _gone(name or digest)
            doomed = [name] if name is not None else [each for each in names if allowed(names[each])]
            if len(doomed) < len(names):
                connection.executemany("DELETE FROM images WHERE name = ?", [(each,) for each in doomed])
                return False
            if users := _users(connection, digest):
                raise InUse(
                    f"the image {name or digest!r} is used by {', '.join(users)}",
                    hint="remove them first with `coppice rm` or `coppice snapshot rm`, or keep it under another name with `coppice image tag`",
                )
            connection.execute("DELETE FROM images WHERE digest = ?", (digest,))
        return True

    def retire(self, digest: str, rename: Callable[[], None]) -> None:
        """Call `rename` in a transaction that finds no record of the image.

        No record can be added meanwhile.

        :raises InUse: an image with this digest was made meanwhile
        """
        with self._db.write() as connection:
            if _is_recorded(connection, digest):
                raise InUse(f"the image {digest} was made again meanwhile", hint="to remove it, repeat the command")
            rename()

    def forget_unnamed(self, *, dry_run: bool = False) -> set[str]:
        """Remove the records of images that have no name and no user; return their digests.

        With `dry_run`, only return them.
        """
        with self._db.write() as connection:
            verb, end = ("SELECT digest", "") if dry_run else ("DELETE", "RETURNING digest")
            rows = connection.execute(
                f"""
                {verb} FROM images WHERE digest NOT IN (
                    SELECT digest FROM images WHERE name <> ''
                    UNION SELECT image FROM instances UNION SELECT image FROM snapshots
                ) {end}
                """  # noqa: S608 - constants
            ).fetchall()
        return {row[0] for row in rows}

    def digests(self) -> set[str]:
        """Return the digests of all images."""
        with self._db.read() as connection:
            return {row[0] for row in connection.execute("SELECT digest FROM images WHERE name = ''")}


def _named(connection: sqlite3.Connection, name: str) -> Image | None:
    row = connection.execute("SELECT record FROM images WHERE name = ? AND name <> ''", (name,)).fetchone()
    return _decode(row[0]) if row else None


def _names(connection: sqlite3.Connection, digest: str) -> dict[str, Image]:
    rows = connection.execute(
        "SELECT name, record FROM images WHERE digest = ? AND name <> '' ORDER BY name", (digest,)
    ).fetchall()
    return {name: _decode(record) for name, record in rows}


def _is_recorded(connection: sqlite3.Connection, digest: str) -> bool:
    return connection.execute("SELECT 1 FROM images WHERE digest = ?", (digest,)).fetchone() is not None


def _users(connection: sqlite3.Connection, digest: str) -> list[str]:
    rows = connection.execute(
        f"""
        SELECT {SHOWN_NAME} AS name FROM instances WHERE image = ?1
        UNION SELECT name FROM snapshots WHERE image = ?1 ORDER BY name
        """,  # noqa: S608 - a constant
        (digest,),
    ).fetchall()
    return [row[0] for row in rows]


def _refuse_taken(connection: sqlite3.Connection, name: str, owner: str | None) -> None:
    """Refuse the name of another owner's image; only the operator may take it."""
    holder = _named(connection, name)
    if holder is not None and owner not in (None, holder.owner):
        raise NameTaken(f"the image name {name!r} is taken", hint="choose another")


def _move_name(connection: sqlite3.Connection, image: Image) -> None:
    connection.execute("DELETE FROM images WHERE name = ?", (image.name,))
    _insert(connection, image)


def _insert(connection: sqlite3.Connection, image: Image, conflict: str = "") -> None:
    connection.execute(
        f"INSERT {conflict} INTO images (digest, name, created_at, record) VALUES (?, ?, ?, ?)",  # noqa: S608 - a constant
        (image.digest, image.name, image.created_at, _encode(image)),
    )


def _gone(reference: str) -> NotFound:
    return NotFound(f"the image {reference!r} no longer exists", hint="list the images with `coppice image ls`")
