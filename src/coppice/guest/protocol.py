"""The agent protocol as bytes: frames, fields, and a decoder for what a guest sends. Pure: no I/O.

The page docs/agent-protocol.md is the contract. What comes from the guest is hostile: the decoder keeps at most one frame and one
chunk, and whatever breaks the protocol raises.
"""

from __future__ import annotations

import re
import struct
from collections.abc import Iterable
from enum import IntEnum
from typing import Final, NamedTuple

from coppice.errors import GuestProtocolError, UsageError

MAGIC: Final = b"COPPICE1"
NONCE_SIZE: Final = 16
END_BYTE: Final = 0xA5
HOST_FRAME_MAX: Final = 4096  # what a virtio port yields to the agent at once
HOST_PAYLOAD_MAX: Final = HOST_FRAME_MAX - 6
GUEST_PAYLOAD_MAX: Final = 65536
REQUEST_MAX: Final = 4 << 20
WINDOW_SIZE: Final = 65536
# Completes any frame that an earlier host left half-sent, and makes it invalid.
PADDING: Final = bytes(HOST_FRAME_MAX)

_HEADER = struct.Struct("<BI")
_U32 = struct.Struct("<I")
_U64 = struct.Struct("<Q")
_ZEROS = re.compile(rb"\0*")
_HINT = "start the machine anew: its agent does not speak this protocol, or something in the guest writes to its port"


class FrameType(IntEnum):
    """What a frame is; the numbers are the protocol's."""

    HELLO = 1
    HELLO_ACK = 2
    OK = 3
    ERROR = 4
    PART = 5
    HEALTH = 16
    IDENTITY = 17
    FREEZE = 18
    THAW = 19
    POWEROFF = 20
    SYNC = 21
    EXEC = 32
    STDIN = 33
    STDIN_EOF = 34
    SIGNAL = 35
    RESIZE = 36
    STARTED = 48
    STDOUT = 49
    STDERR = 50
    WINDOW = 51
    EXIT = 52
    FILE_READ = 64
    FILE_WRITE = 65
    FILE_STAT = 66
    TAR_OUT = 67
    TAR_IN = 68
    DATA = 80
    DATA_EOF = 81


class Frame(NamedTuple):
    """One frame from the guest. `type` is a plain number: an agent may know types that we do not."""

    type: int
    payload: bytes


def encode_frame(frame_type: FrameType, payload: bytes = b"") -> bytes:
    """One frame to the guest. The caller has cut the payload to HOST_PAYLOAD_MAX."""
    if len(payload) > HOST_PAYLOAD_MAX:
        raise ValueError(f"a frame to the guest carries {HOST_PAYLOAD_MAX} bytes at most, not {len(payload)}")
    return _HEADER.pack(frame_type, len(payload)) + payload + bytes((END_BYTE,))


def encode_request(frame_type: FrameType, payload: bytes = b"") -> bytes:
    """A request of any size up to REQUEST_MAX: what is too big for one frame goes before it in PART frames.

    :raises UsageError: it is larger than the agent takes
    """
    if len(payload) > REQUEST_MAX:
        raise UsageError(
            f"the request is {len(payload)} bytes, and an agent takes {REQUEST_MAX}",
            hint="pass large data as a file or on standard input",
        )
    last = max(0, len(payload) - 1) // HOST_PAYLOAD_MAX * HOST_PAYLOAD_MAX
    return encode_stream(FrameType.PART, payload[:last]) + encode_frame(frame_type, payload[last:])


def encode_stream(frame_type: FrameType, data: bytes | memoryview) -> bytes:
    """Data of any size as frames; none for no data."""
    cuts = range(0, len(data), HOST_PAYLOAD_MAX)
    return b"".join(encode_frame(frame_type, bytes(data[start : start + HOST_PAYLOAD_MAX])) for start in cuts)


def encode_hello(nonce: bytes) -> bytes:
    """The opening frame of a session."""
    return encode_frame(FrameType.HELLO, MAGIC + nonce)


Value = int | str | bytes


def encode_fields(fields: Iterable[tuple[int, Value | None]]) -> bytes:
    """A TLV list of tags and values: integers as u64, text as UTF-8; None is left out.

    :raises UsageError: a text holds a zero byte, which no path, argument or variable can
    """
    encoded = bytearray()
    for tag, value in fields:
        if value is None:
            continue
        if isinstance(value, int):
            value = _U64.pack(value)
        elif isinstance(value, str):
            # surrogateescape: names that are no UTF-8 come back from the file system so, and go out as they were
            value = value.encode("utf-8", "surrogateescape")
            if 0 in value:
                raise UsageError("a text holds a zero byte", hint="remove it: paths, arguments and variables end there")
        encoded += _HEADER.pack(tag, len(value)) + value
    return bytes(encoded)


