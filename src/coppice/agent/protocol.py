"""The agent protocol as bytes: frames, fields, and a decoder of a guest's bytes. No I/O.

docs/agent-protocol.md is the contract. The guest is hostile: the decoder keeps at most one frame
and one chunk, and raises for every violation of the protocol.
"""

from __future__ import annotations

import re
import struct
from collections.abc import Iterable
from enum import IntEnum
from typing import Final, NamedTuple

from coppice.errors import GuestProtocolError, UsageError

MAGIC: Final = b"COPPICE2"
VERSION: Final = 2
NONCE_SIZE: Final = 16
END_BYTE: Final = 0xA5
HOST_FRAME_MAX: Final = 4096  # one read of the agent from its virtio port
HOST_PAYLOAD_MAX: Final = HOST_FRAME_MAX - 6
REQUEST_MAX: Final = 4 << 20
WINDOW_SIZE: Final = 65536  # bytes that the host may send ahead on a new stream
CREDIT_SIZE: Final = 262144  # bytes that the guest may send ahead on a new stream
STREAMS_MAX: Final = 65535  # stream 0 is the connection itself
# Completes a frame that an earlier host process left half-sent, and makes it invalid.
PADDING: Final = bytes(HOST_FRAME_MAX)

_HEADER = struct.Struct("<BHH")  # type, stream, length of the payload
_FIELD = struct.Struct("<BI")
_OLD_MAGIC = b"COPPICE1"
_U32 = struct.Struct("<I")
_U64 = struct.Struct("<Q")
_ZEROS = re.compile(rb"\0*")
_HINT = (
    "run `coppice stop NAME`, then `coppice start NAME`: "
    "another program in the guest may have written to the agent's port"
)
OLDER_HINT: Final = (
    "`coppice stop NAME`, then `coppice start NAME` boots it with the new agent (fork a template with "
    "`--target stopped`, and start the fork); make templates and snapshots again from it"
)
LIMITS: Final = "limits"
"""The feature of agents that know the limits of an EXEC."""


class FrameType(IntEnum):
    """The type of a frame. The numbers are part of the protocol."""

    HELLO = 1
    HELLO_ACK = 2
    OK = 3
    ERROR = 4
    PART = 5
    PING = 6
    PONG = 7
    FORGET = 8
    HEALTH = 16
    IDENTITY = 17
    FREEZE = 18
    THAW = 19
    POWEROFF = 20
    SYNC = 21
    CLOCK = 22
    SHARED_RANDOM = 23
    EXEC = 32
    STDIN = 33
    STDIN_EOF = 34
    SIGNAL = 35
    RESIZE = 36
    ATTACH = 37
    LIST = 38
    LEAVE = 39
    END = 40
    STARTED = 48
    STDOUT = 49
    STDERR = 50
    WINDOW = 51
    EXIT = 52
    DROPPED = 53
    FILE_READ = 64
    FILE_WRITE = 65
    FILE_STAT = 66
    TREE_OUT = 67
    TREE_IN = 68
    CONNECT = 69
    FILE_LIST = 70
    FILE_MKDIR = 71
    FILE_MOVE = 72
    FILE_REMOVE = 73
    FILE_WATCH = 74
    DATA = 80
    DATA_EOF = 81


class Frame(NamedTuple):
    """One frame from the guest. `type` is a plain number, since an agent may send unknown types."""

    type: int
    stream: int
    payload: bytes


def encode_frame(frame_type: FrameType, stream: int, payload: bytes = b"") -> bytes:
    """Return one frame to the guest.

    :raises ValueError: the payload is larger than HOST_PAYLOAD_MAX
    """
    if len(payload) > HOST_PAYLOAD_MAX:
        raise ValueError(f"a frame to the guest carries at most {HOST_PAYLOAD_MAX} bytes, not {len(payload)}")
    return _HEADER.pack(frame_type, stream, len(payload)) + payload + bytes((END_BYTE,))


