"""Pulls by hosts, servers and their clients."""

from __future__ import annotations

import asyncio
import sys
from pathlib import Path

import pytest
from hypeman import AsyncHypeman
from hypeman.types import Image as PulledImage

from coppice.client import AsyncHost
from coppice.client.connecting import connect_async
from coppice.errors import CoppiceError, Forbidden, NotFound
from coppice.host import LocalBackend
from coppice.images.cache import LayerCache
from coppice.model import MIB, Progress, State
from coppice.requests import GcRequest, ImageBuildRequest, ImagePullRequest, ImageRmRequest, RunRequest
from coppice.server.auth import load_key, make_token
from coppice.server.serving import Listening
from fakes.driver import FakeDriver
from fakes.rooms import DEADLINES, open_rooms
from image_archives import ARCHITECTURE
from pulls import Hostile, fill, layers
from servers import KEY, fake_hosts, served

OTHER = "arm64" if ARCHITECTURE == "amd64" else "amd64"

pytestmark = pytest.mark.usefixtures("no_saved_logins")


async def test_run_pulls_a_missing_image_of_a_registry(tmp_path: Path, fake_host: AsyncHost, registry: str) -> None:
    """A name without a registry is never looked up outside. Later runs do not ask the registry,
    unless told so.
    """
    name = f"{registry}/team/run:1"
    fill(tmp_path, name, *layers(1000))

    async def run(image: str, instance: str, **more: object) -> State:
        request = RunRequest(image=image, name=instance, overlay_bytes=32 * MIB, **more)  # type: ignore[arg-type]
        return (await fake_host.call(request)).state

    with pytest.raises(NotFound, match="no image"):
        await run(name, "never", pull="never")
    with pytest.raises(NotFound, match="coppice pull team/run:1"):
        await run("team/run:1", "short")
    assert await run(name, "oak") is State.RUNNING
    first = await fake_host.images.inspect(name)
    fill(tmp_path, name, *layers(1001))
    assert await run(name, "elm") is State.RUNNING
    assert (await fake_host.images.inspect(name)).digest == first.digest
    assert await run(name, "ash", pull="always") is State.RUNNING
    assert (await fake_host.images.inspect(name)).digest != first.digest


async def test_a_server_pulls_with_progress(tmp_path: Path, fake_home: Path, driver: FakeDriver, registry: str) -> None:
    """`POST /call/image_pull` streams its progress and then the image."""
    name = f"{registry}/team/served:1"
    fill(tmp_path, name, *layers(1000))
    async with served(fake_hosts(fake_home, driver), Listening(socket=tmp_path / "coppice.sock"), None) as address:
        steps: list[Progress] = []
        async with connect_async(address) as host:
            image = await host.images.pull(name, progress=steps.append)
            assert image.manifest_digest is not None
            assert "download" in {step.stage for step in steps}
            with pytest.raises(NotFound, match=registry):
                await host.images.pull(f"{registry}/team/none:1")


async def test_gc_removes_the_cache_unless_a_pull_uses_it(tmp_path: Path, fake_host: AsyncHost, registry: str) -> None:
    """`gc --caches` removes it, plain gc does not, and neither while a pull is under way."""
    name = f"{registry}/team/gc:1"
    fill(tmp_path, name, *layers(1000))
    await fake_host.call(ImagePullRequest(reference=name))
    cached = fake_host.home / "blobs/_"
    await fake_host.call(GcRequest())
    assert cached.exists()
    async with LayerCache(fake_host.home / "blobs", None).hold("sha256:" + "a" * 64, "it"):
        await fake_host.call(GcRequest(caches=True))
        assert cached.exists()
    assert "blobs/_" in (await fake_host.call(GcRequest(caches=True, dry_run=True))).removed
    report = await fake_host.call(GcRequest(caches=True))
    assert "blobs/_" in report.removed
    assert not cached.exists()
    await fake_host.call(ImageRmRequest(image=name))
    await fake_host.call(ImagePullRequest(reference=name))


