"""The boundary checks names, tags, variables and sizes: nothing else becomes a path or an argument."""

from __future__ import annotations

import posixpath
import re
from pathlib import Path
from typing import Any, Literal

import pytest
from hypothesis import example, given
from hypothesis import strategies as st

from coppice.addresses import MAX_PORTS, check_publish
from coppice.errors import InvalidName, UsageError
from coppice.model import GIB, MIB, Publish, VolumeMount
from coppice.names import (
    MAX_CPUS,
    MAX_FORKS,
    MAX_VOLUME,
    MAX_VOLUMES,
    MIN_MEMORY,
    MIN_OVERLAY,
    MIN_VOLUME,
    NAME_MAX,
    check_argv,
    check_count,
    check_env,
    check_machine,
    check_mounts,
    check_name,
    check_payloads,
    check_reference,
    check_tags,
    check_volume_size,
    is_id,
    new_id,
    new_name,
    parse_size,
)

NAMES = st.from_regex(r"[a-z0-9]([a-z0-9-]{0,61}[a-z0-9])?", fullmatch=True)
PLAIN = frozenset("abcdefghijklmnopqrstuvwxyz0123456789-")


@given(NAMES)
@example("a")
@example("a" * NAME_MAX)
def test_valid_names_pass_unchanged(name: str) -> None:
    """Names of the documented form are accepted."""
    assert check_name(name) == name
    assert check_reference(name) == name


@given(st.text(max_size=80))
@example("")
@example("a\n")
@example("-a")
@example("a-")
@example("..")
@example("a/b")
@example("A")
@example("a" * (NAME_MAX + 1))
@example("ａ")
@example("١")
def test_an_accepted_name_is_safe_as_a_file_name(text: str) -> None:
    """No accepted text has a separator, a dot, a blank, a control character or a leading dash."""
    try:
        name = check_name(text)
    except InvalidName:
        return
    assert set(name) <= PLAIN
    assert 1 <= len(name) <= NAME_MAX
    assert name[0] != "-"
    assert name[-1] != "-"


def test_a_long_wrong_name_is_not_repeated_in_full() -> None:
    """An error message stays readable for any input."""
    with pytest.raises(InvalidName) as refusal:
        check_name("x" * 1_000_000)
    assert len(str(refusal.value)) < 300
    assert refusal.value.hint


@given(NAMES)
@example("a" * NAME_MAX)
@example("a" * 53 + "-" * 2 + "a" * 8)
def test_generated_names_are_valid_and_have_the_prefix(prefix: str) -> None:
    """A generated name is always valid, whatever its prefix."""
    name = new_name(prefix)
    assert check_name(name) == name
    assert name.startswith(prefix[: NAME_MAX - 9].rstrip("-") + "-")


def test_ids_are_unique_and_valid_references() -> None:
    """An id is accepted in place of a name, and no two ids are equal."""
    ids = {new_id() for _ in range(1000)}
    assert len(ids) == 1000
    assert all(is_id(text) and check_reference(text) == text for text in ids)


@given(st.text(max_size=40))
@example("a" * 24 + "\n")
@example("1" + "a" * 23)
@example("../" + "a" * 21)
def test_is_id_accepts_only_ids(text: str) -> None:
    """Paths are built from ids, so other text must never pass as one."""
    assert is_id(text) == bool(re.fullmatch(r"[a-z][a-z0-9]{23}", text))


@given(st.dictionaries(st.text(max_size=12), st.text(max_size=300), max_size=3))
def test_tags_are_bounded(tags: dict[str, str]) -> None:
    """Keys are printable ASCII without blanks or equals signs, values are at most 256 characters."""
    try:
        accepted = check_tags(tags)
    except UsageError:
        return
    assert accepted == tags
    for key, value in accepted.items():
        assert re.fullmatch(r"[A-Za-z0-9][A-Za-z0-9._/-]*", key)
        assert len(value) <= 256


@given(st.dictionaries(st.text(max_size=12), st.text(max_size=20), max_size=3))
@example({"A": "x\0y"})
@example({"A=B": "x"})
@example({"É": "x"})
def test_variables_are_identifiers_without_nul(env: dict[str, str]) -> None:
    """execve ends a value at a NUL and a key at the first equals sign, so neither is accepted."""
    try:
        accepted = check_env(env)
    except UsageError:
        return
    for key, value in accepted.items():
        assert re.fullmatch(r"[A-Za-z_][A-Za-z0-9_]*", key)
        assert "\0" not in value


@given(st.integers(0, 2**50), st.sampled_from(["", "K", "M", "G", "T", "KiB", "mib", "GB", "tb", "k"]))
def test_sizes_are_exact(number: int, unit: str) -> None:
    """A whole number of units gives the exact number of bytes, however large."""
    factor = {"": 1, "k": 1 << 10, "m": 1 << 20, "g": 1 << 30, "t": 1 << 40}[unit[:1].lower()]
    assert parse_size(f"{number}{unit}") == number * factor