def encode_request(frame_type: FrameType, stream: int, payload: bytes = b"") -> bytes:
    """Return a request. If it does not fit in one frame, PART frames before it carry its beginning.

    :raises UsageError: the payload is larger than REQUEST_MAX
    """
    if len(payload) > REQUEST_MAX:
        raise UsageError(
            f"the request has {len(payload)} bytes, and an agent accepts at most {REQUEST_MAX}",
            hint="pass large data as a file or on standard input",
        )
    last = max(0, len(payload) - 1) // HOST_PAYLOAD_MAX * HOST_PAYLOAD_MAX
    return encode_data(FrameType.PART, stream, payload[:last]) + encode_frame(frame_type, stream, payload[last:])


def encode_data(frame_type: FrameType, stream: int, data: bytes | memoryview) -> bytes:
    """Return data of any size as frames; no frame if there is no data."""
    cuts = range(0, len(data), HOST_PAYLOAD_MAX)
    return b"".join(encode_frame(frame_type, stream, bytes(data[start : start + HOST_PAYLOAD_MAX])) for start in cuts)


def encode_hello(nonce: bytes) -> bytes:
    """Return the opening of a session.

    The first bytes are the HELLO of protocol 1, so that its agents answer too, and can be refused.
    The padding completes a frame that an earlier host left half-sent.
    """
    old = _FIELD.pack(FrameType.HELLO, len(_OLD_MAGIC + nonce)) + _OLD_MAGIC + nonce + bytes((END_BYTE,))
    hello = encode_frame(FrameType.HELLO, 0, MAGIC + nonce + encode_fields([(1, VERSION)]))
    return old + PADDING + hello


Value = int | str | bytes


def encode_fields(fields: Iterable[tuple[int, Value | None]]) -> bytes:
    """Return a TLV list of tags and values: integers as u64, text as UTF-8. None is left out.

    :raises UsageError: a text contains a zero byte, which paths, arguments and variables cannot
    """
    encoded = bytearray()
    for tag, value in fields:
        if value is None:
            continue
        if isinstance(value, int):
            value = _U64.pack(value)
        elif isinstance(value, str):
            # surrogateescape: a name that is not UTF-8 is sent with its original bytes.
            value = value.encode("utf-8", "surrogateescape")
            if 0 in value:
                raise UsageError(
                    f"{value[:100]!r} contains a zero byte", hint="remove it: paths, arguments and variables end there"
                )
        encoded += _FIELD.pack(tag, len(value)) + value
    return bytes(encoded)


class Fields:
    """A decoded TLV list. Unknown tags are kept and ignored; repeated tags make lists.

    :raises GuestProtocolError: the list is malformed
    """

    def __init__(self, payload: bytes) -> None:
        self._values: dict[int, list[bytes]] = {}
        at = 0
        while at < len(payload):
            if len(payload) - at < _FIELD.size:
                raise _malformed("a field is cut off")
            tag, size = _FIELD.unpack_from(payload, at)
            at += _FIELD.size
            if size > len(payload) - at:
                raise _malformed("a field is longer than its frame")
            self._values.setdefault(tag, []).append(payload[at : at + size])
            at += size

    def raw(self, tag: int) -> bytes | None:
        """Return the last value of the tag, or None."""
        return self._values[tag][-1] if tag in self._values else None

    def integer(self, tag: int, default: int | None = None) -> int:
        """Return a u64 field.

        :raises GuestProtocolError: it is malformed, or missing and there is no default
        """
        value = self.raw(tag)
        if value is None and default is not None:
            return default
        if value is None or len(value) != _U64.size:
            raise _malformed(f"field {tag} is not an integer")
        number: int = _U64.unpack(value)[0]
        return number

    def text(self, tag: int, default: str = "") -> str:
        """Return a text field, made safe to print by `readable`."""
        value = self.raw(tag)
        return default if value is None else readable(value)

    def raws(self, tag: int) -> list[bytes]:
        """Return all values of a repeated tag."""
        return list(self._values.get(tag, []))

    def texts(self, tag: int) -> list[str]:
        """Return all values of a repeated tag, made safe to print by `readable`."""
        return [readable(value) for value in self.raws(tag)]


