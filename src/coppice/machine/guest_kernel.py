"""Compare a machine's needs with the options of its guest kernel, before the start.

A kernel without a driver would panic or hang in its boot, and the caller would wait for a timeout.
"""

from __future__ import annotations

from coppice.boot import config
from coppice.boot.config import Configuration, Option
from coppice.errors import UsageError
from coppice.model import MachineSpec
from coppice.model.kernel import Kernel
from coppice.vmm.driver import AgentDevice, Capabilities

_AGENT = {AgentDevice.SERIAL: config.CONSOLE, AgentDevice.VSOCK: config.VSOCK}


def require(kernel: Kernel, machine: MachineSpec, capabilities: Capabilities, *, accel: str, has_nic: bool) -> None:
    """Refuse a machine whose kernel is known to lack an option that the machine needs. Blocks.

    An option of which nothing is known counts as present.

    :raises UsageError: the message names each missing option, and the source of this information
    """
    if capabilities.enters_by_pvh and not kernel.pvh:
        raise UsageError(
            f"the kernel {kernel.key} lacks CONFIG_PVH (a start by this VMM): its file has no PVH entry point",
            hint="build it with CONFIG_PVH=y, or add its bzImage with `coppice kernel add`",
        )
    known = Configuration.read(kernel.config, kernel.modules)
    if lacking := known.lacking(_needs(machine, capabilities, accel=accel, has_nic=has_nic)):
        named = ", ".join(f"CONFIG_{option.name} ({option.purpose})" for option in lacking)
        sources = [kernel.config_from, "" if kernel.modules is None else "its directory of modules"]
        where = " and ".join(filter(None, sources))
        raise UsageError(f"the kernel {kernel.key} lacks {named}, says {where}", hint=_hint(lacking))


def _needs(machine: MachineSpec, capabilities: Capabilities, *, accel: str, has_nic: bool) -> tuple[Option, ...]:
    needs = [*config.EVERY_GUEST, _AGENT[capabilities.agent_device]]
    if not machine.acpi:
        needs.append(config.COMMAND_LINE_DEVICES)
    if accel == "kvm":
        needs.append(config.KVM_GUEST)
    if has_nic:
        needs += [config.INET, config.VIRTIO_NET]
    if machine.cpus > 1:
        needs.append(config.SMP)
    return tuple(needs)


def _hint(lacking: list[Option]) -> str:
    if lacking == [config.SMP]:
        return "run with --cpus 1"
    if set(lacking) <= {config.INET, config.VIRTIO_NET}:
        return "run with --network none, or build the kernel with these options"
    return "build the kernel with these options, or list other kernels with `coppice kernel ls`"
