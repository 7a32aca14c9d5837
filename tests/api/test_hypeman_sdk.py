"""The official client of the hypeman API drives a server unchanged, with strict validation."""

from __future__ import annotations

import asyncio
import gzip
import socket
from collections.abc import AsyncIterator
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any, Literal

import hypeman
import pytest
from hypeman import AsyncHypeman
from hypeman.lib import exec_async
from litestar.response import ServerSentEventMessage

from coppice.images.cache import SLOTS
from coppice.server.auth import make_token
from coppice.server.hypeman import guests
from fakes.cards import cards
from fakes.records import MEMORY_BYTES, OVERLAY_BYTES
from fakes.rooms import IMAGE
from image_archives import file, tar
from servers import KEY

SMALL: dict[str, Any] = {"image": IMAGE, "size": f"{MEMORY_BYTES >> 20}MB", "overlay_size": f"{OVERLAY_BYTES >> 20}MB"}


@pytest.fixture
async def client(tcp_address: str) -> AsyncIterator[AsyncHypeman]:
    """A client that refuses answers which do not match its models."""
    token = make_token(KEY, owner=None)
    async with AsyncHypeman(
        api_key=token, base_url=tcp_address, max_retries=0, _strict_response_validation=True
    ) as opened:
        yield opened


async def test_the_first_exercise(client: AsyncHypeman, tmp_path: Path) -> None:
    """Health, image, create, wait, exec, logs, standby, restore, fork, snapshots, stats, stop, start,
    delete: the order in which a new user tries the client.
    """
    assert (await client.health.check()).status == "ok"
    assert (await client.images.create(name=IMAGE)).status == "ready"
    assert (await client.images.get(IMAGE)).name == IMAGE
    made = await client.instances.create(name="oak", tags={"team": "a"}, env={"A": "b"}, **SMALL)
    assert (made.state, made.vcpus, made.hypervisor is not None) == ("Running", 1, True)
    waited = await client.instances.wait(made.id, state="Running", api_timeout="30s")
    assert (waited.state, waited.timed_out) == ("Running", False)
    ran = await exec_async(client, made.id, ["hostname"])
    assert (ran.exit_code, ran.output) == (0, b"oak\n")
    lines = [line async for line in await client.instances.logs(made.id, tail=5, follow=False, source="vmm")]
    assert all(isinstance(line, str) for line in lines)
    assert (await client.instances.standby(made.id)).state == "Standby"
    assert (await client.instances.restore(made.id)).state == "Running"
    fork = await client.instances.fork(made.id, name="elm", from_running=True, target_state="Running")
    assert (fork.name, fork.state) == ("elm", "Running")
    saved = await client.instances.snapshots.create(made.id, kind="Standby", name="first")
    assert [each.id for each in await client.snapshots.list(source_instance_id=made.id, kind="Standby")] == [saved.id]
    assert (await client.snapshots.fork(saved.id, name="ash")).state == "Running"
    await client.instances.stop(made.id)
    assert (await client.instances.snapshots.restore(saved.id, id=made.id)).state == "Running"
    await client.snapshots.delete(saved.id)
    with cards(tmp_path):
        stats = await client.instances.stats(made.id)
    assert (stats.allocated_vcpus, stats.network_rx_bytes, stats.network_tx_bytes) == (1, 1200, 340)
    assert stats.memory_utilization_ratio == stats.memory_rss_bytes / stats.allocated_memory_bytes > 0
    assert (await client.instances.stop(made.id)).state == "Stopped"
    stats = await client.instances.stats(made.id)
    assert (stats.network_rx_bytes, stats.memory_rss_bytes, stats.cpu_seconds) == (0, 0, 0)
    assert (await client.instances.start(made.id)).state == "Running"
    tagged = await client.instances.list(tags={"team": "a"}, state="Running")
    assert [each.name for each in tagged] == ["oak", "elm"]  # a fork has its source's tags
    for name in ("ash", "elm", "oak"):
        await client.instances.delete(name)
    assert await client.instances.list() == []