class Fields:
    """A decoded TLV list. Unknown tags are kept and ignored; repeated tags make lists.

    :raises GuestProtocolError: the list is malformed
    """

    def __init__(self, payload: bytes) -> None:
        self._values: dict[int, list[bytes]] = {}
        at = 0
        while at < len(payload):
            if len(payload) - at < _HEADER.size:
                raise _malformed("a field is cut off")
            tag, size = _HEADER.unpack_from(payload, at)
            at += _HEADER.size
            if size > len(payload) - at:
                raise _malformed("a field is longer than its frame")
            self._values.setdefault(tag, []).append(payload[at : at + size])
            at += size

    def raw(self, tag: int) -> bytes | None:
        """The last value of the tag, or None."""
        return self._values[tag][-1] if tag in self._values else None

    def integer(self, tag: int, default: int | None = None) -> int:
        """A u64; a missing one without default is malformed."""
        value = self.raw(tag)
        if value is None and default is not None:
            return default
        if value is None or len(value) != _U64.size:
            raise _malformed(f"field {tag} is not an integer")
        number: int = _U64.unpack(value)[0]
        return number

    def text(self, tag: int, default: str = "") -> str:
        """Text for people: undecodable bytes are replaced, control characters dropped, and 1000 characters are enough."""
        value = self.raw(tag)
        return default if value is None else readable(value)

    def raws(self, tag: int) -> list[bytes]:
        """All values of a repeated tag."""
        return list(self._values.get(tag, []))

    def texts(self, tag: int) -> list[str]:
        """All values of a repeated tag, as `text`."""
        return [readable(value) for value in self.raws(tag)]


def readable(value: bytes) -> str:
    """What the guest wrote, fit for a message or a terminal."""
    text = value[:1000].decode("utf-8", "replace")
    return "".join(character for character in text if character.isprintable())


def integer32(payload: bytes) -> int:
    """The payload of a WINDOW frame.

    :raises GuestProtocolError: it is not four bytes
    """
    if len(payload) != _U32.size:
        raise _malformed("a window is not four bytes")
    number: int = _U32.unpack(payload)[0]
    return number


def pack32(*values: int) -> bytes:
    """The payload of a SIGNAL or RESIZE frame."""
    return b"".join(_U32.pack(value) for value in values)


class FrameDecoder:
    """Frames out of the bytes of one session, however they are cut.

    It throws away everything until the acknowledgement of this session's HELLO, which is its first frame: output of an earlier
    session never reaches this one. The nonce is random, so nothing sent before can look like it.
    """

    def __init__(self, nonce: bytes) -> None:
        self._mark = MAGIC + nonce
        self._buffer = bytearray()
        self._seeking = True

    @property
    def acknowledged(self) -> bool:
        """Whether the agent has answered the HELLO."""
        return not self._seeking

    def feed(self, data: bytes) -> list[Frame]:
        """Take more bytes and return the frames that are complete now.

        :raises GuestProtocolError: the bytes are not the protocol
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
        at = self._buffer.find(self._mark)
        while 0 <= at < _HEADER.size:  # not behind a header: no frame begins there
            at = self._buffer.find(self._mark, at + 1)
        if at < 0:
            del self._buffer[: -(_HEADER.size + len(self._mark))]
            return False
        del self._buffer[: at - _HEADER.size]
        frame_type, size = _HEADER.unpack_from(self._buffer)
        if frame_type != FrameType.HELLO_ACK or size < len(self._mark):
            raise _malformed("its first frame is no acknowledgement")
        self._seeking = False
        return True

    def _skip_padding(self, at: int) -> int:
        padding = _ZEROS.match(self._buffer, at)
        return padding.end() if padding else at

    def _frame(self, at: int) -> Frame | None:
        """The frame at this offset, or None while bytes are missing."""
        buffer = self._buffer
        if len(buffer) - at < _HEADER.size:
            return None
        frame_type, size = _HEADER.unpack_from(buffer, at)
        if size > GUEST_PAYLOAD_MAX:
            raise _malformed(f"a frame says that it is {size} bytes long")
        end = at + _HEADER.size + size
        if len(buffer) <= end:
            return None
        if buffer[end] != END_BYTE:
            raise _malformed("a frame does not end where it says")
        return Frame(frame_type, bytes(buffer[at + _HEADER.size : end]))


def _malformed(what: str) -> GuestProtocolError:
    return GuestProtocolError(f"the guest broke the agent protocol: {what}", hint=_HINT)
