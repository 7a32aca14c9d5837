"""What a user does with the page: watch, fork, type, remove, by mouse and by keyboard."""

from __future__ import annotations

import re

from playwright.async_api import Browser, Page, expect

from browsers import opened
from conftest import HostFactory
from coppice.model import State
from coppice.requests import ForkRequest, RmRequest, StandbyRequest
from fakes.driver import FakeDriver
from fakes.hosting import ask, boot, make


async def names(page: Page) -> list[str]:
    """Return the names in the tree, from top to bottom."""
    found: list[str] = await page.evaluate(
        """() => [...document.querySelectorAll('.row')]
            .sort((a, b) => a.ariaRowIndex - b.ariaRowIndex)
            .map((row) => row.querySelector('.label').textContent)"""
    )
    return found


async def test_fork_eight_type_into_one_and_remove_it(browser: Browser, address: str, make_host: HostFactory) -> None:
    """The forks appear below their template. A command's output appears in the terminal."""
    async with make_host() as host:
        await make(host, State.TEMPLATE)
        async with opened(browser, address) as watched:
            page = watched.page
            await page.get_by_role("row", name="oak").click()
            await page.get_by_role("button", name="Fork…").click()
            await page.get_by_label("How many").fill("8")
            await page.get_by_role("button", name="Fork", exact=True).click()
            await expect(page.locator(".row[aria-level='2'][data-state=Running]")).to_have_count(8)
            await expect(page.get_by_text("8 forks of oak in")).to_be_visible()
            await expect(page.locator("#summary")).to_contain_text("9 instances, 8 running")
            await expect(page.locator(".row[aria-level='2'] .ram:visible")).to_have_count(8)

            fork = (await names(page))[1]
            await page.get_by_role("row", name=fork).click()
            await page.get_by_role("tab", name="Terminal").click()
            await expect(page.locator(".screen-status")).to_have_text("Connected")
            await page.keyboard.type("echo hello | tr a-z A-Z\r")
            await expect(page.locator(".xterm-rows")).to_contain_text("HELLO")
            await page.keyboard.type("exit\r")
            await expect(page.locator(".screen-status")).to_have_text("Ended with exit code 0")
            await page.get_by_role("button", name="Reconnect").click()
            await expect(page.locator(".screen-status")).to_have_text("Connected")

            await page.get_by_role("button", name="Remove…").click()
            await expect(page.get_by_role("dialog")).to_contain_text(f"Remove {fork}?")
            await page.get_by_role("button", name="Remove", exact=True).click()
            await expect(page.locator(".row[aria-level='2']")).to_have_count(7)
            await expect(page.locator("#details")).to_be_hidden()
        assert fork not in {vm.name for vm in await host.ls()}


async def test_an_error_is_shown_with_its_hint(browser: Browser, address: str, make_host: HostFactory) -> None:
    """The message stays until the user dismisses it."""
    async with make_host() as host:
        await make(host, State.TEMPLATE)
        await host.call(ForkRequest(instance="oak", names=["elm"]))
        async with opened(browser, address) as watched:
            page = watched.page
            await page.get_by_role("row", name="oak").click()
            await page.get_by_role("button", name="Demote").click()
            alert = page.get_by_role("alert")
            await expect(alert).to_contain_text("Cannot demote oak")
            await expect(alert.locator(".reason")).to_contain_text("elm")
            await expect(alert.locator(".hint")).not_to_be_empty()
            await alert.get_by_role("button", name="Dismiss").click()
            await expect(alert).to_have_count(0)


async def test_forks_that_fail_are_named(
    browser: Browser, address: str, make_host: HostFactory, driver: FakeDriver
) -> None:
    """Progress is shown while others grow. A failed fork has its reason."""
    async with make_host() as host:
        await make(host, State.TEMPLATE)
        driver.faults.fail_at("restored", nth=1)
        gate = driver.faults.hold_at("restored", nth=3)
        async with opened(browser, address) as watched:
            page = watched.page
            await page.get_by_role("row", name="oak").click()
            await page.get_by_role("button", name="Fork…").click()
            await page.get_by_label("How many").fill("3")
            await page.get_by_role("button", name="Fork", exact=True).click()
            await expect(page.get_by_text("Forking oak: 2 of 3")).to_be_visible()
            gate.release.set()
            await expect(page.get_by_role("alert")).to_contain_text("2 forks of oak")
            await expect(page.locator(".reason")).to_contain_text("restored is planned to fail")
            await expect(page.locator(".row[aria-level='2']")).to_have_count(2)


