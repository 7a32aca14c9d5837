"""`coppice port-forward` and `coppice connect`: the real command line in a separate process, over a
host whose guest is this machine.
"""

from __future__ import annotations

import contextlib
import json
import os
import pty
import queue
import re
import signal
import socket
import subprocess
import threading
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from cli_host import FakeHost
from cli_lines import run as run_here
from cli_process import command, environment, run, started

DEADLINE_S = 60


@contextlib.contextmanager
def server(work: Callable[[socket.socket], None], path: Path | None = None) -> Iterator[int]:
    """Serve each connection in a thread for a block. Yield the port, or 0 for a unix socket."""
    family = socket.AF_UNIX if path else socket.AF_INET
    with socket.socket(family) as listener:
        listener.bind(str(path) if path else ("127.0.0.1", 0))
        listener.listen(16)

        def serve(sock: socket.socket) -> None:
            with sock, contextlib.suppress(OSError):
                work(sock)

        def accept() -> None:
            with contextlib.suppress(OSError):
                while True:
                    threading.Thread(target=serve, args=(listener.accept()[0],), daemon=True).start()

        threading.Thread(target=accept, daemon=True).start()
        yield 0 if path else int(listener.getsockname()[1])
        listener.shutdown(socket.SHUT_RDWR)


def read_all(sock: socket.socket) -> bytes:
    """Read to the end."""
    return b"".join(iter(lambda: sock.recv(1 << 16), b""))


def reverse(sock: socket.socket) -> None:
    """Answer at the end of the input."""
    sock.sendall(read_all(sock)[::-1])


@contextlib.contextmanager
def unserved() -> Iterator[tuple[socket.socket, int]]:
    """Keep a port on which nothing listens, for a block."""
    with socket.socket() as kept:
        kept.bind(("127.0.0.1", 0))
        yield kept, int(kept.getsockname()[1])


def opened(port: int) -> socket.socket:
    """Connect to a forwarded port."""
    return socket.create_connection(("127.0.0.1", port), DEADLINE_S)


@contextlib.contextmanager
def forwarding(*words: str, **options: Any) -> Iterator[tuple[subprocess.Popen[bytes], list[bytes]]]:
    """Run port-forward for a block. Yield the process, and a line of output for each port."""
    pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE}
    with started("port-forward", "vm", *words, **pipes, **options) as child:
        assert child.stdout is not None
        count = sum(not word.startswith("-") for word in words)
        yield child, [child.stdout.readline() for _ in range(count)]


def port_of(line: bytes) -> int:
    """Return the port of this machine in a line of output."""
    found = re.match(rb"127\.0\.0\.1:(\d+) -> vm ", line)
    assert found, line
    return int(found[1])


def test_each_connection_is_a_stream_of_its_own(tmp_path: Path) -> None:
    """Several ports, a unix socket and several connections at once; half-close reaches the server."""
    with (
        server(reverse) as guest,
        server(reverse, tmp_path / "s"),
        forwarding(f"{guest}:0", f"unix:{tmp_path}/s:0") as (child, lines),
    ):
        assert lines[0].endswith(b"-> vm port %d\n" % guest)
        assert lines[1].endswith(b"-> vm unix:%s/s\n" % bytes(tmp_path))
        socks = [opened(port_of(line)) for line in lines * 3]
        for number, sock in enumerate(socks):
            sock.sendall(b"%d" % number + b"." * 100_000)
        for number, sock in enumerate(socks):
            with sock:
                sock.shutdown(socket.SHUT_WR)
                assert read_all(sock) == b"." * 100_000 + b"%d" % number
        child.send_signal(signal.SIGINT)
        assert child.wait(DEADLINE_S) == 0
        assert child.stderr is not None
        assert child.stderr.read() == b""


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_a_signal_ends_open_connections(number: int) -> None:
    """Ctrl-C closes what is open, and the exit status is 0."""
    with server(reverse) as guest, forwarding(f"{guest}:0") as (child, (line,)), opened(port_of(line)) as sock:
        sock.sendall(b"x")
        child.send_signal(number)
        assert child.wait(DEADLINE_S) == 0
        with contextlib.suppress(ConnectionError):
            assert sock.recv(1) == b""


