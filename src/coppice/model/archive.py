"""Archives of templates, as streams."""

from collections.abc import AsyncIterable, AsyncIterator
from typing import Protocol

from coppice.model.instance import Instance


class ExportSession(Protocol):
    """An archive that is being written. Iterate over it once."""

    @property
    def most_bytes(self) -> int:
        """About how many bytes it will have at most."""

    def __aiter__(self) -> AsyncIterator[bytes]:
        """Yield the archive.

        :raises IntegrityError: a captured file has changed; what was yielded is not a whole archive
        """


class ImportSession(Protocol):
    """A template that is being made of an archive."""

    async def receive(self, archive: AsyncIterable[bytes]) -> Instance:
        """Take an archive, and return the template. It exists only if the whole archive is valid."""
