"""AsyncMachine: the handle of one machine."""

from __future__ import annotations

import contextlib
from functools import cached_property
from types import TracebackType
from typing import TYPE_CHECKING, Self

from coppice.arguments import checked
from coppice.client.aio.automation import MachineAutomation
from coppice.client.aio.guest import MachineGuest
from coppice.client.aio.lifecycle import MachineLifecycle
from coppice.completion import complete
from coppice.errors import NotFound, UsageError
from coppice.model import MemoryReport, State, TreeNode
from coppice.requests import GetRequest, StatsRequest, TreeRequest

if TYPE_CHECKING:
    from coppice.client.aio.commands import AsyncCommands
    from coppice.client.aio.files import AsyncFiles


class AsyncMachine(MachineLifecycle, MachineAutomation, MachineGuest):
    """One machine. Methods that change the machine update `record` and return the handle.

        async with host.run("debian") as vm:
            print((await vm.exec(["uname", "-r"])).stdout)

    At the end of an `async with` block the machine is removed.
    """

    @cached_property
    def commands(self) -> AsyncCommands:
        """Commands that go on without their client: start, list, attach to and end them."""
        from coppice.client.aio.commands import AsyncCommands

        return AsyncCommands(self._backend, self.id)

    @cached_property
    def files(self) -> AsyncFiles:
        """Files and directories of the guest: list, make, move, remove and watch them."""
        from coppice.client.aio.files import AsyncFiles

        return AsyncFiles(self._backend, self.id)

    async def refresh(self) -> Self:
        """Read the machine's current record.

        :raises NotFound: the machine was removed
        """
        return self._became(await self._backend.call(GetRequest(instance=self.id)))

    @checked
    async def freeze(self, *, public: bool | None = None, notify: int | str | None = None) -> Self:
        """Make a Running or Standby machine a template: `standby`, then `promote`. A Template stays
        one.

        :param public: As for `promote`.
        :param notify: As for `promote`.
        """
        if (await self.refresh()).state is not State.TEMPLATE:
            await self.standby()
        return await self.promote(public=public, notify=notify)

    async def stats(self) -> MemoryReport | None:
        """Return the machine's memory as the kernel accounts it, or None if it holds no memory."""
        return (await self._backend.call(StatsRequest(instance=self.id))).get(self.name)

    async def tree(self) -> list[TreeNode]:
        """Return the machine, its forks and their forks, in the order of a drawn tree."""
        return await self._backend.call(TreeRequest(instance=self.id))

    @checked
    async def read_text(self, path: str, *, encoding: str = "utf-8") -> str:
        """Return the content of a text file of the guest.

        :param path: A path in the guest.
        :param encoding: The encoding of the file.
        :raises UnicodeDecodeError: the file is not text in that encoding
        :raises UsageError: there is no such encoding
        """
        _encoded("", encoding)
        return (await self.read_file(path)).decode(encoding)

    @checked
    async def write_text(self, path: str, text: str, *, mode: int = 0o644, encoding: str = "utf-8") -> None:
        """Write a text file in the guest atomically. Missing parent directories are made.

        :param path: A path in the guest.
        :param text: The content.
        :param mode: Permission bits.
        :param encoding: The encoding of the file.
        :raises UsageError: there is no such encoding, or it does not have all characters of the text
        """
        await self.write_file(path, _encoded(text, encoding), mode=mode)

    async def __aenter__(self) -> Self:
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        with contextlib.suppress(NotFound):  # removed inside the block
            await complete(self.rm())


def _encoded(text: str, encoding: str) -> bytes:
    try:
        "x".encode(encoding)  # an encoding of nothing is not looked up
        return text.encode(encoding)
    except UnicodeEncodeError as error:
        raise UsageError(
            f"the text cannot be written in {encoding!r}: {error.reason}", hint="use an encoding such as utf-8"
        ) from None
    except (LookupError, ValueError):
        raise UsageError(f"there is no encoding {encoding!r}", hint="use one such as utf-8") from None
