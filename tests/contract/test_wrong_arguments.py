"""Public calls that make no request refuse arguments of a wrong type by an error of the tree.

The cases are derived from the signatures, as those of `test_error_tree` are from the requests.
"""

from __future__ import annotations

import asyncio
import inspect
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from coppice import Host, connect, connect_async
from coppice.agent.process import ExecSession as AgentSession
from coppice.client import AsyncHost, AsyncMachine, ExecSession
from coppice.client.remote.commands import RemoteExecSession
from coppice.errors import CoppiceError, UsageError
from coppice.requests import LsRequest
from fakes.driver import FakeDriver
from fakes.hosting import boot
from fakes.rooms import DEADLINES, open_rooms

ODD: tuple[Any, ...] = (
    "text",
    "\0",
    "\udcff",
    b"bytes",
    5,
    -1,
    1 << 70,
    1.5,
    float("nan"),
    None,
    True,
    [],
    {},
    object(),
    lambda: None,
)
PLAIN: dict[str, Any] = {
    "path": "/tmp/there",
    "text": "x",
    "data": b"x",
    "number": 18,
    "rows": 24,
    "columns": 80,
    "request": LsRequest(),
    "address": "http://localhost:1",
}
SESSIONS = (AgentSession, RemoteExecSession, ExecSession)


def names_of(kind: type, *, inherited: bool = False) -> list[str]:
    """Return the public methods of a class that have parameters."""
    return [
        name
        for name in (dir(kind) if inherited else vars(kind))
        if not name.startswith("_")
        and inspect.isfunction(member := inspect.getattr_static(kind, name))
        and len(inspect.signature(member).parameters) > 1
    ]


def attempts(call: Callable[..., Any]) -> Iterator[dict[str, Any]]:
    """Yield arguments in which one value is odd and all others are plain."""
    parameters = inspect.signature(call).parameters.values()
    plain = {each.name: PLAIN.get(each.name) for each in parameters if each.default is inspect.Parameter.empty}
    for each in parameters:
        for value in ODD:
            yield plain | {each.name: value}


async def bare_errors(call: Callable[..., Any]) -> list[str]:
    """Return the errors that are none of the tree, for all attempts."""
    found = []
    for arguments in attempts(call):
        try:
            async with asyncio.timeout(30):
                made = call(**arguments)
                if inspect.isawaitable(made):
                    await made
        except CoppiceError:
            pass
        except BaseException as error:
            found.append(f"{type(error).__name__}: {str(error)[:60]} from {str(arguments)[:100]}")
    return found


@pytest.mark.parametrize("name", names_of(AsyncMachine))
async def test_a_machine(fake_host: AsyncHost, name: str) -> None:
    """Each method of the handle that is written by hand."""
    vm = fake_host.machine(await boot(fake_host))
    assert not await bare_errors(getattr(vm, name))


@pytest.mark.parametrize("name", names_of(AsyncHost))
async def test_a_host(fake_host: AsyncHost, name: str) -> None:
    """Each method of the host that is written by hand."""
    PLAIN["record"] = await boot(fake_host)
    assert not await bare_errors(getattr(fake_host, name))


@pytest.mark.parametrize("name", sorted({name for kind in SESSIONS for name in names_of(kind, inherited=True)}))
async def test_a_session(fake_host: AsyncHost, name: str) -> None:
    """Each method of a running command, embedded and through a server."""
    vm = fake_host.machine(await boot(fake_host))
    async with vm.open_exec(["cat"]) as session:
        assert not await bare_errors(getattr(session, name))


@pytest.mark.parametrize("kind", SESSIONS)
def test_every_session_has_the_same_methods(kind: type) -> None:
    """So that the methods of one are those of all."""
    assert set(names_of(kind, inherited=True)) == {"send_stdin", "signal", "resize", "collect"}


