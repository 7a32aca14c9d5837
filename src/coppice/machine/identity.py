"""The identity message of an instance.

Values that differ between machines but stay the same during one machine's life are derived from its
id. Values that must never repeat are random.
"""

from __future__ import annotations

import hashlib
import os
import time
import uuid

from coppice.agent.client import Identity, Mount
from coppice.model import Instance
from coppice.model.network import GuestNetwork

ENTROPY_BYTES = 64


def _derived(instance_id: str, purpose: str) -> bytes:
    return hashlib.sha256(f"coppice:{purpose}:{instance_id}".encode()).digest()


def next_serial(instance: Instance) -> int:
    """Return the next message's serial: larger than any that the guest's memory has seen."""
    return max(instance.identity_serial, instance.capture.identity_serial if instance.capture else 0) + 1


def identity_message(
    instance: Instance, network: GuestNetwork | None, *, booted: bool, payload: bytes | None = None
) -> Identity:
    """Return the message that gives a machine its identity, before it becomes Running.

    A new machine and one that has booted get host name, ids and host keys. A restored machine has
    them in its memory, possibly changed by its owner. After a boot the message also starts the
    process.

    :param network: None for a machine without a NIC; the agent applies only values that are new to
        it
    :param payload: becomes a file that only root in the guest can read
    """
    first = not instance.identified
    told = first or booted
    process = instance.process
    return Identity(
        serial=next_serial(instance),
        entropy=os.urandom(ENTROPY_BYTES),
        clock_ns=time.time_ns(),
        hostname=instance.hostname if told else None,
        machine_id=_derived(instance.id, "machine-id").hex()[:32] if told else None,
        new_machine=first,
        boot_id=str(uuid.UUID(bytes=_derived(instance.id, "boot-id")[:16], version=4))
        if first and not booted
        else None,
        mac=network.mac if network else None,
        address=network.address if network else None,
        gateway=network.gateway if network else None,
        dns=network.dns if network else (),
        mtu=network.mtu if network else None,
        address6=network.address6 if network else None,
        gateway6=network.gateway6 if network else None,
        payload=payload,
        end_sessions=not booted,
        thaw=instance.capture is not None and instance.capture.frozen,
        start_process=booted,
        argv=process.argv if booted else (),
        env=process.env if booted else {},
        cwd=process.workdir if booted else None,
        user=process.user if booted else None,
        mounts=_mounts(instance) if booted else (),
        certificates=process.certificates if booted else (),
    )


def _mounts(instance: Instance) -> tuple[Mount, ...]:
    """Return the mounts of a machine's volumes, each path before those below it."""
    disks = sorted(enumerate(instance.machine.volumes), key=lambda numbered: numbered[1].mount_path)
    return tuple(Mount(number=number, path=disk.mount_path, readonly=disk.readonly) for number, disk in disks)
