"""Words of the command line that are more than a word: `KEY=VALUE`, `HOST:GUEST/udp`, `NAME:PATH`, a state."""

from __future__ import annotations

import contextlib
import os
import re
import sys
from collections.abc import Iterable, Sequence
from ipaddress import ip_address
from pathlib import Path
from typing import TYPE_CHECKING, Literal

from coppice.errors import UsageError

if TYPE_CHECKING:
    from coppice.model import Publish, State, VolumeMount

_PUBLISH = re.compile(
    r"(?:(?P<address>\[[^\]]+\]|[^:]+):)?(?P<host>\d{1,5}|auto):(?P<guest>\d{1,5})(?:/(?P<protocol>tcp|udp))?"
)
_VOLUME = re.compile(r"(?P<name>[^:]+):(?P<path>/[^:]*)(?::(?P<mode>ro|rw))?", re.DOTALL)
_MAX_PAYLOADS_FILE = 256 << 20
_REMOTE = re.compile(r"(?P<name>[A-Za-z0-9][A-Za-z0-9-]*):(?P<path>.*)", re.DOTALL)


def pairs(words: Iterable[str], what: str) -> dict[str, str]:
    """Read `KEY=VALUE` words; a later one wins.

    :raises UsageError: one has no `=`
    """
    found: dict[str, str] = {}
    for word in words:
        key, equals, value = word.partition("=")
        if not equals or not key:
            raise UsageError(f"{word!r} is not a {what}", hint="write KEY=VALUE")
        found[key] = value
    return found


def environment(words: Iterable[str], files: Iterable[Path] = ()) -> dict[str, str]:
    """The environment of `--env` and `--env-file`. A bare `KEY` takes its value from our own environment, as `docker run` has it.

    A file has one `KEY=VALUE` in a line; empty lines and lines that start with `#` are left out. Words win over files.

    :raises UsageError: a file cannot be read, or a bare KEY is not set
    """
    lines: list[str] = []
    for file in files:
        try:
            text = file.read_text()
        except (OSError, UnicodeDecodeError) as error:
            reason = error.strerror if isinstance(error, OSError) else "it is not text"
            raise UsageError(
                f"the environment file {file} cannot be read: {reason}", hint="give another path"
            ) from error
        lines += [line for line in text.splitlines() if line.strip() and not line.lstrip().startswith("#")]
    return pairs((_inherited(word) for word in [*lines, *words]), "variable")


def _inherited(word: str) -> str:
    if "=" in word or not word:
        return word
    if word not in os.environ:
        raise UsageError(f"the variable {word!r} is not set here", hint="write KEY=VALUE, or export it first")
    return f"{word}={os.environ[word]}"


def publish(words: Iterable[str]) -> tuple[Publish, ...]:
    """Read forwarded ports: `HOST:GUEST`, `ADDRESS:HOST:GUEST`, each with `/udp` or `/tcp` behind it. An IPv6 address is in brackets.

    The address `own` is a loopback address of the instance's own, the host port `auto` any that is free.

    :raises UsageError: one is malformed, or has a port that is out of range
    """
    from coppice.model import ANY_PORT, Publish

    ports: list[Publish] = []
    for word in words:
        found = _PUBLISH.fullmatch(word)
        if not found:
            raise UsageError(
                f"{word!r} is not a published port",
                hint="write HOST:GUEST, ADDRESS:HOST:GUEST, own:HOST:GUEST, auto:GUEST or HOST:GUEST/udp",
            )
        protocol: Literal["tcp", "udp"] = "udp" if found["protocol"] == "udp" else "tcp"
        ports.append(
            Publish(
                host_port=ANY_PORT if found["host"] == "auto" else _port(found["host"]),
                guest_port=_port(found["guest"]),
                protocol=protocol,
                host_address=_address(found["address"]) if found["address"] else "127.0.0.1",
            )
        )
    return tuple(ports)


def _port(text: str) -> int:
    if not 1 <= int(text) <= 65535:
        raise UsageError(f"there is no port {text}", hint="ports are 1 to 65535")
    return int(text)


def _address(text: str) -> str:
    from coppice.model import OWN_ADDRESS

    if text == OWN_ADDRESS:
        return text
    try:
        return str(ip_address(text.removeprefix("[").removesuffix("]")))
    except ValueError as error:
        raise UsageError(f"{text!r} is not an IP address", hint="write one such as 127.0.0.1 or [::1]") from error


