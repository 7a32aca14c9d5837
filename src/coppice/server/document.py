"""The API document: what it says beyond that which the framework reads from the routes."""

from __future__ import annotations

from collections.abc import Iterable
from http import HTTPStatus
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final

from litestar.handlers import HTTPRouteHandler
from litestar.openapi import OpenAPIConfig
from litestar.openapi.datastructures import ResponseSpec
from litestar.openapi.plugins import JsonRenderPlugin, SwaggerRenderPlugin
from litestar.openapi.spec import Components, OpenAPIType, Schema, SecurityScheme
from litestar.plugins import OpenAPISchemaPlugin
from litestar.typing import FieldDefinition

from coppice import __version__
from coppice.errors import kinds
from coppice.requests import Request
from coppice.server.failures import NAMES, Failure

if TYPE_CHECKING:
    from litestar._openapi.schema_generation import SchemaCreator

EVENTS: Final = "text/event-stream"
PUBLIC: Final[list[dict[str, list[str]]]] = [{}]
"""The security of a route that needs no token."""
_TOKEN: Final = "token"  # noqa: S105 - the name of a scheme


class _Paths(OpenAPISchemaPlugin):
    """Documents a path as any text; the framework takes it for a URI."""

    def is_plugin_supported_field(self, field_definition: FieldDefinition) -> bool:
        return field_definition.is_subclass_of(Path)

    def to_openapi_schema(self, field_definition: FieldDefinition, schema_creator: SchemaCreator) -> Schema:  # noqa: ARG002
        return Schema(type=OpenAPIType.STRING)


class _Requests(OpenAPISchemaPlugin):
    """Documents the field `operation` of a request as optional, because the path names it too."""

    def is_plugin_supported_field(self, field_definition: FieldDefinition) -> bool:
        return not field_definition.is_union and field_definition.is_subclass_of(Request)

    def to_openapi_schema(self, field_definition: FieldDefinition, schema_creator: SchemaCreator) -> Schema:
        others = (each for each in schema_creator.plugins if each is not self)
        described = next(
            each
            for each in others
            if isinstance(each, OpenAPISchemaPlugin) and each.is_plugin_supported_field(field_definition)
        )
        schema = described.to_openapi_schema(field_definition, schema_creator)
        schema.required = [each for each in schema.required or [] if each != "operation"]
        return schema


def plugins() -> list[OpenAPISchemaPlugin]:
    """Return the plugins of the application that describe types."""
    return [_Paths(), _Requests()]


def configuration(*, tokens: bool) -> OpenAPIConfig:
    """Return the configuration of the document.

    :param tokens: requests need a token
    """
    scheme = SecurityScheme(type="http", scheme="bearer", bearer_format="JWT")
    return OpenAPIConfig(
        title="Coppice",
        version=__version__,
        path="/openapi",
        render_plugins=[JsonRenderPlugin(), SwaggerRenderPlugin()],
        components=Components(security_schemes={_TOKEN: scheme} if tokens else {}),
        security=[{_TOKEN: []}] if tokens else None,
    )


def documented(handlers: Iterable[object]) -> list[Any]:
    """Return handlers whose part of the document lists every status of an error."""
    statuses = {kind.http_status for kind in kinds()} | NAMES.keys()
    errors = {status: ResponseSpec(Failure, description=HTTPStatus(status).phrase) for status in sorted(statuses)}
    found = list(handlers)
    for handler in found:
        if isinstance(handler, HTTPRouteHandler):
            handler.responses = {**errors, **(handler.responses or {})}
    return found
