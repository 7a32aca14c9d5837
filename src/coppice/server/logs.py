"""The log of a server as lines of JSON, for collectors of logs."""

from __future__ import annotations

import logging
import sys
from typing import Any, Final

import msgspec

FIELDS: Final = "fields"
"""The attribute of a log record that has further fields."""
_QUIET: Final = ("asyncio", "uvicorn", "httpx", "httpcore", "websockets")


class JsonLines(logging.Formatter):
    """Makes one JSON object of each record: `at`, `level`, `logger`, `message`, and the fields of the record."""

    def format(self, record: logging.LogRecord) -> str:
        """Return the line."""
        found: dict[str, Any] = {
            "at": round(record.created, 6),
            "level": record.levelname.lower(),
            "logger": record.name,
            "message": record.getMessage(),
            **getattr(record, FIELDS, {}),
        }
        if record.exc_info:
            found["traceback"] = self.formatException(record.exc_info)
        return msgspec.json.encode(found).decode()


def log_json() -> None:
    """Write the log of this process as lines of JSON to standard error, with a line for each request."""
    handler = logging.StreamHandler(sys.stderr)
    handler.setFormatter(JsonLines())
    logging.basicConfig(level=logging.INFO, handlers=[handler], force=True)
    for name in _QUIET:
        logging.getLogger(name).setLevel(logging.WARNING)
