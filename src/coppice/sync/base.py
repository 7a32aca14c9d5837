"""What all of Host's parts share: the asynchronous host, and the thread that its event loop runs in."""

from __future__ import annotations

from pathlib import Path
from types import TracebackType
from typing import Self

from coppice.host import AsyncHost
from coppice.host.base import RoomsOpener
from coppice.host.hashing import Background
from coppice.instance.rooms import Deadlines
from coppice.model import Budgets
from coppice.portal import Portal
from coppice.vmm.driver import VmmDriver


class HostBase:
    """An opened data directory, for blocking code."""

    def __init__(
        self,
        home: Path | str | None = None,
        *,
        accel: str = "auto",
        owner: str | None = None,
        driver: VmmDriver | None = None,
        deadlines: Deadlines | None = None,
        budgets: Budgets | None = None,
        background: Background = "owned",
        spares: int = 1,
        open_rooms: RoomsOpener | None = None,
    ) -> None:
        self._host = AsyncHost(
            home,
            accel=accel,
            owner=owner,
            driver=driver,
            deadlines=deadlines,
            budgets=budgets,
            background=background,
            spares=spares,
            open_rooms=open_rooms,
        )
        self._portal = Portal()

    @property
    def home(self) -> Path:
        return self._host.home

    @property
    def owner(self) -> str | None:
        return self._host.owner

    @property
    def budgets(self) -> Budgets:
        return self._host.budgets

    def open(self) -> Self:
        self._portal.call(self._host.open())
        return self

    def close(self) -> None:
        try:
            self._portal.call(self._host.close())
        finally:
            self._portal.close()

    def __enter__(self) -> Self:
        try:
            return self.open()
        except BaseException:
            self._portal.close()
            raise

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()
