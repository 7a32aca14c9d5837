"""Frames and fields: any bytes from a guest, in chunks of any size, are decoded correctly, refused,
or waited for, within bounds.
"""

from __future__ import annotations

import struct

import pytest
from hypothesis import given
from hypothesis import strategies as st

from coppice.agent.protocol import (
    HOST_PAYLOAD_MAX,
    MAGIC,
    PADDING,
    REQUEST_MAX,
    Fields,
    FrameDecoder,
    FrameType,
    Value,
    encode_fields,
    encode_frame,
    encode_hello,
    encode_request,
    readable,
)
from coppice.errors import GuestProtocolError, UsageError
from hostile_guest import GUEST_PAYLOAD_MAX

NONCE = bytes(range(16))


def guest_frame(frame_type: int, stream: int, payload: bytes) -> bytes:
    """A frame as an agent writes it."""
    return struct.pack("<BHH", frame_type, stream, len(payload)) + payload + b"\xa5"


ACK = guest_frame(FrameType.HELLO_ACK, 0, MAGIC + NONCE)


def cut(data: bytes, sizes: list[int]) -> list[bytes]:
    """Split the data into chunks of these sizes, and the rest."""
    chunks, at = [], 0
    for size in sizes:
        chunks.append(data[at : at + size])
        at += size
    return [*chunks, data[at:]]


frames = st.lists(st.tuples(st.integers(1, 255), st.integers(0, 65535), st.binary(max_size=200)), max_size=8)
sizes = st.lists(st.integers(1, 64), max_size=50)


@given(stale=st.binary(max_size=300), sent=frames, sizes=sizes, padding=st.integers(0, 40))
def test_any_cut_gives_the_same_frames(
    stale: bytes, sent: list[tuple[int, int, bytes]], sizes: list[int], padding: int
) -> None:
    """Neither the chunk boundaries nor bytes before the acknowledgement change the frames."""
    zeros = bytes(padding)
    data = stale + ACK + b"".join(zeros + guest_frame(*frame) for frame in sent) + zeros
    decoder = FrameDecoder(NONCE)
    found = [frame for chunk in cut(data, sizes) for frame in decoder.feed(chunk)]
    assert found[0].type == FrameType.HELLO_ACK
    assert [tuple(frame) for frame in found[1:]] == sent


@given(chunks=st.lists(st.binary(max_size=2000), max_size=30), acknowledged=st.booleans())
def test_garbage_is_refused_or_waited_for(chunks: list[bytes], acknowledged: bool) -> None:
    """Any bytes make the decoder raise only its own error, and keep at most one frame."""
    decoder = FrameDecoder(NONCE)
    if acknowledged:
        decoder.feed(ACK)
    try:
        for chunk in chunks:
            decoder.feed(chunk)
            assert len(decoder._buffer) <= GUEST_PAYLOAD_MAX + 6
    except GuestProtocolError:
        pass


@pytest.mark.parametrize("flood", [b"\0", b"\x31", b"COPPICE1"])
def test_a_flood_before_the_acknowledgement_is_not_kept(flood: bytes) -> None:
    """A guest that never acknowledges cannot fill the host's memory."""
    decoder = FrameDecoder(NONCE)
    for _ in range(50):
        decoder.feed(flood * 10_000)
    assert len(decoder._buffer) < 100
    assert decoder._seeking


def test_a_flood_of_padding_is_not_kept() -> None:
    """Zeros between frames are dropped as they arrive."""
    decoder = FrameDecoder(NONCE)
    decoder.feed(ACK)
    for _ in range(50):
        assert decoder.feed(bytes(100_000)) == []
    assert len(decoder._buffer) == 0


def test_only_this_sessions_acknowledgement_counts() -> None:
    """Only the nonce of the current HELLO opens the session."""
    decoder = FrameDecoder(NONCE)
    assert decoder.feed(guest_frame(FrameType.HELLO_ACK, 0, MAGIC + bytes(16)) + guest_frame(49, 1, b"stale")) == []
    assert decoder._seeking
    assert decoder.feed(ACK)[0].type == FrameType.HELLO_ACK


