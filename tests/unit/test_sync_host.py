"""Host, the blocking twin, has the names and signatures of AsyncHost, and a Ctrl-C leaves nothing
half-made.
"""

from __future__ import annotations

import asyncio
import contextlib
import functools
import inspect
import os
import re
import signal
import socket
import struct
import subprocess
import sys
import threading
from collections.abc import AsyncIterator, Iterator
from pathlib import Path
from typing import Any

import pytest

from agent_process import agent_binary
from coppice.agent.process import ExecSession as AgentSession
from coppice.client import AsyncHost, AsyncMachine, ExecSession, Host, Machine
from coppice.client.aio import images, managers
from coppice.client.blocking import images as blocking_images
from coppice.client.blocking import managers as blocking_managers
from coppice.client.portal import Portal, Result
from coppice.errors import GuestRefused
from fakes.driver import FakeDriver
from fakes.relay import listening
from fakes.rooms import DEADLINES, open_rooms

TWINS: list[tuple[type, type]] = [
    (AsyncHost, Host),
    (AsyncMachine, Machine),
    (images.AsyncImages, blocking_images.Images),
    (images.AsyncKernels, blocking_images.Kernels),
    (managers.AsyncVolumes, blocking_managers.Volumes),
    (managers.AsyncSnapshots, blocking_managers.Snapshots),
]
WITH_AWAIT_ONLY = {"stream"}  # handles have a method for each stream


def public(kind: type) -> dict[str, Any]:
    """Return the public members of a class."""
    return {name: inspect.getattr_static(kind, name) for name in dir(kind) if not name.startswith("_")}


def parameters(function: Any) -> list[inspect.Parameter]:
    """Return the parameters with names, kinds, defaults and annotations."""
    return list(inspect.signature(function).parameters.values())


def blocking(annotation: str) -> str:
    """Return the blocking form of an asynchronous annotation."""
    annotation = re.sub(r"^Opening\[(.*)\]$", r"\1", annotation).replace("Connecting", "Iterator[socket.socket]")
    return (
        re.sub(r"\bAsync(\w)", r"\1", annotation).replace("AbstractContextManager", "Iterator").replace("Abstract", "")
    )


def members() -> list[tuple[type, type, str]]:
    return [(theirs, ours, name) for theirs, ours in TWINS for name in sorted(set(public(theirs)) - WITH_AWAIT_ONLY)]


@pytest.mark.parametrize(("theirs", "ours"), TWINS)
def test_a_twin_has_every_name(theirs: type, ours: type) -> None:
    """A user who moves between the two finds the same names."""
    assert set(public(ours)) == set(public(theirs)) - WITH_AWAIT_ONLY


@pytest.mark.parametrize(("asynchronous", "twin", "name"), members())
def test_a_twin_has_the_same_signatures(asynchronous: type, twin: type, name: str) -> None:
    """Parameters, defaults, results and documentation are the same without `await`."""
    ours, theirs = inspect.getattr_static(twin, name), inspect.getattr_static(asynchronous, name)
    assert ours.__doc__
    assert ours.__doc__.splitlines()[0] == theirs.__doc__.splitlines()[0]
    if isinstance(theirs, property | functools.cached_property):
        ours, theirs = ours.fget, theirs.fget if isinstance(theirs, property) else theirs.func
    assert parameters(ours) == parameters(theirs)
    found, wanted = (inspect.signature(each).return_annotation for each in (inspect.unwrap(ours), theirs))
    assert found == blocking(wanted) or wanted.startswith("AbstractAsyncContextManager")
    assert not inspect.iscoroutinefunction(ours)


def test_the_hosts_have_the_same_settings() -> None:
    """The settings have the same defaults too."""
    assert parameters(Host.__init__) == parameters(AsyncHost.__init__)


def test_a_session_has_every_name_of_the_asynchronous_one() -> None:
    """A session in a `with` block has the methods of one in an `async with` block; only the block
    begins and ends it.
    """
    wanted = {name for name in dir(AgentSession) if not name.startswith("_")} - {"opened", "end", "terminate"}
    assert {name for name in dir(ExecSession) if not name.startswith("_")} == wanted | {
        "id",
        "pid",
        "offset",
        "dropped_bytes",
    }
    for name in wanted:
        ours, theirs = (parameters(getattr(kind, name)) for kind in (ExecSession, AgentSession))
        assert [(each.name, each.kind, each.default) for each in ours] == [
            (each.name, each.kind, each.default) for each in theirs
        ]


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


