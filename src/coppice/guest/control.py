"""The control port: who a machine is, how it is, freezing its disk, switching it off."""

from __future__ import annotations

import re

from coppice.errors import GuestProtocolError, UsageError
from coppice.guest.channel import Channel
from coppice.guest.protocol import Fields, FrameType, Value, encode_fields, encode_request
from coppice.model import Record

_MICROSECONDS = re.compile(r"[0-9]{1,12}")  # a guest that means harm sends numbers that no float holds
_END_SESSIONS, _THAW, _START_PROCESS, _NEW_MACHINE = 1, 2, 4, 8


class Mount(Record, frozen=True, kw_only=True):
    """A volume that the guest is to mount: the machine's volume of that number."""

    number: int
    path: str
    readonly: bool


class Identity(Record, frozen=True, kw_only=True):
    """One message that makes a machine itself. What is None is left as it is.

    `new_machine` says that it never was this machine before: only then are saved random seeds removed, ssh host keys made anew, and the image's
    /etc/coppice/on-fork run (which is not, where the same message starts the image's process).
    """

    serial: int  # larger than any before
    entropy: bytes  # 32 bytes at least, never used before
    clock_ns: int | None = None  # since the epoch
    hostname: str | None = None
    machine_id: str | None = None  # 32 hex digits
    boot_id: str | None = None  # a UUID
    mac: str | None = None  # "02:00:00:00:00:01"
    address: str | None = None  # "10.0.2.15/24"
    gateway: str | None = None
    dns: tuple[str, ...] = ()
    mtu: int | None = None
    payload: bytes | None = None  # becomes /run/coppice/payload
    new_machine: bool = False
    end_sessions: bool = False  # those that the source had open
    thaw: bool = False
    start_process: bool = False
    argv: tuple[str, ...] = ()
    env: dict[str, str] = {}
    cwd: str | None = None
    user: str | None = None
    mounts: tuple[Mount, ...] = ()  # of a machine that has just booted; what is above another comes first


class Health(Record, frozen=True, kw_only=True):
    """What PID 1 says of itself."""

    uptime_ms: int
    identity_serial: int  # 0: it has never been told who it is
    agent_version: str
    process_pid: int | None  # of the image's process, once it was started
    process_exit_code: int | None  # once it has ended
    load: float  # average of one minute


class Control:
    """The control port of one machine. Requests are answered in order, one at a time."""

    def __init__(self, channel: Channel) -> None:
        self._channel = channel
        self._open = False

    async def _request(self, frame_type: FrameType, fields: bytes = b"") -> Fields:
        request = encode_request(frame_type, fields)
        if self._open:
            await self._channel.send(request)
        else:
            await self._channel.begin(request)
            self._open = True
        return await self._channel.reply()

    async def identity(self, identity: Identity) -> dict[str, float]:
        """Make the machine itself; return the milliseconds that each step took inside of it.

        :raises GuestRefused: a step failed: the machine must not be used
        """
        reply = await self._request(FrameType.IDENTITY, encode_identity(identity))
        if reply.integer(1) != identity.serial:
            raise GuestProtocolError(
                f"the guest acknowledged identity {reply.integer(1)} instead of {identity.serial}",
                hint="something in the guest answers for its agent: do not use this machine",
            )
        steps = (line.partition("=") for line in reply.texts(2))
        return {name: int(us) / 1000 for name, _, us in steps if _MICROSECONDS.fullmatch(us)}

    async def health(self) -> Health:
        """Ask PID 1 how it is."""
        reply = await self._request(FrameType.HEALTH)
        exit_code = reply.integer(5, 0)
        return Health(
            uptime_ms=reply.integer(1),
            identity_serial=reply.integer(2),
            agent_version=reply.text(3),
            process_pid=reply.integer(4, 0) or None,
            process_exit_code=exit_code - 1 if exit_code else None,
            load=reply.integer(6, 0) / 100,
        )

    async def freeze(self, timeout_s: float) -> None:
        """Write all of the overlay's file system to its disk and let nobody change it. It thaws by itself after `timeout_s`."""
        await self._request(FrameType.FREEZE, encode_fields([(1, max(1, int(timeout_s * 1000)))]))

    async def thaw(self) -> None:
        """Undo `freeze`. Idempotent."""
        await self._request(FrameType.THAW)

    async def sync(self) -> None:
        """Write what is dirty to the disks."""
        await self._request(FrameType.SYNC)

    async def poweroff(self, grace_s: float = 10.0) -> None:
        """End all processes, SIGTERM first and SIGKILL after `grace_s`, then the machine. Returns when it has begun."""
        await self._request(FrameType.POWEROFF, encode_fields([(1, max(0, int(grace_s * 1000)))]))


def encode_identity(identity: Identity) -> bytes:
    """The fields of an IDENTITY request.

    :raises UsageError: the MAC is malformed
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
        *((20, argument) for argument in identity.argv),
        *((21, f"{name}={value}") for name, value in identity.env.items()),
        (22, identity.cwd),
        (23, identity.user),
        *((24, bytes((mount.number, mount.readonly)) + mount.path.encode()) for mount in identity.mounts),
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
