"""NICs as plain data: the parameters of a VMM, and the network settings of a guest."""

from enum import StrEnum

from coppice.model import Publish, Record


class NicBackend(StrEnum):
    """The kind of connection of a NIC. A provider declares one, a driver all that it supports."""

    USER_MODE = "user-mode"  # a TCP/IP stack inside the VMM, which listens on ports of the host
    TAP = "tap"  # a TAP device in a network namespace
    STREAM = "stream"  # a helper process, which has frames from the VMM on a stream socket


class Nic(Record, frozen=True, kw_only=True):
    """One NIC of a machine."""

    backend: NicBackend
    mac: str  # "02:00:00:00:00:01"
    forwards: tuple[Publish, ...] = ()  # USER_MODE only: host ports that the VMM listens on
    tap: str = ""  # TAP only: the name of the device
    namespace: str = ""  # TAP only: the path of the network namespace that the device is in
    helper: tuple[str, ...] = ()  # STREAM only: the command; the descriptor of its socket is the last word
    greeting: bytes = b""  # STREAM only: a frame that the helper gets before the guest runs


class GuestNetwork(Record, frozen=True, kw_only=True):
    """The network settings in the identity message."""

    mac: str
    address: str  # with its prefix length: "10.0.2.15/24"
    gateway: str
    dns: tuple[str, ...]
    mtu: int | None = None  # None: leave the NIC's own
    address6: str | None = None  # with its prefix; None: no IPv6
    gateway6: str | None = None


class SlotCounts(Record, frozen=True, kw_only=True):
    """How many slots of a network instances use, and how many are ready for others."""

    used: int
    free: int
