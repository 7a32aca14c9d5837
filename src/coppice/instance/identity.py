"""Who a machine is: what the identity message says, derived from the instance.

What must differ between machines but stay the same for one machine over its life is derived from its id; what must never repeat is random.
"""

from __future__ import annotations

import hashlib
import secrets
import time
import uuid

from coppice.guest.client import Identity, Mount
from coppice.model import Instance

ENTROPY_BYTES = 64

# QEMU's user-mode network: each VMM has its own, so the same addresses inside never meet.
USER_MODE_ADDRESS = "10.0.2.15/24"
USER_MODE_GATEWAY = "10.0.2.2"
USER_MODE_DNS = ("10.0.2.3",)


def _derived(instance_id: str, purpose: str) -> bytes:
    return hashlib.sha256(f"coppice:{purpose}:{instance_id}".encode()).digest()


def mac_address(instance_id: str) -> str:
    """A locally administered unicast address of its own for each instance."""
    return ":".join(f"{octet:02x}" for octet in (0x02, *_derived(instance_id, "mac")[:5]))


def identity_message(instance: Instance, *, booted: bool, payload: bytes | None = None) -> Identity:
    """The message that makes a machine itself, before it is called Running.

    A machine that has just booted also gets its process started. Machine-id, boot-id and host keys are given once in the life of an
    instance: a later restore of the same machine is no new machine. `payload` becomes a file that only root in the guest can read.
    """
    first = not instance.identified
    process = instance.process
    return Identity(
        serial=instance.identity_serial + 1,
        entropy=secrets.token_bytes(ENTROPY_BYTES),
        clock_ns=time.time_ns(),
        hostname=instance.hostname,
        machine_id=_derived(instance.id, "machine-id").hex()[:32],
        new_machine=first,
        boot_id=str(uuid.UUID(bytes=_derived(instance.id, "boot-id")[:16], version=4))
        if first and not booted
        else None,
        mac=mac_address(instance.id),
        address=USER_MODE_ADDRESS,
        gateway=USER_MODE_GATEWAY,
        dns=USER_MODE_DNS,
        payload=payload,
        end_sessions=not booted,
        thaw=instance.frozen,
        start_process=booted,
        argv=process.argv if booted else (),
        env=process.env if booted else {},
        cwd=process.workdir if booted else None,
        user=process.user if booted else None,
        mounts=_mounts(instance) if booted else (),
    )


def _mounts(instance: Instance) -> tuple[Mount, ...]:
    """Where the volumes go: a path before what is below it. A machine that is restored has them in its memory."""
    disks = sorted(enumerate(instance.machine.volumes), key=lambda numbered: numbered[1].mount_path)
    return tuple(Mount(number=number, path=disk.mount_path, readonly=disk.readonly) for number, disk in disks)
