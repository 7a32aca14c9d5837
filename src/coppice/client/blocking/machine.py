# Written by tools/generate_client.py from client/aio: change that, then run it.

"""Machine: the handle of one machine."""

from __future__ import annotations

from types import TracebackType
from typing import TYPE_CHECKING, Self

from coppice.client.blocking.automation import MachineAutomation
from coppice.client.blocking.commands import Commands
from coppice.client.blocking.files import Files
from coppice.client.blocking.guest import MachineGuest
from coppice.client.blocking.lifecycle import MachineLifecycle
from coppice.model import MemoryReport, TreeNode

if TYPE_CHECKING:
    pass


class Machine(MachineLifecycle, MachineAutomation, MachineGuest):
    """One machine. Methods that change the machine update `record` and return the handle.

        with host.run("debian") as vm:
            print((vm.exec(["uname", "-r"])).stdout)

    At the end of an `with` block the machine is removed.
    """

    @property
    def commands(self) -> Commands:
        """Commands that go on without their client: start, list, attach to and end them."""
        return Commands(self._portal, self._twin.commands)

    @property
    def files(self) -> Files:
        """Files and directories of the guest: list, make, move, remove and watch them."""
        return Files(self._portal, self._twin.files)

    def refresh(self) -> Self:
        """Read the machine's current record.

        :raises NotFound: the machine was removed
        """
        self._portal.call(self._twin.refresh())
        return self

    def freeze(self, *, public: bool | None = None, notify: int | str | None = None) -> Self:
        """Make a Running or Standby machine a template: `standby`, then `promote`. A Template stays
        one.

        :param public: As for `promote`.
        :param notify: As for `promote`.
        """
        self._portal.call(self._twin.freeze(public=public, notify=notify))
        return self

    def stats(self) -> MemoryReport | None:
        """Return the machine's memory as the kernel accounts it, or None if it holds no memory."""
        return self._portal.call(self._twin.stats())

    def tree(self) -> list[TreeNode]:
        """Return the machine, its forks and their forks, in the order of a drawn tree."""
        return self._portal.call(self._twin.tree())

    def read_text(self, path: str, *, encoding: str = "utf-8") -> str:
        """Return the content of a text file of the guest.

        :param path: A path in the guest.
        :param encoding: The encoding of the file.
        :raises UnicodeDecodeError: the file is not text in that encoding
        :raises UsageError: there is no such encoding
        """
        return self._portal.call(self._twin.read_text(path, encoding=encoding))

    def write_text(self, path: str, text: str, *, mode: int = 420, encoding: str = "utf-8") -> None:
        """Write a text file in the guest atomically. Missing parent directories are made.

        :param path: A path in the guest.
        :param text: The content.
        :param mode: Permission bits.
        :param encoding: The encoding of the file.
        :raises UsageError: there is no such encoding, or it does not have all characters of the text
        """
        self._portal.call(self._twin.write_text(path, text, mode=mode, encoding=encoding))

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._portal.call(self._twin.__aexit__(kind, error, trace))