async def test_ids_names_and_prefixes(client: AsyncHypeman) -> None:
    """An instance is found by its id, its name, or the beginning of its id, however short."""
    made = await client.instances.create(name="oak", **SMALL)
    for key in (made.id, "oak", made.id[:8], made.id[:1]):
        assert (await client.instances.get(key)).id == made.id
    with pytest.raises(hypeman.NotFoundError) as caught:
        await client.instances.get("elm")
    assert isinstance(caught.value.body, dict)
    assert caught.value.body["code"] == "not_found"


async def test_ten_at_once(client: AsyncHypeman) -> None:
    """Concurrent creations all succeed; a repeated name is refused, and the client does not retry."""
    names = [f"oak-{number}" for number in range(10)]
    made = await asyncio.gather(*(client.instances.create(name=name, **SMALL) for name in names))
    assert sorted(each.name for each in made) == sorted(names)
    retrying = client.with_options(max_retries=2)
    with pytest.raises(hypeman.ConflictError):
        await retrying.instances.create(name="oak-1", **SMALL)
    assert len(await client.instances.list()) == 10


async def test_an_image_name_with_slashes_is_one_segment(client: AsyncHypeman) -> None:
    """The client encodes the slashes of a name."""
    tagged = await client.images.tag(IMAGE, target="docker.io/library/tiny:1")
    assert tagged.name == "docker.io/library/tiny:1"
    assert (await client.images.get("docker.io/library/tiny:1")).digest == tagged.digest
    await client.images.delete("docker.io/library/tiny:1")
    with pytest.raises(hypeman.NotFoundError):
        await client.images.get("docker.io/library/tiny:1")


async def test_volumes(client: AsyncHypeman) -> None:
    """A volume is made, attached to a new instance, and removed after it."""
    made = await client.volumes.create(name="data", size_gb=1)
    vm = await client.instances.create(
        name="oak", volumes=[{"volume_id": made.id, "mount_path": "/data", "readonly": True}], **SMALL
    )
    assert vm.volumes is not None
    assert vm.volumes[0].mount_path == "/data"
    (attached,) = (await client.volumes.get("data")).attachments or []
    assert attached.instance_id == vm.id
    with pytest.raises(hypeman.ConflictError):
        await client.volumes.delete(made.id)
    await client.instances.delete(vm.id)
    await client.volumes.delete(made.id)
    assert await client.volumes.list() == []


async def test_a_command_that_cannot_start(client: AsyncHypeman) -> None:
    """Its output says why, and its exit code is that of a shell. A stopped instance runs none."""
    made = await client.instances.create(name="oak", **SMALL)
    ran = await exec_async(client, made.id, ["nonsense"])
    assert ran.exit_code == 127
    assert b"Error: cannot start nonsense" in ran.output
    await client.instances.stop(made.id)
    with pytest.raises(Exception, match="409"):
        await exec_async(client, made.id, ["hostname"])


async def test_the_end_of_the_process(client: AsyncHypeman) -> None:
    """Its exit code is told while the machine runs on."""
    made = await client.instances.create(name="oak", **SMALL)
    assert (made.exit_code, made.exit_message) == (None, None)
    await exec_async(client, made.id, ["remember", "exited", "137"])
    found = await client.instances.get("oak")
    assert (found.state, found.exit_code, found.exit_message) == ("Running", 137, "its process was ended by signal 9")


