"""The web page in a real browser, of a server over fake machines."""

from __future__ import annotations

from collections.abc import AsyncIterator
from pathlib import Path

import pytest
from playwright.async_api import Browser

from api.conftest import driver, personality, tcp_address  # noqa: F401 - fixtures
from browsers import chromium
from coppice.server.serving import Listening
from fakes.driver import FakeDriver
from servers import fake_hosts, served


@pytest.fixture(scope="session")
async def browser() -> AsyncIterator[Browser]:
    """One browser for all tests. Each test has a context of its own."""
    async with chromium() as browser:
        yield browser


@pytest.fixture
async def address(fake_home: Path, driver: FakeDriver) -> AsyncIterator[str]:  # noqa: F811
    """The address of a server that needs no tokens."""
    async with served(fake_hosts(fake_home, driver), Listening(port=0), None) as address:
        yield address
