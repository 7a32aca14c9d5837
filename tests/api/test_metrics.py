"""Metrics of a server: what they count, who may read them, and that they stay cheap."""

from __future__ import annotations

import contextlib
import sqlite3
import time
from typing import Any

import httpx
import msgspec
import pytest
from prometheus_client.parser import text_string_to_metric_families

from conftest import HostFactory
from coppice.model import State
from coppice.server.auth import make_token
from coppice.server.metrics import private_bytes
from fakes.hosting import boot, make
from servers import KEY, client_of

Samples = dict[tuple[str, tuple[tuple[str, str], ...]], float]


def parsed(text: str) -> Samples:
    """Return all samples by name and labels."""
    families = text_string_to_metric_families(text)
    return {(each.name, tuple(sorted(each.labels.items()))): each.value for one in families for each in one.samples}


def of(samples: Samples, name: str, **labels: str) -> float:
    """Return one sample; 0 if there is none."""
    return samples.get((f"coppice_{name}", tuple(sorted(labels.items()))), 0.0)


async def scraped(client: httpx.AsyncClient) -> Samples:
    """Scrape a server."""
    answer = await client.get("/metrics")
    assert answer.status_code == 200, answer.text
    assert answer.headers["content-type"].startswith("text/plain; version=")
    return parsed(answer.text)


async def test_a_fan_out_is_counted_with_its_stages(socket_address: str, make_host: HostFactory) -> None:
    """A repeated request, which has no second effect, is not counted as a second fan-out."""
    async with make_host() as local:
        await make(local, State.TEMPLATE)
    async with client_of(socket_address) as client:
        for _ in range(2):
            body = {"instance": "oak", "count": 3, "measure": True}
            answer = await client.post("/call/fork", json=body, headers={"idempotency-key": "one"})
            assert answer.json()["succeeded"] == 3
        assert (await client.post("/call/fork", json={"instance": "elm"})).status_code == 404
        assert (await client.get("/nonsense-path")).status_code == 404
        samples = await scraped(client)
    assert of(samples, "forks_total", outcome="succeeded") == 3
    assert of(samples, "fork_sharing_total", sharing="hardlink") == 3
    for stage in ("place", "start", "ready", "record"):
        assert of(samples, "fork_stage_seconds_count", stage=stage) == 3
    assert of(samples, "fork_unique_bytes_count") == 3
    assert of(samples, "operations_total", operation="fork", outcome="not_found") == 1
    assert of(samples, "operations_running", operation="fork") == 0
    assert of(samples, "requests_total", method="POST", route="/call/fork", status="200") == 2
    assert of(samples, "requests_total", method="GET", route="none", status="404") == 1
    assert of(samples, "instances", state="Running") == 3
    assert of(samples, "instances", state="Template") == 1
    assert of(samples, "vmm_private_bytes") > 0


async def test_a_copy_instead_of_a_link_is_seen(
    socket_address: str, make_host: HostFactory, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A fork whose memory file could not be linked uses memory of its own."""
    async with make_host() as local:
        await make(local, State.TEMPLATE)

    def refuse(*_: Any, **__: Any) -> None:
        raise OSError(31, "too many links")

    monkeypatch.setattr("os.link", refuse)
    async with client_of(socket_address) as client:
        assert (await client.post("/call/fork", json={"instance": "oak"})).json()["succeeded"] == 1
        assert of(await scraped(client), "fork_sharing_total", sharing="copy") == 1


async def test_no_name_of_a_client_is_a_label(socket_address: str, make_host: HostFactory) -> None:
    """Names of machines, paths and methods do not make new time series."""
    async with make_host() as local:
        await boot(local, "elderberry")
    async with client_of(socket_address) as client:
        await client.get("/instances/elderberry")
        await client.get("/instances/elderberry/elderberry")
        await client.request("ELDERBERRY", "/instances")
        await client.post("/call/exec", json={"instance": "elderberry", "argv": ["hostname"]})
        text = (await client.get("/metrics")).text
    assert "elderberry" not in text.lower()
    assert 'route="/instances/{key}"' in text
    assert 'method="other"' in text


@pytest.mark.parametrize(
    ("owner", "scopes", "status"),
    [(None, ["resource:read"], 200), (None, ["instance:read"], 403), ("ann", [], 403), ("", [], 401)],
)
async def test_only_the_operator_reads_metrics(
    tcp_address: str, owner: str | None, scopes: list[str], status: int
) -> None:
    """They are of all owners together."""
    headers = {} if owner == "" else {"authorization": f"Bearer {make_token(KEY, owner=owner, scopes=scopes)}"}
    async with httpx.AsyncClient(base_url=tcp_address, headers=headers) as client:
        assert (await client.get("/metrics")).status_code == status


async def test_a_scrape_of_many_instances_is_cheap(socket_address: str, make_host: HostFactory) -> None:
    """With 3,000 of them it costs no more than three listings. Scrapes within seconds share one
    measurement.
    """
    async with make_host() as local:
        first = await boot(local)
        store = local.local.rooms.store
        record = msgspec.json.encode(first)
        rows = [(f"{number}", f"m{number}", first.state, first.image, record) for number in range(3000)]
        with contextlib.closing(sqlite3.connect(local.home / "coppice.db")) as connection, connection:
            connection.executemany(
                "INSERT INTO instances (id, name, state, image, created_at, record) VALUES (?, ?, ?, ?, 1.0, ?)", rows
            )
        async with client_of(socket_address) as client:
            listing, scrape = [], []
            for _ in range(3):
                begin = time.process_time()
                assert len(store.instances()) == 3001
                listing.append(time.process_time() - begin)
                begin = time.process_time()
                census = store.census()
                private_bytes(census.pids)
                scrape.append(time.process_time() - begin)
            assert census.states["Running"] == 3001
            assert min(scrape) < 3 * listing[0]  # the store remembers the list after that
            assert of(await scraped(client), "instances", state="Running") == 3001
            with contextlib.closing(sqlite3.connect(local.home / "coppice.db")) as connection, connection:
                connection.execute("DELETE FROM instances WHERE id != ?", (first.id,))
            assert of(await scraped(client), "instances", state="Running") == 3001
