"""The one validator of names, ids, tags and sizes: everything from outside passes here once, at the boundary."""

from __future__ import annotations

import re
import secrets
import string
from collections.abc import Mapping, Sequence
from fractions import Fraction
from ipaddress import ip_address
from pathlib import PurePosixPath

from coppice.errors import InvalidName, UsageError
from coppice.model import ANY_PORT, GIB, MIB, OWN_ADDRESS, Publish, VolumeMount

_NAME = re.compile(r"[a-z0-9]([a-z0-9-]*[a-z0-9])?")
_ID = re.compile(r"[a-z][a-z0-9]{23}")
_TAG_KEY = re.compile(r"[A-Za-z0-9][A-Za-z0-9._/-]{0,127}")
_ENV_KEY = re.compile(r"[A-Za-z_][A-Za-z0-9_]*")
_ALPHABET = string.ascii_lowercase + string.digits
NAME_MAX = 63

MIN_MEMORY = 64 * MIB  # no kernel with an initramfs boots in less; Debian's wants some 110
MAX_MEMORY = 1024 * GIB
MIN_OVERLAY = 16 * MIB
MAX_OVERLAY = 8 * 1024 * GIB  # ext4, as the host's file system, has no file of 16 TiB
MAX_CPUS = 64
MIN_VOLUME = 16 * MIB
MAX_VOLUME = 8 * 1024 * GIB
MAX_VOLUMES = 8  # of one machine: each takes one of the VMM's device slots
MAX_MOUNT_PATH = 1024
MAX_FORKS = 4096
MAX_SECONDS = 366 * 86400.0
MAX_PAYLOAD = MIB  # it lies in the guest's memory, once per fork


def check_name(name: str) -> str:
    """Return a valid instance, snapshot or host name unchanged.

    :raises InvalidName: it is not `^[a-z0-9]([a-z0-9-]*[a-z0-9])?$` or is over 63 characters
    """
    if len(name) > NAME_MAX or not _NAME.fullmatch(name):
        shown = name if len(name) <= 80 else name[:77] + "..."
        raise InvalidName(
            f"{shown!r} is not a valid name",
            hint=f"use a-z, 0-9 and inner dashes, {NAME_MAX} characters at most",
        )
    return name


def check_owner(owner: str | None) -> str | None:
    """Return a valid owner, or None for the operator, unchanged.

    :raises InvalidName: it is not a name
    """
    return owner if owner is None else check_name(owner)


def check_reference(reference: str) -> str:
    """Return what can be a name or an id unchanged; an id is also a valid name.

    :raises InvalidName: it can be neither
    """
    return check_name(reference)


def is_id(text: str) -> bool:
    """Whether `text` has the form of an id."""
    return _ID.fullmatch(text) is not None


def new_id() -> str:
    """A fresh id: 24 characters, a letter first."""
    return secrets.choice(string.ascii_lowercase) + "".join(secrets.choice(_ALPHABET) for _ in range(23))


def new_name(prefix: str) -> str:
    """A generated name that starts with `prefix`, cut where it would grow too long."""
    suffix = "".join(secrets.choice(_ALPHABET) for _ in range(6))
    return check_name(f"{prefix[: NAME_MAX - 7].rstrip('-')}-{suffix}")


def check_tags(tags: Mapping[str, str]) -> dict[str, str]:
    """Return valid tags as a dict.

    :raises UsageError: a key is malformed, or a value is over 256 characters
    """
    for key, value in tags.items():
        if not _TAG_KEY.fullmatch(key) or len(value) > 256:
            raise UsageError(
                f"{key!r} is not a valid tag",
                hint="keys are letters, digits and ._/- (128 at most), values 256 characters",
            )
        check_recorded(value)
    return dict(tags)


def check_recorded(*texts: str) -> None:
    """Check what becomes part of a record, which is UTF-8. A command line may hold any bytes, and Python passes them on.

    :raises UsageError: there are bytes in it that are no text
    """
    for text in texts:
        try:
            text.encode()
        except UnicodeEncodeError as error:
            raise UsageError(f"{text[:80]!r} is not UTF-8", hint="what is kept must be text in UTF-8") from error


