"""Killing a host process in the midst of an operation, and finding out what the next one makes of it."""

from __future__ import annotations

import asyncio
import contextlib
import json
import logging
import os
import sys
import time
from dataclasses import dataclass, field
from pathlib import Path

from coppice.host import AsyncHost
from coppice.model import Record
from crash.operations import STUMP, Operation
from crash.survey import survey
from fakes.hosting import fingerprint, memory_of

_DEADLINE_S = 90.0


class Kill(Record, frozen=True, kw_only=True):
    """One host process that was killed, and what was found then."""

    operation: str
    kind: str  # "step", or "instant"
    at: float  # number of the step from 1, or milliseconds after the operation began
    step: str | None  # what it was about to do, or had just done; None for an instant
    died: bool  # False: the operation had ended before
    recovered: tuple[str, ...]  # what recovery says that it did
    recovery_ms: float
    found: dict[str, str]  # states, by name
    finding: str | None = None  # what must not be


@dataclass
class Measured:
    """An operation that was left alone."""

    steps: list[str]
    wall_s: float


@dataclass
class Ground:
    """A data directory with the stump in it, in which host processes are killed."""

    home: Path
    stump: tuple[int, int, int, str]
    seed: int
    kills: list[Kill] = field(default_factory=list)
    measured: dict[str, Measured] = field(default_factory=dict)

    async def measure(self, operation: Operation) -> Measured:
        """Do it once without a kill: it must end well, and be what an operation that was never killed leaves."""
        if operation.name not in self.measured:
            await self._prepare(operation)
            process = await self._begin(operation, 0)
            begin = time.monotonic()
            said = await self._end(process)
            wall_s = time.monotonic() - begin
            assert process.returncode == 0, f"{operation.name} failed: {said}"  # its error is above
            self.measured[operation.name] = Measured(json.loads(said[-1]), wall_s)
            async with AsyncHost(self.home) as host:
                try:
                    await survey(host, operation, self.stump)
                finally:
                    await self._clear(host)
        return self.measured[operation.name]

    def size_of(self, operation: Operation) -> tuple[int, float]:
        """How many steps it has, and seconds it takes: as measured, or as it is known for."""
        measured = self.measured.get(operation.name)
        return (len(measured.steps), measured.wall_s) if measured else (operation.steps, operation.seconds)

    async def kill_at_step(self, operation: Operation, number: int) -> bool:
        """Have the process kill itself when it comes to a step; tell whether it came so far."""
        await self._prepare(operation)
        process = await self._begin(operation, number)
        said = await self._end(process)
        assert process.returncode in (0, -9), said
        step = said[0] if process.returncode else None
        await self._look(operation, kind="step", at=number, step=step, died=step is not None)
        return step is not None

    async def kill_after(self, operation: Operation, delay_s: float) -> bool:
        """Kill the process from outside; tell whether it was still at work."""
        await self._prepare(operation)
        process = await self._begin(operation, 0)
        await asyncio.sleep(delay_s)
        with contextlib.suppress(ProcessLookupError):
            process.kill()
        said = await self._end(process)
        await self._look(operation, kind="instant", at=round(delay_s * 1000, 1), step=None, died=not said)
        return not said

    async def _prepare(self, operation: Operation) -> None:
        async with AsyncHost(self.home) as host:
            await operation.prepare(host)

    async def _begin(self, operation: Operation, step: int) -> asyncio.subprocess.Process:
        paths = os.pathsep.join(path for path in sys.path if path)
        process = await asyncio.create_subprocess_exec(
            *(sys.executable, "-m", "crash.host_process", str(self.home), operation.name, str(step)),
            stdout=asyncio.subprocess.PIPE,
            env={**os.environ, "PYTHONPATH": paths},
        )
        assert process.stdout is not None
        assert await asyncio.wait_for(process.stdout.readline(), _DEADLINE_S) == b"begin\n"
        return process

    async def _end(self, process: asyncio.subprocess.Process) -> list[str]:
        assert process.stdout is not None
        said = await asyncio.wait_for(process.stdout.read(), _DEADLINE_S)
        await asyncio.wait_for(process.wait(), _DEADLINE_S)
        return said.decode().splitlines()

    async def _look(self, operation: Operation, *, kind: str, at: float, step: str | None, died: bool) -> None:
        """Open the data directory as the next process would, look at everything, and leave it as it was before the operation."""
        found: dict[str, str] = {}
        finding: str | None = None
        with _recoveries() as recovered:
            begin = time.monotonic()
            async with AsyncHost(self.home) as host:
                recovery_ms = (time.monotonic() - begin) * 1000
                try:
                    found = await survey(host, operation, self.stump)
                except BaseException as error:
                    finding = f"{type(error).__name__}: {error}"
                    error.add_note(
                        f"killed in {operation.name} at {kind} {at:g} ({step or 'from outside'}); recovered: {recovered}"
                    )
                    raise
                finally:
                    self.kills.append(
                        Kill(
                            operation=operation.name,
                            kind=kind,
                            at=at,
                            step=step,
                            died=died,
                            recovered=tuple(recovered),
                            recovery_ms=round(recovery_ms, 1),
                            found=found,
                            finding=finding,
                        )
                    )
                    await self._clear(host)

    async def _clear(self, host: AsyncHost) -> None:
        for kept in await host.snapshot_ls():
            if kept.name == "twig":
                await host.snapshot_rm(kept)
        for vm in reversed(await host.ls()):
            if vm.name != STUMP:
                await host.rm(vm)
        for volume in await host.volume_ls():
            await host.volume_rm(volume)
        await host.gc()  # what was found once is not found again
        (stump,) = await host.ls()
        assert fingerprint(memory_of(host, stump)) == self.stump


class _recoveries(logging.Handler):  # noqa: N801 - reads as a function
    """What recovery logs that it did, in the block."""

    def __init__(self) -> None:
        super().__init__(logging.WARNING)
        self.lines: list[str] = []

    def emit(self, record: logging.LogRecord) -> None:
        text = record.getMessage()
        if text.startswith("recovered: "):
            self.lines.append(text.removeprefix("recovered: "))

    def __enter__(self) -> list[str]:
        logging.getLogger("coppice.instance.recovery").addHandler(self)
        return self.lines

    def __exit__(self, *_: object) -> None:
        logging.getLogger("coppice.instance.recovery").removeHandler(self)
