"""The page and its server: tokens, lost connections, and many instances."""

from __future__ import annotations

import json
from pathlib import Path

import msgspec
from playwright.async_api import Browser, Route, expect

from browsers import opened
from conftest import HostFactory
from coppice.model import State
from coppice.requests import ForkRequest, TreeRequest
from coppice.server.auth import make_token
from coppice.server.serving import Listening
from fakes.driver import FakeDriver
from fakes.hosting import boot, make
from servers import KEY, fake_hosts, served

MANY = 3000
MOST_ELEMENTS = 100
COPIES = """
    const send = window.fetch;
    window.fetch = async (path, options) => {
        if (path !== '/tree') return send(path, options);
        const [oak, elm] = nodes;
        const copy = (_, n) => ({...elm, instance: {...elm.instance, id: `id${n}`, name: `elm-${n}`}});
        return new Response(JSON.stringify([oak, ...Array.from({length: many}, copy)]));
    };
"""


async def test_a_token_is_asked_for_and_is_in_no_url(
    browser: Browser, tcp_address: str, make_host: HostFactory
) -> None:
    """A wrong token is refused with the server's words. A right one also opens the sockets."""
    token = make_token(KEY, owner=None)
    async with make_host() as host:
        await boot(host)
        async with opened(browser, tcp_address) as watched:
            page = watched.page
            dialog = page.get_by_role("dialog")
            await expect(dialog).to_contain_text("This server needs an access token")
            await expect(dialog).to_contain_text("coppice token create")
            await page.keyboard.press("Escape")
            await page.get_by_label("Token").fill("nonsense")
            await page.keyboard.press("Enter")
            await expect(dialog).to_contain_text("The token is not valid for this server")
            await page.get_by_label("Token").fill(token)
            await page.get_by_role("button", name="Connect").click()
            await expect(page.locator(".row")).to_have_attribute("data-state", "Running")
            await page.locator(".row").click()
            await page.get_by_role("tab", name="Terminal").click()
            await expect(page.locator(".screen-status")).to_have_text("Connected")
            await page.get_by_role("tab", name="VMM log").click()
            await page.reload()
            await expect(page.locator(".row")).to_have_count(1)
            assert [url for url in watched.urls if token in url] == []
            assert await page.evaluate("Object.values(sessionStorage).length + Object.values(localStorage).length") == 1


async def test_a_token_for_reading_shows_what_it_lacks(
    browser: Browser, tcp_address: str, make_host: HostFactory
) -> None:
    """The tree is there; an operation is refused with a hint."""
    async with make_host() as host:
        await boot(host)
        async with opened(browser, tcp_address) as watched:
            watched.expected = ("Unexpected response code: 403",)
            page = watched.page
            await page.get_by_label("Token").fill(make_token(KEY, owner=None, scopes=["instance:read"]))
            await page.keyboard.press("Enter")
            await page.locator(".row").click()
            await page.get_by_role("button", name="Standby").click()
            await expect(page.get_by_role("alert")).to_contain_text("missing required scope: instance:write")
            await page.get_by_role("tab", name="Terminal").click()
            await expect(page.locator(".screen-status")).to_have_text("The server refused the connection")


async def test_a_lost_server_is_reported_and_resumed(
    browser: Browser, fake_home: Path, driver: FakeDriver, make_host: HostFactory
) -> None:
    """While the server is away, the tree stays and the page says so. Then events go on after the last
    one: the tree is not read again, and misses nothing.
    """
    async with make_host() as host:
        await make(host, State.TEMPLATE)
        async with served(fake_hosts(fake_home, driver), Listening(port=0), None) as address:
            context = await browser.new_context()
            page = await context.new_page()
            asked: list[tuple[str, str | None]] = []
            page.on("request", lambda request: asked.append((request.url, request.headers.get("last-event-id"))))
            await page.goto(address)
            await expect(page.locator("#connection")).to_have_text("Live")
        await expect(page.locator("#connection")).to_have_text("Offline")
        await expect(page.locator("#banner")).to_contain_text("The server does not answer")
        await expect(page.locator(".row")).to_have_count(1)
        await page.get_by_role("button", name="Try now").click()  # in vain
        await host.call(ForkRequest(instance="oak", names=["elm"]))
        where = Listening(port=int(address.rpartition(":")[2]))
        async with served(fake_hosts(fake_home, driver), where, None):
            await expect(page.locator(".row[data-state=Running] .label")).to_have_text("elm")
            await expect(page.locator("#connection")).to_have_text("Live")
            await expect(page.locator("#banner")).to_be_hidden()
            await context.close()
    assert len([url for url, _ in asked if url.endswith("/tree")]) == 1
    followed = [last for url, last in asked if url.endswith("/events")]
    assert followed[0] is None
    assert all(last is not None and last.isdecimal() for last in followed[1:])


async def test_a_request_without_an_answer_is_repeated(browser: Browser, address: str, make_host: HostFactory) -> None:
    """Browsers drop all connections when an interface of the host changes. The operation is carried
    out once.
    """
    keys: list[str | None] = []

    async def fail_once(route: Route) -> None:
        keys.append(route.request.headers.get("idempotency-key"))
        if len(keys) == 1:
            await route.fetch()  # the server carries it out, and the answer is lost
            await route.abort("connectionreset")
        else:
            await route.continue_()

    async with make_host() as host:
        await make(host, State.TEMPLATE)
        async with opened(browser, address) as watched:
            page = watched.page
            await page.route("**/call/fork", fail_once)
            await page.locator(".row").click()
            await page.get_by_role("button", name="Fork…").click()
            await page.get_by_label("How many").fill("2")
            await page.get_by_role("button", name="Fork", exact=True).click()
            await expect(page.get_by_text("2 forks of oak in")).to_be_visible()
            await expect(page.locator(".row")).to_have_count(3)
        assert len(await host.ls()) == 3
    assert keys[0] is not None
    assert keys == [keys[0]] * 2


async def test_thousands_of_instances_do_not_freeze_it(browser: Browser, address: str, make_host: HostFactory) -> None:
    """Only the rows in view are elements. The last one is a key away, and can be found by name."""
    async with make_host() as host:
        await make(host, State.TEMPLATE)
        await host.call(ForkRequest(instance="oak", names=["elm"]))
        oak, elm = await host.call(TreeRequest())
    nodes = msgspec.json.encode([oak, elm]).decode()
    async with opened(browser, address) as watched:
        page = watched.page
        await page.add_init_script(f"const nodes = {nodes}, many = {MANY};{COPIES}")
        await page.reload()
        await expect(page.locator("#summary")).to_contain_text(f"{MANY + 1:,} instances")
        await page.get_by_role("treegrid").focus()
        await page.keyboard.press("End")
        await expect(page.locator(".row.active .label")).to_have_text(f"elm-{MANY - 1}")
        assert await page.locator(".row").count() < MOST_ELEMENTS
        await page.get_by_label("Filter").fill("elm-1234")
        await expect(page.locator(".row:not(.context) .label")).to_have_text(["elm-1234"])
        await page.get_by_label("Filter").fill("")
        spent = json.loads(
            await page.evaluate(
                """async () => {
                    const grid = document.querySelector('[role=treegrid]');
                    const longest = {ms: 0};
                    let before = performance.now();
                    for (let step = 0; step < 100; step += 1) {
                        grid.scrollTop = grid.scrollHeight * step / 100;
                        await new Promise(requestAnimationFrame);
                        const now = performance.now();
                        longest.ms = Math.max(longest.ms, now - before);
                        before = now;
                    }
                    return JSON.stringify(longest);
                }"""
            )
        )
        assert spent["ms"] < 5_000
