"""A program may run Coppice in another event loop than asyncio's own. Many servers use uvloop."""

from __future__ import annotations

import asyncio
from pathlib import Path

import uvloop

from coppice.client import AsyncHost
from coppice.model import Instance

LIFE_S = 120


async def life(home: Path, template: str, copy: Path) -> list[str]:
    """Return what two forks said, of which one was captured, restored and forked while it ran."""
    async with AsyncHost(home, background="off", spares=1) as host:
        said = []
        async with (await host.get(template)).fork(2, atomic=True) as (kept, other):
            await kept.exec(["sh", "-c", "echo carried over >/run/note"])
            await kept.standby()
            await kept.restore()
            await kept.cp_out("/run/note", copy)
            said.append(copy.read_text().strip())
            async with kept.fork(1, from_running=True, atomic=True) as (late,):
                said.append((await late.read_text("/run/note")).strip())
            named = (await other.exec(["uname", "-n"])).stdout.decode().strip() == other.name
        return [*said, "named" if named else "not named"]


async def test_a_life_of_a_machine_on_uvloop(host: AsyncHost, template: Instance, tmp_path: Path) -> None:
    """Each kind of connection to VMMs and guests is opened and closed in a life."""

    def run() -> list[str]:
        with asyncio.Runner(loop_factory=uvloop.new_event_loop) as runner:
            work = life(host.local.rooms.layout.home, template.id, tmp_path / "note")
            return runner.run(asyncio.wait_for(work, LIFE_S))

    assert await asyncio.to_thread(run) == ["carried over", "carried over", "named"]
