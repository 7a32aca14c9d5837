"""The one validator of names, ids, tags and sizes.

All outside input passes it once, at the boundary.
"""

from __future__ import annotations

import os
import re
import string
from collections.abc import Mapping, Sequence
from pathlib import Path, PurePosixPath
from typing import TypeVar

from coppice.errors import InvalidName, UsageError
from coppice.model import GIB, MIB, Limits, State, VolumeMount

_NAME = r"[a-z0-9]([a-z0-9-]*[a-z0-9])?"
_ID = re.compile(r"[a-z][a-z0-9]{23}")
_TAG_KEY = r"[A-Za-z0-9][A-Za-z0-9._/-]{0,127}"
_ENV_KEY = r"[A-Za-z_][A-Za-z0-9_]*"
HostPath = TypeVar("HostPath", str, Path, str | Path)
_ALPHABET = string.ascii_lowercase + string.digits
NAME_MAX = 63
_SUFFIX = 8  # characters of a generated name after its prefix

MIN_MEMORY = 64 * MIB  # no kernel with an initramfs boots in less; Debian's needs about 110
MAX_MEMORY = 1024 * GIB
MIN_OVERLAY = 16 * MIB
MAX_OVERLAY = 8 * 1024 * GIB  # the host's file system may be ext4, whose files are smaller than 16 TiB
MAX_CPUS = 64
MIN_VOLUME = 16 * MIB
MAX_VOLUME = 8 * 1024 * GIB
MAX_VOLUMES = 8  # per machine: each takes one of the VMM's device slots
MAX_MOUNT_PATH = 1024
MAX_FORKS = 4096
MAX_SPARES = 16  # per host, for all templates together
MAX_SECONDS = 366 * 86400.0
_PATH_MAX, _PART_MAX = 4095, 255  # bytes, on any Linux file system
MAX_PAYLOAD = MIB  # it is kept in the guest's memory, once per fork


def check_name(name: str) -> str:
    """Return a valid instance, snapshot or host name unchanged.

    :raises InvalidName: it is not `^[a-z0-9]([a-z0-9-]*[a-z0-9])?$` or is over 63 characters
    """
    if len(name) > NAME_MAX or not re.fullmatch(_NAME, name):
        shown = name if len(name) <= 80 else name[:77] + "..."
        raise InvalidName(
            f"{shown!r} is not a valid name",
            hint=f"use a-z, 0-9 and inner dashes, {NAME_MAX} characters at most",
        )
    return name


def check_owner(owner: str | None) -> str | None:
    """Return a valid owner, or None for the operator, unchanged.

    :raises InvalidName: it is not a valid name
    """
    return owner if owner is None else check_name(owner)


def check_reference(reference: str) -> str:
    """Return a text that can be a name or an id unchanged. Every id is also a valid name.

    :raises InvalidName: it can be neither
    """
    return check_name(reference)


def is_id(text: str) -> bool:
    """Return whether `text` has the form of an id."""
    return _ID.fullmatch(text) is not None


def _random(alphabet: str, length: int) -> str:
    """Return random characters, as unpredictable as those of `secrets`, whose import takes long."""
    number = int.from_bytes(os.urandom(length + 16))  # 2**128 times what the result needs: no visible bias
    characters = []
    for _ in range(length):
        number, index = divmod(number, len(alphabet))
        characters.append(alphabet[index])
    return "".join(characters)


def new_id() -> str:
    """Return a fresh id of 24 characters, the first a letter.

    Its 123 random bits do not repeat in practice, and the database refuses duplicates.
    """
    return _random(string.ascii_lowercase, 1) + _random(_ALPHABET, 23)


def new_name(prefix: str) -> str:
    """Return a generated name that starts with `prefix`, which is cut if the name would be too
    long.

    Among 4096 names with one prefix, two are equal with a chance of 3 in a million. The transaction
    that records a name finds a duplicate.
    """
    suffix = _random(_ALPHABET, _SUFFIX)
    return check_name(f"{prefix[: NAME_MAX - _SUFFIX - 1].rstrip('-')}-{suffix}")