def test_a_nonce_in_another_frame_is_refused() -> None:
    """A guest that sends the nonce in a frame other than the acknowledgement breaks the protocol."""
    with pytest.raises(GuestProtocolError):
        FrameDecoder(NONCE).feed(guest_frame(FrameType.STDOUT, 1, MAGIC + NONCE))


def test_a_broken_frame_is_refused() -> None:
    """A frame that does not end where it says is refused."""
    decoder = FrameDecoder(NONCE)
    decoder.feed(ACK)
    with pytest.raises(GuestProtocolError):
        decoder.feed(struct.pack("<BHH", 49, 1, 2) + b"ab\x00")


def test_an_agent_of_protocol_1_is_refused_with_the_cure() -> None:
    """An agent in an old capture answers the HELLO of its protocol, which goes out first."""
    hello = encode_hello(NONCE)
    old = struct.pack("<BI", FrameType.HELLO, 24) + b"COPPICE1" + NONCE + b"\xa5"
    assert hello.startswith(old)
    answer = struct.pack("<BI", FrameType.HELLO_ACK, 24) + b"COPPICE1" + NONCE + b"\xa5"
    with pytest.raises(GuestProtocolError, match=r"speaks protocol 1 only.*make templates and snapshots again"):
        FrameDecoder(NONCE).feed(b"\0stale" + answer)


def test_padding_completes_any_half_sent_frame() -> None:
    """The zeros before a HELLO are enough for the longest frame that a host may have left half-sent."""
    longest = encode_frame(FrameType.STDIN, 1, bytes(HOST_PAYLOAD_MAX))
    assert len(PADDING) >= len(longest)
    assert encode_hello(NONCE).endswith(
        PADDING + guest_frame(FrameType.HELLO, 0, MAGIC + NONCE + encode_fields([(1, 2)]))
    )


@given(size=st.integers(0, 3 * HOST_PAYLOAD_MAX))
def test_a_request_of_any_size_is_split_into_frames(size: int) -> None:
    """Each frame of a request fits the agent's limit, and the joined parts are the payload."""
    payload = bytes(index % 251 for index in range(size))
    data, seen, types = encode_request(FrameType.EXEC, 9, payload), b"", []
    while data:
        frame_type, stream, length = struct.unpack_from("<BHH", data)
        assert stream == 9
        assert length <= HOST_PAYLOAD_MAX
        assert data[5 + length] == 0xA5
        seen += data[5 : 5 + length]
        types.append(frame_type)
        data = data[6 + length :]
    assert seen == payload
    assert types == [FrameType.PART] * (len(types) - 1) + [FrameType.EXEC]


def test_a_request_beyond_the_agents_bound_is_refused() -> None:
    """It is refused before it is sent."""
    with pytest.raises(UsageError):
        encode_request(FrameType.IDENTITY, 1, bytes(REQUEST_MAX + 1))


values = st.one_of(
    st.integers(0, 2**64 - 1), st.binary(max_size=50), st.text(st.characters(exclude_characters="\0", codec="utf-8"))
)


@given(fields=st.lists(st.tuples(st.integers(0, 255), values), max_size=10))
def test_fields_are_decoded_unchanged(fields: list[tuple[int, Value]]) -> None:
    """Each value is found under its tag; of repeated tags the last one counts."""
    decoded = Fields(encode_fields(fields))
    for tag, value in dict(fields).items():
        if isinstance(value, int):
            assert decoded.integer(tag) == value
        else:
            assert decoded.raw(tag) == (value.encode() if isinstance(value, str) else value)


@given(payload=st.binary(max_size=200))
def test_any_bytes_are_fields_or_are_refused(payload: bytes) -> None:
    """A malformed list raises only the protocol's error."""
    try:
        fields = Fields(payload)
        fields.integer(1, 0)
        fields.texts(2)
    except GuestProtocolError:
        pass


def test_text_with_a_null_byte_is_refused() -> None:
    """A path with a null byte would end early in the guest, so it is not sent."""
    with pytest.raises(UsageError):
        encode_fields([(1, "/etc\0/passwd")])


@given(value=st.binary(max_size=3000))
def test_a_guest_cannot_write_to_the_terminal(value: bytes) -> None:
    """Guest text in a message is short and has no control characters."""
    text = readable(value)
    assert len(text) <= 1000
    assert text.isprintable()