async def test_what_coppice_lacks_is_declared(client: AsyncHypeman) -> None:
    """It answers 501 without a retry, and is not among the capabilities."""
    found = await client.capabilities.get()
    assert {"instances", "images", "volumes", "exec", "logs"} <= set(found.features)
    assert not {"builds", "ingress", "devices"} & set(found.features)
    for call in (client.builds.list, client.devices.list, client.ingresses.list):
        with pytest.raises(hypeman.InternalServerError) as caught:
            await call()
        assert caught.value.response.status_code == 501
        assert caught.value.response.headers["x-should-retry"] == "false"
    with pytest.raises(hypeman.InternalServerError, match="snapshot_policy"):
        await client.instances.create(name="oak", snapshot_policy={"standby_compression_delay": "1s"}, **SMALL)
    found_resources = await client.resources.get()
    assert found_resources.memory.effective_limit > 0
    assert found_resources.allocations == []
    await client.volumes.create(name="data", size_gb=1)
    mount: Any = [{"volume_id": "data", "mount_path": "/data", "readonly": True}]
    await client.instances.create(name="elm", volumes=mount, **SMALL)
    found_resources = await client.resources.get()
    (taken,) = found_resources.allocations
    assert (taken.cpu, taken.disk_bytes, taken.network_download_bps) == (1, OVERLAY_BYTES + (1 << 30), None)
    assert (found_resources.cpu.allocated, found_resources.network.source in ("detected", "unknown")) == (1, True)


async def test_a_lifetime(client: AsyncHypeman) -> None:
    """It is given as a Go duration or as a time, shown, changed and taken away. A fork has none."""
    made = await client.instances.create(name="oak", ttl="1h30m", **SMALL)
    assert made.expires_at is not None
    assert 5390 < (made.expires_at - made.created_at).total_seconds() <= 5400
    fork = await client.instances.fork("oak", name="elm", from_running=True, target_state="Running")
    assert fork.expires_at is None
    later = datetime.now(UTC) + timedelta(days=1)
    changed = await client.instances.update("oak", expires_at=later)
    assert changed.expires_at is not None
    assert abs((changed.expires_at - later).total_seconds()) < 1
    assert (await client.instances.update("oak", ttl="0s")).expires_at is None
    for wrong in ({"ttl": "soon"}, {"expires_at": "2020-01-01T00:00:00Z"}, {"ttl": "1h", "expires_at": later}):
        with pytest.raises(hypeman.BadRequestError):
            await client.instances.update("oak", **wrong)


async def test_restart_policy_and_health_check(client: AsyncHypeman) -> None:
    """They are given, shown, changed and taken away, and the server carries them out."""
    check: Any = {"type": "exec", "exec": {"command": ["echo"]}, "interval": "1s", "failure_threshold": 2}
    restart: Any = {"policy": "on_failure", "backoff": "1s", "max_attempts": 3, "stable_after": "30s"}
    made = await client.instances.create(name="oak", restart_policy=restart, health_check=check, **SMALL)
    assert made.restart_policy is not None
    assert made.restart_policy.to_dict() == restart
    assert made.health_check is not None
    assert made.health_check.exec is not None
    assert (made.health_check.exec.command, made.health_check.interval) == (["echo"], "1s")
    async with asyncio.timeout(30):
        while (found := (await client.instances.get("oak")).health_status) is None or found.status != "healthy":
            pass
    assert found.last_checked_at is not None
    changed = await client.instances.update("oak", restart_policy={"policy": "never"}, health_check={"type": "none"})
    assert (changed.restart_policy, changed.health_check) == (None, None)
    with pytest.raises(hypeman.InternalServerError, match="https"):
        await client.instances.update("oak", health_check={"type": "http", "http": {"port": 1, "scheme": "https"}})
    with pytest.raises(hypeman.BadRequestError):
        await client.instances.update("oak", health_check={"type": "tcp", "tcp": {"port": 0}})


async def test_automatic_standby(client: AsyncHypeman) -> None:
    """It is given, shown, carried out and taken away. Ignored connections are not supported."""
    idle: Any = {"enabled": True, "idle_timeout": "1s"}
    made = await client.instances.create(name="oak", auto_standby=idle, **SMALL)
    assert made.auto_standby is not None
    assert (made.auto_standby.enabled, made.auto_standby.idle_timeout) == (True, "1s")
    assert (await client.instances.wait("oak", state="Standby", api_timeout="30s")).state == "Standby"
    assert (await client.instances.update("oak", auto_standby={"enabled": False})).auto_standby is None
    with pytest.raises(hypeman.InternalServerError):
        await client.instances.update("oak", auto_standby=idle | {"ignore_destination_ports": [22]})