async def test_the_parameter_is_named(fake_host: AsyncHost) -> None:
    """The message has the parameter, its types and the given one."""
    vm = fake_host.machine(await boot(fake_host))
    wrong: Any = "x"
    async with vm.open_exec(["cat"]) as session:
        with pytest.raises(UsageError, match="the data of send_stdin must be bytes, not str"):
            await session.send_stdin(wrong)
        with pytest.raises(UsageError, match="the rows of resize must be int, not str"):
            await session.resize(wrong, 1)
        with pytest.raises(UsageError, match="-1 rows"):
            await session.resize(-1, -1)
        with pytest.raises(UsageError, match="signal 99"):
            await session.signal(99)
        with pytest.raises(UsageError, match="a limit cannot be -1"):
            await session.collect(max_output_bytes=-1)
        like_bytes: Any = bytearray(b"still ")
        await session.send_stdin(like_bytes)
        assert (await session.collect(b"works")).stdout == b"still works"


async def test_encodings(fake_host: AsyncHost) -> None:
    """An unknown encoding, and one that does not have the characters."""
    vm = fake_host.machine(await boot(fake_host))
    for encoding in ("nope", "base64", "\0"):
        with pytest.raises(UsageError, match="there is no encoding"):
            await vm.read_text("/tmp/there", encoding=encoding)
        with pytest.raises(UsageError, match="there is no encoding"):
            await vm.write_text("/tmp/there", "", encoding=encoding)
    with pytest.raises(UsageError, match="'ascii': ordinal not in range"):
        await vm.write_text("/tmp/there", "é", encoding="ascii")


@pytest.mark.parametrize("made", [Host, AsyncHost])
async def test_a_constructor_of_a_host(made: Callable[..., Any], tmp_path: Path) -> None:
    """A value that can never be used is refused before the host is opened."""

    def make(**settings: Any) -> None:
        made(**{"home": tmp_path / "home"} | settings)

    wanted = dict.fromkeys(
        ("home", "vmm", "accel", "owner", "deadlines", "budgets", "background", "spares", "open_rooms", "driver")
    )
    for name in wanted:
        for value in (5.5, [], object()):
            with pytest.raises(UsageError, match=f"the {name} of a host must be"):
                make(**{name: value})
    with pytest.raises(UsageError, match="there is no accelerator 'x'"):
        make(accel="x")
    with pytest.raises(UsageError, match="background"):
        make(background="x")


@pytest.mark.parametrize("function", [connect, connect_async])
async def test_an_address_of_a_server(function: Callable[..., Any]) -> None:
    """Malformed addresses and tokens are refused at once."""
    assert not await bare_errors(function)
    for address in (
        "http://h:99999",
        "http://h:0",
        "http://[::1",
        "http://h:x",
        "unix:/a\0b",
        "unix:x",
        "h:1",
    ):
        with pytest.raises(UsageError, match="write"):
            function(address)
    for token in ("é", "a\nb"):
        with pytest.raises(UsageError, match="the token"):
            function("http://localhost:1", token=token)
    for address in ("http://h", "https://[::1]:65535/prefix/", "unix:/run/coppice.sock"):
        function(address)


async def test_a_host_that_is_not_open(fake_host: AsyncHost, fake_home: Path, driver: FakeDriver) -> None:
    """Before and after, of this machine and of a server."""
    await fake_host.close()
    before = AsyncHost(fake_home, driver=driver, deadlines=DEADLINES, open_rooms=open_rooms, spares=0)
    for host in (fake_host, before, connect_async("http://localhost:1")):
        with pytest.raises(UsageError, match="the host is not open"):
            await host.ls()


def test_a_remote_host_has_no_directory_here() -> None:
    """It is the server's."""
    with pytest.raises(UsageError, match="a server carries out its requests"):
        _ = connect_async("http://localhost:1").home
    with pytest.raises(UsageError, match="a server carries out its requests"):
        _ = connect("http://localhost:1").home
