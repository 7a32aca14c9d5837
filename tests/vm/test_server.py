"""The official client of the hypeman API with real machines: what a fake guest cannot show."""

from __future__ import annotations

import asyncio
import contextlib
import json
import os
import signal
import sys
import time
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

from hypeman import AsyncHypeman, Hypeman
from hypeman.lib import cp_from_instance, cp_from_instance_async, cp_to_instance, cp_to_instance_async, exec, exec_async

from coppice.client import AsyncHost
from coppice.host import LocalBackend
from coppice.model import Instance
from coppice.server.auth import load_key, make_token
from coppice.server.serving import Listening
from image_archives import Layout, file, tar
from registries import docker_registry, make_program, push
from servers import KEY, SERVER_START_S, served

PULLED_S = 120.0
AT_ONCE = 10


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
        before = await client.instances.stats(vm.id)
        seen = await exec_async(client, vm.id, ["cat", "/sys/class/net/eth0/statistics/tx_bytes"])
        after = await client.instances.stats(vm.id)
        assert after.cpu_seconds > 0
        assert before.network_tx_bytes <= int(seen.output) <= after.network_tx_bytes

        fork = await client.instances.fork(vm.id, name=f"{vm.name}-fork", from_running=True, target_state="Running")
        assert (await exec_async(client, fork.id, ["hostname"])).output == f"{fork.name}\n".encode()
        await client.instances.delete(fork.id, graceful_shutdown=False)


@contextlib.asynccontextmanager
async def serve_command(home: Path) -> AsyncIterator[str]:
    """Run `coppice serve` for a block. Yield its address."""
    command = (sys.executable, "-m", "coppice", "--home", str(home), "serve", "--listen", "127.0.0.1:0")
    process = await asyncio.create_subprocess_exec(*command, stdout=asyncio.subprocess.PIPE)
    try:
        assert process.stdout is not None
        async with asyncio.timeout(SERVER_START_S):
            yield (await process.stdout.readline()).decode().split()[-1]
    finally:
        process.send_signal(signal.SIGTERM)
        await process.wait()


def exercise(client: Hypeman, image: str, directory: Path) -> str:
    """Do what a new user tries first, with the blocking client. Return the id of the instance, in standby."""
    assert client.health.check().status == "ok"
    client.images.create(name=image)
    end = time.monotonic() + PULLED_S
    while (found := client.images.get(image)).status != "ready":
        assert found.status in ("pending", "pulling", "converting"), found
        assert time.monotonic() < end
        time.sleep(0.1)
    made = client.instances.create(image=image, name="sdk", hypervisor="qemu", size="128MB", vcpus=1)
    assert client.instances.wait(made.id, state="Running", api_timeout="30s").state == "Running"
    assert exec(client, made.id, ["/bin/app"], wait_for_agent=30).output == b"from the registry\n"
    assert all(isinstance(each, str) for each in client.instances.logs(made.id, tail=5, follow=False, source="app"))
    assert client.instances.standby(made.id).state == "Standby"
    assert client.instances.restore(made.id).state == "Running"

    content = os.urandom(100_000)
    (directory / "data").write_bytes(content)
    cp_to_instance(client, made.id, directory / "data", "/srv/deep/data")  # the image has no mkdir
    cp_from_instance(client, made.id, "/srv/deep/data", directory / "back")
    (copied,) = (each for each in (directory / "back", *(directory / "back").rglob("*")) if each.is_file())
    assert copied.read_bytes() == content
    assert client.instances.stat(made.id, path="/srv/deep/data").size == len(content)
    assert client.instances.stats(made.id).memory_rss_bytes > 0

    fork = client.instances.fork(made.id, name="sdk-fork", from_running=True, target_state="Running")
    saved = client.instances.snapshots.create(made.id, kind="Standby", name="sdk-saved")
    assert [each.id for each in client.snapshots.list(source_instance_id=made.id, kind="Standby")] == [saved.id]
    other = client.snapshots.fork(saved.id, name="sdk-other")
    assert exec(client, other.id, ["/bin/app"]).exit_code == 0
    assert client.instances.stop(made.id).state == "Stopped"
    assert client.instances.snapshots.restore(saved.id, id=made.id).state == "Running"
    client.snapshots.delete(saved.id)
    assert client.instances.stop(fork.id).state == "Stopped"
    assert client.instances.start(fork.id).state == "Running"
    for each in (fork, other):
        client.instances.delete(each.id, graceful_shutdown=False)
    assert client.instances.standby(made.id).state == "Standby"
    return made.id


async def test_the_first_exercise_with_real_machines(host: AsyncHost, tmp_path: Path) -> None:
    """An image of a registry, its machine, forks, snapshots and copies, then ten forks at once."""
    make_program(tmp_path / "app")
    layout = Layout(tmp_path / "layout")
    layer = tar(file("bin/app", (tmp_path / "app").read_bytes(), mode=0o755))
    with docker_registry(tmp_path / "registry") as registry:
        image = f"{registry}/team/sdk:1"
        push(layout.index(layout.image(layer, process={"Cmd": ["/bin/app", "wait"]})), image)
        async with serve_command(host.home) as address:
            token = make_token(load_key(host.home), owner=None)
            with Hypeman(api_key=token, base_url=address, _strict_response_validation=True) as client:
                source = await asyncio.to_thread(exercise, client, image, tmp_path)
            async with AsyncHypeman(api_key=token, base_url=address, _strict_response_validation=True) as several:
                names = [f"sdk-{number}" for number in range(AT_ONCE)]
                forking = (several.instances.fork(source, name=name, target_state="Running") for name in names)
                forks = await asyncio.gather(*forking)
                ran = await asyncio.gather(*(exec_async(several, each.id, ["/bin/app"]) for each in forks))
                assert {each.output for each in ran} == {b"from the registry\n"}
                await asyncio.gather(*(several.instances.delete(each.id, graceful_shutdown=False) for each in forks))
                await several.instances.delete(source)
                await several.images.delete(image)


async def test_forks_of_the_command_line_find_their_vmm_started(host: AsyncHost, template: Instance) -> None:
    """Each command is a process of its own. The server sees the forks of all of them, and starts VMMs ahead."""
    async with serve_command(host.home) as address:
        env = os.environ | {"COPPICE_TOKEN": make_token(load_key(host.home), owner=None)}

        async def coppice(*words: str) -> bytes:
            command = (sys.executable, "-m", "coppice", "--host", address, "--json", *words)
            process = await asyncio.create_subprocess_exec(*command, env=env, stdout=asyncio.subprocess.PIPE)
            output, _ = await process.communicate()
            assert process.returncode == 0
            return output

        forks: list[dict[str, Any]] = []
        while len(forks) < AT_ONCE and not (forks and forks[-1]["started_ahead"]):
            forks += json.loads(await coppice("fork", template.id, "--name", f"ahead-{len(forks)}"))["results"]
        assert [fork["started_ahead"] for fork in forks[:2]] == [False, False]
        last = forks[-1]
        assert last["started_ahead"]
        assert json.loads(await coppice("exec", last["name"], "--", "hostname"))["stdout"] == f"{last['name']}\n"
        await coppice("rm", "--force", *(fork["name"] for fork in forks))
