"""Parsing of structured words: `KEY=VALUE`, `HOST:GUEST/udp`, `NAME:PATH`, states, payloads."""

from __future__ import annotations

import contextlib
import os
import re
import sys
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from coppice.errors import UsageError

if TYPE_CHECKING:
    from coppice.model import Egress, HealthCheck, Limits, Publish, RestartPolicy, State, VolumeMount

# Compiled at their first use: that takes longer than most commands have for them.
_PUBLISH = r"(?:(?P<address>\[[^\]]+\]|[^:]+):)?(?P<host>\d{1,5}|auto):(?P<guest>\d{1,5})(?:/(?P<protocol>tcp|udp))?"
_VOLUME = r"(?P<name>[^:/.~$][^:/]*):(?P<path>/[^:]*)(?::(?P<mode>ro|rw))?"
_MOUNT = (
    "write NAME:/path or NAME:/path:ro; `coppice volume create NAME` makes a volume. A directory of this host cannot "
    "be mounted: `coppice cp DIR NAME:/path` copies it into a machine"
)
_UNITS = {"s": 1, "m": 60, "h": 3600, "d": 86400}
_MAX_PAYLOADS_FILE = 256 << 20
_REMOTE = r"(?P<name>[A-Za-z0-9][A-Za-z0-9-]*):(?P<path>.*)"


def pairs(words: Iterable[str], what: str) -> dict[str, str]:
    """Parse `KEY=VALUE` words. A later word wins.

    :raises UsageError: a word has no key or no `=`
    """
    found: dict[str, str] = {}
    for word in words:
        key, equals, value = word.partition("=")
        if not equals or not key:
            raise UsageError(f"{word!r} is not a {what}", hint="write KEY=VALUE")
        found[key] = value
    return found


def environment(words: Iterable[str], files: Iterable[Path] = ()) -> dict[str, str]:
    """Return the variables of `--env` and `--env-file`. Words win over files.

    A bare `KEY` takes its value from this process's environment, as with `docker run`. A file has
    one `KEY=VALUE` per line; empty lines and lines that start with `#` are ignored.

    :raises UsageError: a file cannot be read, or a bare KEY is not set
    """
    lines: list[str] = []
    for file in files:
        try:
            text = file.read_text()
        except (OSError, UnicodeDecodeError) as error:
            reason = error.strerror if isinstance(error, OSError) else "it is not text"
            raise UsageError(f"cannot read the environment file {file}: {reason}", hint="give another path") from error
        lines += [line for line in text.splitlines() if line.strip() and not line.lstrip().startswith("#")]
    return pairs((_inherited(word) for word in [*lines, *words]), "variable")


def certificates(files: Iterable[Path] | None) -> list[str]:
    """Return the texts of files of certificates.

    :raises UsageError: a file cannot be read
    """
    texts = []
    for file in files or ():
        try:
            texts.append(file.read_text(encoding="ascii", errors="replace"))
        except OSError as error:
            raise UsageError(
                f"cannot read the certificates in {file}: {error.strerror}", hint="give the path of a PEM file"
            ) from error
    return texts


def credentials(file: Path | None) -> str | None:
    """Return the `USER:PASSWORD` of a file (`-`: standard input), else of COPPICE_REGISTRY_CREDS, or
    None.

    :raises UsageError: the file cannot be read, or is not one line USER:PASSWORD
    """
    if file is None:
        return os.environ.get("COPPICE_REGISTRY_CREDS") or None
    try:
        text = sys.stdin.read() if str(file) == "-" else file.read_text()
    except (OSError, UnicodeDecodeError) as error:
        reason = error.strerror if isinstance(error, OSError) else "it is not text"
        raise UsageError(f"cannot read the credentials file {file}: {reason}", hint="give another path") from error
    line = text.strip()
    if not line.partition(":")[2] or "\n" in line:
        raise UsageError(f"the credentials file {file} is not one line USER:PASSWORD", hint="write USER:PASSWORD in it")
    return line


def _inherited(word: str) -> str:
    if "=" in word or not word:
        return word
    if word not in os.environ:
        raise UsageError(
            f"the variable {word!r} is not set in this environment", hint="write KEY=VALUE, or export it first"
        )
    return f"{word}={os.environ[word]}"


def egress(word: str | None) -> Egress | None:
    """Parse a policy: `none`, `all`, or `allow=` with networks and names. An address is a network.

    :raises UsageError: the word has none of these forms
    """
    if word is None:
        return None
    from ipaddress import ip_network

    from coppice.model import Egress

    mode, _, listed = word.partition("=")
    if (mode == "allow") != bool(listed) or mode not in ("none", "all", "allow"):
        raise UsageError(f"{word!r} is not an egress policy", hint="write none, all, or allow=NETWORK,NAME")
    networks, names = [], []
    for each in filter(None, listed.split(",")):
        try:
            networks.append(str(ip_network(each)))
        except ValueError:
            names.append(each.lower().removesuffix("."))
    return Egress(
        mode="allow" if listed else "all" if mode == "all" else "none", networks=tuple(networks), names=tuple(names)
    )


