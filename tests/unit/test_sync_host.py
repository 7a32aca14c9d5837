"""Host, the blocking twin: the same names and signatures as AsyncHost, and a Ctrl-C that leaves nothing half-made."""

from __future__ import annotations

import asyncio
import concurrent.futures
import contextlib
import inspect
import os
import re
import signal
import subprocess
import sys
import threading
from collections.abc import AsyncIterator, Iterator
from pathlib import Path
from typing import Any

import pytest

from coppice.guest.process import ExecSession as AsyncExecSession
from coppice.host import AsyncHost
from coppice.portal import Portal
from coppice.sync import ExecSession, Host
from fakes.driver import FakeDriver
from fakes.rooms import DEADLINES, open_rooms

INTERNAL = {"rooms"}  # how the use cases reach the data directory, not a use case


def public(kind: type) -> dict[str, Any]:
    """The public members of a class."""
    return {name: inspect.getattr_static(kind, name) for name in dir(kind) if not name.startswith("_")}


def parameters(function: Any) -> list[inspect.Parameter]:
    """Parameters with names, kinds, defaults and annotations."""
    return list(inspect.signature(function).parameters.values())


def blocking(annotation: str) -> str:
    """What an asynchronous result is called where one waits for it."""
    return re.sub(r"^Async(Iterator)", r"\1", annotation)


def test_host_has_every_name_of_async_host() -> None:
    """Whoever changes between the two looks nothing up."""
    assert set(public(Host)) == set(public(AsyncHost)) - INTERNAL


@pytest.mark.parametrize("name", ["__init__", *sorted(set(public(AsyncHost)) - INTERNAL)])
def test_host_has_the_signatures_of_async_host(name: str) -> None:
    """Same parameters, defaults, results and documentation; only `await` is gone."""
    ours, theirs = inspect.getattr_static(Host, name), inspect.getattr_static(AsyncHost, name)
    assert name == "__init__" or ours.__doc__ == theirs.__doc__
    if isinstance(theirs, property):
        ours, theirs = ours.fget, theirs.fget
    assert parameters(ours) == parameters(theirs)
    found, wanted = (inspect.signature(each).return_annotation for each in (ours, theirs))
    assert found == blocking(wanted)
    assert not inspect.iscoroutinefunction(ours)


def test_a_session_has_every_name_of_the_asynchronous_one() -> None:
    """A session in a `with` block can do what one in an `async with` block can; ending it is the block's."""
    wanted = {name for name in dir(AsyncExecSession) if not name.startswith("_")} - {"close"}
    assert {name for name in dir(ExecSession) if not name.startswith("_")} == wanted | {"pid"}
    for name in wanted:
        ours, theirs = (parameters(getattr(kind, name)) for kind in (ExecSession, AsyncExecSession))
        assert [(each.name, each.kind, each.default) for each in ours] == [
            (each.name, each.kind, each.default) for each in theirs
        ]


@pytest.fixture
def portal() -> Iterator[Portal]:
    """A loop in a thread, ended with the test."""
    portal = Portal()
    yield portal
    portal.close()
    assert "coppice-host" not in {thread.name for thread in threading.enumerate()}


async def _answer() -> int:
    await asyncio.sleep(0)
    return 42


async def _fail(why: str) -> None:
    raise LookupError(why)


def test_results_and_errors_come_back(portal: Portal) -> None:
    """A call returns what the work returned and raises what it raised, many times over one loop."""
    assert [portal.call(_answer()) for _ in range(3)] == [42] * 3
    with pytest.raises(LookupError, match="nothing"):
        portal.call(_fail("nothing"))


