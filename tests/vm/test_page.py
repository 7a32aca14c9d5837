"""The web page with real machines: forks, a shell on a real terminal, the console, and removal."""

from __future__ import annotations

import re

import pytest
from playwright.async_api import expect

from browsers import chromium, opened
from coppice.client import AsyncHost
from coppice.host import LocalBackend
from coppice.model import Instance
from coppice.server.auth import make_token
from coppice.server.serving import Listening
from servers import KEY, served

FORKS = 8


@pytest.mark.timeout(300)
async def test_fork_eight_and_use_a_shell(host: AsyncHost, template: Instance) -> None:
    """Eight forks of one template appear as Running. One runs a command, follows the size of the
    terminal, and is removed.
    """

    def make_host(owner: str | None) -> LocalBackend:
        return LocalBackend(host.home, owner=owner, spares=0, background="off")

    before = {vm.name for vm in await host.ls()}
    async with (
        served(make_host, Listening(port=0), KEY) as address,
        chromium() as browser,
        opened(browser, address) as watched,
    ):
        page = watched.page
        await page.get_by_label("Token").fill(make_token(KEY, owner=None))
        await page.keyboard.press("Enter")
        await page.get_by_role("row", name=template.name).first.click()
        await page.get_by_role("button", name="Fork…").click()
        await page.get_by_label("How many").fill(str(FORKS))
        await page.get_by_role("button", name="Fork", exact=True).click()
        await expect(page.get_by_text(f"{FORKS} forks of {template.name} in")).to_be_visible(timeout=120_000)
        forks = sorted({vm.name for vm in await host.ls()} - before)
        assert len(forks) == FORKS
        for name in forks:
            row = page.get_by_role("row", name=re.compile(f"{name} "))
            await expect(row).to_have_attribute("data-state", "Running")
            await expect(row.locator(".amount")).to_contain_text("iB")

        await page.get_by_role("row", name=re.compile(f"{forks[0]} ")).click()
        await page.get_by_role("tab", name="Terminal").click()
        await expect(page.locator(".screen-status")).to_have_text("Connected")
        await page.keyboard.type("echo $((6 * 7)) $(hostname) $(tty)\r")
        screen = page.locator(".xterm-rows")
        await expect(screen).to_contain_text(f"42 {forks[0]} /dev/pts/")
        count_rows = "document.querySelector('.xterm-rows').childElementCount"
        old = await page.evaluate(count_rows)
        await page.set_viewport_size({"width": 1000, "height": 500})
        await page.wait_for_function(f"old => {count_rows} !== old", arg=old)
        await page.keyboard.type("echo rows=$(stty size)\r")
        await expect(screen).to_contain_text(f"rows={await page.evaluate(count_rows)} ")
        await page.keyboard.type("echo written >/dev/console\r")
        await page.get_by_role("tab", name="Console").click()
        await expect(screen).to_contain_text("written")

        for name in forks:
            await page.get_by_role("row", name=re.compile(f"{name} ")).click()
            await page.get_by_role("button", name="Remove…").click()
            await page.get_by_role("button", name="Remove", exact=True).click()
            await expect(page.get_by_role("row", name=re.compile(f"{name} "))).to_have_count(0)
    assert {vm.name for vm in await host.ls()} == before
