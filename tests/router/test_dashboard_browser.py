"""The dashboard in a real browser, Debian's Chromium without a window, on a gateway in front of simulated workers."""

import asyncio
import json
import os
import re
import shutil
from collections.abc import AsyncIterator, Coroutine
from contextlib import asynccontextmanager, suppress
from typing import Any
from urllib.parse import urlsplit

import httpx
import pytest

from benchmarks.simulated_worker import CachingWorker
from benchmarks.traces import Request, conversations
from tests.support.simulated_worker import RunningGateway, running_gateway, until

playwright = pytest.importorskip("playwright.async_api", reason="needs playwright")
axe = pytest.importorskip("axe_playwright_python.async_playwright", reason="needs axe-playwright-python")

CHROMIUM = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)
TOKEN = "the-token-of-the-admin"
HOSTILE = "<img src=x onerror=\"document.title='taken'\">"
PATIENCE_MS = 20_000
CHUNK = 64
# A deadline for everything on a busy machine; alone, the tests take seconds.
DEADLINE_S = 120

pytestmark = pytest.mark.skipif(CHROMIUM is None, reason="needs Chromium (Debian: apt-get install chromium)")


def run(work: Coroutine[Any, Any, None]) -> None:
    async def bounded() -> None:
        async with asyncio.timeout(DEADLINE_S):
            await work

    asyncio.run(bounded())


class Seen:
    """What a page did, as the browser tells it."""

    def __init__(self, page: Any) -> None:
        self.page = page
        self.requests: list[Any] = []
        self.errors: list[str] = []
        page.on("request", lambda request: self.requests.append(request))  # noqa: PLW0108 - it has to be a function
        page.on("pageerror", lambda error: self.errors.append(str(error)))
        page.on("console", self._said)

    def _said(self, message: Any) -> None:
        if message.type == "error" and "Failed to load resource" not in message.text:
            self.errors.append(message.text)

    def origins(self) -> set[str]:
        return {"{0.scheme}://{0.netloc}".format(urlsplit(request.url)) for request in self.requests}


@asynccontextmanager
async def chromium() -> AsyncIterator[Any]:
    sandbox = ["--no-sandbox"] if os.geteuid() == 0 else []
    async with playwright.async_playwright() as driver:
        browser = await driver.chromium.launch(executable_path=CHROMIUM, args=["--disable-gpu", *sandbox])
        try:
            yield browser
        finally:
            await browser.close()


@asynccontextmanager
async def fleet(count: int, **settings: Any) -> AsyncIterator[RunningGateway]:
    workers = [
        await CachingWorker(chunk_size=CHUNK, gpu_chunks=60, cpu_chunks=600, prefill=50_000, decode=0.005).start()
        for _ in range(count)
    ]
    async with running_gateway(*workers, **{"report_heartbeat": 5.0, **settings}) as gateway:
        yield gateway


@asynccontextmanager
async def replay(gateway: RunningGateway) -> AsyncIterator[None]:
    """Conversations of a trace, over and over; one block of the trace is one chunk of text."""

    async def play() -> None:
        while True:
            for request in conversations(users=6, turns=4, per_second=1):
                with suppress(httpx.HTTPError):
                    await gateway.chat(text_of(request), stream=True)
                await asyncio.sleep(0.15)

    playing = asyncio.create_task(play())
    try:
        yield
    finally:
        playing.cancel()
        await asyncio.gather(playing, return_exceptions=True)


def text_of(request: Request) -> str:
    return "".join(block.hex() * 2 for block in request.blocks)


async def open_page(browser: Any, gateway: RunningGateway, **options: Any) -> Seen:
    context = await browser.new_context(**options)
    context.set_default_timeout(PATIENCE_MS)
    seen = Seen(await context.new_page())
    await seen.page.goto(f"http://127.0.0.1:{gateway.port}/dashboard")
    return seen


async def sign_in(page: Any, token: str) -> None:
    await page.get_by_role("textbox", name="Token", exact=True).fill(token)
    await page.keyboard.press("Enter")


