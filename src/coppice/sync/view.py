"""Host: looking, checking and tidying up."""

from __future__ import annotations

from collections.abc import Mapping

from coppice.host import Inspection, Reference
from coppice.model import (
    BudgetUse,
    GcReport,
    Instance,
    MemoryReport,
    ProgressSink,
    State,
    TreeNode,
    VerifyReport,
    no_progress,
)
from coppice.sync.base import HostBase


class View(HostBase):
    """Reading; and what concerns the data directory as a whole."""

    def get(self, reference: Reference) -> Instance:
        return self._portal.call(self._host.get(reference))

    def ls(self, *, state: State | None = None, tags: Mapping[str, str] | None = None) -> list[Instance]:
        return self._portal.call(self._host.ls(state=state, tags=tags))

    def inspect(self, reference: Reference) -> Inspection:
        return self._portal.call(self._host.inspect(reference))

    def stats(self, reference: Reference | None = None) -> dict[str, MemoryReport]:
        return self._portal.call(self._host.stats(reference))

    def budget(self) -> BudgetUse:
        return self._portal.call(self._host.budget())

    def tree(self, reference: Reference | None = None) -> list[TreeNode]:
        return self._portal.call(self._host.tree(reference))

    def verify(self, *, progress: ProgressSink = no_progress) -> VerifyReport:
        return self._portal.call(self._host.verify(progress=progress))

    def gc(self, *, dry_run: bool = False, caches: bool = False) -> GcReport:
        return self._portal.call(self._host.gc(dry_run=dry_run, caches=caches))
