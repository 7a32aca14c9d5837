"""The base of all data types, units, and conversion to JSON.

Modules that define records have real annotations: no `from __future__ import annotations`. msgspec
would compile each annotation from its text, which takes milliseconds in every process.
"""

from pathlib import Path, PurePath
from typing import Any

import msgspec

MIB = 1 << 20
GIB = 1 << 30
PAGE_SIZE = 4096


class Record(msgspec.Struct, frozen=True, kw_only=True):
    """Base of all data types: immutable, keyword-only; see `msgspec.structs.replace`."""


def to_json(value: object) -> bytes:
    """Return a JSON document. Bytes become base64, enums their value, paths text."""
    return msgspec.json.encode(value, enc_hook=_encoded)


def from_json(document: bytes | str, kind: Any) -> Any:
    """Return the value of a type that `to_json` has encoded.

    :raises msgspec.MsgspecError: the document is not of this type
    """
    return msgspec.json.decode(document, type=kind, dec_hook=_decoded)


def _encoded(value: object) -> object:
    if isinstance(value, PurePath):
        return str(value)
    raise NotImplementedError(f"{type(value).__name__} has no JSON form")


def _decoded(kind: type, value: object) -> object:
    if issubclass(kind, PurePath) and isinstance(value, str):
        return Path(value)
    raise NotImplementedError(f"{kind.__name__} has no JSON form")


def to_builtins(value: object) -> Any:
    """Return the same value as dicts, lists and strings."""
    return msgspec.to_builtins(value)