async def findings(page: Any) -> list[str]:
    """What axe finds serious or critical."""
    results = await axe.Axe().run(page)
    return [
        f"{found['id']}: {found['help']} at {[node['target'] for node in found['nodes']]}"
        for found in results.response["violations"]
        if found["impact"] in {"serious", "critical"}
    ]


def test_simulated_an_operators_visit_during_a_replay() -> None:
    async def scenario() -> None:
        async with fleet(3, admin_token=TOKEN) as gateway, chromium() as browser, replay(gateway):
            seen = await open_page(browser, gateway, viewport={"width": 1280, "height": 900})
            page = seen.page
            await sign_in(page, "not the token")
            await page.get_by_text("That is not this gateway's admin token.").wait_for()
            assert not await findings(page)
            await sign_in(page, TOKEN)

            rows = page.locator("#decision-list tbody tr")
            await rows.nth(2).wait_for()
            before = await page.locator("#decision-note").inner_text()
            await page.wait_for_function(
                "text => document.getElementById('decision-note').textContent !== text", arg=before
            )
            await page.get_by_text("served").first.wait_for()
            await page.locator("#tiles >> text=per second").wait_for()
            await page.locator("#hit-chart path.t-gpu[d*=M]").wait_for(state="attached")
            await page.locator("#prefix-list tbody tr").first.wait_for()

            await page.get_by_role("textbox", name="Prompt", exact=True).fill("a question that nobody asked yet " * 8)
            await page.get_by_role("button", name="Explain").click()
            await page.get_by_text("It would go to").wait_for()
            assert await page.locator(".candidates li").count() == 3
            assert "264 tokens" in await page.locator("#try-answer").inner_text()
            await page.get_by_role("button", name="Pause").click()
            await page.locator("#decision-list").get_by_role("button", name="Why").first.click()
            await page.get_by_text("Hit ended because").wait_for()
            await page.keyboard.press("Escape")
            await page.get_by_role("button", name="Go on").click()

            await drained_and_taken_back(page, gateway)
            await page.locator("#hit-chart summary").click()
            await page.locator("#hit-chart tbody tr").first.wait_for()
            assert not await findings(page)

            assert seen.origins() == {f"http://127.0.0.1:{gateway.port}"}
            assert not [request.url for request in seen.requests if TOKEN in request.url or "question" in request.url]
            kept = await page.evaluate("[localStorage.length, document.cookie, Object.values(sessionStorage)]")
            assert kept == [0, "", [TOKEN]]
            assert seen.errors == []

    run(scenario())


async def drained_and_taken_back(page: Any, gateway: RunningGateway) -> None:
    b = gateway.gateway.registry.find("b")
    assert b is not None
    drain = page.get_by_role("button", name="Drain b")
    await drain.click()
    await page.get_by_role("button", name="Cancel").click()
    assert not b.draining
    await drain.focus()
    await page.keyboard.press("Enter")
    await page.locator("#dialog-yes").focus()
    await page.keyboard.press("Enter")
    await page.get_by_text("b is draining.").wait_for()
    assert b.draining
    await page.get_by_role("button", name="Take back b").click()
    await page.get_by_text("b takes requests again.").wait_for()
    assert not b.draining
    members = gateway.gateway.control.membership
    members.hold("settings", {b.spec.url: "its pod is not ready"})
    members.settle()
    await page.get_by_text("its pod is not ready").wait_for()
    assert await page.get_by_role("button", name="Take back b").count() == 0, "there is nothing to take back"
    members.hold("settings", {})
    members.settle()
    await page.get_by_role("button", name="Clear cache of b").click()
    await page.locator("#dialog-yes").click()
    await page.locator(".toast", has_text="Not done").or_(page.get_by_text("was cleared.")).wait_for()