def check_tags(tags: Mapping[str, str]) -> dict[str, str]:
    """Return valid tags as a dict.

    :raises UsageError: a key is malformed, or a value is over 256 characters
    """
    for key, value in tags.items():
        if not re.fullmatch(_TAG_KEY, key) or len(value) > 256:
            raise UsageError(
                f"{key!r} is not a valid tag",
                hint="keys are letters, digits and ._/- (128 at most), values 256 characters",
            )
        check_recorded(value)
    return dict(tags)


def check_recorded(*texts: str) -> None:
    """Check texts that become part of a record, which is UTF-8. A command line may hold any bytes.

    :raises UsageError: a text is not valid UTF-8
    """
    for text in texts:
        try:
            text.encode()
        except UnicodeEncodeError as error:
            raise UsageError(f"{text[:80]!r} is not UTF-8", hint="text in records must be UTF-8") from error


def as_recorded(text: str) -> str:
    """Return the text with everything that is not UTF-8 replaced, for a record or a document."""
    return text.encode(errors="replace").decode()


def check_argv(argv: Sequence[str]) -> tuple[str, ...]:
    """Return a command's words as a tuple.

    :raises UsageError: it is one string, a word is not a string, or there is a NUL in a word
    """
    if isinstance(argv, str):
        raise UsageError(
            f"the command {argv[:80]!r} is one string", hint="give a list of words, such as ['sh', '-c', 'echo $HOME']"
        )
    for word in argv:
        if not isinstance(word, str):
            raise UsageError(f"{word!r:.80} in a command is not a string", hint=f"write {str(word)!r:.80}")
    if any("\0" in word for word in argv):
        raise UsageError("a command cannot contain a NUL byte", hint="remove the NUL byte")
    return tuple(argv)


def check_env(env: Mapping[str, str]) -> dict[str, str]:
    """Return a valid environment as a dict.

    :raises UsageError: a key is not an identifier, or there is a NUL in a value
    """
    for key, value in env.items():
        if not re.fullmatch(_ENV_KEY, key) or "\0" in value:
            raise UsageError(
                f"{key!r} is not a valid environment variable", hint="use KEY=VALUE, KEY of letters, digits and _"
            )
    return dict(env)


def check_machine(cpus: int, memory_bytes: int, overlay_bytes: int) -> None:
    """Check the size of a machine.

    :raises UsageError: it is out of bounds, or not whole MiB
    """
    if not 1 <= cpus <= MAX_CPUS:
        raise UsageError(f"cannot allocate {cpus} CPUs", hint=f"ask for 1 to {MAX_CPUS}")
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


def check_limits(limits: Limits | None) -> Limits | None:
    """Return valid limits, or None, unchanged.

    :raises UsageError: one is out of bounds
    """
    if limits is None:
        return None
    for value, least, most, name, hint in (
        (limits.memory_bytes, 32 * MIB, 1 << 50, "memory limit", "32M or more"),
        (limits.cpus, 0.01, 4096, "CPU limit", "0.01 to 4096 CPUs"),
        (limits.pids, 16, 1 << 22, "limit of threads", "16 or more"),
        (limits.io_bytes_per_s, 64 << 10, 1 << 50, "limit of I/O", "64K or more, in bytes per second"),
    ):
        if value is not None and not least <= value <= most:
            raise UsageError(f"the {name} {value:g} is out of bounds", hint=f"ask for {hint}")
    return limits


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


# The guest's agent mounts and writes these paths: a volume mounted over one would hide it.
_AGENTS_OWN = ("/proc", "/sys", "/dev", "/run/coppice")
_ABOVE_THE_AGENTS_OWN = ("/", "/etc", "/run")