def test_a_call_from_the_hosts_own_thread_is_refused(portal: Portal) -> None:
    """A progress sink that calls the host gets an error instead of a deadlock."""

    async def nested() -> int:
        return portal.call(_answer())

    with pytest.raises(RuntimeError, match="own thread"):
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


def test_a_host_over_fake_machines(fake_vmm: Path, fake_home: Path) -> None:
    """A whole life cycle through the blocking twin leaves nothing: run, exec, logs of a session,
    and a fork in a block.
    """
    with Host(fake_home, driver=FakeDriver(fake_vmm), deadlines=DEADLINES, open_rooms=open_rooms) as host:
        assert host.home == fake_home
        (image,) = host.images.ls()
        with host.run(image.name, memory_bytes=64 << 20) as vm:
            assert vm.exec(["echo", "hello"]).stdout == b"hello\n"
            with vm.open_exec(["cat"]) as session:
                session.send_stdin(b"data")
                session.eof()
                assert b"".join(data for _, data in session) == b"data"
                assert session.wait().exit_code == 0
            template = vm.freeze()
            assert template is vm
            with template.fork(2) as forks:
                assert len(host.ls()) == 3
                assert set(vm.inspect().forks) == {fork.name for fork in forks}
                assert [fork.exec(["hostname"]).stdout.decode().strip() for fork in forks] == [
                    fork.name for fork in forks
                ]
            with template.fork_one(name="one") as one:
                assert (one.name, one.state, host.get("one")) == ("one", "Running", one)
        assert host.ls() == []


def test_a_connection_is_a_socket(fake_vmm: Path, fake_home: Path) -> None:
    """Blocking code gets a socket: it sends and receives, both directions end, and errors are raised."""
    agent_binary("static")  # the first call compiles it, which can take as long as a deadline
    with (
        Host(fake_home, driver=FakeDriver(fake_vmm), deadlines=DEADLINES, open_rooms=open_rooms) as host,
        host.run(host.images.ls()[0].name, memory_bytes=64 << 20) as vm,
        socket.create_server(("127.0.0.1", 0)) as server,
        listening(int(server.getsockname()[1])),
    ):
        with vm.connect(server.getsockname()[1]) as sock, server.accept()[0] as guest:
            sock.sendall(b"ping")
            sock.shutdown(socket.SHUT_WR)
            with guest.makefile("rb") as stream:
                assert stream.read() == b"ping"
            guest.sendall(bytes(1 << 20))
            guest.shutdown(socket.SHUT_WR)
            with sock.makefile("rb") as stream:
                assert stream.read() == bytes(1 << 20)
        with pytest.raises(GuestRefused, match="cannot connect to port 1 "), vm.connect(1):
            pytest.fail("connected")
        opening = vm.connect(server.getsockname()[1])
        sock, guest = opening.__enter__(), server.accept()[0]
        guest.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
        guest.close()
        assert sock.recv(1) == b""
        with pytest.raises(GuestRefused, match="was lost"):
            opening.__exit__(None, None, None)


def test_a_host_that_cannot_be_opened_leaves_no_thread(tmp_path: Path) -> None:
    """An error on entry of the block ends the thread too."""
    (tmp_path / "file").write_text("")
    with pytest.raises(Exception, match="cannot use the data directory"), Host(tmp_path / "file" / "home"):
        pytest.fail("the host was opened")
    assert "coppice-host" not in {thread.name for thread in threading.enumerate()}


FORKING = """
import asyncio, os, signal, sys
from coppice.client.portal import Portal
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


def test_a_host_cannot_be_used_in_a_forked_process() -> None:
    """A fork does not copy the host's thread: a multiprocessing worker that uses its parent's host
    gets an error and does not hang.
    """
    done = subprocess.run(
        [sys.executable, "-W", "ignore", "-c", FORKING], capture_output=True, text=True, timeout=60, check=True
    )
    assert "belongs to the parent of this forked process" in done.stdout


def test_a_host_that_cannot_be_closed_leaves_no_thread(
    fake_vmm: Path, fake_home: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """An error at the end of the block ends the thread too."""
    host = Host(fake_home, driver=FakeDriver(fake_vmm), deadlines=DEADLINES, open_rooms=open_rooms).open()
    close = host._twin.close

    async def failing() -> None:
        await close()
        raise ZeroDivisionError

    monkeypatch.setattr(host._twin, "close", failing)
    with pytest.raises(ZeroDivisionError):
        host.close()
    assert "coppice-host" not in {thread.name for thread in threading.enumerate()}