def test_simulated_a_phone_in_the_dark_and_a_gateway_that_goes() -> None:
    async def scenario() -> None:
        async with chromium() as browser:
            async with fleet(2) as gateway:
                for _ in range(3):
                    await gateway.chat("a prompt of more than one chunk " * 5)
                small = {"width": 360, "height": 740}
                seen = await open_page(
                    browser, gateway, viewport=small, color_scheme="dark", reduced_motion="reduce", is_mobile=True
                )
                page = seen.page
                await page.locator("#decision-list tbody tr").nth(2).wait_for()
                await page.locator("#worker-list tbody tr").nth(1).wait_for()
                assert await page.evaluate("document.documentElement.scrollWidth") == 360
                assert not await findings(page)
                await asleep_and_awake(seen)
            await page.get_by_text("The gateway does not answer").wait_for()
            await page.get_by_text("No connection").wait_for()
            assert await page.locator("#worker-list tbody tr").count() == 2
            assert not await findings(page)
            assert seen.errors == []

    run(scenario())


async def asleep_and_awake(seen: Seen) -> None:
    """A page that nobody sees asks for nothing; seen again, it goes on."""
    hide = "hidden => { Object.defineProperty(document, 'hidden', { value: hidden, configurable: true }); document.dispatchEvent(new Event('visibilitychange')); }"
    await seen.page.evaluate(hide, True)
    await asyncio.sleep(0.5)
    asked = len(seen.requests)
    await asyncio.sleep(3)
    assert len(seen.requests) == asked
    await seen.page.evaluate(hide, False)
    await until(lambda: len(seen.requests) > asked + 3, 20)


def test_simulated_many_workers_with_hostile_names() -> None:
    async def scenario() -> None:
        async with fleet(1) as gateway, chromium() as browser:
            row = (await gateway.get("/admin/fleet"))["workers"][0]
            told = await gateway.get("/admin/fleet")
            context = await browser.new_context()
            context.set_default_timeout(PATIENCE_MS)
            seen = Seen(await context.new_page())
            page = seen.page

            async def answer(route: Any) -> None:
                asked = httpx.URL(route.request.url).params
                matching = 30 if asked.get("search") else 1000
                numbers = range(matching)[int(asked["offset"]) :][: int(asked["limit"])]
                rows = [
                    row
                    | {"name": f"{n} {HOSTILE}", "models": [HOSTILE], "state": "down", "why": HOSTILE, "url": HOSTILE}
                    for n in numbers
                ]
                fleet_told = told | {
                    "models": [HOSTILE],
                    "states": {"down": 1000},
                    "matching": matching,
                    "workers": rows,
                }
                await route.fulfill(body=json.dumps(fleet_told), content_type="application/json")

            await page.route("**/admin/fleet*", answer)
            await page.goto(f"http://127.0.0.1:{gateway.port}/dashboard")
            await page.get_by_text(re.compile("1.20 of 1,000")).wait_for()
            await page.get_by_role("button", name="Next").click()
            await page.get_by_text(re.compile("21.40 of 1,000")).wait_for()
            assert await page.locator("#worker-list tbody tr").count() == 20
            assert (await page.locator("#worker-list tbody strong").first.inner_text()) == f"20 {HOSTILE}"
            await page.get_by_label("Find").first.fill("few")
            await page.get_by_text(re.compile("1.20 of 30")).wait_for()
            for _ in range(2):
                async with page.expect_response("**/admin/fleet*"):
                    await page.get_by_role("button", name="Next").dispatch_event("click")
                await page.get_by_text(re.compile("21.30 of 30")).wait_for()
            await page.get_by_role("button", name="Drain").first.click()
            assert HOSTILE in await page.locator("#dialog-title").inner_text()
            assert await page.locator("img[src=x]").count() == 0
            assert await page.title() == "warmroute"
            assert await page.evaluate("document.documentElement.scrollWidth <= innerWidth")
            assert seen.errors == []

    run(scenario())


def test_simulated_without_a_token_a_gateway_on_the_network_says_why_it_is_closed() -> None:
    async def scenario() -> None:
        async with fleet(1, host="0.0.0.0") as gateway, chromium() as browser:
            seen = await open_page(browser, gateway)
            await seen.page.get_by_text("the admin endpoints are closed").wait_for()
            assert not await findings(seen.page)
            assert await seen.page.locator("#content").is_hidden()

    run(scenario())