async def test_opening_removes_what_a_killed_pull_left(fake_home: Path, driver: FakeDriver) -> None:
    """A staging directory without a holder goes when the data directory is opened."""
    left = fake_home / "images/.staging-0123456789abcdef/layout"
    left.mkdir(parents=True)
    backend = LocalBackend(fake_home, driver=driver, deadlines=DEADLINES, open_rooms=open_rooms, background="off")
    async with backend:
        assert not left.parent.exists()


async def test_the_client_of_hypeman_pulls_and_waits(
    tmp_path: Path, fake_home: Path, driver: FakeDriver, registry: str
) -> None:
    """An image is first pulling and then ready, or failed with the reason; a repeated request joins
    the running pull.
    """
    name = f"{registry}/team/polled:1"
    fill(tmp_path, name, *layers(1000))
    token = make_token(KEY, owner=None)
    async with (
        served(fake_hosts(fake_home, driver), Listening(port=0), KEY) as address,
        AsyncHypeman(api_key=token, base_url=address, max_retries=0, _strict_response_validation=True) as client,
    ):
        assert (await client.images.create(name=name)).status == "pulling"
        assert (await client.images.create(name=name)).status in ("pulling", "converting", "ready")
        assert (await settled(client, name)).status == "ready"
        assert (await client.images.create(name=name)).digest.startswith("sha256:")
        missing = f"{registry}/team/none:1"
        await client.images.create(name=missing)
        failed = await settled(client, missing)
        assert failed.status == "failed"
        assert failed.error is not None
        assert "team/none" in failed.error


async def settled(client: AsyncHypeman, name: str) -> PulledImage:
    """Poll an image, as the client's users do, until it is ready or failed."""
    async with asyncio.timeout(60):
        while (found := await client.images.get(name)).status not in ("ready", "failed"):  # noqa: ASYNC110 - as users do
            await asyncio.sleep(0.05)
    return found


async def test_owners_of_tokens_reach_public_hosts_only(tmp_path: Path, hostile: Hostile) -> None:
    """With `coppice serve`: a registry of its own network is not asked for them, by no operation, unless
    the operator has allowed it. The operator may pull from anywhere.
    """
    home, asked = tmp_path / "home", hostile.server.asked
    port = hostile.name.partition("/")[0].partition(":")[2]
    command = [sys.executable, "-m", "coppice", "--home", str(home), "serve", "--listen", "127.0.0.1:0"]
    server = await asyncio.create_subprocess_exec(
        *command, "--allow-registry", f"localhost:{port}", stdout=asyncio.subprocess.PIPE
    )
    try:
        async with asyncio.timeout(60):
            assert server.stdout is not None
            address = (await server.stdout.readline()).decode().split()[-1]
            key = load_key(home)
            async with connect_async(address, token=make_token(key, owner="ann")) as ann:
                for request in (
                    ImagePullRequest(reference=hostile.name),
                    RunRequest(image=hostile.name, pull="always"),
                    ImageBuildRequest(name="x", suite="bookworm", proxy=f"http://127.0.0.1:{port}"),
                ):
                    with pytest.raises(Forbidden, match=r"127\.0\.0\.1 has an address that is not public"):
                        await ann.call(request)
                async with AsyncHypeman(api_key=make_token(key, owner="ann"), base_url=address) as client:
                    made = await client.images.create(name=hostile.name)
                    while made.status not in ("ready", "failed"):
                        made = await client.images.get(hostile.name)
                    assert "not public" in str(made.error)
                assert asked == []
                with pytest.raises(CoppiceError) as caught:
                    await ann.images.pull(f"localhost:{port}/h/x:1")
                assert not isinstance(caught.value, Forbidden)
                assert asked
            asked.clear()
            async with connect_async(address, token=make_token(key, owner=None)) as operator:
                with pytest.raises(CoppiceError) as caught:
                    await operator.images.pull(hostile.name)
                assert not isinstance(caught.value, Forbidden)
            assert asked
    finally:
        server.terminate()
        await server.wait()
