"""`coppice serve` as systemd runs it: ready notification, TLS, the end by a signal."""

from __future__ import annotations

import asyncio
import configparser
import json
import os
import shlex
import signal
import socket
import ssl
import subprocess
import sys
from pathlib import Path

import httpx
import pytest

from conftest import HostFactory
from coppice.cli import main
from coppice.model import State
from coppice.requests import RunRequest
from coppice.server.auth import load_key, make_token
from coppice.server.serving import Listening
from fakes.driver import FakeDriver
from fakes.records import MEMORY_BYTES, OVERLAY_BYTES
from fakes.rooms import IMAGE
from servers import client_of, fake_hosts, served

DEADLINE_S = 60.0
COPPICE = (sys.executable, "-m", "coppice")


@pytest.fixture(scope="module")
def certificate(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    """A certificate of 127.0.0.1 and its key."""
    directory = tmp_path_factory.mktemp("tls")
    chain, key = directory / "chain.pem", directory / "key.pem"
    command = ["openssl", "req", "-x509", "-newkey", "rsa:2048", "-nodes", "-days", "2", "-subj", "/CN=coppice"]
    names = ["-addext", "subjectAltName=IP:127.0.0.1", "-keyout", str(key), "-out", str(chain)]
    subprocess.run([*command, *names], check=True, timeout=DEADLINE_S, capture_output=True)
    return chain, key


async def test_a_service_says_when_it_is_ready_and_ends_by_sigterm(
    tmp_path: Path, certificate: tuple[Path, Path]
) -> None:
    """With TLS: the certificate is checked, and plain HTTP gets no answer. The exit status is 0."""
    chain, key = certificate
    told = socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM)
    told.bind(str(tmp_path / "notify"))
    told.setblocking(False)
    home = ("--home", str(tmp_path / "home"))
    options = ("--listen", "127.0.0.1:0", "--tls-cert", str(chain), "--tls-key", str(key))
    with told:
        server = await asyncio.create_subprocess_exec(
            *(*COPPICE, *home, "serve", *options),
            env=os.environ | {"NOTIFY_SOCKET": str(tmp_path / "notify")},
            stdout=asyncio.subprocess.PIPE,
        )
        try:
            async with asyncio.timeout(DEADLINE_S):
                assert await asyncio.get_running_loop().sock_recv(told, 100) == b"READY=1"
                assert server.stdout is not None
                address = (await server.stdout.readline()).decode().split()[-1]
            assert address.startswith("https://")
            context = ssl.create_default_context(cafile=str(chain))
            async with httpx.AsyncClient(base_url=address, verify=context) as client:
                assert (await client.get("/health")).json() == {"status": "ok"}
                assert (await client.get("/instances")).status_code == 401
            async with httpx.AsyncClient(base_url=address) as client:
                with pytest.raises(httpx.ConnectError, match="CERTIFICATE_VERIFY_FAILED"):
                    await client.get("/health")
            async with httpx.AsyncClient(base_url=address.replace("https", "http")) as client:
                with pytest.raises(httpx.HTTPError):
                    await client.get("/health")
            server.send_signal(signal.SIGTERM)
            async with asyncio.timeout(DEADLINE_S):
                assert await server.wait() == 0
        finally:
            if server.returncode is None:
                server.kill()
                await server.wait()


async def test_the_end_of_a_server_leaves_its_machines_running(
    fake_home: Path, driver: FakeDriver, tmp_path: Path, make_host: HostFactory
) -> None:
    """An operation under way is undone; what has succeeded stays."""
    body = {"image": IMAGE, "memory_bytes": MEMORY_BYTES, "overlay_bytes": OVERLAY_BYTES}
    gate = driver.faults.hold_at("booted", nth=2)
    async with (
        served(fake_hosts(fake_home, driver), Listening(socket=tmp_path / "s"), None) as address,
        client_of(address) as client,
    ):
        assert (await client.post("/call/run", json={**body, "name": "oak"})).status_code == 200
        begun = {"prefer": "respond-async"}
        assert (await client.post("/call/run", json={**body, "name": "elm"}, headers=begun)).status_code == 202
        async with asyncio.timeout(DEADLINE_S):
            await gate.reached.wait()
    async with make_host() as host:
        (vm,) = await host.ls()
        assert (vm.name, vm.state) == ("oak", State.RUNNING)
        assert (await vm.exec(["hostname"])).stdout == b"oak\n"
        assert (await host.call(RunRequest(**body, name="elm"))).state is State.RUNNING  # type: ignore[arg-type]


def test_a_unit_runs_the_command(tmp_path: Path) -> None:
    """It has the options that were given, with `%` and `$` escaped."""
    chain = tmp_path / "a b%$.pem"
    options = ["--listen", "0.0.0.0:8443", "--tls-cert", str(chain), "--tls-key", str(chain)]
    command = [*COPPICE, "--home", str(tmp_path), "serve", *options]
    printed = subprocess.run([*command, "--print-unit"], check=True, timeout=DEADLINE_S, capture_output=True, text=True)
    unit = configparser.ConfigParser(interpolation=None)
    unit.optionxform = str  # type: ignore[assignment, method-assign]
    unit.read_string(printed.stdout)
    assert (unit["Service"]["Type"], unit["Service"]["KillMode"]) == ("notify", "process")
    run = unit["Service"]["ExecStart"].replace("%%", "%").replace("$$", "$")
    assert shlex.split(run) == command
    assert not (tmp_path / "coppice.db").exists()


async def test_a_log_of_json_lines(tmp_path: Path) -> None:
    """One for each request, with its id and its caller, and nothing else on standard error."""
    home = ("--home", str(tmp_path / "home"))
    token = make_token(load_key(tmp_path / "home"), owner="ann")
    server = await asyncio.create_subprocess_exec(
        *(*COPPICE, *home, "serve", "--listen", "127.0.0.1:0", "--log-format", "json"),
        stdout=asyncio.subprocess.PIPE,
        stderr=asyncio.subprocess.PIPE,
    )
    try:
        assert server.stdout is not None
        async with asyncio.timeout(DEADLINE_S):
            address = (await server.stdout.readline()).decode().split()[-1]
            headers = {"authorization": f"Bearer {token}", "x-request-id": "mine"}
            async with httpx.AsyncClient(base_url=address, headers=headers) as client:
                assert (await client.get("/instances/secret-name")).status_code == 404
                assert (await client.get("/instances", headers={"authorization": "Bearer x"})).status_code == 401
    finally:
        server.send_signal(signal.SIGTERM)
        async with asyncio.timeout(DEADLINE_S):
            _, errors = await server.communicate()
    lines = [json.loads(each) for each in errors.splitlines()]
    found, refused = (each for each in lines if each["message"] == "request")
    assert {name: found[name] for name in ("request_id", "owner", "method", "route", "status", "level")} == {
        "request_id": "mine",
        "owner": "ann",
        "method": "GET",
        "route": "/instances/{key}",
        "status": 404,
        "level": "info",
    }
    assert (refused["owner"], refused["status"]) == (None, 401)
    assert b"secret-name" not in errors


@pytest.mark.parametrize("address", ["0.0.0.0:0", "[::]:0", "192.0.2.1:8080"])
def test_a_server_without_tokens_listens_on_loopback_only(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], address: str
) -> None:
    """Any other address is refused before anything listens or is made."""
    home = tmp_path / "home"
    assert main(["--home", str(home), "serve", "--listen", address, "--insecure-no-auth"]) == 2
    assert "other machines" in capsys.readouterr().err
    assert not home.exists()
