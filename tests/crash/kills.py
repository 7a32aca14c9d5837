"""Kill a host process during an operation, and check how the next process recovers."""

from __future__ import annotations

import asyncio
import contextlib
import logging
import os
import signal
import sys
import time
from abc import ABC, abstractmethod
from collections.abc import AsyncIterator, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import ClassVar, Generic, NamedTuple, Self, TypeVar

import msgspec

from coppice.client import AsyncHost
from coppice.model import Record
from coppice.requests import LsRequest, PromoteRequest, RmRequest, SnapshotRequest, StandbyRequest
from crash.kinds import Kind
from crash.operation import SEED, STUMP, Operation
from crash.states import boot
from crash.steps import Measured
from crash.survey import Mark, mark_of, survey
from fakes.hosting import assert_tidy, memory_of
from remains import working_below

_DEADLINE_S = 90.0


class Kill(Record, frozen=True, kw_only=True):
    """One killed host process, and the state found afterwards."""

    machines: str  # the kind of machines
    operation: str
    kind: str  # "step", or "instant"
    at: float  # number of the step from 1 (0: chosen by its name), or milliseconds after the operation began
    step: str | None  # the step at which it was killed; None for an instant
    died: bool  # False: the operation ended first
    recovered: tuple[str, ...]  # the messages of recovery
    recovery_ms: float
    found: dict[str, str]  # states, by name
    finding: str | None = None  # the violation found, if any


class Findings:
    """The errors of several kills. A kill with an error does not end the run."""

    def __init__(self, title: str) -> None:
        self._title = title
        self._errors: list[Exception] = []

    @contextlib.contextmanager
    def kept(self) -> Iterator[None]:
        """Keep the error that the block raises."""
        try:
            yield
        except Exception as error:
            self._errors.append(error)

    def raise_all(self) -> None:
        """Raise the errors, if there were any."""
        if self._errors:
            raise self._errors[0] if len(self._errors) == 1 else ExceptionGroup(self._title, self._errors)


class HostProcesses:
    """Processes that open a host, one at a time; see `crash.host_process`."""

    def __init__(self, process: asyncio.subprocess.Process) -> None:
        assert process.stdin is not None
        assert process.stdout is not None
        self._process = process
        self._orders = process.stdin
        self._answers = process.stdout

    @classmethod
    @contextlib.asynccontextmanager
    async def over(cls, home: Path, kind: Kind) -> AsyncIterator[Self]:
        """Start the process that forks the hosts. It ends with the block."""
        paths = os.pathsep.join(path for path in sys.path if path)
        process = await asyncio.create_subprocess_exec(
            *(sys.executable, "-m", *cls.program(home), *kind.arguments),
            stdin=asyncio.subprocess.PIPE,
            stdout=asyncio.subprocess.PIPE,
            pass_fds=kind.descriptors,
            limit=1 << 20,
            env={**os.environ, "PYTHONPATH": paths},
        )
        hosts = cls(process)
        try:
            yield hosts
        finally:
            hosts._orders.close()
            await asyncio.wait_for(process.wait(), _DEADLINE_S)

    @classmethod
    def program(cls, home: Path) -> Sequence[str]:
        """Return the module that forks the processes, and its first arguments."""
        return "crash.host_process", str(home)

    async def begin(self, operation: Operation, step: int | str) -> int:
        """Start a host, wait until it has opened the data directory, and return its pid."""
        pid = await self._order(f"{operation.name} {step}")
        assert await self._line() == "begin"
        return pid

    async def _order(self, order: str) -> int:
        """Start a process, and return its pid."""
        self._orders.write(f"{order}\n".encode())
        return int(await self._line())

    async def end(self) -> tuple[int, list[str]]:
        """Wait for the end of the started host; return its exit status and the lines it printed."""
        said = [await self._line()]
        while not said[-1].startswith("ended "):
            said.append(await self._line())
        return int(said.pop().split()[1]), said

    async def _line(self) -> str:
        return (await asyncio.wait_for(self._answers.readline(), _DEADLINE_S)).decode().rstrip("\n")


P = TypeVar("P", bound=HostProcesses)


class Recovered(NamedTuple):
    """What the next process did before it was ready, and for how long."""

    lines: Sequence[str]
    ms: float


