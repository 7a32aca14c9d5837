"""Metrics for Prometheus. No label holds a name that a client chose, so their number is bounded."""

from __future__ import annotations

import asyncio
import contextlib
import os
import time
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Final

from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram
from prometheus_client.exposition import choose_encoder

from coppice.completion import in_thread
from coppice.host import LocalBackend
from coppice.model import ForkReport
from coppice.server.failures import code_of

_PREFIX: Final = "coppice"
_MEASURED_FOR_S: Final = 5.0  # scrapes within this time get the same values of the host
_MS: Final = (0.001, 0.002, 0.005, 0.01, 0.02, 0.05, 0.1, 0.2, 0.5, 1.0, 2.0, 5.0)
_LONG: Final = (*_MS, 10.0, 30.0, 60.0, 300.0)
_BYTES: Final = tuple(float(1 << power) for power in range(18, 34, 2))
_PAGE: Final = os.sysconf("SC_PAGE_SIZE")
_METHODS: Final = frozenset({"GET", "POST", "PUT", "PATCH", "DELETE", "HEAD", "OPTIONS", "WEBSOCKET"})


class Metrics:
    """The metrics of one server, in a registry of its own."""

    def __init__(self) -> None:
        self._registry = CollectorRegistry()
        self._requests = self._counter("requests", "Requests answered.", "method", "route", "status")
        self._first_byte = self._histogram("request_seconds", "Time to the first byte of the answer.", _LONG, "route")
        self._operations = self._counter("operations", "Operations ended.", "operation", "outcome")
        self._durations = self._histogram("operation_seconds", "Duration of an operation.", _LONG, "operation")
        self._running = self._gauge("operations_running", "Operations under way.", "operation")
        self._forks = self._counter("forks", "Forks made or failed.", "outcome")
        self._sharing = self._counter("fork_sharing", "How forks got their memory file.", "sharing")
        self._stages = self._histogram("fork_stage_seconds", "Duration of a stage of a fork.", _MS, "stage")
        self._fork_seconds = self._histogram("fork_seconds", "Duration of a fork.", _MS)
        self._unique = self._histogram("fork_unique_bytes", "Memory of a fork alone, if it was measured.", _BYTES)
        self._instances = self._gauge("instances", "Recorded instances.", "state")
        self._private = self._gauge("vmm_private_bytes", "Resident memory that VMMs share with no file.")
        self._slots = self._gauge("network_slots", "Slots of a network.", "network", "use")
        self._measured_at = float("-inf")
        self._measuring = asyncio.Lock()

    def _counter(self, name: str, text: str, *labels: str) -> Counter:
        return Counter(name, text, labels, namespace=_PREFIX, registry=self._registry)

    def _gauge(self, name: str, text: str, *labels: str) -> Gauge:
        return Gauge(name, text, labels, namespace=_PREFIX, registry=self._registry)

    def _histogram(self, name: str, text: str, buckets: Iterable[float], *labels: str) -> Histogram:
        return Histogram(name, text, labels, namespace=_PREFIX, buckets=list(buckets), registry=self._registry)

    def answered(self, method: str, route: str, status: int, seconds: float) -> None:
        """Count an answer. `route` is the template of the path, not the path."""
        self._requests.labels(method if method in _METHODS else "other", route, str(status)).inc()
        self._first_byte.labels(route).observe(seconds)

    @contextlib.contextmanager
    def operation(self, name: str) -> Iterator[None]:
        """Count and time the operation of a block."""
        begin = time.perf_counter()
        outcome = "succeeded"
        running = self._running.labels(name)
        running.inc()
        try:
            yield
        except (Exception, asyncio.CancelledError) as error:
            outcome = code_of(error)
            raise
        finally:
            running.dec()
            self._operations.labels(name, outcome).inc()
            self._durations.labels(name).observe(time.perf_counter() - begin)

    def made(self, result: object) -> None:
        """Take the figures of a fan-out from its report. Other results are ignored."""
        if not isinstance(result, ForkReport):
            return
        for fork in result.results:
            self._forks.labels("succeeded" if fork.ok else fork.error_code or "error").inc()
            if fork.sharing is not None:
                self._sharing.labels(str(fork.sharing)).inc()
            if fork.memory is not None:
                self._unique.observe(fork.memory.unique_bytes)
            for stage, milliseconds in fork.stages.items():
                self._stages.labels(stage).observe(milliseconds / 1000)
            if fork.ok and fork.total_ms:
                self._fork_seconds.observe(fork.total_ms / 1000)

    async def exposition(self, host: LocalBackend, accept: str) -> tuple[bytes, str]:
        """Return all metrics and their content type, in a format that the scraper accepts."""
        async with self._measuring:
            if time.monotonic() - self._measured_at > _MEASURED_FOR_S:
                await self._measure(host)
                self._measured_at = time.monotonic()
        encode, content_type = choose_encoder(accept)
        return encode(self._registry), content_type

    async def _measure(self, host: LocalBackend) -> None:
        """Read the gauges of the host. A scrape reads two numbers of each VMM, and no page map."""
        rooms = host.rooms
        census = await in_thread(rooms.store.census)
        self._instances.clear()
        for state, count in census.states.items():
            self._instances.labels(state).set(count)
        self._private.set(await in_thread(private_bytes, census.pids))
        for network, counts in (await in_thread(rooms.networks.slot_counts)).items():
            self._slots.labels(network, "used").set(counts.used)
            self._slots.labels(network, "free").set(counts.free)


def private_bytes(pids: Iterable[int]) -> int:
    """Return the resident memory of processes that belongs to no file. Blocks for 20 us a process."""
    return sum(map(_private_bytes_of, pids))


def _private_bytes_of(pid: int) -> int:
    try:
        _, resident, shared, *_ = Path(f"/proc/{pid}/statm").read_bytes().split()
    except (FileNotFoundError, ProcessLookupError):
        return 0
    return (int(resident) - int(shared)) * _PAGE