def limits(memory: str | None, cpus: float | None, pids: int | None, io: str | None) -> Limits | None:
    """Return the limits that a user gave, where 0 is no limit; None if no option was given.

    :raises UsageError: a size cannot be parsed
    """
    from coppice.model import Limits
    from coppice.names import parse_size

    if (memory, cpus, pids, io) == (None, None, None, None):
        return None
    return Limits(
        memory_bytes=parse_size(memory or "0") or None,
        cpus=cpus or None,
        pids=pids or None,
        io_bytes_per_s=parse_size(io or "0") or None,
    )


def network(word: str | None) -> str | None:
    """Return the name of a network, unless it is one of another program's.

    :raises UsageError: it is
    """
    from coppice.cli.habits import value_advice

    if word is not None and (meant := value_advice("--network", word)):
        raise UsageError(f"there is no network {word!r}", hint=meant)
    return word


def publish(words: Iterable[str]) -> tuple[Publish, ...]:
    """Parse published ports: `HOST:GUEST` or `ADDRESS:HOST:GUEST`, optionally with `/udp` or
    `/tcp`.

    An IPv6 address is in brackets. The address `own` is a loopback address of the instance's own;
    the host port `auto` is any free port.

    :raises UsageError: a word is malformed, or has a port that is out of range
    """
    from coppice.model import ANY_PORT, Publish

    ports: list[Publish] = []
    for word in words:
        found = re.fullmatch(_PUBLISH, word)
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
        raise UsageError(f"the port {text} is out of range", hint="ports are 1 to 65535")
    return int(text)


def _address(text: str) -> str:
    from coppice.model import OWN_ADDRESS

    if text == OWN_ADDRESS:
        return text
    from ipaddress import ip_address

    try:
        return str(ip_address(text.removeprefix("[").removesuffix("]")))
    except ValueError as error:
        raise UsageError(f"{text!r} is not an IP address", hint="write one such as 127.0.0.1 or [::1]") from error


def volumes(words: Iterable[str]) -> tuple[VolumeMount, ...]:
    """Parse volumes to attach: `NAME:/path`, or `NAME:/path:ro` for a read-only one.

    :raises UsageError: a word is malformed
    """
    from coppice.model import VolumeMount

    mounts: list[VolumeMount] = []
    for word in words:
        found = re.fullmatch(_VOLUME, word, re.DOTALL)
        if not found:
            raise UsageError(f"{word!r} is not a volume with its path", hint=_MOUNT)
        mounts.append(VolumeMount(volume=found["name"], mount_path=found["path"], readonly=found["mode"] == "ro"))
    return tuple(mounts)


def states(words: Iterable[str]) -> list[State]:
    """Parse states, in upper or lower case.

    :raises UsageError: there is no such state
    """
    from coppice.model import State

    known = {state.value.lower(): state for state in State}
    for word in (found := list(words)):
        if word.lower() not in known:
            raise UsageError(f"there is no state {word!r}", hint=f"states: {', '.join(State)}")
    return [known[word.lower()] for word in found]


def forks_payloads(shared: str | None, each: str | None) -> tuple[bytes | None, list[bytes]]:
    """Read `--payload` and `--payloads`, if they are given.

    :raises UsageError: see `payload` and `payloads`
    """
    return None if shared is None else payload(shared), [] if each is None else payloads(each)


def fork_count(count: int | None, each: Sequence[bytes], names: Sequence[str]) -> int:
    """Return the number of forks: the given count, or the number of payloads or names, or one."""
    return count if count is not None else max(1, len(each) or len(names))


def payload(word: str) -> bytes:
    """Read `--payload`. A word that begins as a JSON object, array or string is the payload itself.

    Any other word is the path of a file, or `-` for standard input.

    :raises UsageError: the file cannot be read or is too large, or the JSON is malformed
    """
    from coppice.names import MAX_PAYLOAD

    if word.startswith(("{", "[", '"')):
        data = word.encode("utf-8", "surrogateescape")
        _check_json(data, "the payload")
        return data
    return _content(word, MAX_PAYLOAD)


def payloads(word: str) -> list[bytes]:
    """Read `--payloads`: a file, or `-` for standard input. Payloads are kept byte for byte.

    The file has one JSON array of payloads, or one JSON document per line.

    :raises UsageError: the file cannot be read, is too large, or has neither form
    """
    import msgspec

    data = _content(word, _MAX_PAYLOADS_FILE)
    try:
        return [bytes(each) for each in msgspec.json.decode(data, type=list[msgspec.Raw])]
    except msgspec.MsgspecError:
        found = [line for line in data.splitlines() if line.strip()]
    if not found:
        raise UsageError(f"the file {word} has no payloads", hint="write one JSON document per line")
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
        raise UsageError(f"cannot read the file {path}: {error.strerror}", hint="give another path") from error
    if len(data) > most:
        raise UsageError(f"the file {path} exceeds {most} bytes", hint="make the payloads smaller")
    return data


