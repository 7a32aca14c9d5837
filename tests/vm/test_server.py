"""The official client of the hypeman API with real machines: what a fake guest cannot show."""

from __future__ import annotations

import os
from pathlib import Path

from hypeman import AsyncHypeman
from hypeman.lib import cp_from_instance_async, cp_to_instance_async, exec_async

from coppice.client import AsyncHost
from coppice.host import LocalBackend
from coppice.model import Instance
from coppice.server.auth import make_token
from coppice.server.serving import Listening
from servers import KEY, served


async def test_the_client_of_another_system_works_in_a_guest(host: AsyncHost, vm: Instance, tmp_path: Path) -> None:
    """A command with a terminal and input, files and trees in both directions, logs, and a fork."""

    def make_host(owner: str | None) -> LocalBackend:
        return LocalBackend(host.home, owner=owner, spares=0, background="off")

    async with (
        served(make_host, Listening(port=0), KEY) as address,
        AsyncHypeman(api_key=make_token(KEY, owner=None), base_url=address, _strict_response_validation=True) as client,
    ):
        ran = await exec_async(
            client, vm.id, ["sh", "-c", "read word; echo got $word; tty; exit 3"], tty=True, stdin=[b"x\n"]
        )
        assert ran.exit_code == 3
        assert b"got x" in ran.output
        assert b"/dev/pts/" in ran.output

        tree = tmp_path / "tree"
        (tree / "deep" / "empty").mkdir(parents=True)
        content = os.urandom(300_000)
        (tree / "deep" / "data").write_bytes(content)
        (tree / "run.sh").write_text("#!/bin/sh\necho ran\n")
        (tree / "run.sh").chmod(0o755)
        await cp_to_instance_async(client, vm.id, tree, "/srv/tree")
        assert (await exec_async(client, vm.id, ["/srv/tree/run.sh"])).output == b"ran\n"
        await cp_from_instance_async(client, vm.id, "/srv/tree", tmp_path / "back")
        (copied,) = (tmp_path / "back").rglob("data")
        assert copied.read_bytes() == content

        found = await client.instances.stat(vm.id, path="/srv/tree/deep/data")
        assert (found.is_file, found.size) == (True, len(content))
        assert not (await client.instances.stat(vm.id, path="/srv/nothing")).exists
        await exec_async(client, vm.id, ["sh", "-c", "echo said >/dev/console"])
        lines = [line async for line in await client.instances.logs(vm.id, tail=5, follow=False, source="app")]
        assert "said" in lines
        assert (await client.instances.stats(vm.id)).cpu_seconds > 0

        fork = await client.instances.fork(vm.id, name=f"{vm.name}-fork", from_running=True, target_state="Running")
        assert (await exec_async(client, fork.id, ["hostname"])).output == f"{fork.name}\n".encode()
        await client.instances.delete(fork.id, graceful_shutdown=False)