def check_mounts(mounts: Sequence[VolumeMount]) -> tuple[VolumeMount, ...]:
    """Return valid mounts as a tuple.

    :raises UsageError: there are too many, two have the same path, or a path cannot be a mount
        point
    :raises InvalidName: a reference is neither a valid name nor an id
    """
    if len(mounts) > MAX_VOLUMES:
        raise UsageError(f"cannot attach {len(mounts)} volumes", hint=f"a machine can have {MAX_VOLUMES} at most")
    for mount in mounts:
        check_reference(mount.volume)
        _check_mount_path(mount.mount_path)
    if len({mount.mount_path for mount in mounts}) < len(mounts):
        raise UsageError("two volumes cannot be mounted at the same path", hint="give each its own path")
    return tuple(mounts)


def _check_mount_path(path: str) -> None:
    plain = path.startswith("/") and all(part not in ("", ".", "..") for part in path[1:].split("/"))
    if not plain or not path.isprintable() or len(path.encode("utf-8", "surrogateescape")) > MAX_MOUNT_PATH:
        raise UsageError(
            f"a volume cannot be mounted at {path[:80]!r}",
            hint="give an absolute path without . or .., such as /srv/data",
        )
    own = PurePosixPath(path)
    if path in _ABOVE_THE_AGENTS_OWN or any(own.is_relative_to(taken) for taken in _AGENTS_OWN):
        raise UsageError(
            f"a volume cannot be mounted at {path}: the machine itself uses this path", hint="choose another path"
        )


def _in_mib(count: int) -> str:
    return f"{count // MIB} MiB" if count % MIB == 0 else f"{count} bytes"


def check_count(count: int) -> int:
    """Return a valid number of forks unchanged.

    :raises UsageError: it is below 1 or too large
    """
    if not 1 <= count <= MAX_FORKS:
        raise UsageError(f"cannot make {count} forks in one call", hint=f"ask for 1 to {MAX_FORKS}")
    return count


def check_timeout(seconds: float | None) -> float | None:
    """Return a valid time limit, or None for no limit, unchanged.

    :raises UsageError: it is not above 0, or not a number
    """
    if seconds is not None and not 0 < seconds <= MAX_SECONDS:
        raise UsageError(f"{seconds:g} s is not a time limit", hint="give a number of seconds above 0, or omit it")
    return seconds


def check_grace(seconds: float | None) -> None:
    """Check the time that a guest has to power off: 0 for none, None for the default.

    :raises UsageError: it is negative, or not a number of seconds
    """
    if seconds is not None and not 0 <= seconds <= MAX_SECONDS:
        raise UsageError(f"a grace period cannot be {seconds:g} s", hint="use 0 to stop at once")


def check_limit(count: int) -> None:
    """Check an upper limit on a number of bytes or lines, or the number of an event.

    :raises UsageError: it is negative, or has more than 63 bits
    """
    if not 0 <= count < 1 << 63:
        raise UsageError(f"a limit cannot be {count}", hint="use 0 or more, with at most 63 bits")


def check_spares(count: int | None) -> int | None:
    """Return a valid number of spare VMMs for one template unchanged; None follows the rate of forks.

    :raises UsageError: it is negative or too large
    """
    if count is not None and not 0 <= count <= MAX_SPARES:
        raise UsageError(f"a host cannot keep {count} spares of a template", hint=f"use 0 to {MAX_SPARES}")
    return count


def check_accel(accel: str) -> str:
    """Return the name of an accelerator unchanged.

    :raises UsageError: there is none of that name
    """
    if accel not in ("auto", "kvm", "tcg"):
        raise UsageError(f"there is no accelerator {accel!r}", hint="use auto, kvm or tcg")
    return accel


def check_command(argv: Sequence[str]) -> None:
    """Check the words of a command to run.

    :raises UsageError: there are none, or one contains a NUL byte
    """
    if not argv:
        raise UsageError("no command given", hint="give a program and its arguments")
    check_argv(argv)


def check_target(target: State) -> None:
    """Check the target state of forks.

    :raises UsageError: no fork can be made in that state
    """
    if target not in (State.STOPPED, State.STANDBY, State.RUNNING):
        raise UsageError(f"a fork cannot be made {target}", hint="the target is Stopped, Standby or Running")


