"""Requests of the agent protocol that only clients of other versions send."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Final

from coppice.agent.protocol import FrameType, encode_fields
from coppice.agent.session import Session
from coppice.model.guest import Source, Unpacked

APPEND: Final = 1
MAKE_PARENTS: Final = 2


async def read_range(session: Session, path: str, offset: int, length: int | None = None) -> bytes:
    """Return a part of a file."""
    fields = encode_fields([(1, path), (2, offset), (3, length)])
    return b"".join([chunk async for chunk in session._download(FrameType.FILE_READ, fields)])


async def write_with(
    session: Session, path: str, data: Source, flags: int = MAKE_PARENTS, owner: Sequence[int | None] = (None, None)
) -> None:
    """Write a file with these flags, for an owner (uid and gid)."""
    fields = encode_fields([(1, path), (3, owner[0]), (4, owner[1]), (5, flags)])
    await session._upload(FrameType.FILE_WRITE, fields, data)


async def tree_into_new(session: Session, directory: str, records: Source) -> Unpacked:
    """Make a directory and a tree below it."""
    reply = await session._upload(FrameType.TREE_IN, encode_fields([(1, directory), (2, 1)]), records)
    return Unpacked(members=reply.integer(1), content_bytes=reply.integer(2))