def test_an_unreachable_server_is_reported_once() -> None:
    """Each client's connection is closed. Standard error says why, and again only after a success."""
    with unserved() as (listener, guest), forwarding(f"{guest}:0") as (child, (line,)):
        for _ in range(3):
            with contextlib.suppress(ConnectionError), opened(port_of(line)) as sock:
                assert sock.recv(1) == b""
        listener.listen()
        with opened(port_of(line)) as sock:
            listener.accept()[0].close()
            assert sock.recv(1) == b""
        listener.close()
        with contextlib.suppress(ConnectionError), opened(port_of(line)) as sock:
            assert sock.recv(1) == b""
        child.send_signal(signal.SIGINT)
        assert child.wait(DEADLINE_S) == 0
        assert child.stderr is not None
        assert child.stderr.read() == b"coppice: cannot connect: Connection refused\n" * 2


def test_the_same_port_and_json() -> None:
    """LOCAL is the same number if it is left out. With --json one document names the ports."""
    with server(reverse) as guest:
        taken = run("port-forward", "vm", str(guest))  # it listens on this machine already
        assert taken.returncode == 4
        assert b"Cannot listen on port %d of 127.0.0.1: Address already in use" % guest in taken.stderr
        with started("--json", "port-forward", "vm", f"{guest}:0", stdout=subprocess.PIPE) as child:
            assert child.stdout is not None
            (found,) = json.loads(child.stdout.readline())["forwards"]
            assert (found["to"], found["address"]) == (guest, "127.0.0.1")
            with opened(found["port"]) as sock:
                sock.shutdown(socket.SHUT_WR)
                assert read_all(sock) == b""
            child.send_signal(signal.SIGINT)
            assert child.stdout.read() == b""


@pytest.mark.parametrize(
    "words",
    [
        ("nothing",), ("0",), ("65536",), ("80:65536",), ("80:x",), ("unix:/run/s",), ("unix:run/s:0",),
        ("80", "--address", "localhost"), (),
    ],
)  # fmt: skip
def test_wrong_words(words: tuple[str, ...]) -> None:
    """A malformed port is refused before anything is opened, with a hint."""
    host = FakeHost(health=None)
    assert run_here(host, "port-forward", "vm", *words) == 2
    assert not host.calls


def test_a_machine_that_does_not_exist() -> None:
    """Nothing listens for it."""
    assert run("port-forward", "nobody", "80:0").returncode == 3
    assert run("connect", "nobody", "80").returncode == 3


@pytest.mark.parametrize("size", [5, 1 << 20])
def test_connect_joins_standard_input_and_output(size: int, tmp_path: Path) -> None:
    """Every byte passes, and the end of the input is the end of the server's input."""
    data = os.urandom(size)
    with server(reverse) as guest, server(reverse, tmp_path / "s"):
        for to in (str(guest), f"unix:{tmp_path}/s"):
            ended = run("connect", "vm", to, stdin=data)
            assert (ended.returncode, ended.stderr) == (0, b"")
            assert ended.stdout == data[::-1]


def test_connect_shows_the_end_of_the_server_at_once() -> None:
    """A program that started it, as ssh does, sees the end of its output, closes the input, and then
    it ends. What is sent in between still arrives.
    """
    got: queue.Queue[bytes] = queue.Queue()

    def work(sock: socket.socket) -> None:
        sock.sendall(b"bye")
        sock.shutdown(socket.SHUT_WR)
        got.put(read_all(sock))

    pipes = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE}
    with server(work) as guest, started("connect", "vm", str(guest), **pipes) as child:
        assert child.stdout is not None
        assert child.stdin is not None
        assert child.stdout.read() == b"bye"
        child.stdin.write(b"late")
        child.stdin.close()
        assert child.wait(DEADLINE_S) == 0
        assert got.get(timeout=DEADLINE_S) == b"late"


def test_connect_on_a_terminal_ends_with_the_server() -> None:
    """A user need not end the input."""
    ours, theirs = pty.openpty()
    try:
        with server(lambda sock: sock.sendall(b"bye")) as guest:
            words = command("connect", "vm", str(guest))
            ended = subprocess.run(
                words, stdin=theirs, stdout=subprocess.PIPE, env=environment(), timeout=DEADLINE_S, check=False
            )
        assert (ended.returncode, ended.stdout) == (0, b"bye")
    finally:
        os.close(ours)
        os.close(theirs)


def test_connect_to_nothing() -> None:
    """The error and the exit status are those of every refusal of the guest."""
    with unserved() as (_, guest):
        ended = run("connect", "vm", str(guest))
    assert (ended.returncode, ended.stdout) == (1, b"")
    assert ended.stderr.startswith(b"coppice: cannot connect: Connection refused")
    assert run("connect", "vm", "0").returncode == 2
    assert run("--json", "connect", "vm", "80").returncode == 2
