"""The dashboard's page and data over HTTP: headers, who may see what, what is switched off, and what is told live."""

import asyncio
import gc
import json
import re
from contextlib import asynccontextmanager
from importlib.resources import files
from typing import Any

import httpx
import msgspec
import pytest

from router.api.dashboard import page_files
from router.app import create_app
from router.config import Settings, load
from router.dashboard import live
from router.errors import Busy
from tests.support.simulated_worker import RunningGateway, SimulatedWorker, run, running_gateway, until

DATA = ("/admin/fleet", "/admin/timeline", "/admin/prefixes", "/admin/decisions")
TEXT = "a conversation that fills some chunks of sixteen bytes each, and then a little more of it"


async def some_workers(count: int) -> list[SimulatedWorker]:
    return [await SimulatedWorker().start() for _ in range(count)]


class Stream:
    """The events of one stream, as they come."""

    def __init__(self, response: httpx.Response) -> None:
        self._lines = response.aiter_lines()

    async def next(self) -> tuple[str, Any]:
        async with asyncio.timeout(15):
            async for line in self._lines:
                if line.startswith("event: "):
                    name = line.removeprefix("event: ")
                elif line.startswith("data: "):
                    return name, json.loads(line.removeprefix("data: "))
        raise EOFError


@asynccontextmanager
async def stream_of(gateway: RunningGateway) -> Any:
    async with gateway.client.stream("GET", "/admin/decisions") as response:
        assert response.status_code == 200
        assert response.headers["content-type"].startswith("text/event-stream")
        yield Stream(response)


def test_the_page_is_protected_and_cached_by_its_content() -> None:
    async def scenario() -> None:
        async with running_gateway() as gateway:
            page = await gateway.client.get("/dashboard")
            assert (page.status_code, page.headers["content-type"]) == (200, "text/html; charset=utf-8")
            policy = dict(part.strip().split(" ", 1) for part in page.headers["content-security-policy"].split(";"))
            assert policy["default-src"] == policy["frame-ancestors"] == policy["base-uri"] == "'none'"
            assert policy["script-src"] == policy["style-src"] == policy["connect-src"] == "'self'"
            assert policy["require-trusted-types-for"] == "'script'"
            for name, value in (
                ("x-frame-options", "DENY"),
                ("x-content-type-options", "nosniff"),
                ("referrer-policy", "no-referrer"),
                ("cache-control", "no-cache"),
            ):
                assert page.headers[name] == value
            again = await gateway.client.get(
                "/dashboard", headers={"if-none-match": f'"other", {page.headers["etag"]}'}
            )
            assert (again.status_code, again.content) == (304, b"")
            assert (await gateway.client.head("/dashboard")).headers["etag"] == page.headers["etag"]

    run(scenario())


def test_every_part_the_page_names_is_there_and_nothing_else() -> None:
    async def scenario() -> None:
        async with running_gateway() as gateway:
            named = set(re.findall(r'(?:src|href)="(?!#)([^"]+)"', (await gateway.client.get("/dashboard")).text))
            assert "dashboard/app.js" in named
            modules = set(page_files()) - {"index.html"}
            assert named <= {f"dashboard/{name}" for name in modules}
            for name in modules:
                part = await gateway.client.get(f"/dashboard/{name}")
                assert part.status_code == 200
                assert "content-security-policy" in part.headers
                imports = re.findall(r'from "\./([^"]+)"', part.text)
                assert set(imports) <= modules
            for path in ("absent.js", "index.html", "..%2f..%2f__init__.py", "%2e%2e/board.py"):
                missing = await gateway.client.get(f"/dashboard/{path}")
                assert missing.status_code in {400, 404}, path
            slash = await gateway.client.get("/dashboard/")
            assert (slash.status_code, slash.headers["location"]) == (308, "../dashboard")

    run(scenario())