def as_recorded(text: str) -> str:
    """The text as a record or a document can have it: what is no UTF-8 is replaced."""
    return text.encode(errors="replace").decode()


def check_argv(argv: Sequence[str]) -> tuple[str, ...]:
    """Return a command's words as a tuple.

    :raises UsageError: it is one string, or there is a NUL in a word
    """
    if isinstance(argv, str):
        raise UsageError(
            f"the command {argv[:80]!r} is one string", hint="give a list of words, such as ['sh', '-c', 'echo $HOME']"
        )
    if any("\0" in word for word in argv):
        raise UsageError("a command cannot have a NUL in it", hint="remove it")
    return tuple(argv)


def check_env(env: Mapping[str, str]) -> dict[str, str]:
    """Return a valid environment as a dict.

    :raises UsageError: a key is not an identifier, or there is a NUL in a value
    """
    for key, value in env.items():
        if not _ENV_KEY.fullmatch(key) or "\0" in value:
            raise UsageError(
                f"{key!r} is not a valid environment variable", hint="use KEY=VALUE, KEY of letters, digits and _"
            )
    return dict(env)


def check_publish(ports: Sequence[Publish]) -> tuple[Publish, ...]:
    """Return valid forwarded ports as a tuple. They become options of the VMM: an address is an address and nothing else.

    :raises UsageError: a port is out of range, an address is none, or the same one is published twice
    """
    for port in ports:
        if not (
            ANY_PORT <= port.host_port <= 65535 and 1 <= port.guest_port <= 65535 and port.protocol in ("tcp", "udp")
        ):
            raise UsageError(
                f"{port.host_port}:{port.guest_port}/{port.protocol} cannot be published",
                hint="ports are 1 to 65535 (on the host's side 0 for any), protocols tcp and udp",
            )
        if port.host_address != OWN_ADDRESS and not _is_address(port.host_address):
            raise UsageError(f"{port.host_address!r} is not an IP address", hint="write one such as 127.0.0.1")
    fixed = [(port.host_address, port.host_port, port.protocol) for port in ports if port.host_port != ANY_PORT]
    if len(set(fixed)) != len(fixed):
        raise UsageError("the same port of the host is published twice", hint="give each its own")
    return tuple(ports)


def _is_address(text: str) -> bool:
    try:
        ip_address(text)
    except ValueError:
        return False
    return "%" not in text  # the zone of an IPv6 address may be any text


def check_machine(cpus: int, memory_bytes: int, overlay_bytes: int) -> None:
    """Check the size of a machine.

    :raises UsageError: it is out of bounds, or not whole MiB
    """
    if not 1 <= cpus <= MAX_CPUS:
        raise UsageError(f"{cpus} CPUs cannot be had", hint=f"ask for 1 to {MAX_CPUS}")
    if not MIN_MEMORY <= memory_bytes <= MAX_MEMORY or memory_bytes % MIB:
        raise UsageError(
            f"a memory of {_in_mib(memory_bytes)} is out of bounds",
            hint=f"ask for whole MiB, {MIN_MEMORY // MIB} MiB to {MAX_MEMORY // GIB} GiB",
        )
    if not MIN_OVERLAY <= overlay_bytes <= MAX_OVERLAY or overlay_bytes % MIB:
        raise UsageError(
            f"an overlay of {_in_mib(overlay_bytes)} is out of bounds",
            hint=f"ask for whole MiB, {MIN_OVERLAY // MIB} MiB to {MAX_OVERLAY // GIB} GiB",
        )


def check_volume_size(size_bytes: int) -> int:
    """Return a valid size of a volume unchanged.

    :raises UsageError: it is out of bounds, or not whole MiB
    """
    if not MIN_VOLUME <= size_bytes <= MAX_VOLUME or size_bytes % MIB:
        raise UsageError(
            f"a volume of {_in_mib(size_bytes)} is out of bounds",
            hint=f"ask for whole MiB, {MIN_VOLUME // MIB} MiB to {MAX_VOLUME // GIB} GiB",
        )
    return size_bytes


# What the guest's agent mounts and writes by itself: a volume over it would hide it from the guest.
_AGENTS_OWN = ("/proc", "/sys", "/dev", "/run/coppice")
_ABOVE_THE_AGENTS_OWN = ("/", "/etc", "/run")


