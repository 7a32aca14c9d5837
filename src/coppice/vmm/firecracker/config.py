"""The configuration of a machine for Firecracker, with relative paths only: requests for a first
boot and a restore.

Firecracker's API document describes every field. All fields exist in the oldest supported release,
except those with a gate below.
"""

from __future__ import annotations

from typing import Final

from coppice.model import MIB
from coppice.model.network import Nic
from coppice.vmm import driver as files
from coppice.vmm.driver import Launch
from coppice.vmm.firecracker.api import Request
from coppice.vmm.firecracker.metrics import METRICS

Release = tuple[int, int]
"""Major and minor number."""

OLDEST: Final[Release] = (1, 10)
NEWEST_TRIED: Final[Release] = (1, 16)
TAP_OVERRIDES: Final[Release] = (1, 12)  # `network_overrides` of PUT /snapshot/load
SERIAL_LIMIT: Final[Release] = (1, 16)  # `rate_limiter` of PUT /serial
RESET_BEFORE_RESUME: Final[Release] = (1, 16)  # see `resume`
# Older releases deliver connections before the guest has handled the event that resets all of them.
RESET_AWAITED: Final[Release] = (1, 16)

VSOCK_SOCKET: Final = "vsock.sock"
_GUEST_CID: Final = 3  # each Firecracker has its own vsock, so all guests can have the same
_CONSOLE_MOST: Final = 64 * MIB
_TEN_YEARS_MS: Final = 10 * 365 * 24 * 3600 * 1000

# reboot=k: Firecracker's only reset, which ends the process. i8042.*: the keyboard controller has
# only this reset, and the kernel would look for mice. coppice.disks: Firecracker sets its own
# serial numbers for disks, so the agent identifies them by their order.
_KERNEL_WORDS: Final = (
    *files.KERNEL_WORDS,
    "reboot=k",
    "i8042.noaux",
    "i8042.nomux",
    "i8042.dumbkbd",
    "coppice.disks=overlay,root,volumes",
)

_METRICS: Final = Request("PUT", "/metrics", {"metrics_path": METRICS})


def boot(launch: Launch, release: Release) -> list[Request]:
    """Return the requests of a first boot.

    They are as quick as a configuration file, which cannot configure the serial port.
    """
    drives = [
        {
            "drive_id": disk.serial,
            "path_on_host": disk.path,
            "is_root_device": False,
            "is_read_only": disk.readonly,
            "cache_type": "Unsafe" if disk.readonly else "Writeback",  # Writeback: a guest's flush reaches the disk
        }
        for disk in launch.disks
    ]
    machine = {"vcpu_count": launch.machine.cpus, "mem_size_mib": launch.machine.memory_bytes // MIB}
    kernel = {
        "kernel_image_path": files.KERNEL,
        "initrd_path": files.INITRD,
        "boot_args": " ".join(_KERNEL_WORDS),
    }
    return [
        _METRICS,
        *_serial(release),
        Request("PUT", "/machine-config", machine),
        Request("PUT", "/boot-source", kernel),
        *(Request("PUT", f"/drives/{drive['drive_id']}", drive) for drive in drives),
        Request("PUT", "/vsock", {"guest_cid": _GUEST_CID, "uds_path": VSOCK_SOCKET}),
        Request("PUT", "/entropy", {}),
        *(
            Request("PUT", f"/network-interfaces/net{number}", {**_host_side(number, nic), "guest_mac": nic.mac})
            for number, nic in enumerate(launch.nics)
        ),
        Request("PUT", "/actions", {"action_type": "InstanceStart"}),
    ]


def restore(launch: Launch, release: Release, *, paused: bool) -> list[Request]:
    """Return the requests that load VMSTATE over a private mapping of MEMORY."""
    load: dict[str, object] = {
        "snapshot_path": files.VMSTATE,
        "mem_backend": {"backend_type": "File", "backend_path": files.MEMORY},
        "resume_vm": not paused,
    }
    if launch.nics and release >= TAP_OVERRIDES:  # an older release opens the TAP by its name in the saved state
        load["network_overrides"] = [_host_side(number, nic) for number, nic in enumerate(launch.nics)]
    return [_METRICS, *_serial(release), Request("PUT", "/snapshot/load", load)]


def resume(release: Release) -> list[Request]:
    """Return the requests that resume a paused machine. Firecracker may refuse all but the last.

    From 1.16 on, a resume holds back vsock traffic to the guest until the guest acknowledges an
    event that resets its connections. Only a snapshot sends this event, so after a pause without
    one the vsock device would be dead. These requests therefore start a snapshot that is not
    written to a file.
    """
    return [
        *([device_state("/dev/null")] if release >= RESET_BEFORE_RESUME else []),
        Request("PATCH", "/vm", {"state": "Resumed"}),
    ]


def device_state(path: str, ram: str = "/dev/null") -> Request:
    """Return the request that writes the device state to `path`, and then all RAM to `ram`.

    Firecracker refuses /dev/null for both.
    """
    return Request("PUT", "/snapshot/create", {"snapshot_type": "Full", "snapshot_path": path, "mem_file_path": ram})


def _host_side(number: int, nic: Nic) -> dict[str, object]:
    return {"iface_id": f"net{number}", "host_dev_name": nic.tap}


def _serial(release: Release) -> list[Request]:
    """Limit the console: output beyond the limit is dropped.

    An older release ends when it reaches its file size limit.
    """
    limit = {"rate_limiter": {"size": _CONSOLE_MOST, "refill_time": _TEN_YEARS_MS}}
    return [Request("PUT", "/serial", limit)] if release >= SERIAL_LIMIT else []