def test_calls_from_several_threads(portal: Portal) -> None:
    """Threads wait for their own work only: they run at the same time."""

    arrived: list[int] = []
    all_here = asyncio.Event()

    async def meet() -> None:
        arrived.append(1)
        if len(arrived) == 4:
            all_here.set()
        await all_here.wait()

    threads = [threading.Thread(target=lambda: portal.call(meet())) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(30)
    assert len(arrived) == 4
    assert not any(thread.is_alive() for thread in threads)


class Interrupted:
    """Work that presses Ctrl-C when it has begun, and takes its time to clean up."""

    def __init__(self) -> None:
        self.done: list[str] = []

    async def run(self) -> None:
        try:
            os.kill(os.getpid(), signal.SIGINT)
            await asyncio.Event().wait()
        finally:
            for _ in range(10):
                await asyncio.sleep(0.001)
            self.done.append("cleaned")

    @contextlib.asynccontextmanager
    async def entered(self) -> AsyncIterator[None]:
        await self.run()
        yield


def test_ctrl_c_cancels_and_waits_for_the_cleanup(portal: Portal) -> None:
    """KeyboardInterrupt comes out when the operation's own cleanup is over, not before."""
    work = Interrupted()
    with pytest.raises(KeyboardInterrupt):
        portal.call(work.run())
    assert work.done == ["cleaned"]
    assert portal.call(_answer()) == 42


def test_ctrl_c_at_the_very_start_leaves_no_work_behind(portal: Portal) -> None:
    """Wherever the caller is when the work presses the keys, the work has been cleaned up when the interrupt comes out of the call."""
    interval = sys.getswitchinterval()
    sys.setswitchinterval(1e-6)  # the loop's thread gets its turn at any moment of the call
    try:
        for _ in range(100):
            work = Interrupted()
            with pytest.raises(KeyboardInterrupt):
                portal.call(work.run())
            assert work.done == ["cleaned"]
    finally:
        sys.setswitchinterval(interval)


def test_ctrl_c_while_a_block_is_entered(portal: Portal) -> None:
    """The same holds for `with host.machine(...)`, whose entry takes the longest."""
    work = Interrupted()
    with pytest.raises(KeyboardInterrupt), portal.within(work.entered()):
        pytest.fail("it was never entered")
    assert work.done == ["cleaned"]


class InterruptedWhenDone(concurrent.futures.Future[None]):
    """The keys are pressed when the work is done, and the caller has not learned of it yet."""

    def result(self, timeout: float | None = None) -> None:
        super().result(timeout)
        raise KeyboardInterrupt


def test_ctrl_c_when_a_block_has_just_been_entered(portal: Portal) -> None:
    """Nobody would ever leave it: what it holds, such as the forks of `with host.forks(...)`, would stay."""
    done: list[str] = []

    async def hold(entered: concurrent.futures.Future[None]) -> None:
        entered.set_result(None)
        try:
            await asyncio.Event().wait()
        finally:
            done.append("cleaned")

    entered = InterruptedWhenDone()
    with pytest.raises(KeyboardInterrupt):
        portal._job(hold(entered)).run(entered)
    assert done == ["cleaned"]


class Manager:
    """A context manager that needs one task to enter and leave it, as asyncio.timeout does."""

    def __init__(self) -> None:
        self.seen: list[BaseException | None] = []

    @contextlib.asynccontextmanager
    async def held(self, fail: type[Exception] | None = None) -> AsyncIterator[int]:
        async with asyncio.timeout(60):
            try:
                yield 7
            except BaseException as error:
                self.seen.append(error)
                raise
            else:
                self.seen.append(None)
            finally:
                await asyncio.sleep(0)
                if fail:
                    raise fail


def test_a_block_is_entered_and_left_in_one_task(portal: Portal) -> None:
    """A value comes out, calls go on inside, and the end is waited for."""
    manager = Manager()
    with portal.within(manager.held()) as value:
        assert value == 7
        assert portal.call(_answer()) == 42
        assert manager.seen == []
    assert manager.seen == [None]


@pytest.mark.parametrize("kind", [LookupError, KeyboardInterrupt, SystemExit, GeneratorExit])
def test_an_exception_in_a_block_ends_it(portal: Portal, kind: type[BaseException]) -> None:
    """The manager sees a failure, the caller gets the very exception it raised, and the loop lives on."""
    manager = Manager()
    raised = kind("mine")
    with pytest.raises(kind) as found, portal.within(manager.held()):
        raise raised
    assert found.value is raised
    (seen,) = manager.seen
    assert isinstance(seen, kind if issubclass(kind, Exception) else asyncio.CancelledError)
    assert portal.call(_answer()) == 42


def test_an_entry_or_a_cleanup_that_fails_is_raised(portal: Portal) -> None:
    """Neither is swallowed by the thread between."""

    @contextlib.asynccontextmanager
    async def broken() -> AsyncIterator[None]:
        await _fail("entry")
        yield

    with pytest.raises(LookupError, match="entry"), portal.within(broken()):
        pytest.fail("it was never entered")
    with pytest.raises(ZeroDivisionError), portal.within(Manager().held(ZeroDivisionError)):
        pass


def test_items_are_taken_one_by_one(portal: Portal) -> None:
    """An iterator waits for each item, and what it held is closed when its user breaks off."""
    closed: list[str] = []

    async def numbers() -> AsyncIterator[int | None]:
        try:
            yield 1
            yield None
            await asyncio.sleep(0)
            yield 3
        finally:
            closed.append("yes")

    assert list(portal.iterate(numbers())) == [1, None, 3]
    assert closed == ["yes"]
    partly = portal.iterate(numbers())
    assert next(partly) == 1
    partly.close()  # type: ignore[attr-defined] # what `for ... break` does at last; it is a generator
    assert closed == ["yes", "yes"]


def test_a_call_from_the_hosts_own_thread_is_refused(portal: Portal) -> None:
    """A progress sink that calls the host gets an error instead of waiting for itself for ever."""

    async def nested() -> int:
        return portal.call(_answer())

    with pytest.raises(RuntimeError, match="own thread"):
        portal.call(nested())


def test_closing_cancels_what_runs() -> None:
    """A thread that still waits when the host is closed does not wait for ever."""
    portal = Portal()
    begun = threading.Event()
    outcome: list[BaseException] = []

    async def forever() -> None:
        begun.set()
        await asyncio.Event().wait()

    def wait() -> None:
        try:
            portal.call(forever())
        except BaseException as error:
            outcome.append(error)

    thread = threading.Thread(target=wait)
    thread.start()
    assert begun.wait(30)
    portal.close()
    portal.close()
    thread.join(30)
    assert isinstance(outcome[0], asyncio.CancelledError)


def test_a_host_over_fake_machines(fake_vmm: Path, fake_home: Path) -> None:
    """A whole life through the blocking twin: run, exec, logs of a session, fork in a block, and nothing is left."""
    with Host(fake_home, driver=FakeDriver(fake_vmm), deadlines=DEADLINES, open_rooms=open_rooms) as host:
        assert host.home == fake_home
        (image,) = host.image_ls()
        with host.machine(image.name, memory_bytes=64 << 20) as vm:
            assert host.exec(vm, ["echo", "hello"]).stdout == b"hello\n"
            with host.open_exec(vm, ["cat"]) as session:
                session.send_stdin(b"data")
                session.eof()
                assert b"".join(data for _, data in session) == b"data"
                assert session.wait().exit_code == 0
            host.standby(vm)
            with host.forks(vm, 2) as forks:
                assert len(host.ls()) == 3
                assert set(host.inspect(vm).forks) == {fork.name for fork in forks}
        assert host.ls() == []


def test_a_host_that_cannot_be_opened_leaves_no_thread(tmp_path: Path) -> None:
    """An error at the entry of the block ends the thread too."""
    (tmp_path / "file").write_text("")
    with pytest.raises(Exception, match="cannot be used"), Host(tmp_path / "file" / "home"):
        pytest.fail("it was never opened")
    assert "coppice-host" not in {thread.name for thread in threading.enumerate()}


FORKING = """
import asyncio, os, signal, sys
from coppice.portal import Portal
portal = Portal()
portal.call(asyncio.sleep(0))
if os.fork() == 0:
    signal.alarm(10)
    try:
        portal.call(asyncio.sleep(0))
    except RuntimeError as error:
        print(error, flush=True)
    os._exit(0)
os.wait()
portal.close()
"""


def test_a_host_does_not_come_along_into_a_process_that_is_forked() -> None:
    """Its thread does not: a worker of multiprocessing that uses its parent's host is told so, and does not wait for ever."""
    done = subprocess.run(
        [sys.executable, "-W", "ignore", "-c", FORKING], capture_output=True, text=True, timeout=60, check=True
    )
    assert "opened by the process that this one was forked from" in done.stdout


def test_a_host_that_cannot_be_closed_leaves_no_thread(
    fake_vmm: Path, fake_home: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """An error at the end of the block ends the thread too."""
    host = Host(fake_home, driver=FakeDriver(fake_vmm), deadlines=DEADLINES, open_rooms=open_rooms).open()
    close = host._host.close

    async def failing() -> None:
        await close()
        raise ZeroDivisionError

    monkeypatch.setattr(host._host, "close", failing)
    with pytest.raises(ZeroDivisionError):
        host.close()
    assert "coppice-host" not in {thread.name for thread in threading.enumerate()}
