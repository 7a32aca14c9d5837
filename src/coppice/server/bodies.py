"""Bodies of requests: JSON that cannot be decoded is an error of the client."""

from __future__ import annotations

from typing import Any

from litestar import Request

from coppice.errors import UsageError
from coppice.server.auth import Caller


class JsonRequest(Request[Caller, Any, Any]):
    """A request of the framework, which takes bytes that are no UTF-8 for an internal error."""

    async def json(self) -> Any:
        """Return the decoded body.

        :raises UsageError: it is not UTF-8, or is nested too deeply
        """
        try:
            return await super().json()
        except UnicodeDecodeError as error:
            raise UsageError(
                f"the body is not UTF-8: {error.reason} at byte {error.start}", hint="send JSON"
            ) from error
        except RecursionError as error:
            raise UsageError("the body is nested too deeply", hint="see the API document") from error
