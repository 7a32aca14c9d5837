"""Sizes as text, such as `1GB`: units are powers of 1024, as in hypeman."""

from __future__ import annotations

import re
from typing import Final

from coppice.errors import UsageError

_UNITS: Final = ("B", "KB", "MB", "GB", "TB")
_SIZE: Final = re.compile(r"(?P<number>\d{1,12}(?:\.\d{1,6})?)\s*(?P<unit>[KMGT]?)i?B?", re.IGNORECASE)


def parse_size(text: str, what: str) -> int:
    """Return the bytes of a size.

    :raises UsageError: the text is not a size
    """
    found = _SIZE.fullmatch(text.strip())
    if found is None:
        raise UsageError(f"the {what} {text!r} is not a size", hint="write a number and a unit, such as 512MB or 2GB")
    power = "BKMGT".index(found["unit"].upper() or "B")
    return int(float(found["number"]) * 1024**power)


def show_size(size: int) -> str:
    """Return a size as hypeman prints it: `512.0 MB`."""
    number, unit = float(size), 0
    while number >= 1024 and unit < len(_UNITS) - 1:
        number, unit = number / 1024, unit + 1
    return f"{number:.1f} {_UNITS[unit]}"
