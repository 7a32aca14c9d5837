"""Faster start of commands: import less, and do not collect garbage during imports."""

from __future__ import annotations

import contextlib
import gc
import sys
from collections.abc import Iterator
from importlib import import_module


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


def import_asyncio() -> None:
    """Import asyncio without ssl. asyncio needs it only for TLS, which no command uses.

    It takes a third of the time of the import.
    """
    _import_without("ssl", "asyncio")


def import_msgspec() -> None:
    """Import msgspec without typing_extensions. msgspec prefers it, but only older Pythons need it.

    It takes a third of the time of the import.
    """
    _import_without("typing_extensions", "msgspec")


def _import_without(unwanted: str, name: str) -> None:
    if name in sys.modules or unwanted in sys.modules:
        return
    modules: dict[str, object] = sys.modules  # type: ignore[assignment]  # None: the import fails, as documented
    modules[unwanted] = None
    try:
        import_module(name)
    finally:
        del modules[unwanted]