async def test_all_of_it_by_keyboard(browser: Browser, address: str, make_host: HostFactory) -> None:
    """Move, fold, filter, open, fork and remove without a mouse."""
    async with make_host() as host:
        await make(host, State.TEMPLATE)
        await host.call(ForkRequest(instance="oak", names=["elm-1", "elm-2"], count=2))
        async with opened(browser, address) as watched:
            page = watched.page
            await expect(page.locator(".row")).to_have_count(3)
            active = page.locator(".row.active .label")
            await page.keyboard.press("ArrowDown")
            await expect(active).to_have_text("elm-1")
            await page.keyboard.press("End")
            await expect(active).to_have_text("elm-2")
            grid = page.get_by_role("treegrid")
            focused = await grid.get_attribute("aria-activedescendant")
            assert await page.locator(f"#{focused} .label").text_content() == "elm-2"
            await page.keyboard.press("ArrowLeft")
            await expect(active).to_have_text("oak")
            await page.keyboard.press("ArrowLeft")
            await expect(page.locator(".row")).to_have_count(1)
            await page.keyboard.press("ArrowRight")
            await expect(page.locator(".row")).to_have_count(3)

            await page.keyboard.press("/")
            await page.keyboard.type("elm-2")
            await expect(page.locator(".row:not(.context) .label")).to_have_text(["elm-2"])
            await page.keyboard.press("Enter")
            await page.keyboard.press("End")
            await page.keyboard.press("Enter")
            await expect(page.locator("#details h2")).to_have_text("elm-2")
            await page.keyboard.press("Escape")
            await expect(page.locator("#details")).to_be_hidden()
            await page.keyboard.press("Delete")
            await expect(page.get_by_role("dialog")).to_contain_text("Remove elm-2?")
            await page.keyboard.press("Enter")
            await expect(page.locator(".message")).to_contain_text("No instance matches")
            await page.keyboard.press("/")
            await page.keyboard.press("Escape")
            await expect(page.locator(".row")).to_have_count(2)
            await page.keyboard.press("Escape")
            await page.keyboard.press("Home")
            await page.keyboard.press("f")
            await page.keyboard.type("2")
            await page.keyboard.press("Enter")
            await expect(page.locator(".row[aria-level='2'][data-state=Running]")).to_have_count(3)

            await page.keyboard.press("End")
            await page.keyboard.press("t")
            await expect(page.locator(".screen-status")).to_have_text("Connected")
            await page.keyboard.type("echo typed | tr a-z A-Z\r")
            await expect(page.locator(".xterm-rows")).to_contain_text("TYPED")
            await page.keyboard.press("F6")
            await expect(page.get_by_role("tab", name="Terminal")).to_be_focused()
            await page.keyboard.press("ArrowLeft")
            await expect(page.locator(".facts")).to_contain_text("oak")


async def test_changes_of_others_appear(browser: Browser, address: str, make_host: HostFactory) -> None:
    """The page starts empty. Another process makes, changes and removes instances."""
    async with make_host() as host, opened(browser, address) as watched:
        page = watched.page
        await expect(page.locator("#connection")).to_have_text("Live")
        await expect(page.locator(".message")).to_contain_text("No instances yet")
        await boot(host)
        await expect(page.locator(".row")).to_have_attribute("data-state", "Running")
        await expect(page.locator(".row .amount")).not_to_be_empty()
        await expect(page.locator(".message")).to_be_empty()
        await host.call(StandbyRequest(instance="oak"))
        await expect(page.locator(".row")).to_have_attribute("data-state", "Standby")
        await host.call(RmRequest(instance="oak"))
        await expect(page.locator(".row")).to_have_count(0)


async def test_texts_of_guests_and_users_are_texts(browser: Browser, address: str, make_host: HostFactory) -> None:
    """Tags, ports and consoles with markup are shown as they are."""
    evil = "<img src=x onerror=document.title='owned'>"
    async with make_host() as host:
        vm = await boot(host, tags={"note": evil})
        console = host.local.rooms.directory(vm.id) / "console.log"
        console.write_bytes(f"{evil}\r\nsecond\r\n".encode())
        async with opened(browser, address) as watched:
            page = watched.page
            await page.get_by_role("row", name="oak").click()
            await expect(page.locator(".facts")).to_contain_text(evil)
            await page.get_by_role("tab", name="Console").click()
            await expect(page.locator(".xterm-rows")).to_contain_text("onerror")
            await expect(page.locator(".xterm-rows")).to_contain_text("second")
            with console.open("ab") as stream:
                stream.write(b"third\r\n")
            await expect(page.locator(".xterm-rows")).to_contain_text("third")
            await page.get_by_label("Filter").fill(evil)
            await expect(page.locator(".row")).to_have_count(1)
            assert await page.title() == "Coppice"
            assert await page.locator("img").count() == 1
        assert await ask(host, "oak", "hostname") == "oak"


async def test_memory_is_to_scale(browser: Browser, address: str, make_host: HostFactory) -> None:
    """A guest that writes pages has a longer part of its own in its bar, without any event."""
    async with make_host() as host:
        await make(host, State.TEMPLATE)
        await host.call(ForkRequest(instance="oak", names=["elm-1", "elm-2"], count=2))
        await ask(host, "elm-2", "dirty", "6000")
        async with opened(browser, address) as watched:
            page = watched.page
            await expect(page.locator(".row")).to_have_count(3)

            async def width(name: str, part: str) -> float:
                box = await page.get_by_role("row", name=re.compile(f"{name} ")).locator(part).bounding_box()
                assert box is not None
                return box["width"]

            await expect(page.get_by_role("row", name=re.compile("elm-2 ")).locator(".amount")).to_contain_text("MiB")
            bar = await width("elm-2", ".ram")
            assert await width("elm-1", ".ram") == bar
            found = (await host.stats())["elm-2"]
            share = found.unique_bytes / found.mapped_bytes
            assert abs(await width("elm-2", ".unique") / bar - share) < 0.02
            await ask(host, "elm-1", "dirty", "6000")
            await expect(page.get_by_role("row", name=re.compile("elm-1 ")).locator(".amount")).to_contain_text("MiB")
