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
    *(
        "bz2",
        "certifi",
        "ctypes",
        "hashlib",
        "idna",
        "inspect",
        "ipaddress",
        "json",
        "linecache",
        "locale",
        "lzma",
        "mimetypes",
        "random",
        "shutil",
    ),
    *("ssl", "textwrap", "tokenize", "zlib"),
    *("asyncio.sslproto", "httpx", "msgspec.inspect"),
)
# What a package has only if others are installed, and no command needs: the command line of httpx, which takes half of
# its import, and a compression that no server of Coppice uses; a third of the import of msgspec, for older Pythons.
_WITHOUT: Final = {"httpx": ("pygments", "zstandard"), "msgspec": ("typing_extensions",)}
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
        return getattr(import_small(self.__name__), name)


def import_small(name: str) -> ModuleType:
    """Import a module as if the optional packages that no command needs were not installed."""
    if name in sys.modules:
        return import_module(name)  # which waits if another thread imports it now
    modules: dict[str, object] = sys.modules  # type: ignore[assignment]  # None: the import fails, as documented
    absent = [each for each in _WITHOUT.get(name, ()) if each not in modules]
    modules.update(dict.fromkeys(absent))
    try:
        return import_module(name)
    finally:
        for each in absent:
            modules.pop(each, None)
