"""The process of a real machine: its end is seen everywhere, and a warm process takes notices of forks."""

from __future__ import annotations

import asyncio
from pathlib import Path

import pytest

from coppice.client import AsyncHost
from coppice.commands import PROCESS
from coppice.errors import GuestTimeout
from coppice.host import LocalBackend
from coppice.model import HealthCheck, Instance, State
from coppice.requests import GetRequest, LsRequest
from coppice.server.serving import Listening
from fakes.supervising import event_of
from servers import served

WAIT_S = 120.0
END = "printf 'os._exit(5)\\n' >/run/warm/ask"

# Listens on a unix socket from before the capture on, and keeps what it is told.
APP = """
import http.server, os, socketserver
class App(http.server.BaseHTTPRequestHandler):
    def address_string(self): return "host"
    def do_POST(self):
        payload = self.rfile.read(int(self.headers["Content-Length"]))
        told = self.path.encode() + b" " + self.headers["Coppice-Name"].encode() + b" " + payload + b" " + os.uname().nodename.encode()
        open("/run/told", "wb").write(told)
        self.send_response(500 if payload == b"bad" else 204)
        self.end_headers()
        self.wfile.write(b"no such job" if payload == b"bad" else b"")
socketserver.UnixStreamServer("/run/app.sock", App).serve_forever()
"""


async def test_the_end_of_a_process_is_seen_everywhere(host: AsyncHost, vm: Instance, tmp_path: Path) -> None:
    """By whoever waits, in lists and records, as an event, and in a fork that is made later."""

    def make_host(owner: str | None) -> LocalBackend:
        return LocalBackend(host.home, owner=owner, spares=0, background="off")

    machine = await host.get(vm.id)
    assert machine.record.process_end is None
    (process,) = [each for each in await machine.commands.ls() if each.id == PROCESS]
    assert process.exit_code is None
    assert process.argv[0] == "python3"
    waiting = asyncio.create_task(machine.wait_process(WAIT_S))
    assert (await machine.exec(["sh", "-c", END])).exit_code == 0
    async with asyncio.timeout(WAIT_S):
        end = (await waiting).record.process_end
    assert end is not None
    assert (end.exit_code, end.signal) == (5, None)
    (listed,) = [each for each in await host.call(LsRequest()) if each.id == vm.id]
    assert (listed.state, listed.process_end) == (State.RUNNING, end)
    lines = [line async for line in machine.logs()]
    assert any(b"process exited with status 5" in line for line in lines)
    async with await machine.fork_one(from_running=True) as fork:
        assert fork.record.process_end == end
        assert (await fork.wait_process(1)).record.process_end == end

    async with served(make_host, Listening(socket=tmp_path / "coppice.sock"), None):
        parent = await host.get(vm.parent or "")
        async with await parent.fork_one() as killed:
            assert killed.record.process_end is None
            await killed.commands.kill(PROCESS, 9)
            event = await event_of(host, lambda each: (each.kind, each.instance) == ("exited", killed.id))
            assert event.detail == "status 137 (signal 9)"
            assert (await host.call(GetRequest(instance=killed.id))).process_end is not None


async def test_a_line_of_the_console_is_readiness_in_forks(host: AsyncHost, vm: Instance) -> None:
    """A service says once that it is ready. Its forks are, though their consoles begin empty."""
    machine = await host.get(vm.id)
    await machine.update(health_check=HealthCheck(kind="log", text="the model is loaded"))
    async with await machine.fork_one(from_running=True) as early:
        await machine.exec(["sh", "-c", "echo 'now the model is loaded' >/dev/console"])
        await machine.ready(deadline_s=WAIT_S)
        async with await machine.fork_one(from_running=True) as late:
            assert [line async for line in late.logs()] == []
            await late.ready(deadline_s=WAIT_S)
        with pytest.raises(GuestTimeout, match="its console does not show 'the model is loaded'"):
            await early.ready(deadline_s=3)
    await machine.standby()
    await machine.restore()
    await machine.ready(deadline_s=WAIT_S)


async def test_a_warm_process_takes_the_notice_of_a_fork(host: AsyncHost, vm: Instance) -> None:
    """On a unix socket, before the fork runs; no process is started for it. Its refusal is the fork's failure."""
    machine = await host.get(vm.id)
    await machine.write_file("/run/app.py", APP.encode())
    start = "setsid python3 /run/app.py >/run/app.log 2>&1 & until test -S /run/app.sock; do sleep 0.1; done"
    assert (await machine.exec(["sh", "-c", start], timeout_s=WAIT_S)).exit_code == 0
    template = await machine.freeze(notify="unix:/run/app.sock")
    try:
        async with template.fork(2, names=["told", "refused"], payloads=[b"good", b"bad"]) as forks:
            (fork,) = forks
            told, refused = forks.report.results
            assert [told.ok, refused.ok] == [True, False]
            assert "unix:/run/app.sock answered the fork's notice with HTTP status 500: no such job" in (
                refused.error or ""
            )
            assert await fork.read_text("/run/told") == "/coppice/fork told good told"
            assert "notice" in told.stages
    finally:
        await template.demote()  # the fixture removes it
