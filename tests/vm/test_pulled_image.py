"""An image of a registry runs on a real machine."""

from __future__ import annotations

from pathlib import Path

from coppice.client import AsyncHost
from coppice.requests import ExecRequest, ForkRequest, RunRequest, StandbyRequest
from image_archives import Layout, file, tar
from registries import docker_registry, make_program, push


async def test_a_pulled_image_runs_and_forks(host: AsyncHost, tmp_path: Path) -> None:
    """`run` pulls the missing image; a fork of its machine has the same files."""
    make_program(tmp_path / "app")
    layout = Layout(tmp_path / "layout")
    layer = tar(file("bin/app", (tmp_path / "app").read_bytes(), mode=0o755))
    with docker_registry(tmp_path / "registry") as address:
        push(layout.index(layout.image(layer, process={"Cmd": ["/bin/app", "wait"]})), f"{address}/team/app:1")
        vm = await host.call(RunRequest(image=f"{address}/team/app:1", name="pulled"))
    await host.call(StandbyRequest(instance=vm.id))
    report = await host.call(ForkRequest(instance=vm.id, count=2))
    for fork in report.results:
        assert fork.instance is not None
        said = await host.call(ExecRequest(instance=fork.instance.id, argv=["/bin/app"]))
        assert said.stdout == b"from the registry\n"
