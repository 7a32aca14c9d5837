"""Access tokens: who calls, and what the caller may do.

A token is a JWT signed with HS256. `sub` is the owner whose records the caller makes and sees; a
token without `sub` is the operator's. `permissions` lists the scopes of the token; a token without
`permissions` has all of them. `exp` is the time at which the token becomes invalid.
"""

from __future__ import annotations

import os
import secrets
import time
from collections.abc import Collection
from pathlib import Path
from typing import Any, Final

import jwt

from coppice.errors import Unauthorized, UsageError
from coppice.linux.files import os_errors
from coppice.model import Record
from coppice.names import check_owner

KEY_FILE: Final = "server.key"
KEY_VARIABLE: Final = "COPPICE_SERVER_KEY"
_ALGORITHM: Final = "HS256"
_HINT: Final = "make a token with `coppice token create` and send it as `Authorization: Bearer TOKEN`"
_LEAST_KEY: Final = 32  # bytes: as long as the hash, RFC 7518 section 3.2
_RESOURCES: Final = ("instance", "image", "volume", "snapshot")
_ACTIONS: Final = ("read", "write", "delete")

ALL: Final = "*"
SCOPES: Final = frozenset(
    {f"{resource}:{action}" for resource in _RESOURCES for action in _ACTIONS} | {"resource:read"}
)
"""All scopes. The names are those of the hypeman API, so that its tokens can be used."""


class Caller(Record, frozen=True, kw_only=True):
    """Who makes a request. `owner` None: the operator.

    `key` is the idempotency key of a POST: a repeated request with the same key has no second
    effect. `request_id` and `client`, the address, are for the audit log.
    """

    owner: str | None = None
    scopes: frozenset[str] = frozenset({ALL})
    key: str | None = None
    request_id: str = ""
    client: str = ""

    def may(self, scope: str) -> bool:
        """Return whether the caller has a scope."""
        return ALL in self.scopes or scope in self.scopes


def load_key(home: Path) -> bytes:
    """Return the signing key: from the environment, else from the data directory, where it is made if
    there is none. Blocks.

    :raises UsageError: the key is too short
    :raises HostCannot: the key's file cannot be read or made
    """
    given = os.environ.get(KEY_VARIABLE)
    if given is not None:
        return _long_enough(given.encode(), KEY_VARIABLE)
    file = home / KEY_FILE
    with os_errors(f"read or make the signing key {file}"):
        if not file.exists():
            home.mkdir(mode=0o700, parents=True, exist_ok=True)
            _make_key(file)
        return _long_enough(file.read_bytes().strip(), str(file))


def _make_key(file: Path) -> None:
    """Write a new key. If another process makes one at the same time, its key stays."""
    new = file.with_name(f".{file.name}.{secrets.token_hex(6)}")
    descriptor = os.open(new, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, 0o600)
    try:
        with os.fdopen(descriptor, "wb") as output:
            output.write(secrets.token_hex(_LEAST_KEY).encode() + b"\n")
            output.flush()
            os.fsync(output.fileno())
        if not file.exists():
            os.link(new, file)
    except FileExistsError:
        pass
    finally:
        new.unlink()


def _long_enough(key: bytes, where: str) -> bytes:
    if len(key) < _LEAST_KEY:
        raise UsageError(
            f"the signing key in {where} has {len(key)} bytes; it must have at least {_LEAST_KEY}",
            hint="make one with `openssl rand -hex 32`",
        )
    return key


def make_token(key: bytes, *, owner: str | None, scopes: Collection[str] = (), ttl_s: float | None = None) -> str:
    """Return a signed token. No scopes: all scopes. No TTL: it never expires.

    :raises UsageError: there is no such scope, or the TTL is not positive
    :raises InvalidName: the owner is not a valid name
    """
    unknown = sorted(set(scopes) - SCOPES - {ALL})
    if unknown:
        raise UsageError(f"there is no scope {unknown[0]!r}", hint=f"choose from: {', '.join(sorted(SCOPES))}")
    if ttl_s is not None and not ttl_s > 0:
        raise UsageError(f"a token cannot live {ttl_s:g} s", hint="give a TTL such as 8h")
    now = time.time()
    claims: dict[str, Any] = {"iat": int(now)}
    if check_owner(owner) is not None:
        claims["sub"] = owner
    if scopes:
        claims["permissions"] = sorted(scopes)
    if ttl_s is not None:
        claims["exp"] = int(now + ttl_s)
    return jwt.encode(claims, key, algorithm=_ALGORITHM)


def read_token(key: bytes, authorization: str | None) -> Caller:
    """Return the caller of an `Authorization` header. The signature is compared in constant time.

    :raises Unauthorized: there is no token, or it is not valid
    """
    scheme, _, token = (authorization or "").partition(" ")
    if scheme.lower() != "bearer" or not token.strip():
        raise Unauthorized("the request has no token", hint=_HINT)
    try:
        claims = jwt.decode(token.strip(), key, algorithms=[_ALGORITHM], options={"verify_aud": False})
        owner = check_owner(claims.get("sub"))
    except jwt.ExpiredSignatureError:
        raise Unauthorized("the token has expired", hint=_HINT) from None
    except (jwt.InvalidTokenError, UsageError):
        raise Unauthorized("the token is not valid for this server", hint=_HINT) from None
    permissions = claims.get("permissions", [ALL])
    if not isinstance(permissions, list) or not all(isinstance(each, str) for each in permissions):
        raise Unauthorized("the token's `permissions` are not a list of scopes", hint=_HINT)
    if {"repos", "build_id"} & claims.keys():  # tokens for other services, signed with the same key
        raise Unauthorized("the token is not for this API", hint=_HINT)
    return Caller(owner=owner, scopes=frozenset(permissions))