def check_children(names: Sequence[str], count: int) -> tuple[str, ...]:
    """Return the name of each of `count` forks, or no names if Coppice is to generate them.

    :raises UsageError: there are not as many as forks, or two are the same
    :raises InvalidName: one is not a valid name
    """
    if len(names) == 1 and count > 1:
        width = len(str(count))
        names = [f"{names[0]}-{number:0{width}d}" for number in range(1, count + 1)]
    if names and len(names) != count:
        raise UsageError(f"{len(names)} names for {count} forks", hint="give one name per fork, or one for all")
    if len(set(names)) != len(names):
        raise UsageError("two forks cannot have the same name", hint="give each its own name")
    return tuple(check_name(name) for name in names)


def check_payloads(
    payload: bytes | None, payloads: Sequence[bytes], count: int, target: State = State.RUNNING
) -> tuple[bytes | None, ...]:
    """Return one payload, or None, for each of `count` forks. A payload is never part of a message.

    :raises UsageError: both are given, there are not as many as forks, one is too large, or the
        forks do not run
    """
    if payloads and payload is not None:
        raise UsageError(
            "cannot combine one payload for all forks with payloads for each",
            hint="include the common part in each payload",
        )
    if payloads and len(payloads) != count:
        raise UsageError(f"{len(payloads)} payloads for {count} forks", hint="give one per fork, or one for all")
    each = tuple(payloads) or (payload,) * count
    if target is not State.RUNNING and any(data is not None for data in each):
        raise UsageError(
            f"a fork that is made {target} cannot have a payload: it is delivered at the guest's start, and not stored",
            hint="use the target Running, or no payload",
        )
    for number, data in enumerate(each, 1):
        if data is not None and not isinstance(data, bytes):
            raise UsageError(
                f"the payload of fork {number} is {type(data).__name__}, not bytes",
                hint="encode text, as in payload.encode(), and serialize other values, as in json.dumps(value).encode()",
            )
        if data is not None and len(data) > MAX_PAYLOAD:
            raise UsageError(
                f"the payload of fork {number} has {len(data)} bytes ({MAX_PAYLOAD} are allowed)",
                hint="copy large data with `coppice cp`, or put it into the source before it is captured",
            )
    return each


_SIZE = r"([0-9]{1,18}(?:\.[0-9]{1,9})?)\s*([KMGT]?)(?:i?B)?"
_FACTOR = {"": 1, "K": 1 << 10, "M": 1 << 20, "G": 1 << 30, "T": 1 << 40}


def parse_size(text: str) -> int:
    """Read a size such as `512M`, `1GiB` or `268435456` (bytes); units are powers of 1024.

    :raises UsageError: it is not a size
    """
    found = re.fullmatch(_SIZE, text.strip(string.whitespace), re.IGNORECASE | re.ASCII)
    if not found:
        raise UsageError(f"{text!r} is not a size", hint="write 512M, 1G or a number of bytes")
    from fractions import Fraction

    return int(Fraction(found[1]) * _FACTOR[found[2].upper()])  # a float would round large numbers of bytes


def check_host_path(path: HostPath) -> HostPath:
    """Return a path of this host unchanged. It need not exist.

    :raises UsageError: it cannot be a path
    """
    text = str(path)
    too_long = len(os.fsencode(text)) > _PATH_MAX or any(len(os.fsencode(part)) > _PART_MAX for part in text.split("/"))
    if not text or "\0" in text or too_long:
        raise UsageError(f"{text[:80]!r} is not a path", hint="give the path of a file or directory of this host")
    return path


def check_mode(mode: int) -> int:
    """Return valid permission bits unchanged.

    :raises UsageError: other bits are set
    """
    if not 0 <= mode <= 0o7777:
        raise UsageError(f"{mode} is not a file mode", hint="give permission bits, such as 0o644")
    return mode


def check_terminal(size: tuple[int, int]) -> tuple[int, int]:
    """Return a valid terminal size, (rows, columns), unchanged.

    :raises UsageError: a number is out of range
    """
    if not all(0 <= count <= 0xFFFF for count in size):
        raise UsageError(f"a terminal cannot have {size[0]} rows and {size[1]} columns", hint="give 0 to 65535 of each")
    return size