def endpoint(text: str | None) -> int | str | None:
    """Return where a process takes notices: `PORT`, `unix:PATH` or `none`."""
    return int(text) if text is not None and text.isdecimal() else text


def duration(word: str) -> float:
    """Return the seconds of a duration such as 90s, 15m, 8h or 30d.

    :raises UsageError: the word is not a duration
    """
    number, unit = word[:-1], word[-1:]
    if unit not in _UNITS or not number.isdecimal():
        raise UsageError(f"{word!r} is not a duration", hint="write a number and s, m, h or d, such as 8h")
    return float(int(number) * _UNITS[unit])


def ttl(word: str | None) -> float | None:
    """Return the seconds of `--ttl`, or None.

    :raises UsageError: the word is not a duration
    """
    return None if word is None else duration(word)


def restart(word: str | None, delay: str | None) -> RestartPolicy | None:
    """Parse `--restart` and its delay.

    :raises UsageError: the word is no policy, or there is a delay without one
    """
    if word is None:
        if delay is not None:
            raise UsageError("--restart-delay needs --restart", hint="add --restart on-failure")
        return None
    when, colon, number = word.partition(":")
    found: Literal["never", "on-failure", "always"]
    match when:
        case "never" | "no":
            found = "never"
        case "on-failure":
            found = "on-failure"
        case "always" | "unless-stopped":
            found = "always"
        case _:
            raise UsageError(f"there is no restart policy {word!r}", hint="write never, on-failure:5 or always")
    if colon and not number.isdecimal():
        raise UsageError(f"{number!r} is not a number of attempts", hint="write on-failure:5")
    from coppice.model import RestartPolicy

    return RestartPolicy(when=found, max_attempts=int(number or 0), backoff_s=1.0 if delay is None else duration(delay))


def health(
    word: str | None,
    *,
    interval: str | None,
    timeout: str | None,
    failures: int | None,
    start_period: str | None,
    restart: bool,
) -> HealthCheck | None:
    """Parse `--health` and the options of the check.

    :raises UsageError: the word is no check, or there are options without one
    """
    given = {
        "interval_s": None if interval is None else duration(interval),
        "timeout_s": None if timeout is None else duration(timeout),
        "failures": failures,
        "start_period_s": None if start_period is None else duration(start_period),
        "restart": restart or None,
    }
    options: dict[str, Any] = {name: value for name, value in given.items() if value is not None}
    if word is None:
        if options:
            raise UsageError("options of a health check need --health", hint="add --health tcp:80")
        return None
    from coppice.model import HealthCheck

    kind, _, rest = word.partition(":")
    if kind == "none" and not rest:
        return HealthCheck()
    if kind == "exec" and rest:
        return HealthCheck(kind="exec", command=words(rest), **options)
    if kind == "log" and rest:
        return HealthCheck(kind="log", text=rest, **options)
    number, slash, path = rest.partition("/")
    if number.isdecimal() and kind == "tcp" and not slash:
        return HealthCheck(kind="tcp", port=int(number), **options)
    if number.isdecimal() and kind == "http":
        return HealthCheck(kind="http", port=int(number), path=f"/{path}", **options)
    raise UsageError(
        f"there is no health check {word!r}", hint="write exec:COMMAND, tcp:80, http:80/health or log:TEXT"
    )


def words(text: str) -> tuple[str, ...]:
    """Return the words of a command, as a shell splits them."""
    import shlex

    try:
        return tuple(shlex.split(text))
    except ValueError as error:
        raise UsageError(f"cannot split {text!r} into words: {error}", hint="close every quotation mark") from error


def copy_ends(source: str, target: str) -> tuple[str, str, bool]:
    """Parse the two ends of `cp`.

    Return the instance's name, its path, and whether the copy goes into it. `NAME:PATH` is in an
    instance; `./NAME:PATH` and `/NAME:PATH` are not, nor is `-`.

    :raises UsageError: not exactly one end is in an instance, or its path is empty
    """
    remote_source, remote_target = (re.fullmatch(_REMOTE, end, re.DOTALL) for end in (source, target))
    if bool(remote_source) is bool(remote_target):
        both = "both ends are" if remote_source else "neither end is"
        raise UsageError(
            f"{both} in an instance",
            hint="write NAME:PATH on exactly one side; write a local path with a colon as ./PATH",
        )
    remote = remote_source or remote_target
    if remote is None or not remote["path"]:
        raise UsageError("the path in the instance is empty", hint="write NAME:PATH")
    return remote["name"], remote["path"], remote_target is not None