def readable(value: bytes) -> str:
    """Return the guest's text, safe for a message or a terminal.

    Undecodable bytes are replaced, control characters dropped, and at most 1000 bytes kept.
    """
    text = value[:1000].decode("utf-8", "replace")
    return text if text.isprintable() else "".join(character for character in text if character.isprintable())


def unpack_number(payload: bytes) -> int:
    """Return the number in the payload of a WINDOW frame (u32) or a DROPPED frame (u64).

    :raises GuestProtocolError: the payload has neither four nor eight bytes
    """
    if len(payload) not in (_U32.size, _U64.size):
        raise _malformed(f"a number has {len(payload)} bytes")
    return int.from_bytes(payload, "little")


def pack32(*values: int) -> bytes:
    """Return the payload of a SIGNAL, RESIZE or WINDOW frame."""
    return b"".join(_U32.pack(value) for value in values)


class FrameDecoder:
    """Decodes the bytes of one session into frames, however the bytes are split.

    The first frame of a session acknowledges its HELLO. All bytes before it are discarded, so no
    output of an earlier session reaches this one. The nonce in it is random and cannot be guessed.
    """

    def __init__(self, nonce: bytes) -> None:
        self._mark = MAGIC + nonce
        self._old_mark = _OLD_MAGIC + nonce
        self._buffer = bytearray()
        self._seeking = True

    def feed(self, data: bytes) -> list[Frame]:
        """Add bytes and return the frames that are complete now.

        :raises GuestProtocolError: the bytes violate the protocol
        """
        self._buffer += data
        frames: list[Frame] = []
        if self._seeking and not self._seek():
            return frames
        at = self._skip_padding(0)
        while (frame := self._frame(at)) is not None:
            frames.append(frame)
            at = self._skip_padding(at + _HEADER.size + len(frame.payload) + 1)
        del self._buffer[:at]
        return frames

    def _seek(self) -> bool:
        if self._buffer.find(self._old_mark) >= 0:
            raise GuestProtocolError(
                "the machine was captured with an older agent, which speaks protocol 1 only", hint=OLDER_HINT
            )
        at = self._buffer.find(self._mark)
        while 0 <= at < _HEADER.size:  # no space for a header before it, so no frame begins there
            at = self._buffer.find(self._mark, at + 1)
        if at < 0:
            del self._buffer[: -(_HEADER.size + len(self._mark))]
            return False
        del self._buffer[: at - _HEADER.size]
        frame_type, _, size = _HEADER.unpack_from(self._buffer)
        if frame_type != FrameType.HELLO_ACK or size < len(self._mark):
            raise _malformed("its first frame is not an acknowledgement")
        self._seeking = False
        return True

    def _skip_padding(self, at: int) -> int:
        padding = _ZEROS.match(self._buffer, at)
        return padding.end() if padding else at

    def _frame(self, at: int) -> Frame | None:
        """Return the frame at this offset, or None if bytes are missing."""
        buffer = self._buffer
        if len(buffer) - at < _HEADER.size:
            return None
        frame_type, stream, size = _HEADER.unpack_from(buffer, at)
        end = at + _HEADER.size + size
        if len(buffer) <= end:
            return None
        if buffer[end] != END_BYTE:
            raise _malformed("a frame has no end byte after its payload")
        return Frame(frame_type, stream, bytes(buffer[at + _HEADER.size : end]))


def _malformed(what: str) -> GuestProtocolError:
    return GuestProtocolError(f"the guest broke the agent protocol: {what}", hint=_HINT)