async def test_the_status_and_the_hold_of_an_automatic_standby(client: AsyncHypeman) -> None:
    """What keeps an instance awake, and a hold: success means that it runs until then."""
    idle: Any = {"enabled": True, "idle_timeout": "1h"}
    made = await client.instances.create(name="oak", **SMALL)
    for call in (client.instances.auto_standby.status, client.instances.auto_standby.hold):
        found = await call("oak")
        assert (found.status, found.reason, found.configured) == ("disabled", "policy_missing", False)
    await client.instances.update("oak", auto_standby=idle)
    found = await client.instances.auto_standby.status(made.id)
    assert (found.status, found.reason) == ("idle_countdown", "idle_timeout_not_elapsed")
    assert (found.supported, found.configured, found.enabled, found.eligible) == (True, True, True, True)
    assert (found.active_inbound_connections, found.idle_timeout, found.hold_until) == (0, "3600s", None)
    assert found.next_standby_at is not None
    assert found.idle_since is not None
    assert found.next_standby_at - found.idle_since == timedelta(hours=1)
    held = await client.instances.auto_standby.hold("oak")
    assert held.hold_until is not None
    assert 3590 < (held.hold_until - datetime.now(UTC)).total_seconds() <= 3600
    await client.instances.standby("oak")
    found = await client.instances.auto_standby.status("oak")
    assert (found.status, found.reason, found.eligible) == ("ineligible", "instance_not_running", False)
    with pytest.raises(hypeman.ConflictError) as caught:
        await client.instances.auto_standby.hold("oak")
    assert isinstance(caught.value.body, dict)
    assert caught.value.body["code"] == "instance_in_standby"
    with pytest.raises(hypeman.NotFoundError):
        await client.instances.auto_standby.status("elm")


async def test_a_snapshot_schedule(client: AsyncHypeman) -> None:
    """It is set, shown, changed and removed. What it does is the supervisor's."""
    made = await client.instances.create(name="oak", **SMALL)
    schedules = client.instances.snapshot_schedule
    for call in (schedules.get, schedules.delete):
        with pytest.raises(hypeman.NotFoundError, match="no snapshot schedule"):
            await call("oak")
    first = await schedules.update(
        "oak", interval="1h30m", retention={"max_count": 3}, metadata={"team": "a"}, name_prefix="nightly"
    )
    assert (first.instance_id, first.interval, first.name_prefix) == (made.id, "5400s", "nightly")
    assert (first.metadata, first.retention.max_count, first.retention.max_age) == ({"team": "a"}, 3, None)
    assert first.next_run_at - first.created_at == timedelta(minutes=90)
    assert await schedules.get(made.id) == first
    second = await schedules.update("oak", interval="90m", retention={"max_age": "48h"})
    assert (second.retention.max_count, second.retention.max_age) == (None, "172800s")
    assert (second.next_run_at, second.created_at, second.metadata) == (first.next_run_at, first.created_at, {})
    assert second.updated_at > first.updated_at
    for interval, retention in (
        ("59s", {"max_count": 1}),
        ("soon", {"max_count": 1}),
        ("1h", {}),
        ("1h", {"max_age": "x"}),
    ):
        with pytest.raises(hypeman.BadRequestError):
            await schedules.update("oak", interval=interval, retention=retention)  # type: ignore[arg-type]
    await schedules.delete("oak")
    with pytest.raises(hypeman.NotFoundError):
        await schedules.get("oak")


