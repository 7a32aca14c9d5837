"""VMM drivers by name: one for each record, and the chosen one for new machines."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import TYPE_CHECKING, Final

from coppice.errors import NotSupported, UsageError
from coppice.names import check_accel

if TYPE_CHECKING:
    from coppice.vmm.driver import VmmDriver

DEFAULT: Final = "qemu"


def _qemu(accel: str) -> VmmDriver:
    from coppice.vmm.qemu.driver import QemuDriver

    return QemuDriver(accel)


def _firecracker(accel: str) -> VmmDriver:
    from coppice.vmm.firecracker.driver import FirecrackerDriver

    return FirecrackerDriver(accel)


# Constructors, each with an accelerator (`auto`, `kvm` or `tcg`). This is the only list of drivers.
_MAKERS: Final[dict[str, Callable[[str], VmmDriver]]] = {"qemu": _qemu, "firecracker": _firecracker}


class Drivers:
    """The drivers of one host. Each is made when it is first used."""

    def __init__(self, chosen: str | VmmDriver = DEFAULT, *, accel: str = "auto") -> None:
        """Choose a driver as `choose` does.

        :raises UsageError: no driver or accelerator has this name
        """
        self._accel = check_accel(accel)
        self._drivers: dict[str, VmmDriver] = {}
        self.choose(chosen)

    def choose(self, chosen: str | VmmDriver) -> None:
        """Choose the driver of new machines. A driver object replaces the registered driver of its
        name.

        :raises UsageError: no driver has this name, or the object is no driver
        """
        if isinstance(chosen, str):
            self._require(chosen)
            self._chosen = chosen
            return
        from coppice.vmm.driver import VmmDriver

        if not isinstance(chosen, VmmDriver):
            raise UsageError(
                f"the driver of a host must be VmmDriver or None, not {type(chosen).__name__}",
                hint="see the documentation of its parameters",
            )
        self._drivers[chosen.name] = chosen
        self._chosen = chosen.name

    def _names(self) -> dict[str, None]:
        return dict.fromkeys([*_MAKERS, *self._drivers])

    def __iter__(self) -> Iterator[VmmDriver]:
        return iter([self.named(name) for name in self._names()])

    @property
    def chosen(self) -> VmmDriver:
        """The driver of new machines."""
        return self.named(self._chosen)

    def wanted(self, name: str | None) -> VmmDriver:
        """Return the driver that a user named, or the chosen one.

        :raises UsageError: there is no driver of that name
        """
        if name is None:
            return self.chosen
        self._require(name)
        return self.named(name)

    def _require(self, name: str) -> None:
        if name not in self._names():
            raise UsageError(f"there is no VMM {name!r}", hint=f"choose one of: {', '.join(sorted(self._names()))}")

    def named(self, name: str) -> VmmDriver:
        """Return the driver that a record names.

        :raises NotSupported: this Coppice has no such driver
        """
        if name not in self._drivers:
            if name not in _MAKERS:
                raise NotSupported(
                    f"this Coppice has no driver for the VMM {name!r}", hint="use the Coppice that made the instance"
                )
            self._drivers[name] = _MAKERS[name](self._accel)
        return self._drivers[name]
