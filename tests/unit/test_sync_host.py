"""Host, the blocking twin, has the names and signatures of AsyncHost, and leaves no thread."""

from __future__ import annotations

import functools
import inspect
import re
import socket
import struct
import threading
from pathlib import Path
from typing import Any

import pytest

from agent_process import agent_binary
from coppice.agent.process import ExecSession as AgentSession
from coppice.client import AsyncHost, AsyncMachine, ExecSession, Host, Machine
from coppice.client.aio import images, managers
from coppice.client.blocking import images as blocking_images
from coppice.client.blocking import managers as blocking_managers
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