async def test_another_command_at_start(client: AsyncHypeman) -> None:
    """It is recorded, and a running instance must be stopped first."""
    made = await client.instances.create(name="oak", **SMALL)
    with pytest.raises(hypeman.ConflictError):
        await client.instances.start("oak", cmd=["sleep", "1"])
    await client.instances.stop("oak")
    assert (await client.instances.start("oak", entrypoint=["/bin/serve"], cmd=["--port", "1"])).state == "Running"
    raw: Any = await client.post("/call/get", body={"instance": made.id}, cast_to=object)
    assert raw["process"]["argv"] == ["/bin/serve", "--port", "1"]
    await client.instances.stop("oak")
    await client.instances.start("oak")
    raw = await client.post("/call/get", body={"instance": made.id}, cast_to=object)
    assert raw["process"]["argv"] == ["/bin/serve", "--port", "1"]


async def test_the_log_of_the_host(client: AsyncHypeman) -> None:
    """The source `hypeman` has the events of one instance, its last ones and new ones."""
    made = await client.instances.create(name="oak", **SMALL)
    await client.instances.create(name="elm", **SMALL)
    await client.instances.standby(made.id)
    stream = await client.instances.logs(made.id, tail=1, follow=True, source="hypeman")
    lines = stream.__aiter__()
    async with asyncio.timeout(20):
        assert (await anext(lines)).endswith("state Standby")
        await client.instances.restore(made.id)
        while not (await anext(lines)).endswith("state Running"):
            pass
    await stream.close()
    for wrong in (-1, 1 << 63):
        with pytest.raises(hypeman.BadRequestError):
            await client.instances.logs(made.id, source="hypeman", tail=wrong)
    lines_so_far = [each async for each in await client.instances.logs(made.id, source="hypeman")]
    assert lines_so_far[0].split()[1:] == ["made", "Created"]
    assert all("Z" in each or "+00:00" in each for each in lines_so_far)


@pytest.mark.parametrize("source", ["vmm", "hypeman"])
async def test_silence_of_a_log_is_no_line(
    client: AsyncHypeman, monkeypatch: pytest.MonkeyPatch, source: Literal["vmm", "hypeman"]
) -> None:
    """The server sends comments then, which the client does not take for lines."""
    monkeypatch.setattr(guests, "KEEPALIVE_S", 0.01)
    silent = asyncio.Event()
    encode = ServerSentEventMessage.encode

    def encoded(message: ServerSentEventMessage) -> bytes:
        if message.comment:
            silent.set()
        return encode(message)

    monkeypatch.setattr(ServerSentEventMessage, "encode", encoded)
    made = await client.instances.create(name="oak", **SMALL)
    stream = await client.instances.logs(made.id, tail=0, follow=True, source=source)
    first = asyncio.ensure_future(anext(stream.__aiter__()))
    async with asyncio.timeout(20):
        await silent.wait()
        if source == "vmm":
            first.cancel()
        else:
            await client.instances.stop(made.id)
            assert (await first).split()[1] == "state"
    await asyncio.wait({first})
    assert first.cancelled() or source == "hypeman"
    await stream.close()


async def test_pulls_wait_in_order(client: AsyncHypeman) -> None:
    """A few pull at once, the others are pending with their place. The list has all of them."""
    silent = socket.create_server(("127.0.0.1", 0))  # connections wait in its queue
    port = silent.getsockname()[1]
    names = [f"127.0.0.1:{port}/app:{number}" for number in range(SLOTS + 2)]
    try:
        made = [await client.images.create(name=name, tags={"number": name[-1]}) for name in names]
        assert {(each.size_bytes, each.cmd, each.working_dir) for each in made} == {(None, None, None)}
        assert [(each.status, each.queue_position) for each in made] == [
            *[("pulling", None)] * SLOTS,
            ("pending", 1),
            ("pending", 2),
        ]
        first, last = names[SLOTS], names[SLOTS + 1]
        assert (await client.images.get(last)).queue_position == 2
        assert (await client.images.create(name=last)).queue_position == 2
        listed = await client.images.list(tags={"number": first[-1]})
        assert [(each.name, each.status) for each in listed] == [(first, "pending")]
        operations: Any = await client.get("/operations", cast_to=object)
        await client.delete(f"/operations/{operations[0]['id']}", cast_to=object)
        assert (await client.images.get(names[0])).status == "failed"
        assert (await client.images.get(first)).status == "pulling"
        assert (await client.images.get(last)).queue_position == 1
    finally:
        silent.close()


