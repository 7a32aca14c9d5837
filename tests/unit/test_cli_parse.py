"""Words of the command line: their meaning, and one sentence for each that has none."""

from __future__ import annotations

import json
import tempfile
from ipaddress import IPv4Address, IPv6Address
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from coppice.cli import parse
from coppice.errors import UsageError
from coppice.model import Publish, State, VolumeMount
from coppice.names import MAX_PAYLOAD

PORT = st.integers(1, 65535)
ADDRESS = st.one_of(st.ip_addresses(v=4), st.ip_addresses(v=6))


@given(PORT, PORT, st.sampled_from(["tcp", "udp"]), ADDRESS)
def test_a_published_port_is_parsed_exactly(
    host: int, guest: int, protocol: str, address: IPv4Address | IPv6Address
) -> None:
    """--publish gives exactly the requested forward, IPv6 included."""
    shown = f"[{address}]" if address.version == 6 else str(address)
    (found,) = parse.publish([f"{shown}:{host}:{guest}/{protocol}"])
    assert (found.host_port, found.guest_port, found.protocol) == (host, guest, protocol)
    assert found.host_address == str(address)


def test_a_published_port_is_local_unless_it_says_otherwise() -> None:
    """By default no port is open to the network."""
    assert parse.publish(["8080:80"]) == (Publish(host_port=8080, guest_port=80, host_address="127.0.0.1"),)


def test_each_machine_can_have_its_own_port_or_address() -> None:
    """A fan-out needs the words for any port and for an unused address."""
    assert parse.publish(["auto:80", "own:8080:80/udp", "0.0.0.0:auto:81", "own:auto:82"]) == (
        Publish(host_port=0, guest_port=80),
        Publish(host_port=8080, guest_port=80, protocol="udp", host_address="own"),
        Publish(host_port=0, guest_port=81, host_address="0.0.0.0"),
        Publish(host_port=0, guest_port=82, host_address="own"),
    )


@given(st.text())
def test_any_text_is_a_port_or_a_usage_error(text: str) -> None:
    """Garbage in --publish raises only a usage error."""
    try:
        (found,) = parse.publish([text])
    except UsageError:
        return
    assert (1 if "auto" not in text else 0) <= found.host_port <= 65535
    assert 1 <= found.guest_port <= 65535


@pytest.mark.parametrize(
    "word",
    [
        "80",
        "0:80",
        "80:65536",
        "a:1:2",
        "1:2/sctp",
        "1.2.3:4:5",
        "::1:80:80",
        "",
        "80:80:80:80",
        "auto",
        "80:auto",
        "auto:own:80",
        "Own:1:2",
    ],
)
def test_a_malformed_port_is_refused(word: str) -> None:
    """A typing error in --publish is refused instead of forwarding another port."""
    with pytest.raises(UsageError):
        parse.publish([word])


@given(st.dictionaries(st.text(st.characters(exclude_characters="="), min_size=1), st.text()))
def test_pairs_are_split_at_the_first_equals_sign(wanted: dict[str, str]) -> None:
    """A value may contain `=`."""
    assert parse.pairs((f"{key}={value}" for key, value in wanted.items()), "tag") == wanted


@pytest.mark.parametrize("word", ["novalue", "=value", ""])
def test_a_pair_without_key_or_equals_sign_is_refused(word: str) -> None:
    """--tag x is an error, not an empty tag."""
    with pytest.raises(UsageError):
        parse.pairs([word], "tag")


