"""The client's part of a trace: the server's spans are below the span that is current here."""

from __future__ import annotations

import sys


def trace_headers() -> dict[str, str]:
    """Return the header `traceparent` of W3C, if this program uses OpenTelemetry and has a span."""
    headers: dict[str, str] = {}
    if "opentelemetry.trace" in sys.modules:
        from opentelemetry.trace.propagation.tracecontext import TraceContextTextMapPropagator

        TraceContextTextMapPropagator().inject(headers)
    return headers
