"""nftables through libnftables, the library of the `nft` command, without starting a process.

A ruleset is text in `nft` syntax, applied as one transaction to the calling thread's network
namespace.
"""

from __future__ import annotations

import ctypes
import functools
import json
from typing import Any, Final

from coppice.errors import HostCannot

_LIBRARY: Final = "libnftables.so.1"
_AS_JSON: Final = 1 << 4


class Refused(Exception):
    """The kernel or the parser refused a ruleset; the message is that of nftables."""


@functools.cache
def _library() -> ctypes.CDLL:
    try:
        library = ctypes.CDLL(_LIBRARY)
    except OSError as error:
        raise HostCannot("libnftables is not installed", hint="apt-get install libnftables1") from error
    library.nft_ctx_new.restype = ctypes.c_void_p
    library.nft_ctx_get_error_buffer.restype = ctypes.c_char_p
    library.nft_ctx_get_output_buffer.restype = ctypes.c_char_p
    library.nft_run_cmd_from_buffer.argtypes = (ctypes.c_void_p, ctypes.c_char_p)
    for name in (
        "nft_ctx_buffer_error",
        "nft_ctx_buffer_output",
        "nft_ctx_get_error_buffer",
        "nft_ctx_get_output_buffer",
    ):
        getattr(library, name).argtypes = (ctypes.c_void_p,)
    library.nft_ctx_free.argtypes = (ctypes.c_void_p,)
    library.nft_ctx_free.restype = None
    library.nft_ctx_output_set_flags.argtypes = (ctypes.c_void_p, ctypes.c_uint)
    return library


def available() -> bool:
    """Whether the library is installed."""
    try:
        _library()
    except HostCannot:
        return False
    return True


def apply(ruleset: str) -> None:
    """Apply a ruleset completely or not at all. Blocks.

    :raises Refused: the message is that of nftables
    :raises HostCannot: the library is not installed
    """
    _run(ruleset, 0)


def read(command: str) -> list[dict[str, Any]]:
    """Run a `list` command and return the objects of libnftables-json(5). Blocks.

    :raises Refused: the message is that of nftables
    :raises HostCannot: the library is not installed
    """
    listed: list[dict[str, Any]] = json.loads(_run(command, _AS_JSON) or b'{"nftables": []}')["nftables"]
    return listed


def _run(command: str, flags: int) -> bytes:
    library = _library()
    context = library.nft_ctx_new(0)  # opens its socket in this thread's namespace
    if not context:
        raise HostCannot("nftables cannot be used", hint="load the module nf_tables: modprobe nf_tables")
    try:
        library.nft_ctx_buffer_output(context)
        library.nft_ctx_buffer_error(context)
        library.nft_ctx_output_set_flags(context, flags)
        status = library.nft_run_cmd_from_buffer(context, command.encode())
        if status != 0:
            raise Refused(library.nft_ctx_get_error_buffer(context).decode(errors="replace").strip())
        output: bytes = library.nft_ctx_get_output_buffer(context)
        return output
    finally:
        library.nft_ctx_free(context)
