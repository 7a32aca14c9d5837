"""Traces: a collector of OpenTelemetry gets a span for each request, operation, fork and stage."""

from __future__ import annotations

import asyncio
import http.server
import queue
import signal
import subprocess
import sys
import threading
from collections.abc import Iterator
from typing import Any

import pytest
from opentelemetry import trace
from opentelemetry.proto.collector.trace.v1.trace_service_pb2 import ExportTraceServiceRequest
from opentelemetry.proto.trace.v1.trace_pb2 import Span, Status
from opentelemetry.sdk.trace import TracerProvider

from conftest import HostFactory
from coppice.client.connecting import connect_async
from coppice.errors import MissingTool, NotFound, UsageError
from coppice.model import State
from coppice.requests import ForkRequest, RmRequest
from coppice.server.tracing import ENDPOINTS, traces_of
from fakes.hosting import make
from servers import Servers, client_of

DEADLINE_S = 60.0
TRACE, PARENT = "0af7651916cd43dd8448eb211c80319c", "b7ad6b7169203331"


class Collector(http.server.ThreadingHTTPServer):
    """Keeps the requests of exporters."""

    def __init__(self) -> None:
        super().__init__(("127.0.0.1", 0), _Receiver)
        self.received: queue.Queue[tuple[str, bytes]] = queue.Queue()

    @property
    def endpoint(self) -> str:
        """The value of OTEL_EXPORTER_OTLP_ENDPOINT."""
        return f"http://127.0.0.1:{self.server_address[1]}"

    def spans(self) -> tuple[dict[str, str], list[Span]]:
        """Return the attributes of the resource, and all spans so far."""
        about: dict[str, str] = {}
        found: list[Span] = []
        while not self.received.empty():
            path, body = self.received.get()
            assert path == "/v1/traces"
            for each in ExportTraceServiceRequest.FromString(body).resource_spans:
                about |= {pair.key: pair.value.string_value for pair in each.resource.attributes}
                found += [span for scope in each.scope_spans for span in scope.spans]
        return about, found


class _Receiver(http.server.BaseHTTPRequestHandler):
    server: Collector

    def do_POST(self) -> None:
        body = self.rfile.read(int(self.headers["content-length"]))
        self.server.received.put((self.path, body))
        self.send_response(200)
        self.send_header("content-length", "0")
        self.end_headers()

    def log_message(self, format: str, *args: Any) -> None:
        """Print nothing."""


@pytest.fixture
def collector() -> Iterator[Collector]:
    """A collector on loopback."""
    with Collector() as found:
        thread = threading.Thread(target=found.serve_forever, kwargs={"poll_interval": 0.05})
        thread.start()
        yield found
        found.shutdown()
        thread.join()


def value_of(span: Span, key: str) -> Any:
    """Return an attribute; None: the span has none."""
    found = [each.value for each in span.attributes if each.key == key]
    return getattr(found[0], str(found[0].WhichOneof("value"))) if found else None


async def test_a_fork_is_traced(servers: Servers, make_host: HostFactory, collector: Collector) -> None:
    """The request continues the client's trace. Its operation, the forks and their stages are below it,
    with the times that the report has. What is not sent when the server ends is sent then.
    """
    async with make_host() as local, asyncio.timeout(DEADLINE_S):
        await make(local, State.TEMPLATE)
        address = await servers.start(variables={ENDPOINTS[0]: collector.endpoint, "OTEL_BSP_SCHEDULE_DELAY": "600000"})
        async with client_of(address) as client:
            headers = {"traceparent": f"00-{TRACE}-{PARENT}-01"}
            body = {"instance": "oak", "count": 2, "names": ["elm", "ash"]}
            report = (await client.post("/call/fork", json=body, headers=headers)).json()
            assert (await client.post("/call/rm", json={"instance": "none"})).status_code == 404
        assert collector.received.empty()
        await servers.end(signal.SIGTERM)
    about, spans = await asyncio.to_thread(collector.spans)
    assert about["service.name"] == "coppice"
    mine = [span for span in spans if span.trace_id.hex() == TRACE]
    (request,) = [span for span in mine if span.parent_span_id.hex() == PARENT]
    assert (request.name, request.kind) == ("POST /call/fork", Span.SPAN_KIND_SERVER)
    assert value_of(request, "http.response.status_code") == 200

    def below(parent: Span) -> list[Span]:
        return sorted((each for each in mine if each.parent_span_id == parent.span_id), key=lambda each: each.name)

    (operation,) = below(request)
    assert (operation.name, value_of(operation, "coppice.target")) == ("fork", "oak")
    results = {result["name"]: result for result in report["results"]}
    forks = below(operation)
    assert {value_of(fork, "coppice.fork.name") for fork in forks} == results.keys()
    for fork in forks:
        result = results[value_of(fork, "coppice.fork.name")]
        stages = {each.name: (each.end_time_unix_nano - each.start_time_unix_nano) / 1e6 for each in below(fork)}
        assert stages == pytest.approx(result["stages"], abs=0.001)
        assert (fork.end_time_unix_nano - fork.start_time_unix_nano) / 1e6 == pytest.approx(result["total_ms"], abs=0.1)
        assert all(
            fork.start_time_unix_nano <= each.start_time_unix_nano <= each.end_time_unix_nano <= fork.end_time_unix_nano
            for each in below(fork)
        )
    assert len(mine) == 2 + sum(1 + len(result["stages"]) for result in results.values())
    (failed,) = [span for span in spans if span.name == "rm"]
    assert (value_of(failed, "error.type"), failed.status.code) == ("not_found", Status.STATUS_CODE_ERROR)
    assert not failed.events  # messages of errors are not sent


