"""Parameters and plain values of the hypeman API: image names with slashes, ids, `tags[k]=v`, durations and times."""

from __future__ import annotations

import re
from datetime import UTC, datetime
from typing import Any, Final
from urllib.parse import unquote

from litestar.types import ASGIApp, Receive, Scope, Send
from msgspec import UNSET, UnsetType

from coppice.errors import NotFound, Refused, UsageError
from coppice.host import LocalBackend
from coppice.model import Instance
from coppice.requests import GetRequest, LsRequest

_TAG: Final = re.compile(r"tags\[(?P<key>[^\]]*)\]")
_PART: Final = re.compile(r"(\d+(?:\.\d*)?|\.\d+)(h|ms|m|s|us|µs|ns)")
_UNITS: Final = {"h": 3600.0, "m": 60.0, "s": 1.0, "ms": 1e-3, "us": 1e-6, "µs": 1e-6, "ns": 1e-9}


class Ambiguous(Refused):
    """A prefix of several ids."""

    code = "ambiguous"


class EncodedSlashes:
    """ASGI middleware: keep `%2F` in a path, so that an image name is one segment.

    A server decodes paths before it routes them, and would take the slashes of
    `docker.io%2Flibrary%2Falpine` for separators.
    """

    def __init__(self, app: ASGIApp) -> None:
        self._app = app

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Pass a request on."""
        raw = bytes(scope.get("raw_path") or b"")
        if b"%2f" in raw.lower():
            parts = raw.decode("ascii", "replace").partition("?")[0].split("/")
            kept = [unquote(each).replace("%", "%25").replace("/", "%2F") for each in parts]
            changed: dict[str, Any] = {**scope, "path": "/".join(kept)}
            scope = changed  # type: ignore[assignment]
        await self._app(scope, receive, send)


def name_in_path(segment: str) -> str:
    """Return the image name of a path segment."""
    return unquote(segment)


def tags_in(query: list[tuple[str, str]]) -> dict[str, str]:
    """Return the filter `tags[k]=v` of a query."""
    return {found["key"]: value for name, value in query if (found := _TAG.fullmatch(name))}


def seconds(text: str) -> float:
    """Return the seconds of a Go duration such as `1m30s`.

    :raises UsageError: the text is not a duration
    """
    parts = list(_PART.finditer(text))
    if text != "0" and (not parts or "".join(part[0] for part in parts) != text):
        raise UsageError(f"{text[:40]!r} is not a duration", hint="write a duration such as 30s or 1m30s")
    return sum(float(part[1]) * _UNITS[part[2]] for part in parts)


def go_duration(duration_s: float) -> str:
    """Return a duration in seconds, such as `90s` or `0.5s`."""
    return f"{duration_s:.9f}".rstrip("0").rstrip(".") + "s"


async def find(host: LocalBackend, key: str) -> Instance:
    """Return the instance with this id or name, or the only one whose id starts with it.

    :raises NotFound: there is none
    :raises Ambiguous: several ids start with it
    """
    try:
        return await host.call(GetRequest(instance=key))
    except NotFound:
        matching = [each for each in await host.call(LsRequest()) if each.id.startswith(key)]
        if not matching:
            raise
    if len(matching) > 1:
        raise Ambiguous(f"{len(matching)} ids start with {key!r}", hint="write more of the id")
    return matching[0]


def moment(seconds: float) -> datetime:
    """Return the time of a record."""
    return datetime.fromtimestamp(seconds, UTC)


def moment_if(seconds: float | None) -> datetime | UnsetType:
    """Return the time of a record that may have none."""
    return UNSET if seconds is None else moment(seconds)
