"""Traces of OpenTelemetry: a span for each request, each operation, each fork and each stage of it.

Nothing of OpenTelemetry is imported here, unless the environment names an endpoint.
"""

from __future__ import annotations

import asyncio
import contextlib
import os
import threading
import time
from collections.abc import Iterator, Mapping
from typing import TYPE_CHECKING, Any, Final

from litestar.types import ASGIApp, Message, Receive, Scope, Send

import coppice
from coppice.errors import MissingTool, UsageError
from coppice.model import ForkResult, Progress, ProgressSink
from coppice.server.failures import code_of

if TYPE_CHECKING:
    from opentelemetry.trace import Span
    from opentelemetry.util.types import AttributeValue

ENDPOINTS: Final = ("OTEL_EXPORTER_OTLP_ENDPOINT", "OTEL_EXPORTER_OTLP_TRACES_ENDPOINT")
_PROTOCOLS: Final = ("OTEL_EXPORTER_OTLP_TRACES_PROTOCOL", "OTEL_EXPORTER_OTLP_PROTOCOL")
_PROTOCOL: Final = "http/protobuf"
_NEEDED: Final = "coppice-vm[server,otel]"
_FLUSH_S: Final = 3.0  # a collector that does not answer must not delay the server's end
_STATUS: Final = {"http.response.start", "websocket.http.response.start"}
_SERVER_ERROR: Final = 500


def traces_of(environment: Mapping[str, str]) -> Traces | None:
    """Return the traces for which the environment names an endpoint; None: there is none.

    :raises MissingTool: the exporter is not installed
    :raises UsageError: the environment asks for another protocol than HTTP
    """
    named = next((each for each in reversed(ENDPOINTS) if environment.get(each)), None)
    if named is None:
        return None
    protocol = next((environment[each] for each in _PROTOCOLS if environment.get(each)), _PROTOCOL)
    if protocol != _PROTOCOL:
        raise UsageError(f"traces cannot be sent by {protocol}", hint=f"set {_PROTOCOLS[0]}={_PROTOCOL}")
    try:
        return Traces()
    except ModuleNotFoundError as error:
        raise MissingTool(
            f"{named} is set, but traces need the package {error.name}",
            hint=f"run `pip install '{_NEEDED}'`, or unset {named}",
        ) from error


class Traces:
    """The spans of a server. Further variables of OpenTelemetry's SDK apply, such as OTEL_TRACES_SAMPLER."""

    def __init__(self) -> None:
        """Start the exporter.

        :raises ModuleNotFoundError: it is not installed
        """
        from opentelemetry import trace
        from opentelemetry.exporter.otlp.proto.http.trace_exporter import OTLPSpanExporter
        from opentelemetry.sdk.resources import SERVICE_NAME, SERVICE_VERSION, Resource
        from opentelemetry.sdk.trace import TracerProvider
        from opentelemetry.sdk.trace.export import BatchSpanProcessor
        from opentelemetry.trace.propagation.tracecontext import TraceContextTextMapPropagator

        about = {SERVICE_VERSION: coppice.__version__}
        if not os.environ.get("OTEL_SERVICE_NAME"):
            about[SERVICE_NAME] = "coppice"
        self._trace = trace
        self._provider = TracerProvider(resource=Resource.create(about), shutdown_on_exit=False)
        self._provider.add_span_processor(BatchSpanProcessor(OTLPSpanExporter()))
        self._tracer = self._provider.get_tracer("coppice", coppice.__version__)
        self._propagator = TraceContextTextMapPropagator()

    async def close(self) -> None:
        """Send what is not sent yet, for a few seconds at most: then it is given up."""
        loop, sent = asyncio.get_running_loop(), asyncio.Event()

        def send() -> None:
            self._provider.shutdown()
            with contextlib.suppress(RuntimeError):  # the loop is closed: nothing waits any longer
                loop.call_soon_threadsafe(sent.set)

        threading.Thread(target=send, name="traces", daemon=True).start()
        with contextlib.suppress(TimeoutError):
            async with asyncio.timeout(_FLUSH_S):
                await sent.wait()

    @contextlib.contextmanager
    def request(self, method: str, headers: Mapping[str, str]) -> Iterator[Span]:
        """Make the span of a request, below the client's span that its header `traceparent` names."""
        parent = self._propagator.extract(headers)
        kind = self._trace.SpanKind.SERVER
        with self._tracer.start_as_current_span(
            method, context=parent, kind=kind, record_exception=False, set_status_on_exception=False
        ) as span:
            yield span

    @contextlib.contextmanager
    def operation(self, name: str, target: str | None) -> Iterator[None]:
        """Make the span of an operation, below that of its request. Errors are in it as their codes."""
        attributes = {"coppice.operation": name} | ({"coppice.target": target} if target else {})
        with self._tracer.start_as_current_span(
            name, attributes=attributes, record_exception=False, set_status_on_exception=False
        ) as span:
            try:
                yield
            except (Exception, asyncio.CancelledError) as error:
                self.fail(span, code_of(error))
                raise

    def forks(self, progress: ProgressSink) -> ProgressSink:
        """Return a sink that passes progress on, and makes the spans of each fork that has ended."""
        parent = self._trace.set_span_in_context(self._trace.get_current_span())

        def sink(step: Progress) -> None:
            if step.fork is not None:
                self._fork(step.fork, parent)
            progress(step)

        return sink

    def _fork(self, fork: ForkResult, parent: Any) -> None:
        """Make the span of a fork that has just ended. Its stages follow each other from its start."""
        end = time.time_ns()
        begin = end - _ns(fork.total_ms)
        attributes: dict[str, AttributeValue] = {
            "coppice.fork.name": fork.name,
            "coppice.fork.started_ahead": fork.started_ahead,
        }
        if fork.sharing is not None:
            attributes["coppice.fork.sharing"] = str(fork.sharing)
        span = self._tracer.start_span("fork of a machine", context=parent, start_time=begin, attributes=attributes)
        if not fork.ok:
            self.fail(span, fork.error_code or "error")
        below = self._trace.set_span_in_context(span, parent)
        for stage, milliseconds in fork.stages.items():
            made = self._tracer.start_span(stage, context=below, start_time=begin)
            begin += _ns(milliseconds)
            made.end(begin)
        span.end(end)

    def fail(self, span: Span, code: str) -> None:
        """Mark a span as failed with an error code."""
        span.set_attribute("error.type", code)
        span.set_status(self._trace.StatusCode.ERROR)


def _ns(milliseconds: float) -> int:
    return round(milliseconds * 1e6)


class Traced:
    """ASGI middleware: make a span for each request and each WebSocket."""

    def __init__(self, app: ASGIApp, traces: Traces) -> None:
        self._app = app
        self._traces = traces

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Pass a connection on."""
        if str(scope["type"]) == "lifespan":
            await self._app(scope, receive, send)
            return
        method = str(scope.get("method", "WEBSOCKET"))
        headers = {name.decode("latin-1").lower(): value.decode("latin-1") for name, value in scope["headers"]}
        with self._traces.request(method, headers) as span:

            async def sending(message: Message) -> None:
                if message["type"] in _STATUS:
                    status: int = message["status"]  # type: ignore[typeddict-item]
                    span.set_attribute("http.response.status_code", status)
                    if status >= _SERVER_ERROR:
                        self._traces.fail(span, str(status))
                await send(message)

            span.set_attribute("http.request.method", method)
            try:
                await self._app(scope, receive, sending)
            finally:
                if route := scope.get("path_template"):
                    span.update_name(f"{method} {route}")
                    span.set_attribute("http.route", str(route))
