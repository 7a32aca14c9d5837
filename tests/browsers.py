"""Debian's Chromium, and pages of it that record what they request and complain about."""

from __future__ import annotations

import contextlib
import os
from collections.abc import AsyncIterator
from typing import Any
from urllib.parse import urlsplit

from playwright.async_api import Browser, Page, async_playwright, expect

PROGRAM = "/usr/bin/chromium"
DEADLINE_MS = 20_000
expect.set_options(timeout=DEADLINE_MS)


@contextlib.asynccontextmanager
async def chromium() -> AsyncIterator[Browser]:
    """Run a browser for a block."""
    # Chromium's sandbox needs another user than root.
    args = ["--no-sandbox"] if os.geteuid() == 0 else []
    async with async_playwright() as playwright:
        browser = await playwright.chromium.launch(executable_path=PROGRAM, args=args)
        try:
            yield browser
        finally:
            await browser.close()


class Watched:
    """A page with its requests and complaints."""

    def __init__(self, page: Page) -> None:
        self.page = page
        self.urls: list[str] = []
        self.complaints: list[str] = []
        self.expected: tuple[str, ...] = ()
        page.on("request", lambda request: self.urls.append(request.url))
        page.on("websocket", lambda socket: self.urls.append(socket.url))
        page.on("pageerror", lambda error: self.complaints.append(str(error)))
        page.on("console", lambda message: self._hear(message.type, message.text))
        page.on("response", lambda response: self._see(response.status, response.url))

    def _hear(self, kind: str, text: str) -> None:
        # The browser reports every status of an error; the page shows those that concern the user.
        if kind in ("error", "warning") and not text.startswith("Failed to load resource"):
            self.complaints.append(text)

    def _see(self, status: int, url: str) -> None:
        if status >= 500 or (status >= 400 and "/assets/" in url):
            self.complaints.append(f"{status} {url}")

    def check(self, address: str) -> None:
        """Assert that all requests went to one server, and that nothing failed unexpectedly: the
        browser reports exceptions and violations of the policy.
        """
        hosts = {urlsplit(url).netloc for url in self.urls if not url.startswith(("data:", "blob:"))}
        assert hosts <= {urlsplit(address).netloc}, hosts
        unexpected = [each for each in self.complaints if not any(part in each for part in self.expected)]
        assert not unexpected, unexpected


@contextlib.asynccontextmanager
async def opened(browser: Browser, address: str, **options: Any) -> AsyncIterator[Watched]:
    """Open the page of a server for a block, then check what it did. `options` are those of a
    browser's context.
    """
    context = await browser.new_context(viewport={"width": 1280, "height": 760}, **options)
    context.set_default_timeout(DEADLINE_MS)
    try:
        watched = Watched(await context.new_page())
        await watched.page.goto(f"{address}/")
        yield watched
        watched.check(address)
    finally:
        await context.close()