@given(st.text(max_size=30))
@example("9" * 400)
@example("1e9")
@example("-1")
@example("١M")
@example("1.M")
@example("0x10")
@example("inf")
@example("0\x85")
def test_an_invalid_size_is_a_usage_error(text: str) -> None:
    """Any invalid text raises UsageError and nothing else, and no size is negative."""
    try:
        size = parse_size(text)
    except UsageError:
        return
    assert size >= 0
    assert text.isascii()


def test_a_fraction_of_a_unit_is_rounded_down() -> None:
    """1.5G means one and a half GiB."""
    assert parse_size("1.5G") == GIB * 3 // 2
    assert parse_size(" 0.3K ") == 307


@pytest.mark.parametrize(
    ("cpus", "memory", "overlay"),
    [
        (0, MIN_MEMORY, MIN_OVERLAY),
        (MAX_CPUS + 1, MIN_MEMORY, MIN_OVERLAY),
        (1, MIN_MEMORY - MIB, MIN_OVERLAY),
        (1, MIN_MEMORY + 1, MIN_OVERLAY),
        (1, 1025 * GIB, MIN_OVERLAY),
        (1, MIN_MEMORY, MIN_OVERLAY - MIB),
        (1, MIN_MEMORY, MIN_OVERLAY + 4096),
        (1, MIN_MEMORY, 17 * 1024 * GIB),
        (-1, -MIB, -MIB),
    ],
)
def test_impossible_machines_are_refused(cpus: int, memory: int, overlay: int) -> None:
    """A machine that no VMM could start is refused before anything is made for it."""
    with pytest.raises(UsageError):
        check_machine(cpus, memory, overlay)


def test_the_smallest_machine_is_allowed() -> None:
    """The bounds themselves are accepted."""
    check_machine(1, MIN_MEMORY, MIN_OVERLAY)


@pytest.mark.parametrize("count", [0, -1, MAX_FORKS + 1])
def test_impossible_counts_are_refused(count: int) -> None:
    """A fan-out has at least one child, and at most as many as the bound."""
    with pytest.raises(UsageError):
        check_count(count)
    assert check_count(MAX_FORKS) == MAX_FORKS


@pytest.mark.parametrize(
    "port",
    [
        Publish(host_port=-1, guest_port=80),
        Publish(host_port=80, guest_port=0),
        Publish(host_port=80, guest_port=80, host_address="OWN"),
        Publish(host_port=80, guest_port=65536),
        Publish(host_port=80, guest_port=80, host_address="localhost"),
        Publish(host_port=80, guest_port=80, host_address=""),
        Publish(host_port=80, guest_port=80, host_address="224.0.0.1"),
        Publish(host_port=80, guest_port=80, host_address="ff02::1"),
        Publish(host_port=80, guest_port=80, host_address="255.255.255.255"),
        Publish(host_port=80, guest_port=80, host_address="0:0::1"),
        Publish(host_port=80, guest_port=80, host_address="127.0.0.1,guestfwd=tcp:10.0.2.9:1-cmd:reboot"),
        Publish(host_port=80, guest_port=80, host_address="fe80::1%,guestfwd=tcp:10.0.2.9:1-cmd:reboot"),
    ],
)
def test_an_invalid_port_cannot_be_published(port: Publish) -> None:
    """The port becomes part of a VMM's option, so it must contain nothing else."""
    with pytest.raises(UsageError):
        check_publish([port])


def test_ports_of_either_family_are_published() -> None:
    """They are kept unchanged; any port may be given several times, and an address may be chosen
    later.
    """
    ports = (
        Publish(host_port=1, guest_port=65535),
        Publish(host_port=80, guest_port=80, host_address="::1"),
        Publish(host_port=80, guest_port=80, host_address="own"),
        Publish(host_port=80, guest_port=80, protocol="udp", host_address="own"),
        Publish(host_port=0, guest_port=80),
        Publish(host_port=0, guest_port=81),
    )
    assert check_publish(ports) == ports


def test_a_port_is_published_once() -> None:
    """A second publication of a port would find it taken by the machine itself."""
    port = Publish(host_port=80, guest_port=80, host_address="own")
    with pytest.raises(UsageError, match="twice"):
        check_publish([port, Publish(host_port=80, guest_port=81, host_address="own")])


@pytest.mark.parametrize("protocol", ["tcp", "udp"])
@pytest.mark.parametrize("order", [1, -1])
def test_a_port_of_all_addresses_excludes_single_addresses(protocol: Literal["tcp", "udp"], order: int) -> None:
    """0.0.0.0 takes the port of all addresses, even of one chosen later: a VMM cannot listen on
    both. Other protocols and ports stay free.
    """
    every = Publish(host_port=80, guest_port=80, host_address="0.0.0.0", protocol=protocol)
    for address in ("127.0.0.1", "own"):
        one = Publish(host_port=80, guest_port=80, host_address=address, protocol=protocol)
        with pytest.raises(UsageError, match=f"80/{protocol} is published twice"):
            check_publish([every, one][::order])
        other = Publish(
            host_port=80, guest_port=80, host_address=address, protocol="udp" if protocol == "tcp" else "tcp"
        )
        assert check_publish((every, other)) == (every, other)