async def test_a_client_passes_its_trace_on(servers: Servers, make_host: HostFactory, collector: Collector) -> None:
    """A program with OpenTelemetry sees what the server did for its span; one without sends no header."""
    async with make_host() as local, asyncio.timeout(DEADLINE_S):
        await make(local, State.TEMPLATE)
        address = await servers.start(variables={ENDPOINTS[0]: collector.endpoint})
        async with connect_async(address) as host:
            with TracerProvider(shutdown_on_exit=False).get_tracer("test").start_as_current_span("mine") as span:
                context = span.get_span_context()
                await host.call(ForkRequest(instance="oak", names=["elm"]))
            with pytest.raises(NotFound):
                await host.call(RmRequest(instance="none"))
        await servers.end(signal.SIGTERM)
    _, spans = await asyncio.to_thread(collector.spans)
    (request,) = [each for each in spans if each.name == "POST /call/fork"]
    assert request.trace_id.hex() == trace.format_trace_id(context.trace_id)
    assert request.parent_span_id.hex() == trace.format_span_id(context.span_id)
    (other,) = [each for each in spans if each.name == "POST /call/rm"]
    assert other.parent_span_id == b""


async def test_a_collector_that_is_gone_delays_nothing(servers: Servers, make_host: HostFactory) -> None:
    """Requests are answered, and the server ends in order."""
    async with make_host() as local, asyncio.timeout(DEADLINE_S):
        await make(local, State.TEMPLATE)
        address = await servers.start(variables={ENDPOINTS[1]: "http://127.0.0.1:9/v1/traces"})
        async with client_of(address) as client:
            body = {"instance": "oak", "names": ["elm"]}
            assert (await client.post("/call/fork", json=body)).json()["succeeded"] == 1
        await servers.end(signal.SIGTERM)
    assert servers.status == 0


def test_nothing_is_imported_without_an_endpoint() -> None:
    """Neither by the server nor by the client."""
    program = (
        "import sys, coppice.server.app, coppice.server.serving, coppice.client.remote.calls\n"
        "from coppice.server.tracing import traces_of\n"
        "assert traces_of({}) is None\n"
        "sys.exit(any(each.startswith('opentelemetry') for each in sys.modules))"
    )
    subprocess.run([sys.executable, "-c", program], check=True, timeout=DEADLINE_S)


def test_a_missing_exporter_is_reported(monkeypatch: pytest.MonkeyPatch) -> None:
    """The error names the variable, the package and the command that installs it."""
    monkeypatch.setitem(sys.modules, "opentelemetry.exporter.otlp.proto.http.trace_exporter", None)
    with pytest.raises(MissingTool, match=r"OTEL_EXPORTER_OTLP_ENDPOINT is set.*coppice-vm\[server,otel\]"):
        traces_of({ENDPOINTS[0]: "http://127.0.0.1:9"})


def test_another_protocol_is_refused() -> None:
    """Spans would get lost silently."""
    with pytest.raises(UsageError, match="grpc"):
        traces_of({ENDPOINTS[0]: "http://127.0.0.1:9", "OTEL_EXPORTER_OTLP_PROTOCOL": "grpc"})