def test_the_environment_comes_from_files_words_and_the_caller(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Words override files, comments are skipped, and a bare KEY is inherited from the caller."""
    file = tmp_path / "env"
    file.write_text("# a comment\n\nA=1\nB=x=y\n  \nHERE\n")
    monkeypatch.setenv("HERE", "inherited")
    assert parse.environment(["A=2"], [file]) == {"A": "2", "B": "x=y", "HERE": "inherited"}


def test_an_unset_bare_key_and_an_unreadable_file_are_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A guest must not run without a variable that the user meant to set."""
    monkeypatch.delenv("GONE", raising=False)
    with pytest.raises(UsageError):
        parse.environment(["GONE"])
    with pytest.raises(UsageError):
        parse.environment([], [tmp_path / "missing"])
    (tmp_path / "binary").write_bytes(b"\xff\xfe=1")
    with pytest.raises(UsageError):
        parse.environment([], [tmp_path / "binary"])


@pytest.mark.parametrize(
    ("source", "target", "found"),
    [
        ("vm:/etc/passwd", ".", ("vm", "/etc/passwd", False)),
        ("./vm:x", "vm:/tmp/", ("vm", "/tmp/", True)),
        ("file", "web-1:dir:with:colons", ("web-1", "dir:with:colons", True)),
        ("/a:b", "vm:c\nd", ("vm", "c\nd", True)),
    ],
)
def test_the_two_sides_of_a_copy(source: str, target: str, found: tuple[str, str, bool]) -> None:
    """The copy goes in the written direction; a path with a colon is local if it starts like a
    path.
    """
    assert parse.copy_ends(source, target) == found


@pytest.mark.parametrize(("source", "target"), [("a", "b"), ("vm:/a", "vm:/b"), ("vm:", "b")])
def test_a_copy_needs_exactly_one_instance(source: str, target: str) -> None:
    """`cp` never guesses which side is the guest."""
    with pytest.raises(UsageError):
        parse.copy_ends(source, target)


def test_states_are_read_in_any_case() -> None:
    """--state running and --state Running are the same."""
    assert parse.states(["running", "TEMPLATE"]) == [State.RUNNING, State.TEMPLATE]
    with pytest.raises(UsageError, match="no state"):
        parse.states(["asleep"])


def test_a_payload_is_json_or_a_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A word that begins like JSON is used as it is. Any other word names a file, `-` standard
    input, whose bytes are not parsed.
    """
    file = tmp_path / "payload"
    file.write_bytes(b"\xff\x00 any bytes\n")
    assert parse.payload(str(file)) == b"\xff\x00 any bytes\n"
    for word in ('{"a":  1}', "[1]", '"text"'):
        assert parse.payload(word) == word.encode()
    with file.open() as stdin:
        monkeypatch.setattr("sys.stdin", stdin)
        assert parse.payload("-") == file.read_bytes()


@pytest.mark.parametrize("word", ["{", '{"a": }', '"open', "/does/not/exist", "/", ""])
def test_a_word_that_is_neither_json_nor_a_file_is_refused(word: str) -> None:
    """A typing error does not reach a guest."""
    with pytest.raises(UsageError):
        parse.payload(word)


def test_a_payload_that_is_too_large_is_refused(tmp_path: Path) -> None:
    """A file is read no further than the largest payload."""
    file = tmp_path / "large"
    file.write_bytes(bytes(MAX_PAYLOAD + 1))
    with pytest.raises(UsageError, match="exceeds 1048576 bytes"):
        parse.payload(str(file))


JSON = st.recursive(st.none() | st.booleans() | st.integers() | st.text(), st.lists, max_leaves=5)


@settings(deadline=None)  # it writes files, which takes long on a busy host
@given(st.lists(JSON, min_size=2, max_size=5))
def test_payloads_are_an_array_or_lines(wanted: list[object]) -> None:
    """In both forms each payload is one JSON document, in order."""
    with tempfile.NamedTemporaryFile() as file:
        for text in (json.dumps(wanted), "\n\n".join(json.dumps(each) for each in wanted)):
            Path(file.name).write_text(text)
            assert [json.loads(each) for each in parse.payloads(file.name)] == wanted


@pytest.mark.parametrize("text", ["", "\n", '{"a": 1}\nnot json\n', "[1,", '{"secret": 1} {"b": 2}'])
def test_payloads_in_another_form_are_refused(tmp_path: Path, text: str) -> None:
    """All payloads are refused together, and the message does not repeat their contents."""
    file = tmp_path / "payloads"
    file.write_text(text)
    with pytest.raises(UsageError) as refused:
        parse.payloads(str(file))
    assert "secret" not in str(refused.value)


def test_a_volume_is_parsed_exactly() -> None:
    """A volume is writable unless the word ends in `:ro`."""
    assert parse.volumes(["data:/srv/data", "models:/m:ro", "logs:/var/log:rw"]) == (
        VolumeMount(volume="data", mount_path="/srv/data"),
        VolumeMount(volume="models", mount_path="/m", readonly=True),
        VolumeMount(volume="logs", mount_path="/var/log"),
    )


@pytest.mark.parametrize(
    "word", ["data", "data:", ":/data", "data:data", "data:/data:r", "data:/data:ro:rw", "", "/a:/b:c"]
)
def test_a_malformed_volume_is_refused(word: str) -> None:
    """A typing error in --volume is refused: `:r` does not mean writable, and no other volume is
    attached.
    """
    with pytest.raises(UsageError):
        parse.volumes([word])


@given(st.text())
def test_any_text_is_a_volume_or_a_usage_error(text: str) -> None:
    """Garbage in --volume raises only a usage error."""
    try:
        (found,) = parse.volumes([text])
    except UsageError:
        return
    assert found.mount_path.startswith("/")
