"""Where a server listens: what is at the path of its socket stays, and errors are about the address."""

from __future__ import annotations

import asyncio
import contextlib
import os
import socket
from collections.abc import Callable
from pathlib import Path

import pytest

from coppice import cli
from coppice.cli import app
from coppice.errors import HostCannot, InUse, Refused, UsageError
from coppice.host.ports import Ports
from coppice.model import Publish
from coppice.server.serving import Listening, listen
from fakes.records import make_instance


def bound(path: Path, kind: int = socket.SOCK_STREAM) -> socket.socket:
    """Return a socket that is bound to a path."""
    made = socket.socket(socket.AF_UNIX, kind)
    made.bind(str(path))
    return made


def file(path: Path) -> None:
    path.write_text("precious")


def link(path: Path) -> None:
    file(path.with_name("target"))
    path.symlink_to("target")


def link_to_socket(path: Path) -> None:
    bound(path.with_name("target")).close()
    path.symlink_to("target")


def dangling(path: Path) -> None:
    path.symlink_to("nowhere")


@pytest.mark.parametrize("make", [file, link, link_to_socket, dangling, Path.mkdir, os.mkfifo])
def test_what_is_no_socket_stays(tmp_path: Path, make: Callable[[Path], None]) -> None:
    """A mistyped path must not cost a file."""
    path = tmp_path / "there"
    make(path)
    before = path.lstat()
    with (
        pytest.raises(Refused, match=r"there: it exists, and is not a socket; choose another path"),
        listen(Listening(socket=path)),
    ):
        pass
    assert os.path.samestat(path.lstat(), before)


def test_the_socket_of_a_dead_server_is_replaced(tmp_path: Path) -> None:
    """It answers no connection. At the end nothing is left."""
    path = tmp_path / "socket"
    bound(path).close()
    with listen(Listening(socket=path)), socket.socket(socket.AF_UNIX) as client:
        client.connect(str(path))
    assert not path.exists()


@pytest.mark.parametrize("kind", [socket.SOCK_STREAM, socket.SOCK_DGRAM])
def test_a_socket_in_use_stays(tmp_path: Path, kind: int) -> None:
    """Also that of a program which takes no connections now, or datagrams."""
    path = tmp_path / "socket"
    with bound(path, kind) as other, socket.socket(socket.AF_UNIX) as client:
        if kind == socket.SOCK_STREAM:
            other.listen(0)
            client.connect(str(path))  # the queue is full
        before = path.lstat()
        with pytest.raises(InUse, match="another server listens"), listen(Listening(socket=path)):
            pass
        assert os.path.samestat(path.lstat(), before)


@pytest.mark.parametrize("make", [file, lambda path: bound(path).close()])
def test_what_replaced_the_socket_stays(tmp_path: Path, make: Callable[[Path], None]) -> None:
    """A server that ends removes its own socket only."""
    path = tmp_path / "socket"
    with listen(Listening(socket=path)):
        path.unlink()
        make(path)
    assert path.lstat()


def test_the_socket_of_a_successor_stays(tmp_path: Path) -> None:
    """A server closes its socket some time before its end, and a file system uses the number of an inode again."""
    where = Listening(socket=tmp_path / "socket")
    with contextlib.ExitStack() as first:
        first.enter_context(listen(where)).close()
        with listen(where), socket.socket(socket.AF_UNIX) as client:
            first.close()
            client.connect(str(where.socket))


@pytest.mark.parametrize(
    ("where", "hint"),
    [
        (Listening(socket=Path("/nonexistent/sock")), "make the directory of the socket first"),
        (Listening(socket=Path(f"/tmp/{'x' * 120}")), "choose a shorter path"),
        (Listening(socket=Path(f"/tmp/{'x' * 300}")), "choose a shorter path"),
        (Listening(address="192.0.2.1"), "choose an address of this host"),
        (Listening(address="nowhere.invalid"), "choose an address of this host"),
    ],
)
def test_a_hint_is_about_the_address(where: Listening, hint: str) -> None:
    """Not about instances, the data directory or standard output."""
    with pytest.raises(HostCannot, match="Cannot listen on ") as refused, listen(where):
        pass
    assert refused.value.hint is not None
    assert hint in refused.value.hint


def test_a_port_in_use_and_a_malformed_name() -> None:
    """Both are errors of the tree."""
    with listen(Listening(port=0)) as first:
        with pytest.raises(InUse, match="choose another address"), listen(Listening(port=first.getsockname()[1])):
            pass
        with pytest.raises(UsageError, match="is not an address"), listen(Listening(address="é" * 70, port=0)):
            pass


def test_errors_of_the_block_stay_as_they_are() -> None:
    """Only listening is translated."""
    with pytest.raises(BlockingIOError), listen(Listening(port=0)):
        raise BlockingIOError


def test_the_command_names_the_address(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Its failure is none of standard output."""
    assert cli.main(["--home", str(tmp_path / "home"), "serve", "--listen", "192.0.2.1:0"]) == 5
    assert capsys.readouterr().err.startswith("coppice: Cannot listen on http://192.0.2.1:0: ")


def test_a_bare_error_of_the_system_is_none_of_standard_output(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """Whatever raised it, the output was not lost."""

    def fails(*_: object, **__: object) -> None:
        raise FileNotFoundError(2, "No such file or directory", "there")

    monkeypatch.setattr(app.app, "main", fails)
    assert cli.main(["ls"]) == 5
    assert capsys.readouterr().err.startswith("coppice: No such file or directory: there; check this host")


async def test_a_held_port_names_the_address() -> None:
    """The supervisor's errors have the same hints."""
    ports = Ports(lambda _: None)
    elsewhere = make_instance(publish=(Publish(host_port=8080, guest_port=80, host_address="192.0.2.1"),))
    with pytest.raises(HostCannot, match="choose an address of this host"):
        ports.hold(elsewhere)
    with socket.create_server(("127.0.0.1", 0)) as other:
        taken = make_instance(publish=(Publish(host_port=other.getsockname()[1], guest_port=80),))
        with pytest.raises(InUse, match="Cannot listen"):
            ports.hold(taken)
    await asyncio.sleep(0)
