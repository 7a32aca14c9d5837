"""The control port: identity, clock, health, freezing the disk, powering off."""

from __future__ import annotations

import re
import time
from typing import Final

from coppice.agent.channel import Channel
from coppice.agent.protocol import Fields, FrameType, Value, encode_fields
from coppice.errors import GuestProtocolError, UsageError
from coppice.model import ProcessEnd, Record
from coppice.model.guest import Health

CLOCK_ERROR_S: Final = 0.02
"""The largest error of a guest's clock that is accepted. A larger one is corrected."""
CLOCK_ATTEMPTS: Final = 3
MAX_PROCESSES: Final = 64
"""In a report on shared random generators. A guest may send more, and they are dropped."""

_MICROSECONDS = re.compile(r"[0-9]{1,12}")  # a hostile guest may send numbers that no float holds
_END_SESSIONS, _THAW, _START_PROCESS, _NEW_MACHINE = 1, 2, 4, 8


class Mount(Record, frozen=True, kw_only=True):
    """A volume that the guest mounts: the machine's volume of this number."""

    number: int
    path: str
    readonly: bool


class Identity(Record, frozen=True, kw_only=True):
    """One message that gives a machine its identity. A field that is None changes nothing.

    `new_machine` says that the guest had another identity before. Only then does the agent remove
    saved random seeds, replace ssh host keys, and run the image's /etc/coppice/on-fork (unless the
    same message starts the image's process).
    """

    serial: int  # larger than any before
    entropy: bytes  # at least 32 bytes, never used before
    clock_ns: int | None = None  # since the epoch
    hostname: str | None = None
    machine_id: str | None = None  # 32 hex digits
    boot_id: str | None = None  # a UUID
    mac: str | None = None  # "02:00:00:00:00:01"
    address: str | None = None  # "10.0.2.15/24"
    gateway: str | None = None
    dns: tuple[str, ...] = ()
    mtu: int | None = None
    address6: str | None = None  # "fd00::2/126"; the card has no IPv6 without
    gateway6: str | None = None
    payload: bytes | None = None  # becomes /run/coppice/payload
    new_machine: bool = False
    end_sessions: bool = False  # the sessions that were open in the source
    thaw: bool = False
    start_process: bool = False
    argv: tuple[str, ...] = ()
    env: dict[str, str] = {}
    cwd: str | None = None
    user: str | None = None
    mounts: tuple[Mount, ...] = ()  # only after a boot; a parent mount point comes before those in it
    certificates: tuple[str, ...] = ()  # PEM, one each; only after a boot


class Acknowledged(Record, frozen=True, kw_only=True):
    """The answer to an identity message."""

    steps_ms: dict[str, float] = {}  # how long each step took in the guest
    process_end: ProcessEnd | None  # of the machine's process, which may have ended before a capture


