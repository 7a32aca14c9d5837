"""Several host processes for histories: they begin at once, and every wait for one of them has a
deadline.
"""

from __future__ import annotations

import os
import select
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path
from types import TracebackType
from typing import Self

import msgspec

from histories import Call, Done
from history_process import Answer, Order


class Processes:
    """Host processes over real machines, or over fake ones if `fake_vmm` is given. They are ended
    with the block.
    """

    def __init__(self, count: int, *, fake_vmm: Path | None = None, deadline_s: float = 60.0) -> None:
        argv = [sys.executable, "-m", "history_process", *([str(fake_vmm)] if fake_vmm else [])]
        paths = os.pathsep.join(path for path in sys.path if path)
        self._deadline_s = deadline_s
        self._processes = [
            subprocess.Popen(
                argv, stdin=subprocess.PIPE, stdout=subprocess.PIPE, bufsize=0, env={**os.environ, "PYTHONPATH": paths}
            )
            for _ in range(count)
        ]

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        for process in self._processes:
            process.kill()
            process.wait()
            for pipe in (process.stdin, process.stdout):
                if pipe is not None:
                    pipe.close()

    def run(
        self, home: Path, histories: Sequence[Sequence[Call]], *, state: str | None = None
    ) -> list[tuple[Done, ...]]:
        """Do one history per process in the data directory, and return the outcomes. With a `state`
        the first process makes the source beforehand.

        An answer that does not arrive in time counts as a deadlock.
        """
        all_processes = range(len(histories))
        self._order(all_processes, [Order(what="open", home=str(home))] * len(histories))
        if state is not None:
            self._order([0], [Order(what="make", state=state)])
        answers = self._order(all_processes, [Order(what="go", calls=tuple(calls)) for calls in histories])
        self._order(all_processes, [Order(what="close")] * len(histories))
        return [answer.done for answer in answers]

    def _order(self, numbers: Sequence[int], orders: Sequence[Order]) -> list[Answer]:
        chosen = [self._processes[number] for number in numbers]
        for process, order in zip(chosen, orders, strict=True):
            assert process.stdin is not None
            process.stdin.write(msgspec.json.encode(order) + b"\n")
        answers = []
        for process in chosen:
            assert process.stdout is not None
            ready, _, _ = select.select([process.stdout], [], [], self._deadline_s)
            assert ready, f"process {process.pid} does not answer within {self._deadline_s:g} s"
            line = process.stdout.readline()
            assert line, f"process {process.pid} ended: see its error above"
            answers.append(msgspec.json.decode(line, type=Answer))
        return answers
