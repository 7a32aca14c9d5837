"""Names of a package that are imported at their first use, which keeps the import of the package fast."""

from __future__ import annotations

TYPE_CHECKING = False
if TYPE_CHECKING:
    pass


class Names(dict[str, str]):
    """The module of each name. The package lists the names of each module, separated by spaces."""

    def __init__(self, package: str, modules: dict[str, str]) -> None:
        super().__init__({name: module for module, names in modules.items() for name in names.split()})
        self._package = package

    def find(self, name: str) -> object:
        """Return the object of that name. It is the package's `__getattr__`."""
        import sys
        from importlib import import_module

        if name not in self:
            raise AttributeError(f"module {self._package!r} has no attribute {name!r}")
        value: object = getattr(import_module(f"{self._package}.{self[name]}"), name)
        setattr(sys.modules[self._package], name, value)
        return value
