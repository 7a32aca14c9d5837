"""Make slots for the next burst while no fork waits for one.

Slots are made when fewer than half of the wanted ones are free. A new slot takes more CPU time than all
else of a fork, and the import of pyroute2 ten times as much: each command that forks would pay for it.
"""

from __future__ import annotations

import logging
import threading
import time
from typing import Final

from coppice.network.nat.pool import Pool

_log = logging.getLogger(__name__)
_FEWEST: Final = 8
_MOST: Final = 64
_QUIET_S: Final = 0.05  # without a fork before slots are made: both need the same lock of the kernel


class Refill:
    """Makes slots in its own thread, as many as are in use, within bounds."""

    def __init__(self, pool: Pool) -> None:
        self._pool = pool
        self._lock = threading.Lock()
        self._asked_at = 0.0
        self._thread: threading.Thread | None = None

    def request(self) -> None:
        """Note that a slot was taken, and make more if few are free.

        The thread ends by itself, and the interpreter waits for its end.
        """
        with self._lock:
            self._asked_at = time.monotonic()
            if self._thread is None and self._pool.free() * 2 < self._wanted():
                self._thread = threading.Thread(target=self._run, name="network slots")
                self._thread.start()

    def _wanted(self) -> int:
        return min(_MOST, max(_FEWEST, len(self._pool.used())))

    def _run(self) -> None:
        while True:
            # Poll instead of waiting for an event: a fork would have to wake this thread up.
            while (left := self._asked_at + _QUIET_S - time.monotonic()) > 0:
                time.sleep(left)
            begun = self._asked_at
            try:
                self._pool.fill(self._wanted(), while_true=lambda: self._asked_at == begun)  # noqa: B023 - called now
            except Exception as error:  # a fork that finds no slot makes its own and reports errors
                _log.warning("cannot make network slots in advance: %s", error)
            with self._lock:
                if self._asked_at == begun:
                    self._thread = None
                    return