def test_nothing_in_the_page_comes_from_elsewhere_or_is_inline() -> None:
    held = {name: file.content.decode() for name, file in page_files().items()}
    for name, text in held.items():
        addresses = set(re.findall(r"(?:https?:)?//[\w.-]+\.\w+[^\s\"'`]*", text))
        assert not {one for one in addresses if "www.w3.org" not in one}, name
    assert not re.search(r"<script(?![^>]*\ssrc=)|<style|\sstyle=|\son\w+=", held["index.html"])
    for name, text in held.items():
        if name.endswith(".js"):
            banned = r"innerHTML|outerHTML|insertAdjacentHTML|document\.write|\beval\(|new Function|localStorage|EventSource\("
            assert not re.search(banned, text), name


def test_the_page_asks_for_nothing_while_its_data_is_guarded_as_the_admin_endpoints_are() -> None:
    async def scenario() -> None:
        settings = {"admin_token": "the-admin-token", "api_keys": "team:" + "k" * 40, "open_probes": False}
        async with running_gateway(**settings) as gateway:
            page = await gateway.client.get("/dashboard")
            assert page.status_code == 200
            assert (await gateway.client.get("/dashboard/app.js")).status_code == 200
            for path in DATA:
                for headers in ({}, {"authorization": "Bearer wrong"}, {"authorization": "Bearer " + "k" * 40}):
                    assert (await gateway.client.get(path, headers=headers)).status_code == 401, path
            allowed = {"authorization": "Bearer the-admin-token"}
            for path in DATA[:3]:
                answer = await gateway.client.get(path, headers=allowed)
                assert (answer.status_code, answer.headers["cache-control"]) == (200, "no-store")
            assert b"the-admin-token" not in page.content

    run(scenario())


def test_without_a_token_no_page_of_another_origin_reaches_the_admin_endpoints() -> None:
    async def scenario() -> None:
        async with running_gateway() as gateway:
            for site, status in (("cross-site", 403), ("same-site", 403), ("same-origin", 200), ("none", 200)):
                answer = await gateway.client.post("/admin/cache/clear", headers={"sec-fetch-site": site})
                assert answer.status_code == status, site
            elsewhere = await gateway.client.get("/admin/fleet", headers={"host": "attacker.example"})
            assert elsewhere.status_code == 403

    run(scenario())


def test_an_origin_that_may_call_lets_no_other_page_reach_the_admin_endpoints() -> None:
    named, other = "https://page.example", "https://evil.example"
    tried = [
        ({"sec-fetch-site": "cross-site", "origin": named}, 200),
        ({"sec-fetch-site": "cross-site", "origin": other}, 403),
        ({"sec-fetch-site": "cross-site"}, 403),
        ({"sec-fetch-site": "cross-site", "origin": "null"}, 403),
        ({"origin": named}, 200),
        ({"origin": other}, 403),
        ({"origin": "http://localhost:8080", "host": "localhost:8080"}, 200),
        ({"origin": "http://localhost:3000", "host": "localhost:8080"}, 403),
    ]

    async def scenario() -> None:
        async with running_gateway(cors_origins=f"{named}, https://b.example") as gateway:
            for headers, status in tried:
                answer = await gateway.client.post("/admin/cache/clear", headers=headers)
                assert answer.status_code == status, headers
        async with running_gateway(cors_origins="*") as gateway:
            headers = {"sec-fetch-site": "cross-site", "origin": other}
            assert (await gateway.client.post("/admin/cache/clear", headers=headers)).status_code == 403

    run(scenario())


def test_switched_off_it_is_not_there_and_keeps_nothing() -> None:
    async def scenario() -> None:
        async with running_gateway(*await some_workers(1), dashboard=False) as gateway:
            await gateway.chat(TEXT)
            for path in ("/dashboard", "/dashboard/", "/dashboard/app.js", *DATA):
                assert (await gateway.client.get(path)).status_code == 404, path
            assert not gateway.gateway.board.prompts
            assert (await gateway.client.get("/admin/workers")).status_code == 200

    run(scenario())
    assert Settings().dashboard


