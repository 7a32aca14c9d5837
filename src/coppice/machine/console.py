"""The console of a machine's present run, and the search for a text in it.

A check of health by a line of the console (`log`) succeeds once the guest has printed its text. The
guest's memory goes on in forks and restored machines, and their consoles begin empty. So a capture
records what the console had shown (`Capture.printed`), and each search begins with that. A boot
begins with nothing.
"""

from __future__ import annotations

import os
from pathlib import Path
from typing import Final

from coppice.completion import in_thread
from coppice.linux.files import os_errors
from coppice.model import MIB, Instance
from coppice.vmm import driver as files

SEEN: Final = "process.seen"
"""The file with the size of the console when the agent was last asked for the end of the process."""


def size(directory: Path, of: str = files.CONSOLE_LOG) -> int:
    """Return the bytes in a machine's console log, or in another one; 0 if there is none. Blocks."""
    try:
        return os.stat(f"{directory}/{of}").st_size  # noqa: PTH116 - a fork does this many times
    except OSError:
        return 0


class Search:
    """The search for a text in the console of an instance's present run. The guest can print any bytes."""

    def __init__(self, directory: Path, instance: Instance, text: str) -> None:
        self._path = directory / files.CONSOLE_LOG
        self._wanted = text
        self._text = text.encode()
        self._last = (instance.capture.printed if instance.capture else "").encode()  # before the next byte
        self._at = instance.console_from
        self._found = self._text in self._last

    def found(self, end: int | None = None) -> bool:
        """Return whether the console shows the text. Go on where the last call ended. Blocks.

        :param end: ignore bytes from this offset on
        """
        if not self._found and self._path.exists():
            with os_errors("search the console"), self._path.open("rb") as log:
                log.seek(self._at)
                while not self._found and (data := log.read(MIB if end is None else min(MIB, max(end - self._at, 0)))):
                    self._at += len(data)
                    self._last += data
                    self._found = self._text in self._last
                    self._last = self._last[max(len(self._last) - len(self._text) + 1, 0) :]
        return self._found

    def printed(self, end: int) -> str:
        """Return the text if the console shows it, else the part of it with which the console ends. Blocks.

        The rest may be printed after a capture.
        """
        if self.found(end):
            return self._wanted
        beginnings = (self._wanted[:length] for length in range(len(self._wanted) - 1, 0, -1))
        return next((each for each in beginnings if self._last.endswith(each.encode())), "")


async def printed(directory: Path, instance: Instance, end: int) -> str:
    """Return how much of the text of an instance's check the console has shown, for its capture.

    :param end: the size of the console at the instant of the capture
    """
    check = instance.health_check
    if check is None or check.kind != "log":
        return ""
    return await in_thread(Search(directory, instance, check.text).printed, end)