def check_mounts(mounts: Sequence[VolumeMount]) -> tuple[VolumeMount, ...]:
    """Return valid mounts as a tuple.

    :raises UsageError: there are too many, two have the same path, or a path is not one that a volume can have
    :raises InvalidName: a volume can have neither that name nor that id
    """
    if len(mounts) > MAX_VOLUMES:
        raise UsageError(f"{len(mounts)} volumes cannot be attached", hint=f"a machine has {MAX_VOLUMES} at most")
    for mount in mounts:
        check_reference(mount.volume)
        _check_mount_path(mount.mount_path)
    if len({mount.mount_path for mount in mounts}) < len(mounts):
        raise UsageError("two volumes cannot be mounted at the same path", hint="give each its own")
    return tuple(mounts)


def _check_mount_path(path: str) -> None:
    plain = path.startswith("/") and all(part not in ("", ".", "..") for part in path[1:].split("/"))
    if not plain or not path.isprintable() or len(path.encode("utf-8", "surrogateescape")) > MAX_MOUNT_PATH:
        raise UsageError(
            f"{path[:80]!r} is no path that a volume can be mounted at", hint="write it in full and plainly: /srv/data"
        )
    own = PurePosixPath(path)
    if path in _ABOVE_THE_AGENTS_OWN or any(own.is_relative_to(taken) for taken in _AGENTS_OWN):
        raise UsageError(f"no volume can be mounted at {path}: the machine needs it", hint="choose another path")


def _in_mib(count: int) -> str:
    return f"{count // MIB} MiB" if count % MIB == 0 else f"{count} bytes"


def check_count(count: int) -> int:
    """Return a valid number of forks unchanged.

    :raises UsageError: it is below 1 or absurd
    """
    if not 1 <= count <= MAX_FORKS:
        raise UsageError(f"{count} forks cannot be made in one call", hint=f"ask for 1 to {MAX_FORKS}")
    return count


def check_timeout(seconds: float | None) -> float | None:
    """Return a valid time limit, or None for none, unchanged.

    :raises UsageError: it is not above 0, or is no number of seconds
    """
    if seconds is not None and not 0 < seconds <= MAX_SECONDS:
        raise UsageError(f"{seconds:g} s is no time limit", hint="give a number of seconds above 0, or none")
    return seconds


def check_payloads(payload: bytes | None, payloads: Sequence[bytes], count: int) -> tuple[bytes | None, ...]:
    """Return one payload, or None, for each of `count` forks. What is in a payload is never part of a message.

    :raises UsageError: both are given, there are not as many as forks, or one is too large
    """
    if payloads and payload is not None:
        raise UsageError(
            "a payload for all and payloads for each cannot both be given", hint="put the common part into each"
        )
    if payloads and len(payloads) != count:
        raise UsageError(f"{len(payloads)} payloads for {count} forks", hint="give one per fork, or one for all")
    each = tuple(payloads) or (payload,) * count
    for number, data in enumerate(each, 1):
        if data is not None and len(data) > MAX_PAYLOAD:
            raise UsageError(
                f"the payload of fork {number} has {len(data)} bytes, and {MAX_PAYLOAD} are allowed",
                hint="copy large data with `coppice cp`, or put it into the source before it is captured",
            )
    return each


_SIZE = re.compile(r"([0-9]{1,18}(?:\.[0-9]{1,9})?)\s*([KMGT]?)(?:i?B)?", re.IGNORECASE | re.ASCII)
_FACTOR = {"": 1, "K": 1 << 10, "M": 1 << 20, "G": 1 << 30, "T": 1 << 40}


def parse_size(text: str) -> int:
    """Read a size such as `512M`, `1GiB` or `268435456` (bytes); units are powers of 1024.

    :raises UsageError: it is not a size
    """
    found = _SIZE.fullmatch(text.strip(string.whitespace))
    if not found:
        raise UsageError(f"{text!r} is not a size", hint="write 512M, 1G or a number of bytes")
    return int(Fraction(found[1]) * _FACTOR[found[2].upper()])  # a float would round large numbers of bytes
