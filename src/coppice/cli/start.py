"""Faster start of commands: import less, and do not collect garbage during imports."""

from __future__ import annotations

import contextlib
import gc
import sys
import threading
from collections.abc import Iterator
from importlib import import_module
from types import ModuleType
from typing import Final

_SELDOM_USED: Final = (
    *("bz2", "ctypes", "hashlib", "inspect", "ipaddress", "json", "linecache", "locale", "lzma", "random", "shutil"),
    *("ssl", "textwrap", "tokenize", "zlib"),
    *("asyncio.sslproto", "msgspec.inspect"),
)
_replacing: Final = threading.Lock()


@contextlib.contextmanager
def without_collection() -> Iterator[None]:
    """Disable the garbage collector during a block of imports, which make no garbage.

    `collect_again` enables it before the end of the block.
    """
    was_enabled = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        if was_enabled:
            gc.enable()


def collect_again() -> None:
    """Enable the collector for the operation, but exclude all existing objects from collection."""
    gc.freeze()
    gc.enable()


def defer_imports() -> None:
    """Let modules that are imported by many others, and seldom used, be imported at their first use.

    They would take a sixth of the time of `coppice ls`.
    """
    for name in _SELDOM_USED:
        if name not in sys.modules:
            sys.modules[name] = _Deferred(name)


class _Deferred(ModuleType):
    """Stands for a module in `sys.modules`. The first use of an attribute imports the module.

    `importlib.util.LazyLoader` will not do: in Python 3.11 a second `import` statement is a use.
    """

    def __getattr__(self, name: str) -> object:
        with _replacing:
            if sys.modules.get(self.__name__) is self:
                del sys.modules[self.__name__]
        return getattr(import_module(self.__name__), name)


def import_msgspec() -> None:
    """Import msgspec without typing_extensions. msgspec prefers it, but only older Pythons need it.

    It takes a third of the time of the import.
    """
    if {"msgspec", "typing_extensions"} & sys.modules.keys():
        return
    modules: dict[str, object] = sys.modules  # type: ignore[assignment]  # None: the import fails, as documented
    modules["typing_extensions"] = None
    try:
        import_module("msgspec")
    finally:
        del modules["typing_extensions"]