async def test_an_archive_is_sent_again(client: AsyncHypeman) -> None:
    """The same archive with the same key makes one volume; another archive with that key is refused."""
    archives = [gzip.compress(tar(file("data", content))) for content in (b"one", b"two")]
    options: Any = {"name": "data", "size_gb": 1, "extra_headers": {"idempotency-key": "one"}}
    first = await client.volumes.create_from_archive(archives[0], **options)
    assert (await client.volumes.create_from_archive(archives[0], **options)).id == first.id
    with pytest.raises(hypeman.UnprocessableEntityError):
        await client.volumes.create_from_archive(archives[1], **options)
    assert [each.id for each in await client.volumes.list()] == [first.id]


async def test_what_would_have_no_effect_is_refused(client: AsyncHypeman) -> None:
    """No field that asks for something is ignored, and no route of the API is unknown."""
    for field in (
        {"network": {"bandwidth_download": "1Gbps"}},
        {"network": {"egress": {"enabled": True}}},
        {"volumes": [{"volume_id": "data", "mount_path": "/data", "readonly": True, "overlay": True}]},
        {"platform": "linux/arm64"},
        {"skip_guest_agent": True},
        {"disk_io_bps": "100MB/s"},
    ):
        with pytest.raises(hypeman.InternalServerError) as caught:
            await client.instances.create(name="oak", **SMALL, **field)
        assert caught.value.response.status_code == 501
    assert await client.instances.list() == []
    with pytest.raises(hypeman.InternalServerError) as caught:
        await client.resources.reclaim_memory(reclaim_bytes=1 << 20)
    assert caught.value.response.status_code == 501
    assert caught.value.response.headers["x-should-retry"] == "false"
    made = await client.instances.create(name="oak", **SMALL)
    with pytest.raises(hypeman.BadRequestError):
        await client.get("/instances/oak/wait?state=Unknown", cast_to=object)
    with pytest.raises(hypeman.InternalServerError, match="compression"):
        await client.instances.standby(made.id, compression={"enabled": True})
    assert (await client.instances.get(made.id)).state == "Running"
    saved = await client.instances.snapshots.create(made.id, kind="Standby", compression={"enabled": False})
    assert (await client.instances.standby(made.id, compression={"enabled": False})).state == "Standby"
    with pytest.raises(hypeman.InternalServerError, match="Stopped"):
        await client.instances.snapshots.restore(saved.id, id=made.id, target_state="Stopped")
    restored = await client.instances.snapshots.restore(saved.id, id=made.id, target_state="Standby")
    assert restored.state == "Standby"
    with pytest.raises(hypeman.InternalServerError):
        await client.volumes.create_from_archive(b"", name="data", size_gb=1, id="mine")


async def test_a_template_is_reached_by_plain_requests(client: AsyncHypeman) -> None:
    """The client has no method for templates; its `post` works, and the state passes its lax mode."""
    lax = AsyncHypeman(api_key=make_token(KEY, owner=None), base_url=str(client.base_url), max_retries=0)
    made = await lax.instances.create(name="oak", **SMALL)
    await lax.instances.standby(made.id)
    await lax.post("/instances/oak/promote-template", cast_to=object)
    waited = await lax.instances.wait(made.id, state="Running", api_timeout="60s")
    assert (waited.state, waited.timed_out) == ("Template", False)  # it does not leave this state by itself
    assert str((await lax.instances.get("oak")).state) == "Template"
    assert (await lax.instances.fork("oak", name="elm")).state == "Running"
    with pytest.raises(hypeman.ConflictError):
        await lax.post("/instances/oak/demote-template", cast_to=object)
    await lax.instances.delete("elm")
    await lax.post("/instances/oak/demote-template", cast_to=object)
    await lax.close()
