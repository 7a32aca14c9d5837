"""Draw the web page for docs/server.md: `python tools/page_pictures.py HOME IMAGE`.

HOME is a data directory without instances, and IMAGE one of its images, with Python. Machines are
booted and forked, two pictures are taken in Chromium, and the machines are removed.
"""

from __future__ import annotations

import asyncio
import re
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent / "tests"))

from playwright.async_api import Browser, expect

from browsers import chromium
from coppice.client import AsyncHost
from coppice.host import LocalBackend
from coppice.model import MIB, Publish
from coppice.requests import LogsRequest
from coppice.server.serving import Listening
from servers import served

DOCS = Path(__file__).resolve().parent.parent / "docs"
SIZE = {"width": 1440, "height": 580}
WORK = "x = bytearray({} << 20); x[::4096] = b'1' * len(x[::4096])\nwhile True: __import__('time').sleep(9)"
SERVER = ["python3", "-m", "http.server", "80"]
DEADLINE_S = 200


async def grow(host: AsyncHost, image: str) -> None:
    """Make a template, forks of it with more or less memory of their own, and others."""
    vm = await host.run(image, command=SERVER, name="python-ready", memory_bytes=256 * MIB)
    async with asyncio.timeout(DEADLINE_S), host.stream(LogsRequest(instance=vm.id, follow=True)) as lines:
        async for line in lines:
            if line.startswith(b"Serving HTTP"):
                break
    await vm.freeze()
    template = await host.get("python-ready")
    names = [f"rollout-{number}" for number in range(1, 7)]
    await template.fork(names=names, count=len(names))
    sizes = {"rollout-2": 24, "rollout-3": 60, "rollout-5": 8}
    for name, megabytes in sizes.items():
        program = ["python3", "-c", WORK.format(megabytes)]
        fork = await host.get(name)
        await fork.exec(["sh", "-c", 'setsid "$@" >/dev/null 2>&1 &', "sh", *program])
    await (await host.get("rollout-3")).fork(names=["rollout-3a", "rollout-3b"], count=2, from_running=True)
    await (await host.get("rollout-6")).standby()
    await template.fork(names=["preview"], publish=[Publish(host_port=0, guest_port=80)])
    await (await host.run(image, name="builder", memory_bytes=128 * MIB, start=False)).refresh()


async def picture(browser: Browser, address: str, scheme: str) -> None:
    """Take one picture, of a fork's terminal."""
    context = await browser.new_context(color_scheme=scheme, viewport=SIZE, device_scale_factor=1.25)  # type: ignore[arg-type]
    page = await context.new_page()
    await page.goto(address)
    await page.get_by_role("row", name=re.compile("rollout-3 ")).click()
    if scheme == "light":
        await page.get_by_role("tab", name="Terminal").click()
        await expect(page.locator(".screen-status")).to_have_text("Connected")
        await expect(page.locator(".xterm-rows")).to_contain_text("rollout-3:/#")
        await page.keyboard.type("head -3 /proc/meminfo\r")
        await expect(page.locator(".xterm-rows")).to_contain_text("MemAvailable:")
    else:
        await expect(page.locator(".facts")).to_contain_text("Disk")
    await page.screenshot(path=DOCS / f"page-{scheme}.png")
    await context.close()


async def main(home: str, image: str) -> None:
    """Boot, draw, remove."""

    def make_host(owner: str | None) -> LocalBackend:
        return LocalBackend(home, owner=owner, spares=0, background="off")

    async with AsyncHost(home) as host:
        if await host.ls():
            sys.exit(f"{home} has instances")
        try:
            await grow(host, image)
            async with served(make_host, Listening(port=0), None) as address, chromium() as browser:
                for scheme in ("light", "dark"):
                    await picture(browser, address, scheme)
        finally:
            for vm in reversed(await host.ls()):
                await vm.rm()


if __name__ == "__main__":
    asyncio.run(main(*sys.argv[1:]))