class Control:
    """The requests about one machine. The agent answers them in order, one at a time."""

    def __init__(self, channel: Channel) -> None:
        self._channel = channel

    async def _request(self, frame_type: FrameType, fields: bytes = b"") -> Fields:
        return await self._channel.call(frame_type, fields)

    async def greet(self) -> None:
        """Wait until the agent reads the port.

        :raises GuestTimeout: it does not in time
        :raises VmmDied: the port is closed
        """
        await self._channel.greet()

    async def identity(self, identity: Identity) -> Acknowledged:
        """Give the machine its identity.

        The guest may read the message seconds after it was written, if the host is busy. So the
        acknowledgement carries the guest's time, and the time is sent again if that is late.

        :raises GuestRefused: a step failed; the machine must not be used
        """
        reply = await self._request(FrameType.IDENTITY, encode_identity(identity))
        if reply.integer(1) != identity.serial:
            raise GuestProtocolError(
                f"the guest acknowledged identity {reply.integer(1)} instead of {identity.serial}",
                hint="something in the guest answers in place of its agent: do not use this machine",
            )
        if identity.clock_ns is not None and (guest_ns := reply.integer(3, 0)):
            await self._correct_clock(guest_ns)
        steps = (line.partition("=") for line in reply.texts(2))
        return Acknowledged(
            steps_ms={name: int(us) / 1000 for name, _, us in steps if _MICROSECONDS.fullmatch(us)},
            process_end=_process_end(reply),
        )

    async def acknowledged(self, serial: int) -> Acknowledged | None:
        """Return the answer to the identity with this serial again, and set the clock again. None:
        the machine has not read the message.

        :raises GuestProtocolError: it has read the message, and is not known to have taken all steps
        """
        reply = await self._request(FrameType.HEALTH)
        if reply.integer(2) < serial:
            return None
        if reply.integer(2) > serial or not reply.integer(7, 0):  # older agents do not tell
            raise GuestProtocolError(
                "a step of the guest's identity failed, and its answer was lost", hint="fork or restore it again"
            )
        await self._correct_clock(0)
        return Acknowledged(process_end=_process_end(reply))

    async def _correct_clock(self, guest_ns: int) -> None:
        """Set the guest's clock until it is known to be right. Unless the host is very busy, once
        is enough.

        :param guest_ns: the guest's time just before it answered. Its error is at most its
            difference to the host's time now
        """
        for _ in range(CLOCK_ATTEMPTS):
            if abs(time.time_ns() - guest_ns) <= CLOCK_ERROR_S * 1e9:
                return
            guest_ns = (await self._request(FrameType.CLOCK, encode_fields([(1, time.time_ns())]))).integer(1)

    async def health(self) -> Health:
        """Return the agent's report on itself."""
        reply = await self._request(FrameType.HEALTH)
        return Health(
            uptime_ms=reply.integer(1),
            identity_serial=reply.integer(2),
            agent_version=reply.text(3),
            process_pid=reply.integer(4, 0) or None,
            process_end=_process_end(reply),
            load=reply.integer(6, 0) / 100,
        )

    async def shared_random(self) -> tuple[str, ...]:
        """Return the processes whose random generators forks would share, with what they use:
        `node (pid 212): openssl`.
        """
        reply = await self._request(FrameType.SHARED_RANDOM)
        return tuple(reply.texts(1)[:MAX_PROCESSES])

    async def freeze(self, timeout_s: float) -> None:
        """Write the overlay's file system to its disk and block changes to it.

        The guest thaws by itself after `timeout_s`.
        """
        await self._request(FrameType.FREEZE, encode_fields([(1, max(1, int(timeout_s * 1000)))]))

    async def thaw(self) -> None:
        """Undo `freeze`. Idempotent."""
        await self._request(FrameType.THAW)

    async def sync(self) -> None:
        """Write dirty data to the disks."""
        await self._request(FrameType.SYNC)

    async def poweroff(self, grace_s: float = 10.0) -> None:
        """Power the machine off: SIGTERM to all processes, SIGKILL after `grace_s`.

        Returns when the agent has begun.
        """
        await self._request(FrameType.POWEROFF, encode_fields([(1, max(0, int(grace_s * 1000)))]))


def _process_end(reply: Fields) -> ProcessEnd | None:
    """Return the end of the machine's process, or None. A guest can send any numbers."""
    status, signal = reply.integer(5, 0), reply.integer(8, 0)
    if not status:
        return None
    return ProcessEnd(
        exit_code=min(status - 1, 255), signal=signal if 0 < signal <= 64 else None, at=reply.integer(9, 0) / 1e9
    )


def encode_identity(identity: Identity) -> bytes:
    """Return the fields of an IDENTITY request.

    :raises UsageError: the MAC address is malformed
    """
    flags = (
        (_END_SESSIONS if identity.end_sessions else 0)
        | (_THAW if identity.thaw else 0)
        | (_START_PROCESS if identity.start_process else 0)
        | (_NEW_MACHINE if identity.new_machine else 0)
    )
    fields: list[tuple[int, Value | None]] = [
        (1, identity.serial),
        (2, identity.entropy),
        (3, identity.clock_ns),
        (4, identity.hostname),
        (5, identity.machine_id),
        (6, identity.boot_id),
        (7, None if identity.mac is None else _mac_bytes(identity.mac)),
        (8, identity.address),
        (9, identity.gateway),
        *((10, address) for address in identity.dns),
        (11, identity.payload),
        (12, flags),
        (13, identity.mtu),
        (14, identity.address6),
        (15, identity.gateway6),
        *((20, argument) for argument in identity.argv),
        *((21, f"{name}={value}") for name, value in identity.env.items()),
        (22, identity.cwd),
        (23, identity.user),
        *((24, bytes((mount.number, mount.readonly)) + mount.path.encode()) for mount in identity.mounts),
        *((25, certificate) for certificate in identity.certificates),
    ]
    return encode_fields(fields)


def _mac_bytes(mac: str) -> bytes:
    try:
        octets = bytes.fromhex(mac.replace(":", ""))
    except ValueError:
        octets = b""
    if len(octets) != 6:
        raise UsageError(f"{mac!r} is not a MAC address", hint="write it as 02:00:00:00:00:01")
    return octets
