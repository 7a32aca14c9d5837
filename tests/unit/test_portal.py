"""The loop in a thread that blocking calls use: results, interrupts that leave nothing half-made, and its end."""

from __future__ import annotations

import asyncio
import contextlib
import gc
import os
import signal
import subprocess
import sys
import threading
from collections.abc import AsyncIterator, Iterator

import pytest

from coppice.client.portal import Portal, Result
from coppice.errors import UsageError


@pytest.fixture
def portal() -> Iterator[Portal]:
    """Return a loop in a thread, which ends with the test."""
    portal = Portal()
    yield portal
    portal.close()
    assert "coppice-host" not in {thread.name for thread in threading.enumerate()}


async def _answer() -> int:
    await asyncio.sleep(0)
    return 42


async def _fail(why: str) -> None:
    raise LookupError(why)


def test_results_and_errors_are_passed_on(portal: Portal) -> None:
    """A call returns the result of the work or raises its error, many times over one loop."""
    assert [portal.call(_answer()) for _ in range(3)] == [42] * 3
    with pytest.raises(LookupError, match="nothing"):
        portal.call(_fail("nothing"))


def test_calls_from_several_threads_run_concurrently(portal: Portal) -> None:
    """Each thread waits only for its own work."""

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
    """Work that interrupts the caller once it has begun, and takes its time to clean up."""

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
    """KeyboardInterrupt is raised after the operation's own cleanup, not before."""
    work = Interrupted()
    with pytest.raises(KeyboardInterrupt):
        portal.call(work.run())
    assert work.done == ["cleaned"]
    assert portal.call(_answer()) == 42


def test_an_early_ctrl_c_leaves_no_work(portal: Portal) -> None:
    """The work has been cleaned up when the call raises the interrupt, wherever the caller was at
    that moment.
    """
    interval = sys.getswitchinterval()
    sys.setswitchinterval(1e-6)  # lets the loop's thread run at any moment of the call
    try:
        for _ in range(100):
            work = Interrupted()
            with pytest.raises(KeyboardInterrupt):
                portal.call(work.run())
            assert work.done == ["cleaned"]
    finally:
        sys.setswitchinterval(interval)


def test_ctrl_c_while_a_block_is_entered(portal: Portal) -> None:
    """The same holds for `with host.run(...)`, whose entry takes longest."""
    work = Interrupted()
    with pytest.raises(KeyboardInterrupt), portal.within(work.entered()):
        pytest.fail("the block was entered")
    assert work.done == ["cleaned"]


class InterruptedWhenDone(Result[None]):
    """It interrupts the caller when the work is done but its result not yet delivered."""

    def get(self) -> None:
        super().get()
        raise KeyboardInterrupt


def test_ctrl_c_when_a_block_has_just_been_entered(portal: Portal) -> None:
    """No code would leave the block otherwise: what it holds, such as the forks of `with
    template.fork(...)`, would stay.
    """
    done: list[str] = []

    async def hold(entered: Result[None]) -> None:
        entered.set(None)
        try:
            await asyncio.Event().wait()
        finally:
            done.append("cleaned")

    entered = InterruptedWhenDone()
    with pytest.raises(KeyboardInterrupt):
        portal._job(hold(entered)).run(entered)
    assert done == ["cleaned"]


class Manager:
    """A context manager that must be entered and left in one task, like asyncio.timeout."""

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
    """The block gets its value, calls inside it work, and its end is awaited."""
    manager = Manager()
    with portal.within(manager.held()) as value:
        assert value == 7
        assert portal.call(_answer()) == 42
        assert manager.seen == []
    assert manager.seen == [None]


@pytest.mark.parametrize("kind", [LookupError, KeyboardInterrupt, SystemExit, GeneratorExit])
def test_an_exception_in_a_block_ends_it(portal: Portal, kind: type[BaseException]) -> None:
    """The manager sees the failure, the caller gets the same exception back, and the loop keeps
    running.
    """
    manager = Manager()
    raised = kind("mine")
    with pytest.raises(kind) as found, portal.within(manager.held()):
        raise raised
    assert found.value is raised
    (seen,) = manager.seen
    assert isinstance(seen, kind if issubclass(kind, Exception) else asyncio.CancelledError)
    assert portal.call(_answer()) == 42


def test_a_failed_entry_or_cleanup_is_raised(portal: Portal) -> None:
    """The thread in between swallows neither error."""

    @contextlib.asynccontextmanager
    async def broken() -> AsyncIterator[None]:
        await _fail("entry")
        yield

    with pytest.raises(LookupError, match="entry"), portal.within(broken()):
        pytest.fail("the block was entered")
    with pytest.raises(ZeroDivisionError), portal.within(Manager().held(ZeroDivisionError)):
        pass


def test_items_are_iterated_one_by_one(portal: Portal) -> None:
    """An iterator waits for each item, and is closed when its user stops early."""
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
    partly.close()  # type: ignore[attr-defined] # as `for ... break` does eventually; it is a generator
    assert closed == ["yes", "yes"]


def test_what_is_left_open_ends_with_the_portal() -> None:
    """An iterator or a block that is dropped later starts no thread, and fails nowhere."""
    closed: list[str] = []

    async def numbers() -> AsyncIterator[int]:
        try:
            yield 1
            yield 2
        finally:
            closed.append("numbers")

    portal = Portal()
    partly, manager = portal.iterate(numbers()), Manager()
    block = portal.within(manager.held())
    assert (next(partly), block.__enter__()) == (1, 7)
    portal.close()
    assert closed == ["numbers"]
    assert isinstance(manager.seen[0], asyncio.CancelledError)
    del partly, block
    gc.collect()
    assert "coppice-host" not in {thread.name for thread in threading.enumerate()}


def test_an_iterator_is_collected_in_the_loops_thread(portal: Portal) -> None:
    """A collection of garbage happens in any thread. The loop closes the iterator then."""
    closed = threading.Event()

    async def numbers() -> AsyncIterator[int]:
        try:
            yield 1
        finally:
            closed.set()

    cycle: list[object] = [portal.iterate(numbers())]
    assert next(cycle[0]) == 1  # type: ignore[call-overload]
    cycle.append(cycle)
    del cycle

    async def collect() -> None:
        gc.collect()

    portal.call(collect())
    assert closed.wait(30)


def test_a_call_from_the_hosts_own_thread_is_refused(portal: Portal) -> None:
    """A progress sink that calls the host gets an error instead of a deadlock."""

    async def nested() -> int:
        return portal.call(_answer())

    with pytest.raises(UsageError, match="own thread"):
        portal.call(nested())


def test_closing_cancels_running_calls() -> None:
    """A thread that still waits when the host is closed does not wait forever."""
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


FORKING = """
import asyncio, os, signal, sys
from coppice.client.portal import Portal
from coppice.errors import UsageError
portal = Portal()
portal.call(asyncio.sleep(0))
if os.fork() == 0:
    signal.alarm(10)
    try:
        portal.call(asyncio.sleep(0))
    except UsageError as error:
        print(error, flush=True)
    os._exit(0)
os.wait()
portal.close()
"""


def test_a_host_cannot_be_used_in_a_forked_process() -> None:
    """A fork does not copy the host's thread: a multiprocessing worker that uses its parent's host
    gets an error and does not hang.
    """
    done = subprocess.run(
        [sys.executable, "-W", "ignore", "-c", FORKING], capture_output=True, text=True, timeout=60, check=True
    )
    assert "belongs to the parent of this forked process" in done.stdout
