import asyncio
import json
import time
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any

import httpx
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from typer.testing import CliRunner

from router.access import Access, KeySpec, hash_key, make_access, make_key, read_keys
from router.cli import app as command
from router.config import WorkerSpec, load
from router.errors import (
    ApiError,
    ConfigError,
    Forbidden,
    InvalidRequest,
    Limited,
    ModelNotFound,
    Unauthorized,
)
from router.limits import Bucket, Meter, Usage
from router.parse import parse_request, read_headers
from router.salt import derive_salt, with_salt
from tests.support.simulated_worker import SimulatedWorker, chat_body, run, running_gateway, until

KEY = "k" * 40
OTHER = "o" * 40
SALT = "0123456789abcdef"


def spec(name: str = "a", key: str = KEY, **members: Any) -> KeySpec:
    return KeySpec(name=name, hash=hash_key(key), **members)


def bearer(key: str) -> list[tuple[bytes, bytes]]:
    return [(b"host", b"x"), (b"authorization", b"Bearer " + key.encode())]


def keys_file(tmp_path: Path, *specs: KeySpec) -> Path:
    path = tmp_path / "keys.yaml"
    path.write_text(json.dumps({"keys": [item.model_dump(mode="json") for item in specs]}))
    path.chmod(0o600)
    return path


# Who may.


@pytest.mark.parametrize(
    "headers",
    [
        bearer(KEY),
        [(b"authorization", b"bearer  " + KEY.encode())],
        [(b"x-api-key", KEY.encode())],
        [(b"authorization", b"Basic abc"), (b"x-api-key", KEY.encode())],
    ],
)
def test_a_key_is_taken_the_ways_clients_send_it(headers: list[tuple[bytes, bytes]]) -> None:
    assert Access([spec("b", OTHER), spec()]).authenticate(headers).name == "a"


@pytest.mark.parametrize(
    ("headers", "code"),
    [
        ([], "missing_api_key"),
        ([(b"authorization", b"Basic abc")], "missing_api_key"),
        (bearer("x" * 40), "invalid_api_key"),
        (bearer(""), "invalid_api_key"),
        (bearer(KEY[:-1]), "invalid_api_key"),
        (bearer(KEY * 100), "invalid_api_key"),
        (bearer(hash_key(KEY)), "invalid_api_key"),
        (bearer(OTHER), "expired_api_key"),
        (bearer("d" * 40), "invalid_api_key"),
    ],
)
def test_others_are_refused(headers: list[tuple[bytes, bytes]], code: str) -> None:
    expired = spec("late", OTHER, expires="2020-01-01T00:00:00Z")
    access = Access([spec(), expired, spec("off", "d" * 40, disabled=True)])
    with pytest.raises(Unauthorized) as caught:
        access.authenticate(headers)
    assert caught.value.code == code
    assert KEY not in str(caught.value)
    assert (b"www-authenticate", b"Bearer") in caught.value.headers()
    assert access.refused == 1


def test_no_key_is_in_force_without_entries() -> None:
    access = Access([])
    for headers in (bearer(""), bearer("\0" * 32), [(b"x-api-key", bytes(32))]):
        with pytest.raises(Unauthorized):
            access.authenticate(headers)


def test_a_remembered_key_expires_and_wrong_ones_are_not_remembered(monkeypatch: pytest.MonkeyPatch) -> None:
    ends = datetime.now(UTC) + timedelta(minutes=1)
    access = Access([spec(expires=ends)])
    assert access.authenticate(bearer(KEY)) is access.authenticate(bearer(KEY))
    for _ in range(2):
        with pytest.raises(Unauthorized):
            access.authenticate(bearer(OTHER))
    assert list(access._remembered) == [KEY.encode()]
    monkeypatch.setattr("router.access.time.time", ends.timestamp)
    with pytest.raises(Unauthorized, match="expired"):
        access.authenticate(bearer(KEY))
    monkeypatch.undo()
    access.use([spec("b", OTHER)])
    with pytest.raises(Unauthorized, match="not valid"):
        access.authenticate(bearer(KEY))


def test_made_keys_are_long_and_differ() -> None:
    made = {make_key() for _ in range(100)}
    assert len(made) == 100
    assert all(key.startswith("wr-") and len(key) == 46 for key in made)