def test_simulated_the_fleet_is_summed_and_paged() -> None:
    async def scenario() -> None:
        workers = await some_workers(5)
        workers[1].store("cpu", workers[1].hashes(TEXT))
        async with running_gateway(*workers) as gateway:
            await gateway.client.post("/admin/workers/drain", json={"worker": "c"})
            fleet = await gateway.get("/admin/fleet", limit=2, offset=2)
            assert [worker["name"] for worker in fleet["workers"]] == ["c", "d"]
            assert (fleet["matching"], fleet["states"]) == (5, {"up": 4, "draining": 1})
            assert fleet["models"] == ["simulated"]
            chunks = len(TEXT) // 16
            assert fleet["tiers"]["cpu"] == {"chunks": chunks, "capacity": 500_000, "bytes": chunks * 1024}
            only = await gateway.get("/admin/fleet", state="draining")
            assert [worker["state"] for worker in only["workers"]] == ["draining"]
            members = gateway.gateway.control.membership
            members.hold("settings", {workers[3].url: "its pod is not ready"})
            members.settle()
            held = await gateway.get("/admin/fleet", state="draining")
            assert [worker["why"] for worker in held["workers"]] == ["", "its pod is not ready"]
            assert [worker["drained"] for worker in held["workers"]] == [True, False], "only one can be taken back"
            members.hold("settings", {})
            members.settle()
            found = await gateway.get("/admin/fleet", search=workers[4].url[-5:].upper())
            assert [worker["name"] for worker in found["workers"]] == ["e"]
            full = await gateway.get("/admin/fleet", sort="cache", descending=True)
            assert full["workers"][0]["name"] == "b"
            await workers[0].kill()
            await until(lambda: not gateway.gateway.registry.workers[0].up)
            worst = (await gateway.get("/admin/fleet", sort="state", descending=True))["workers"][0]
            assert (worst["name"], worst["state"]) == ("a", "down")
            assert worst["why"]
            for wrong in ({"limit": 0}, {"limit": 201}, {"offset": -1}, {"sort": "url"}, {"colour": "red"}):
                assert (await gateway.client.get("/admin/fleet", params=wrong)).status_code == 400

    run(scenario())


def test_simulated_decisions_arrive_and_are_told_again_when_they_are_finished() -> None:
    async def scenario() -> None:
        worker = await SimulatedWorker().start()
        async with running_gateway(worker) as gateway:
            first = (await gateway.chat("one")).headers["x-request-id"]
            async with stream_of(gateway) as events:
                name, backlog = await events.next()
                assert (name, [one["request_id"] for one in backlog["decisions"]]) == ("decisions", [first])
                assert gateway.gateway.board.live.watchers == 1
                worker.hold_head.clear()
                asking = asyncio.create_task(gateway.chat("two"))
                _, begun = await events.next()
                assert [one["outcome"] for one in begun["decisions"] if one["request_id"] != first] == ["running"]
                worker.hold_head.set()
                second = (await asking).headers["x-request-id"]
                _, ended = await events.next()
                assert [(one["request_id"], one["outcome"]) for one in ended["decisions"]] == [(second, "served")]
                assert ended["decisions"][0]["ttft_s"] > 0
            await until(lambda: gateway.gateway.board.live.watchers == 0)

    run(scenario())


def test_of_streams_asked_for_at_once_no_more_begin_than_may() -> None:
    async def scenario() -> None:
        async def stay() -> bool:
            return False

        async with running_gateway() as gateway:
            watching = gateway.gateway.board.live
            begun = await asyncio.gather(*(watching.open(stay) for _ in range(40)), return_exceptions=True)
            assert sum(isinstance(each, Busy) for each in begun) == 40 - live.MOST_WATCHERS
            begun.clear()
            gc.collect()
            await until(lambda: watching.watchers == 0)  # whose answer never began are forgotten, too

    run(scenario())