def test_the_number_of_published_ports_is_bounded() -> None:
    """Thousands of forwards would not fit on a command line."""
    ports = tuple(Publish(host_port=number + 1, guest_port=80) for number in range(MAX_PORTS))
    assert check_publish(ports) == ports
    with pytest.raises(UsageError, match=str(MAX_PORTS + 1)):
        check_publish([*ports, Publish(host_port=9999, guest_port=80)])


def mounts(*paths: str) -> tuple[VolumeMount, ...]:
    """Return a volume at each of the paths."""
    return tuple(VolumeMount(volume=f"v{number}", mount_path=path) for number, path in enumerate(paths))


@given(st.text(max_size=40))
@example("/../etc")
@example("/a/../../b")
@example("/a/./b")
@example("//a")
@example("/a/")
@example("/a\0b")
@example("/a\nb")
@example("/proc/self")
@example("/run/coppice/payload")
@example("a")
def test_a_volumes_path_is_plain_or_refused(path: str) -> None:
    """A mount point is absolute, without dot components, and never covers the agent's own mounts."""
    try:
        check_mounts(mounts(path))
    except UsageError:
        return
    assert posixpath.normpath(path) == path
    assert path.startswith("/")
    assert ".." not in path.split("/")
    assert path.isprintable()
    assert path.split("/")[1] not in ("", "proc", "sys", "dev")


@pytest.mark.parametrize(
    "path", ["/", "/proc", "/sys/fs", "/dev/shm", "/run", "/run/coppice", "/run/coppice/x", "/etc", "/" + "x" * 1024]
)
def test_the_machines_own_paths_are_refused(path: str) -> None:
    """A volume at such a path would hide a part of the machine itself."""
    with pytest.raises(UsageError):
        check_mounts(mounts(path))


def test_usual_paths_are_allowed() -> None:
    """Volumes may be nested, lie below /run and /etc, and be as many as a machine can have."""
    paths = ("/data", "/data/sub", "/run/data", "/etc/app", "/procs", "/srv/a b", "/srv/d\u00e4ta", "/..data")
    assert len(paths) == MAX_VOLUMES
    assert check_mounts(mounts(*paths)) == mounts(*paths)


@pytest.mark.parametrize(
    "wanted",
    [
        mounts("/a", "/a"),
        mounts(*(f"/{number}" for number in range(MAX_VOLUMES + 1))),
        (VolumeMount(volume="../data", mount_path="/a"),),
    ],
    ids=["same path", "too many", "no name"],
)
def test_impossible_mounts_are_refused(wanted: tuple[VolumeMount, ...]) -> None:
    """They are refused before any volume is looked up."""
    with pytest.raises(UsageError):
        check_mounts(wanted)


@pytest.mark.parametrize("size", [0, -MIB, MIN_VOLUME - MIB, MIN_VOLUME + 1, MAX_VOLUME + MIB])
def test_impossible_sizes_of_volumes_are_refused(size: int) -> None:
    """The bounds themselves are accepted; the error shows the requested size in a readable form,
    not as 1e+07.
    """
    with pytest.raises(UsageError, match=rf"{size // MIB} MiB|{size} bytes"):
        check_volume_size(size)
    assert check_volume_size(MIN_VOLUME) == MIN_VOLUME
    assert check_volume_size(MAX_VOLUME) == MAX_VOLUME


@pytest.mark.parametrize("argv", ["ls -l", ["printf", "a\0b"]])
def test_an_invalid_command_is_refused(argv: str | list[str]) -> None:
    """A string is a sequence too, and would run its first letter. An argument cannot contain a NUL."""
    with pytest.raises(UsageError):
        check_argv(argv)


def test_a_command_is_kept_word_by_word() -> None:
    """Empty words are kept, and an empty command is allowed."""
    assert check_argv(["printf", "", "a b"]) == ("printf", "", "a b")
    assert check_argv([]) == ()


@pytest.mark.parametrize("argv", [["ls", 1], ["ls", b"-l"], [None], ["ls", Path("/")]])
def test_words_that_are_not_strings_are_refused(argv: list[str]) -> None:
    """The error names the word, instead of a TypeError from a lower layer."""
    with pytest.raises(UsageError, match="is not a string"):
        check_argv(argv)


@pytest.mark.parametrize(("payload", "payloads"), [("text", ()), ({"a": 1}, ()), (None, ["text", b"x"]), (None, "ab")])
def test_payloads_that_are_not_bytes_are_refused(payload: Any, payloads: Any) -> None:
    """The encoding of text would be a guess; the hint says how to encode it."""
    with pytest.raises(UsageError, match="not bytes") as refused:
        check_payloads(payload, payloads, 2)
    assert "encode()" in (refused.value.hint or "")
