"""A machine that was booted with an older agent, whose sources are kept: today's host runs, forks and restores it."""

from __future__ import annotations

from pathlib import Path

import msgspec
import pytest

from agent_process import OLDER, agent_binary
from coppice.client import AsyncHost
from coppice.errors import NotSupported
from coppice.host.opened import default_rooms
from coppice.machine.rooms import Deadlines, Rooms
from coppice.requests import RunRequest
from coppice.state.layout import Layout
from coppice.vmm.registry import Drivers
from machines import GUEST_MEMORY

HOOK = '#!/bin/sh\ncp "$COPPICE_PAYLOAD" /run/seen-by-hook\n'


def older_rooms(layout: Layout, drivers: Drivers, deadlines: Deadlines) -> Rooms:
    """Return the rooms of a host that boots machines with the older agent."""
    return msgspec.structs.replace(default_rooms(layout, drivers, deadlines), agent=agent_binary(OLDER))


@pytest.mark.timeout(400)
async def test_an_older_agent_runs_forks_and_rests(host: AsyncHost, image: str, tmp_path: Path) -> None:
    """Commands and their later clients, copies, connections, forks with payloads, standby; and the end of the machine's
    process. Its next boot brings today's agent.
    """
    script = "python3 -m http.server --bind 127.0.0.1 8000 >/dev/null 2>&1 & read -r _ < /run/end; exit 4"
    request = RunRequest(
        image=image, command=["sh", "-c", f"mkfifo /run/end; {script}"], name="older", memory_bytes=GUEST_MEMORY
    )
    async with AsyncHost(host.home, spares=0, open_rooms=older_rooms) as older:
        made = await older.call(request)
    async with host.machine(made) as vm:
        with pytest.raises(NotSupported, match="older agent"):
            await vm.exec(["true"], pids_limit=9)
        await vm.write_text("/etc/coppice/on-fork", HOOK, mode=0o755)
        (tmp_path / "tree/deeper").mkdir(parents=True)
        (tmp_path / "tree/deeper/file").write_bytes(b"text" * 10_000)
        assert await vm.cp_in(tmp_path / "tree", "/srv/") == 40_000
        command = (await vm.commands.start(["cat"], stdin=True)).id
        async with vm.fork(2, from_running=True, payloads=[b"first", b"second"], atomic=True) as forks:
            for fork, payload in zip(forks, ("first", "second"), strict=True):
                assert await fork.read_text("/run/seen-by-hook") == payload
                assert (await fork.exec(["hostname"])).stdout.decode().strip() == fork.name
                async with fork.commands.attach(command, stdin=True) as attached:
                    await attached.send_stdin(payload.encode())
                    await attached.eof()
                    assert b"".join([data async for _, data in attached]) == payload.encode()
                assert await fork.cp_out("/srv/tree", tmp_path / fork.name) == 40_000
        await vm.standby()
        await vm.restore()
        async with vm.connect(8000) as (reader, writer):
            writer.write(b"GET / HTTP/1.0\r\n\r\n")
            assert (await reader.readline()).startswith(b"HTTP/1.0 200")
        await vm.exec(["sh", "-c", "echo end > /run/end"])
        assert (await vm.wait_process(60)).record.process_end.exit_code == 4  # type: ignore[union-attr]
        await vm.stop()
        await vm.start()
        assert (await vm.exec(["echo", "limited"], pids_limit=9)).stdout == b"limited\n"