def volumes(words: Iterable[str]) -> tuple[VolumeMount, ...]:
    """Read attached volumes: `NAME:/path`, and `:ro` behind it where the machine is only to read.

    :raises UsageError: one is malformed
    """
    from coppice.model import VolumeMount

    mounts: list[VolumeMount] = []
    for word in words:
        found = _VOLUME.fullmatch(word)
        if not found:
            raise UsageError(f"{word!r} is not a volume with its path", hint="write NAME:/path or NAME:/path:ro")
        mounts.append(VolumeMount(volume=found["name"], mount_path=found["path"], readonly=found["mode"] == "ro"))
    return tuple(mounts)


def states(words: Iterable[str]) -> list[State]:
    """Read states, in any case.

    :raises UsageError: there is no such state
    """
    from coppice.model import State

    known = {state.value.lower(): state for state in State}
    for word in (found := list(words)):
        if word.lower() not in known:
            raise UsageError(f"there is no state {word!r}", hint=f"the states are {', '.join(State)}")
    return [known[word.lower()] for word in found]


def forks_payloads(shared: str | None, each: str | None) -> tuple[bytes | None, list[bytes]]:
    """Read `--payload` and `--payloads`, where they are given.

    :raises UsageError: see `payload` and `payloads`
    """
    return None if shared is None else payload(shared), [] if each is None else payloads(each)


def fork_count(count: int | None, each: Sequence[bytes], names: Sequence[str]) -> int:
    """How many forks are meant: as many as was said, else as there are payloads or names, else one."""
    return count if count is not None else max(1, len(each) or len(names))


def payload(word: str) -> bytes:
    """Read `--payload`: JSON itself, if it begins as an object, array or string does; else the bytes of a file, or of standard input for `-`.

    :raises UsageError: the file cannot be read or is too large, or the JSON is malformed
    """
    from coppice.names import MAX_PAYLOAD

    if word.startswith(("{", "[", '"')):
        data = word.encode("utf-8", "surrogateescape")
        _check_json(data, "the payload")
        return data
    return _content(word, MAX_PAYLOAD)


def payloads(word: str) -> list[bytes]:
    """Read `--payloads`: a file (`-`: standard input) with one JSON array, or with one JSON document in each line. Each is a payload, byte for byte.

    :raises UsageError: the file cannot be read or is too large, or is neither
    """
    import msgspec

    data = _content(word, _MAX_PAYLOADS_FILE)
    try:
        return [bytes(each) for each in msgspec.json.decode(data, type=list[msgspec.Raw])]
    except msgspec.MsgspecError:
        found = [line for line in data.splitlines() if line.strip()]
    if not found:
        raise UsageError(f"the file {word} has no payloads", hint="write one JSON document in each line")
    for number, line in enumerate(found, 1):
        _check_json(line, f"payload {number} of {word}")
    return found


def _check_json(data: bytes, what: str) -> None:
    import msgspec

    try:
        msgspec.json.decode(data)
    except (msgspec.MsgspecError, UnicodeDecodeError) as error:
        raise UsageError(f"{what} is not JSON: {error}", hint="write JSON, or give the name of a file") from error


def _content(path: str, most: int) -> bytes:
    try:
        with contextlib.nullcontext(sys.stdin.buffer) if path == "-" else Path(path).open("rb") as file:
            data = file.read(most + 1)
    except OSError as error:
        raise UsageError(f"the file {path} cannot be read: {error.strerror}", hint="give another path") from error
    if len(data) > most:
        raise UsageError(f"the file {path} has more than {most} bytes", hint="make the payloads smaller")
    return data


def copy_ends(source: str, target: str) -> tuple[str, str, bool]:
    """Read the two ends of `cp`: the instance's name, its path, and whether the copy goes into it.

    `NAME:PATH` is in an instance; `./NAME:PATH` and `/NAME:PATH` are not.

    :raises UsageError: not exactly one end is in an instance, or its path is empty
    """
    remote_source, remote_target = _REMOTE.fullmatch(source), _REMOTE.fullmatch(target)
    if bool(remote_source) is bool(remote_target):
        both = "both ends are" if remote_source else "neither end is"
        raise UsageError(
            f"{both} in an instance", hint="write NAME:PATH on exactly one side; a local path with a colon as ./PATH"
        )
    remote = remote_source or remote_target
    if remote is None or not remote["path"]:
        raise UsageError("the path in the instance is empty", hint="write NAME:PATH")
    return remote["name"], remote["path"], remote_target is not None