def test_authentication_and_limits_cost_less_than_5_us() -> None:
    """Of this process's own time, on headers as OpenAI's client sends them."""
    others = [spec(f"t{number}", f"{number:040d}") for number in range(5000)]
    access = Access([*others, spec(requests_per_minute=10**9, tokens_per_minute=10**9, concurrency=1000)])
    headers = [(f"x-stainless-{number}".encode(), b"v") for number in range(12)] + bearer(KEY)
    best = float("inf")
    for _ in range(20):
        started = time.process_time()
        for _ in range(1000):
            access.enter(read_headers(headers)).leave()
        best = min(best, time.process_time() - started)
    print(f"{best * 1000:.2f} us")
    assert best < 15e-3, "5 us on a free core; three times that leaves room for a busy one"


# The file.


def test_the_file_is_read_again_and_a_bad_one_changes_nothing(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    path = keys_file(tmp_path, spec())
    access = Access(path=str(path))
    tenant = access.authenticate(bearer(KEY))
    tenant.usage.enter(0.0)
    assert not access.reload(), "nothing changed"
    path.write_text("keys: [{name: a, hash: nonsense}]")
    assert not access.reload()
    assert "key 'a': hash: a hash is sha256:" in access.error
    assert access.authenticate(bearer(KEY)) is tenant
    path.unlink()
    assert not access.reload()
    assert access.authenticate(bearer(KEY)) is tenant
    path.write_text(json.dumps({"keys": [{"name": "a", "hash": hash_key(OTHER), "concurrency": 1}]}))
    assert access.reload()
    assert not access.error
    with pytest.raises(Unauthorized):
        access.authenticate(bearer(KEY))
    with pytest.raises(Limited):
        access.authenticate(bearer(OTHER)).usage.enter(0.0)
    assert "stay as they were" in caplog.text
    assert "open to every user" in caplog.text


@pytest.mark.parametrize(
    ("text", "complaint"),
    [
        ("keys: [", "not YAML: line 1"),
        ("[]", "one mapping with the list 'keys'"),
        ("kees: []", "one mapping with the list 'keys'"),
        ("keys: [7]", "entry 1"),
        ("keys: [{name: a}]", "key 'a': hash"),
        ("keys: [{name: 'a b', hash: x}]", "key 'a b': name"),
        (f"keys: [{{name: a, hash: '{hash_key(KEY)}', rpm: 3}}]", "key 'a': rpm"),
        (f"keys: [{{name: a, hash: '{hash_key(KEY)}', concurrency: 0}}]", "key 'a': concurrency"),
        (f"keys: [{{name: a, hash: '{hash_key(KEY)}'}}, {{name: a, hash: '{hash_key(OTHER)}'}}]", "share a name: a"),
        (f"keys: [{{name: a, hash: '{hash_key(KEY)}'}}, {{name: b, hash: '{hash_key(KEY)}'}}]", "stands there twice"),
    ],
)
def test_a_bad_file_is_refused_by_name_and_place(tmp_path: Path, text: str, complaint: str) -> None:
    path = tmp_path / "keys.yaml"
    path.write_text(text)
    with pytest.raises(ConfigError) as caught:
        read_keys(path)
    assert complaint in str(caught.value)
    assert hash_key(KEY) not in str(caught.value)


def test_keys_come_from_the_environment_plain_or_hashed() -> None:
    settings = load({}, {"WARMROUTE_API_KEYS": f"a:{KEY} b:{hash_key(OTHER)}"})
    assert KEY not in repr(settings)
    access = make_access("", settings.api_keys.get_secret_value())
    assert access is not None
    assert access.authenticate(bearer(KEY)).name == "a"
    assert access.authenticate(bearer(OTHER)).name == "b"
    assert make_access("", "") is None
    for wrong, complaint in (("a", "NAME:KEY"), ("a:short", "shorter than 32"), (f"a:{KEY} a:{OTHER}", "share a name")):
        with pytest.raises(ConfigError, match=complaint) as caught:
            make_access("", wrong)
        assert "short" not in str(caught.value).replace("shorter", "")


def test_nothing_that_is_shown_holds_a_secret(tmp_path: Path) -> None:
    access = Access([spec(cache_salt=SALT)])
    tenant = access.authenticate(bearer(KEY))
    shown = (
        json.dumps(access.describe()) + repr(tenant) + repr(tenant.spec) + str(access.enter(read_headers(bearer(KEY))))
    )
    assert SALT not in shown
    assert KEY not in shown
    assert hash_key(KEY) not in json.dumps(access.describe())
    secret = tmp_path / "secret"
    secret.write_text("worker-secret\n")
    worker = WorkerSpec.parse(f"http://h:1,key=file:{secret}")
    assert worker.key.get_secret_value() == "worker-secret"
    assert "worker-secret" not in repr(worker) + str(worker) + worker.model_dump_json()
    for text in ("http://h:1,key=a b", "http://h:1,key=file:/nowhere", "http://h:1,kee=worker-secret"):
        with pytest.raises(ConfigError) as caught:
            load({"workers": [text]}, {})
        assert "worker-secret" not in str(caught.value)


# What for.


def test_models_are_limited_by_name_and_pattern() -> None:
    tenant = Access([spec(models=["llama", "team-*"])]).authenticate(bearer(KEY))
    assert [tenant.may_use(model) for model in ("llama", "team-x", "llama2", "Team-x")] == [True, True, False, False]
    tenant.bind(parse_request("chat", json.dumps(chat_body("x") | {"model": "team-x"}).encode(), [], "id"))
    with pytest.raises(ModelNotFound):
        tenant.bind(parse_request("chat", json.dumps(chat_body("x")).encode(), [], "id"))
    with pytest.raises(InvalidRequest, match="model is required"):
        tenant.bind(parse_request("completions", b'{"prompt":"x"}', [], "id"))


@pytest.mark.parametrize(
    ("own", "given", "allowed"), [(0, 0, True), (0, -1, False), (-5, -5, True), (-5, "-6", False), (5, 0, True)]
)
def test_the_engines_priority_is_no_way_around_the_keys(own: int, given: Any, *, allowed: bool) -> None:
    tenant = Access([spec(priority=own)]).authenticate(bearer(KEY))
    request = parse_request("chat", json.dumps(chat_body("x", priority=given)).encode(), [], "id")
    if allowed:
        tenant.bind(request)
    else:
        with pytest.raises(Forbidden):
            tenant.bind(request)


@pytest.mark.parametrize("given", [10**400, "soon", [1], {}])
def test_a_priority_that_is_no_number_is_the_clients_fault(given: Any) -> None:
    tenant = Access([spec()]).authenticate(bearer(KEY))
    with pytest.raises(InvalidRequest):
        tenant.bind(parse_request("chat", json.dumps(chat_body("x", priority=given)).encode(), [], "id"))


def test_the_queues_priority_is_the_headers_as_far_as_the_key_allows() -> None:
    tenant = Access([spec(priority=-5)]).authenticate(bearer(KEY))
    assert tenant.urgency(None) == -5
    assert tenant.urgency(b"3") == 3
    with pytest.raises(Forbidden):
        tenant.urgency(b"-6")
    with pytest.raises(InvalidRequest):
        tenant.urgency(b"now")


# Salts.


@given(st.tuples(st.text(), st.text()), st.tuples(st.text(), st.text()))
def test_salts_are_equal_only_where_both_parts_are(one: tuple[str, str], other: tuple[str, str]) -> None:
    salts = derive_salt(*one), derive_salt(*other)
    assert (salts[0] == salts[1]) == (one == other)
    assert all(salt.isalnum() and len(salt) == 34 for salt in salts)


_JSON = st.none() | st.integers(-(2**60), 2**60) | st.text(max_size=8) | st.lists(st.text(max_size=4), max_size=3)


@settings(max_examples=60)
@given(st.dictionaries(st.text(max_size=6) | st.just("cache_salt"), _JSON, max_size=5), st.booleans())
def test_a_spliced_body_is_the_same_but_for_its_salt(body: dict[str, Any], spaced: bool) -> None:
    raw = b" \n" * spaced + json.dumps(body, ensure_ascii=spaced, indent=2 if spaced else None).encode(
        "utf-8", "replace"
    )
    body = json.loads(raw)
    salted = with_salt(raw, body, "wrsalt")
    assert json.loads(salted) == body | {"cache_salt": "wrsalt"}
    assert salted.count(b"cache_salt") <= raw.count(b"cache_salt") + 1


@pytest.mark.parametrize(
    "raw",
    [
        b'{"prompt":"x","cache_salt":"mine","cache_salt":"wr0"}',
        b'{"cache\\u005fsalt":"wr0","prompt":"x"}',
        b'{"cache_salt":null,"prompt":"x"}',
        b'{"prompt":"x","cache_salt":"a","cache_salt":null}',
        b'\n {"prompt":"x"}',
    ],
)
def test_a_client_cannot_name_another_tenants_salt(raw: bytes) -> None:
    victim = derive_salt(SALT, "")
    raw = raw.replace(b"wr0", victim.encode())
    for own in (SALT + "x", ""):
        tenant = Access([spec(cache_salt=own)]).authenticate(bearer(KEY))
        request = parse_request("completions", raw, [], "id")
        tenant.bind(request)
        sent = json.loads(request.raw)
        assert sent.get("cache_salt") != victim
        assert (sent.get("cache_salt") or "") == request.cache_salt
        assert request.raw.count(b"salt") <= max(1, raw.count(b"salt") * (not own))


# Limits.


def test_a_bucket_holds_a_minute_and_fills_evenly() -> None:
    bucket = Bucket(60, 0.0)
    assert bucket.level(0.0) == 60
    bucket.take(60)
    assert bucket.level(0.0) == 0
    assert bucket.wait(1) == pytest.approx(1.0)
    assert bucket.level(1.0) == pytest.approx(1.0)
    bucket.take(31)
    assert bucket.wait(0) == pytest.approx(30.0)
    bucket.resize(120, 1.0)
    assert bucket.level(1.0) == pytest.approx(30.0), "what was used stays used"
    assert bucket.level(1000.0) == 120


@given(st.lists(st.tuples(st.floats(0, 5), st.integers(1, 40))), st.integers(1, 600))
def test_no_minute_sees_more_than_twice_the_limit(steps: list[tuple[float, int]], limit: int) -> None:
    usage = Usage("a")
    usage.limit(requests=None, tokens=limit, concurrency=None, now=0.0)
    now, taken = 0.0, []
    for step, amount in steps:
        now += step
        try:
            usage.prompt(amount, now)
        except Limited:
            continue
        taken.append((now, amount))
    for start, _ in taken:
        assert sum(amount for at, amount in taken if start <= at < start + 60) <= 2 * limit + 1e-6


def test_each_limit_says_what_it_is_and_when_to_come_back() -> None:
    usage = Usage("a")
    usage.limit(requests=2, tokens=100, concurrency=1, now=0.0)
    usage.enter(0.0)
    with pytest.raises(Limited, match="1 requests at once") as at_once:
        usage.enter(0.0)
    usage.leave()
    usage.enter(0.0)
    usage.leave()
    with pytest.raises(Limited, match="2 requests per minute: try again in 30 s") as requests:
        usage.enter(0.0)
    usage.limit(requests=None, tokens=100, concurrency=None, now=0.0)
    usage.prompt(60, 0.0)
    with pytest.raises(Limited, match="this prompt has 50: try again in 6 s"):
        usage.prompt(50, 0.0)
    with pytest.raises(Limited, match="this prompt alone has 101") as too_long:
        usage.prompt(101, 0.0)
    usage.completion(100, 0.0)
    with pytest.raises(Limited, match="100 tokens per minute: try again in 37 s"):
        usage.enter(0.0)
    usage.enter(37.0)
    assert (at_once.value.type, requests.value.type, too_long.value.type) == ("concurrency", "requests", "tokens")
    headers = dict(requests.value.headers())
    assert headers[b"retry-after"] == b"30"
    assert 30_000 <= int(headers[b"retry-after-ms"]) <= 37_500
    assert headers[b"x-should-retry"] == b"true"
    assert dict(too_long.value.headers())[b"x-should-retry"] == b"false"
    assert usage.limited == {"requests": 1, "tokens": 3, "concurrency": 1}


def test_answers_are_metered_as_the_worker_says_or_by_events() -> None:
    streamed = Meter()
    for number in range(5):
        streamed.scan(b'data: {"choices":[%d]}\n\n' % number)
    streamed.scan(b'data: {"a":1}\n\ndata: {"b":2}\n\ndata: [DONE]\n\n')
    assert streamed.tokens == 7
    streamed.scan(b'data: {"usage":{"prompt_tokens":9,"completion_tokens": 3}}\n\n')
    assert streamed.tokens == 3
    whole = Meter()
    whole.scan(b'{"text":"\\"completion_tokens\\":99","usage":{"output_tokens":12}}')
    assert whole.tokens == 12
    assert Meter().tokens == 0


# Through the gateway.


def test_simulated_tenants_share_nothing_and_workers_see_no_key(tmp_path: Path) -> None:
    path = keys_file(
        tmp_path, spec("a", KEY, cache_salt=SALT), spec("b", OTHER, cache_salt="x" * 16), spec("c", "c" * 40)
    )

    async def scenario() -> None:
        worker = await SimulatedWorker().start()
        async with running_gateway(worker, api_keys_file=str(path), worker_api_key="worker-secret") as gateway:
            for key in (KEY, OTHER, "c" * 40):
                for members in ({}, {"cache_salt": "mine"}):
                    headers = {"authorization": f"Bearer {key}", "x-api-key": key}
                    body = chat_body("hello", **members)
                    assert (
                        await gateway.client.post("/v1/chat/completions", json=body, headers=headers)
                    ).status_code == 200
            requests = worker.served("/v1/chat/completions")
            salts = [json.loads(body).get("cache_salt") for _, _, body in requests]
            assert len(set(salts)) == 6
            assert salts[4] is None
            assert all(headers["authorization"] == "Bearer worker-secret" for _, headers, _ in worker.requests)
            assert not [headers for _, headers, _ in worker.requests if "x-api-key" in headers]
            assert {path for path, _, _ in worker.requests} >= {"/health", "/v1/models"}

    run(scenario())


def test_simulated_salts_are_part_of_the_hash(tmp_path: Path) -> None:
    path = keys_file(tmp_path, spec("a", KEY, cache_salt=SALT), spec("b", OTHER, cache_salt="x" * 16))
    text = "word " * 40

    async def scenario() -> None:
        worker = await SimulatedWorker().start()
        worker.store("gpu", worker.hashes(text, cache_salt=derive_salt(SALT, "")))
        async with running_gateway(worker, api_keys_file=str(path)) as gateway:
            hits = []
            for key in (KEY, OTHER):
                headers = {"authorization": f"Bearer {key}"}
                ids = list(text.encode())
                answer = await gateway.client.post(
                    "/v1/completions", json={"model": "simulated", "prompt": ids}, headers=headers
                )
                hits.append(int(answer.headers["x-warmroute-hit-tokens"]))
            assert hits[0] > 0
            assert hits[1] == 0

    run(scenario())


def test_simulated_paths_without_a_key(tmp_path: Path) -> None:
    path = keys_file(tmp_path, spec("a", KEY, models=["simulated"]), spec("b", OTHER, models=["another"]))

    async def scenario() -> None:
        worker = await SimulatedWorker().start()
        settings = {"api_keys_file": str(path), "admin_token": "admin-secret"}
        async with running_gateway(worker, **settings) as gateway:
            get, post = gateway.client.get, gateway.client.post
            for probe in ("/health", "/ready", "/metrics", "/version"):
                assert (await get(probe)).status_code == 200
            for closed in ("/v1/models", "/openapi.json", "/v1/models/simulated"):
                assert (await get(closed)).status_code == 401
            for name in ("chat/completions", "completions", "embeddings", "responses", "messages"):
                answer = await post(f"/v1/{name}", json=chat_body("x"))
                assert answer.status_code == 401, name
                assert answer.json()["error"]["code"] == "missing_api_key"
            admin = {"authorization": "Bearer admin-secret"}
            assert (await post("/v1/completions", json={"prompt": "x"}, headers=admin)).status_code == 401
            assert (await get("/admin/keys", headers={"x-api-key": KEY})).status_code == 401
            shown = await get("/admin/keys", headers=admin)
            assert [key["name"] for key in shown.json()["keys"]] == ["a", "b"]
            models = [(await get("/v1/models", headers={"x-api-key": key})).json()["data"] for key in (KEY, OTHER)]
            assert [len(cards) for cards in models] == [1, 0]
            assert (await get("/v1/models/simulated", headers={"x-api-key": OTHER})).status_code == 404
            refused = await post("/v1/chat/completions", json=chat_body("x"), headers={"x-api-key": OTHER})
            assert (refused.status_code, refused.json()["error"]["code"]) == (404, "model_not_found")
            assert not worker.served("/v1/chat/completions")
            assert "admin-secret" not in shown.text
        async with running_gateway(await SimulatedWorker().start(), **settings, open_probes=False) as gateway:
            get = gateway.client.get
            assert [(await get(probe)).status_code for probe in ("/health", "/metrics")] == [401, 401]
            assert (await get("/metrics", headers=admin)).status_code == 200
            assert (await get("/health", headers={"x-api-key": KEY})).status_code == 200

    run(scenario())


def test_simulated_limits_of_a_key_hold_and_are_given_back(tmp_path: Path) -> None:
    path = keys_file(tmp_path, spec(requests_per_minute=4, concurrency=1, tokens_per_minute=10_000))
    headers = {"authorization": f"Bearer {KEY}"}

    async def scenario() -> None:
        worker = await SimulatedWorker().start()
        async with running_gateway(worker, api_keys_file=str(path)) as gateway:

            async def ask(**members: Any) -> httpx.Response:
                body = {"model": "simulated", "prompt": [1] * 100, **members}
                return await gateway.client.post("/v1/completions", json=body, headers=headers)

            access = gateway.gateway.access
            assert access is not None
            usage = access.tenants["a"].usage
            assert (await ask()).status_code == 200
            await until(lambda: usage.tokens == {"prompt": 100, "completion": worker.words})
            assert (await ask(stream=True)).status_code == 200
            await until(lambda: usage.tokens == {"prompt": 200, "completion": 2 * worker.words})
            worker.hold_head.clear()
            held = asyncio.create_task(ask())
            await until(lambda: usage.in_flight == 1)
            busy = await ask()
            assert (busy.status_code, busy.json()["error"]["type"]) == (429, "concurrency")
            held.cancel()
            await until(lambda: usage.in_flight == 0)
            worker.hold_head.set()
            assert (await ask()).status_code == 200
            limited = await ask()
            assert (limited.status_code, limited.json()["error"]["type"]) == (429, "requests")
            assert 1 <= int(limited.headers["retry-after"]) <= 15
            assert limited.headers["x-should-retry"] == "true"
            assert await gateway.metric('warmroute_router_key_limited_total{key="a",limit="requests"}') == 1
            assert await gateway.metric('warmroute_router_key_requests_total{key="a"}') == 4

    run(scenario())


def test_simulated_keys_are_taken_from_the_file_while_serving(tmp_path: Path) -> None:
    path = keys_file(tmp_path, spec())

    async def scenario() -> None:
        worker = await SimulatedWorker().start()
        async with running_gateway(worker, api_keys_file=str(path), config_interval=0.05) as gateway:
            access = gateway.gateway.access
            assert access is not None
            assert (await gateway.client.get("/v1/models", headers={"x-api-key": KEY})).status_code == 200
            result = CliRunner().invoke(command, ["keys", "rotate", "a", "--file", str(path), "--now"])
            assert result.exit_code == 0
            fresh = result.stdout.strip()
            await until(lambda: hash_key(fresh) in str(access.tenants["a"].spec.hashes))
            assert (await gateway.client.get("/v1/models", headers={"x-api-key": KEY})).status_code == 401
            assert (await gateway.client.get("/v1/models", headers={"x-api-key": fresh})).status_code == 200

    run(scenario())


@pytest.mark.parametrize("key", ["file:/etc/hostname", "env:HOME"])
def test_simulated_workers_that_are_added_cannot_ask_for_this_machines_secrets(key: str) -> None:
    async def scenario() -> None:
        worker, trap = await SimulatedWorker().start(), await SimulatedWorker().start()
        async with running_gateway(worker) as gateway:
            body = {"url": trap.url, "reports": "none", "key": key}
            answer = await gateway.client.post("/admin/workers", json=body)
            assert answer.status_code == 400
            answer = await gateway.client.post("/admin/workers", json=body | {"key": "its-own"})
            assert answer.status_code == 201
            assert "its-own" not in answer.text + (await gateway.client.get("/admin/workers")).text
            await until(lambda: trap.requests)
            assert all(headers["authorization"] == "Bearer its-own" for _, headers, _ in trap.requests)
        await trap.kill()

    run(scenario())


def test_simulated_other_origins_are_for_those_named() -> None:
    preflight = {"origin": "https://page.example", "access-control-request-method": "POST"}

    async def scenario() -> None:
        async with running_gateway(await SimulatedWorker().start()) as gateway:
            answer = await gateway.client.options("/v1/chat/completions", headers=preflight)
            assert "access-control-allow-origin" not in answer.headers
            assert answer.status_code >= 400
        named = "https://page.example, https://b.example"
        async with running_gateway(await SimulatedWorker().start(), cors_origins=named) as gateway:
            answer = await gateway.client.options("/v1/chat/completions", headers=preflight)
            assert answer.headers["access-control-allow-origin"] == "https://page.example"
            other = {**preflight, "origin": "https://evil.example"}
            answer = await gateway.client.options("/v1/chat/completions", headers=other)
            assert "access-control-allow-origin" not in answer.headers
            for body, status in ((chat_body("x"), 200), (chat_body("x", stream=True), 200), ({}, 400)):
                answer = await gateway.client.post(
                    "/v1/chat/completions", json=body, headers={"origin": "https://page.example"}
                )
                assert answer.status_code == status
                assert answer.headers["access-control-allow-origin"] == "https://page.example"
            assert "x-request-id" in answer.headers["access-control-expose-headers"]
            assert "access-control-allow-credentials" not in answer.headers

    run(scenario())


# The command.


def test_keys_are_made_shown_and_removed_by_command(tmp_path: Path) -> None:
    path = tmp_path / "keys.yaml"

    def keys(*arguments: str, code: int = 0) -> str:
        result = CliRunner().invoke(command, ["keys", *arguments, "--file", str(path)])
        assert result.exit_code == code, result.output
        return result.stdout if code == 0 else result.output

    first = keys("add", "a", "--concurrency", "3", "--model", "m").strip()
    second = keys("add", "b", "--share-cache-with", "a").strip()
    third = keys("add", "c", "--shared-cache").strip()
    assert path.stat().st_mode & 0o777 == 0o600
    content = path.read_text()
    assert not [key for key in (first, second, third) if key in content]
    access = Access(path=str(path))
    tenants = [access.authenticate(bearer(key)) for key in (first, second, third)]
    assert [tenant.name for tenant in tenants] == ["a", "b", "c"]
    salts = [tenant.spec.cache_salt.get_secret_value() for tenant in tenants]
    assert salts[0] == salts[1] != salts[2] == ""
    listed = keys("list")
    assert "a: 3 at once; models: m; own cache" in listed
    assert not [word for word in (*salts[:1], first, hash_key(first)) if word in listed]
    rotated = keys("rotate", "a").strip()
    access.reload()
    assert [access.authenticate(bearer(key)).name for key in (first, rotated)] == ["a", "a"]
    keys("retire", "a")
    keys("disable", "b")
    keys("remove", "c")
    access.reload()
    for key in (first, second, third):
        with pytest.raises(ApiError):
            access.authenticate(bearer(key))
    assert access.authenticate(bearer(rotated)).name == "a"
    assert "there is a key 'a' already" in keys("add", "a", code=2)
    assert "there is no key 'z'; there are: a, b" in keys("remove", "z", code=2)
    assert not list(tmp_path.glob(".keys.yaml.*[!k]")), "no temporary file is left"


def test_changing_keys_leaves_links_and_owners_as_they_were(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    given: list[tuple[int, int]] = []
    monkeypatch.setattr("os.chown", lambda _, user, group: given.append((user, group)))
    path = keys_file(tmp_path, spec())
    (link := tmp_path / "link.yaml").symlink_to(path)
    result = CliRunner().invoke(command, ["keys", "add", "b", "--file", str(link)])
    assert result.exit_code == 0, result.output
    assert link.is_symlink()
    assert [key.name for key in read_keys(path)] == ["a", "b"]
    assert given == [(path.stat().st_uid, path.stat().st_gid)]


def test_a_directory_that_is_not_there_is_named(tmp_path: Path) -> None:
    result = CliRunner().invoke(command, ["keys", "add", "b", "--file", str(tmp_path / "absent" / "keys.yaml")])
    assert result.exit_code == 2
    assert "there is no directory" in result.stderr
