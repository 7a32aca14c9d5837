"""The boundary: what is let in as a name, a tag, a variable, a size; nothing else becomes a path or an argument."""

from __future__ import annotations

import posixpath
import re

import pytest
from hypothesis import example, given
from hypothesis import strategies as st

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
    check_publish,
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
    """The documented form is the accepted form."""
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
def test_whatever_passes_is_safe_as_a_file_name(text: str) -> None:
    """No text at all that passes has a separator, a dot, a blank, a control character or a leading dash."""
    try:
        name = check_name(text)
    except InvalidName:
        return
    assert set(name) <= PLAIN
    assert 1 <= len(name) <= NAME_MAX
    assert name[0] != "-"
    assert name[-1] != "-"


def test_a_long_wrong_name_is_not_repeated_in_full() -> None:
    """An error message stays readable whatever was sent."""
    with pytest.raises(InvalidName) as refusal:
        check_name("x" * 1_000_000)
    assert len(str(refusal.value)) < 300
    assert refusal.value.hint


@given(NAMES)
@example("a" * NAME_MAX)
@example("a" * 55 + "-" * 2 + "a" * 6)
def test_generated_names_are_valid_and_start_as_asked(prefix: str) -> None:
    """A generated name is always a valid one, whatever its prefix."""
    name = new_name(prefix)
    assert check_name(name) == name
    assert name.startswith(prefix[: NAME_MAX - 7].rstrip("-") + "-")


def test_ids_are_ids_names_and_different() -> None:
    """An id can be given wherever a name can, and no two are the same."""
    ids = {new_id() for _ in range(1000)}
    assert len(ids) == 1000
    assert all(is_id(text) and check_reference(text) == text for text in ids)


@given(st.text(max_size=40))
@example("a" * 24 + "\n")
@example("1" + "a" * 23)
@example("../" + "a" * 21)
def test_is_id_admits_only_ids(text: str) -> None:
    """Paths are built from ids: what is no id never becomes one."""
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
    """execve ends a string at a NUL and a key at the first equals sign: neither is let in."""
    try:
        accepted = check_env(env)
    except UsageError:
        return
    for key, value in accepted.items():
        assert re.fullmatch(r"[A-Za-z_][A-Za-z0-9_]*", key)
        assert "\0" not in value


@given(st.integers(0, 2**50), st.sampled_from(["", "K", "M", "G", "T", "KiB", "mib", "GB", "tb", "k"]))
def test_sizes_are_exact(number: int, unit: str) -> None:
    """A whole number of units is that many bytes, to the byte, however large."""
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
def test_what_is_no_size_is_refused_as_usage(text: str) -> None:
    """No text at all makes the parser fail in another way than with UsageError, nor gives a negative size."""
    try:
        size = parse_size(text)
    except UsageError:
        return
    assert size >= 0
    assert text.isascii()


def test_a_fraction_of_a_unit_is_rounded_down() -> None:
    """1.5G is what a person expects."""
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
    """The bounds themselves are inside."""
    check_machine(1, MIN_MEMORY, MIN_OVERLAY)


@pytest.mark.parametrize("count", [0, -1, MAX_FORKS + 1])
def test_impossible_counts_are_refused(count: int) -> None:
    """A fan-out has at least one child, and not more than the bound."""
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
        Publish(host_port=80, guest_port=80, host_address="127.0.0.1,guestfwd=tcp:10.0.2.9:1-cmd:reboot"),
        Publish(host_port=80, guest_port=80, host_address="fe80::1%,guestfwd=tcp:10.0.2.9:1-cmd:reboot"),
    ],
)
def test_what_is_no_port_cannot_be_published(port: Publish) -> None:
    """It becomes an option of the VMM: whatever else is in it would be one too."""
    with pytest.raises(UsageError):
        check_publish([port])


def test_ports_of_either_family_are_published() -> None:
    """As they are; so are any port, several times, and an address that is chosen later."""
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
    """The second would find it taken, by the machine's own first."""
    port = Publish(host_port=80, guest_port=80, host_address="own")
    with pytest.raises(UsageError, match="twice"):
        check_publish([port, Publish(host_port=80, guest_port=81, host_address="own")])


def mounts(*paths: str) -> tuple[VolumeMount, ...]:
    """A volume at each of the paths."""
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
def test_a_volume_is_mounted_at_a_plain_path_or_not_at_all(path: str) -> None:
    """Absolute, without dots to climb by, and never over what the agent itself mounts."""
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
def test_the_machines_own_paths_are_kept(path: str) -> None:
    """A volume there would hide what makes the machine itself."""
    with pytest.raises(UsageError):
        check_mounts(mounts(path))


def test_usual_paths_are_allowed() -> None:
    """Also below each other, below /run and /etc, and up to as many as a machine has."""
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
    """Before anything is looked up."""
    with pytest.raises(UsageError):
        check_mounts(wanted)


@pytest.mark.parametrize("size", [0, -MIB, MIN_VOLUME - MIB, MIN_VOLUME + 1, MAX_VOLUME + MIB])
def test_impossible_sizes_of_volumes_are_refused(size: int) -> None:
    """The bounds themselves are inside; what was asked for is shown as a person writes it, not as 1e+07."""
    with pytest.raises(UsageError, match=rf"{size // MIB} MiB|{size} bytes"):
        check_volume_size(size)
    assert check_volume_size(MIN_VOLUME) == MIN_VOLUME
    assert check_volume_size(MAX_VOLUME) == MAX_VOLUME


@pytest.mark.parametrize("argv", ["ls -l", ["printf", "a\0b"]])
def test_what_is_no_command_is_refused(argv: str | list[str]) -> None:
    """A string is a sequence of strings too, and would run its first letter; and no argument can have a NUL."""
    with pytest.raises(UsageError):
        check_argv(argv)


def test_a_command_is_kept_word_by_word() -> None:
    """Empty words count, and so does none at all."""
    assert check_argv(["printf", "", "a b"]) == ("printf", "", "a b")
    assert check_argv([]) == ()