@dataclass
class Ground(ABC, Generic[P]):
    """A data directory with the stump, in which processes are killed."""

    home: Path
    kind: Kind
    processes: P
    stump: Mark
    kills: list[Kill]
    measured: dict[str, Measured] = field(default_factory=dict)

    sampled: ClassVar[bool] = False
    """Whether a full run kills at some of the steps that recovery depends on, instead of all."""

    @classmethod
    @contextlib.asynccontextmanager
    async def at(cls, home: Path, kind: Kind, kills: list[Kill], processes: type[P]) -> AsyncIterator[Self]:
        """Make the stump, ready to be forked, in a data directory with its image, and append each
        kill to `kills`. At the end only the stump is left, and it is removed.
        """
        async with kind.host(home) as host:
            await host.gc()  # a kept test home may have files of an older version
            stump = await boot(host, kind, name=STUMP)
            instances = host.local.rooms.layout.instances.resolve()
            await kind.learn(host, STUMP)
            await host.call(StandbyRequest(instance=stump.id))
            stump = await host.call(PromoteRequest(instance=stump.id))
            await host.call(SnapshotRequest(instance=stump.id, name=SEED))
            known = mark_of(memory_of(host, stump))
        async with processes.over(home, kind) as started:
            yield cls(home, kind, started, known, kills)
        async with kind.host(home) as host:
            await assert_tidy(host, STUMP)
            await host.snapshots.rm(SEED)
            await host.call(RmRequest(instance=STUMP))
            await assert_tidy(host)
        assert working_below(instances) == {}

    @property
    def machines(self) -> str:
        """The kind of machines, for the report."""
        return self.kind.name

    async def measure(self, operation: Operation) -> Measured:
        """Run the operation once without a kill; it must succeed and leave the expected state."""
        if operation.name not in self.measured:
            await self._prepare(operation)
            self.measured[operation.name] = await self._run(operation)
            async with self.kind.host(self.home) as host:
                try:
                    await survey(host, self.kind, operation, self.stump)
                finally:
                    await self._clear(host)
        return self.measured[operation.name]

    @abstractmethod
    async def _run(self, operation: Operation) -> Measured:
        """Run the operation without a kill; it must succeed."""

    @abstractmethod
    async def kill_at_step(self, operation: Operation, number: int) -> bool:
        """Let the process kill itself at a step; return whether it reached the step."""

    @abstractmethod
    async def kill_after(self, operation: Operation, delay_s: float) -> bool:
        """Kill the process from outside; return whether it was still running."""

    def size_of(self, operation: Operation) -> tuple[int, float]:
        """Return its number of steps and its seconds: measured, or else the known values."""
        measured = self.measured.get(operation.name)
        return (len(measured.steps), measured.wall_s) if measured else (operation.steps, operation.seconds)

    async def _prepare(self, operation: Operation) -> None:
        async with self.kind.host(self.home) as host:
            await operation.prepare(host, self.kind)

    async def _look(
        self,
        operation: Operation,
        *,
        kind: str,
        at: float,
        step: str | None,
        died: bool,
        recovered_before: Recovered | None = None,
        failure: BaseException | None = None,
    ) -> None:
        """Open the data directory as the next process does, check everything, and remove what the
        operation made.

        :param recovered_before: what another process has recovered; then nothing is left to recover
        :param failure: the error that a client got, which must be none
        """
        found: dict[str, str] = {}
        finding: str | None = None
        with _recoveries() as recovered:
            begin = time.monotonic()
            async with self.kind.host(self.home) as host:
                by, recovery_ms = recovered_before or Recovered(recovered, (time.monotonic() - begin) * 1000)
                try:
                    if failure is not None:
                        raise failure
                    assert by is recovered or not recovered, f"the next server did not recover: {recovered}"
                    found = await survey(host, self.kind, operation, self.stump)
                except BaseException as error:
                    finding = f"{type(error).__name__}: {error}"
                    error.add_note(
                        f"killed in {operation.name} at {kind} {at:g} ({step or 'from outside'}); recovered: {by}"
                    )
                    raise
                finally:
                    self.kills.append(
                        Kill(
                            machines=self.machines,
                            operation=operation.name,
                            kind=kind,
                            at=at,
                            step=step,
                            died=died,
                            recovered=tuple(by),
                            recovery_ms=round(recovery_ms, 1),
                            found=found,
                            finding=finding,
                        )
                    )
                    await self._clear(host)

    async def _clear(self, host: AsyncHost) -> None:
        for kept in await host.snapshots.ls():
            if kept.name == "twig":
                await host.snapshots.rm(kept)
        for vm in reversed(await host.call(LsRequest())):
            if vm.name != STUMP:
                await host.call(RmRequest(instance=vm.id))
        for volume in await host.volumes.ls():
            await host.volumes.rm(volume)
        await host.gc()  # so that a later check does not report the same again
        (stump,) = await host.call(LsRequest())
        assert mark_of(memory_of(host, stump)) == self.stump


class HostGround(Ground[HostProcesses]):
    """A data directory in which processes are killed that carry out operations themselves."""

    async def _run(self, operation: Operation) -> Measured:
        await self.processes.begin(operation, 0)
        status, said = await self.processes.end()
        assert status == 0, f"{operation.name} failed: {said}"  # its error is above
        return msgspec.json.decode(said[-1], type=Measured)

    async def kill_at_step(self, operation: Operation, number: int) -> bool:
        """Let the host kill itself at a step."""
        await self._prepare(operation)
        await self.processes.begin(operation, number)
        status, said = await self.processes.end()
        assert status in (0, -signal.SIGKILL), said
        step = said[0] if status else None
        await self._look(operation, kind="step", at=number, step=step, died=step is not None)
        return step is not None

    async def kill_at_first(self, operation: Operation, name: str) -> None:
        """Let the host kill itself at the first step whose name begins so. It must reach one."""
        await self._prepare(operation)
        await self.processes.begin(operation, name)
        status, said = await self.processes.end()
        assert status == -signal.SIGKILL, f"no step of {operation.name} is {name!r}: {said}"
        await self._look(operation, kind="step", at=0, step=said[0], died=True)

    async def kill_after(self, operation: Operation, delay_s: float) -> bool:
        """Kill the host."""
        await self._prepare(operation)
        pid = await self.processes.begin(operation, 0)
        await asyncio.sleep(delay_s)
        os.kill(pid, signal.SIGKILL)
        _, said = await self.processes.end()
        await self._look(operation, kind="instant", at=round(delay_s * 1000, 1), step=None, died=not said)
        return not said


class _recoveries(logging.Handler):  # noqa: N801 - reads as a function
    """Collect the log messages of recovery during the block."""

    def __init__(self) -> None:
        super().__init__(logging.WARNING)
        self.lines: list[str] = []

    def emit(self, record: logging.LogRecord) -> None:
        text = record.getMessage()
        if text.startswith("recovered: "):
            self.lines.append(text.removeprefix("recovered: "))

    def __enter__(self) -> list[str]:
        logging.getLogger("coppice.host.recovery").addHandler(self)
        return self.lines

    def __exit__(self, *_: object) -> None:
        logging.getLogger("coppice.host.recovery").removeHandler(self)
