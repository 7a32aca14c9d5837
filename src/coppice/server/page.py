"""The web page at `/`, and its files under `/assets/`.

The files are in the package, in `web/`. Only the page itself is made for each request, since its
policy names a nonce. All files are public: they contain nothing of this server.
"""

from __future__ import annotations

import functools
import hashlib
import secrets
from importlib.resources import files
from importlib.resources.abc import Traversable
from typing import Any, Final

from litestar import Request as HttpRequest
from litestar import Response, get
from litestar.exceptions import NotFoundException
from litestar.params import FromPath

from coppice.model import Record

_PAGE: Final = "index.html"
_NONCE: Final = b"{{nonce}}"
_TYPES: Final = {
    "css": "text/css; charset=utf-8",
    "js": "text/javascript; charset=utf-8",
    "mjs": "text/javascript; charset=utf-8",
    "svg": "image/svg+xml",
}
# xterm.js makes style elements, which get the nonce, and sets style attributes for colours.
_POLICY: Final = (
    "default-src 'none'; script-src 'self'; style-src 'self' 'nonce-{nonce}'; style-src-attr 'unsafe-inline'; "
    "img-src 'self'; connect-src 'self'; base-uri 'none'; form-action 'none'; frame-ancestors 'none'; "
    "require-trusted-types-for 'script'; trusted-types 'none'"
)
_HEADERS: Final = {
    "x-content-type-options": "nosniff",
    "referrer-policy": "no-referrer",
    "cross-origin-opener-policy": "same-origin",
    "cross-origin-resource-policy": "same-origin",
}


class _Asset(Record, frozen=True, kw_only=True):
    content: bytes
    media_type: str
    etag: str


@functools.cache
def _root() -> Traversable:
    return files("coppice.server") / "web"


@functools.cache
def _assets() -> dict[str, _Asset]:
    """Return the files by their path under `/assets/`. No other path can be requested."""
    found: dict[str, _Asset] = {}
    pending = [("", _root())]
    while pending:
        prefix, directory = pending.pop()
        for each in directory.iterdir():
            name = prefix + each.name
            if each.is_dir():
                pending.append((name + "/", each))
            elif media_type := _TYPES.get(name.rpartition(".")[2]):
                content = each.read_bytes()
                etag = f'"{hashlib.sha256(content).hexdigest()[:32]}"'
                found[name] = _Asset(content=content, media_type=media_type, etag=etag)
    return found


@get("/", include_in_schema=False, sync_to_thread=False)
def page() -> Response[bytes]:
    """Return the page. It may load this server's files only, and nothing may frame it."""
    nonce = secrets.token_urlsafe(18)
    content = (_root() / _PAGE).read_bytes().replace(_NONCE, nonce.encode())
    headers = {**_HEADERS, "content-security-policy": _POLICY.format(nonce=nonce), "cache-control": "no-store"}
    return Response(content, media_type="text/html; charset=utf-8", headers=headers)


@get("/assets/{name:path}", include_in_schema=False, sync_to_thread=False)
def asset(name: FromPath[str], request: HttpRequest[Any, Any, Any]) -> Response[bytes]:
    """Return a file of the page. A browser that has the same version gets 304."""
    found = _assets().get(name.removeprefix("/"))
    if found is None:
        raise NotFoundException(f"the page has no file {name[:100]!r}")
    headers = {**_HEADERS, "etag": found.etag, "cache-control": "no-cache"}
    if request.headers.get("if-none-match") == found.etag:
        return Response(b"", status_code=304, headers=headers)
    return Response(found.content, media_type=found.media_type, headers=headers)


ROUTES: Final[list[Any]] = [page, asset]