def test_streams_are_few_end_in_time_and_do_not_hold_a_stopping_gateway_up(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(live, "MOST_WATCHERS", 1)
    monkeypatch.setattr(live, "LOOK_S", 0.05)

    async def scenario() -> None:
        async with running_gateway() as gateway:
            async with stream_of(gateway) as events:
                await until(lambda: gateway.gateway.board.live.watchers == 1)
                refused = await gateway.client.get("/admin/decisions")
                assert (refused.status_code, "retry-after" in refused.headers) == (429, True)
                monkeypatch.setattr(live, "LIFETIME_S", 0.0)
                assert (await events.next())[0] == "end"
            monkeypatch.setattr(live, "LIFETIME_S", 900.0)
            await until(lambda: gateway.gateway.board.live.watchers == 0)
            async with stream_of(gateway) as events:
                gateway.stop()
                assert (await events.next())[0] == "end"

    run(scenario())


def test_simulated_a_quiet_stream_says_that_it_is_still_there(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(live, "HEARTBEAT_S", 0.0)
    monkeypatch.setattr(live, "LOOK_S", 0.02)

    async def scenario() -> None:
        async with running_gateway() as gateway, gateway.client.stream("GET", "/admin/decisions") as response:
            async with asyncio.timeout(15):
                async for line in response.aiter_lines():
                    if line.startswith(":"):
                        return
            raise AssertionError("the stream ended without a sign of life")

    run(scenario())


def test_simulated_the_last_minutes_and_what_prompts_share() -> None:
    async def scenario() -> None:
        a, b = await some_workers(2)
        a.admit = b.admit = {"cpu": 32}
        a.store("cpu", a.hashes(TEXT))
        async with running_gateway(a, b) as gateway:
            for end in ("first end of sixteen", "other end of sixteen and more"):
                assert (await gateway.chat(TEXT + end)).headers["x-warmroute-worker"] == "a"
            told = await gateway.get("/admin/timeline", minutes=5)
            assert len(told["at"]) == len(told["requests_per_s"]) == len(told["hit_rate"]["cpu"]) == 60
            assert told["step_s"] == 5
            now = told["now"]
            tokens = 2 * len(TEXT) + len("first end of sixteen" + "other end of sixteen and more")
            assert now["prompt_tokens"] == tokens
            assert now["hit_rate"]["cpu"] == pytest.approx(64 / tokens, abs=1e-3)
            assert now["ttft_p50_s"] > 0
            assert (await gateway.client.get("/admin/timeline", params={"minutes": 61})).status_code == 400

            shared = await gateway.get("/admin/prefixes")
            assert shared["prompts"] == 2
            (prefix,) = shared["prefixes"]
            whole = len(TEXT) // 16
            assert (prefix["prompts"], prefix["depth"], prefix["end_tokens"]) == (2, 0, whole * 16)
            assert prefix["id"] == a.hashes(TEXT)[-1].hex()
            assert prefix["holders"] == [{"worker": "a", "tokens": whole * 16, "tiers": {"cpu": whole * 16}}]
            kept = msgspec.json.encode([list(map(str, hashes)) for hashes in gateway.gateway.board.prompts])
            assert b"conversation" not in kept

    run(scenario())


def test_every_process_answers_for_all() -> None:
    async def scenario() -> None:
        app = create_app(load({"port": 0}, {}, None))
        board = app.gateway.board
        assert await board.on_call("unheard-of", None) is None
        told = msgspec.msgpack.decode(msgspec.msgpack.encode(await board.on_call("dashboard-decisions", {})))
        found = msgspec.convert(told, live.Changes)
        assert (found.cursor.count, found.decisions) == (0, [])
        app.gateway.board.prompts.append({("m", 16): [[b"0" * 16]]})
        (path,) = msgspec.msgpack.decode(msgspec.msgpack.encode(await board.on_call("dashboard-prompts", None)))
        assert path == ["m", 16, [b"0" * 16]]
        board.timeline.look()
        assert await board.on_call("dashboard-queued", None) == 0
        rows = await board.on_call("dashboard-timeline", 60)
        assert len(rows) == 1

    asyncio.run(scenario())


def test_the_page_is_in_the_installed_package() -> None:
    held = {item.name for item in files("router.dashboard").joinpath("page").iterdir() if item.is_file()}
    assert {"index.html", "style.css", "app.js", "icon.svg"} <= held
    assert held == set(page_files())


def test_what_is_queued_is_of_all_processes(monkeypatch: pytest.MonkeyPatch) -> None:
    async def scenario() -> None:
        async with running_gateway() as gateway:
            siblings = gateway.gateway.control.siblings

            async def ask(operation: str, *_: Any) -> dict[int, Any]:
                return {1: 3, 2: 4} if operation == "dashboard-queued" else {}

            monkeypatch.setattr(siblings, "ask", ask)
            assert (await gateway.get("/admin/fleet"))["queued"] == 7

    run(scenario())
