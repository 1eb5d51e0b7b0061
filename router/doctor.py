"""``warmroute doctor``: probes gateways and workers, and proves, or disproves with the reason and the fix, that they
work together.

Proof is by doing: a prompt nobody has seen is computed by each worker, and the hash its chunk should get must come in
on the report stream, show in the gateway's index, and be reused by the same prompt sent again. Nothing is changed, and
no more than a few hundred tokens are computed per worker.
"""

import asyncio
import time
from collections.abc import Callable, Iterable, Sequence
from typing import Any

import httpx
import msgspec
from rich.console import Console

from router.config import WorkerSpec
from router.doctor_worker import WorkerExam
from router.errors import ConfigError
from router.findings import Finding, Result, as_json, healthy, show

TIMEOUT_S = 5.0
SKEW_S = 2.0
PROBE_TIMEOUT_S = 60.0


class Options(msgspec.Struct):
    """``probe`` is whether workers are given prompts to compute."""

    admin_token: str = ""
    report_token: str = ""
    api_key: str = ""
    tokenizer: str = ""
    chat_template: str = ""
    probe: bool = True


def run(targets: Sequence[str], options: Options, *, json_output: bool) -> int:
    """Examine and show; 0 if nothing failed, else 1.

    Raises:
        ConfigError: a target is not understood.
    """
    findings = asyncio.run(examine(targets, options))
    if json_output:
        print(as_json(findings))  # noqa: T201 - the command's output
    else:
        show(Console(), findings)
    return 0 if healthy(findings) else 1


async def examine(targets: Sequence[str], options: Options) -> list[Finding]:
    """Every finding, target by target, then what concerns several.

    Raises:
        ConfigError: a target is not understood.
    """
    specs = [spec for target in targets for spec in _specs(target)]
    kinds = await asyncio.gather(*(_is_gateway(spec, options) for spec in specs))
    gateways = [GatewayExam(spec.url, options) for spec, is_one in zip(specs, kinds, strict=True) if is_one]
    findings: list[Finding] = []
    for gateway in gateways:
        findings += await gateway.examine()
    workers = [WorkerExam(spec, options) for spec in _workers(specs, kinds, gateways)]
    for worker in workers:  # one after another: each is to compute a prompt alone
        findings += await worker.examine()
        for gateway in gateways:
            findings += await gateway.examine_index(worker)
    for gateway in gateways:
        findings += await gateway.examine_forwarding()
    return findings + list(_compare(workers)) + list(_compare_gateways(gateways))


class GatewayExam:
    """What can be seen of one gateway."""

    def __init__(self, url: str, options: Options) -> None:
        self.url = url
        self.workers: list[dict[str, Any]] = []
        self._options = options
        self._admin = {"authorization": f"Bearer {options.admin_token}"} if options.admin_token else {}
        self._client_headers = {"authorization": f"Bearer {options.api_key}"} if options.api_key else {}

    async def examine(self) -> list[Finding]:
        """Everything but what workers are needed for."""
        version = await self._get("/version")
        found = [
            self._say("reachable", "ok", "answers"),
            self._say("version", "ok", f"gateway {(version or {}).get('version', 'unknown')}"),
            *await self._ready(),
        ]
        began = time.time()
        answer = await self._ask("GET", "/admin/config", headers=self._admin)
        middle = (began + time.time()) / 2
        if answer is None or answer.status_code != httpx.codes.OK:
            return [*found, self._closed(answer)]
        config = answer.json()
        found += [self._say("admin", "ok", "open to us"), *self._config(config), self._clock(config, middle)]
        found.append(self._limits(config))
        self.workers = ((await self._get("/admin/workers", headers=self._admin)) or {}).get("workers", [])
        return found + [finding for worker in self.workers for finding in self._routable(worker)]

    async def examine_index(self, worker: WorkerExam) -> list[Finding]:
        """Whether what a worker was seen to compute is in the gateway's index."""
        name = next((item["name"] for item in self.workers if item["url"] == worker.spec.url), None)
        if name is None or not worker.proof:
            return []
        size = worker.proof.chunk_size
        body = {"model": worker.proof.model, "prompt": worker.proof.ids}
        hit = 0
        for _ in range(10):
            answer = await self._ask("POST", "/admin/route", headers=self._admin, json=body)
            if answer is None or answer.status_code != httpx.codes.OK:
                return [self._say("index", "warn", f"a dry run for {name} was answered {_status(answer)}")]
            candidates = {item["worker"]: item["hit_tokens"] for item in answer.json()["candidates"]}
            if name not in candidates:
                return [self._say("index", "warn", f"{name} would get no request now", "see routable")]
            if (hit := candidates[name]) >= size:
                return [self._say("index", "ok", f"{name}: the chunk it just computed is known, a hit of {hit} tokens")]
            await asyncio.sleep(0.2)
        found = f"{name} computed and reported a chunk of {size} tokens; the gateway predicts a hit of {hit}"
        return [self._say("index", "fail", found, "compare the versions of gateway and worker; see the gateway's log")]

    async def examine_forwarding(self) -> list[Finding]:
        """Whether a request through the gateway is routed by its tokens, and its outcome comes back."""
        models = await self._get("/v1/models", headers=self._client_headers)
        cards = [card["id"] for card in (models or {}).get("data", []) if not card.get("parent")]
        if not self._options.probe or not cards or not self.workers:
            return [self._say("forwarding", "skip", "nothing was sent" if cards else "no model is served")]
        return [await self._forward(model) for model in cards]

    async def _forward(self, model: str) -> Finding:
        body = {"model": model, "messages": [{"role": "user", "content": "Say hello."}], "max_tokens": 1}
        answer = await self._ask(
            "POST", "/v1/chat/completions", headers=self._client_headers, json=body, timeout=PROBE_TIMEOUT_S
        )
        if answer is None or answer.status_code != httpx.codes.OK:
            fix = (
                "name a key with --api-key"
                if answer is not None and answer.status_code == 401
                else "see /admin/workers"
            )
            return self._say("forwarding", "fail", f"a chat with {model} was answered {_status(answer)}", fix)
        request_id = answer.headers.get("x-request-id", "")
        record = await self._record(request_id)
        if record is None:
            found = f"the chat {request_id} is not at /admin/requests"
            return self._say("forwarding", "warn", found, "set recent_requests above 0")
        found = f"{model}: {record['worker']} answered, {record['prompt_tokens']} tokens by {record['tokenized_by']}"
        if record["tokenized_by"] != "router":
            return self._say("forwarding", "warn", found, "give --tokenizer and --chat-template; see parity")
        return self._say("forwarding", "ok", found)

    async def _record(self, request_id: str) -> dict[str, Any] | None:
        for _ in range(10):
            answer = await self._get(f"/admin/requests?id={request_id}", headers=self._admin)
            records: list[dict[str, Any]] = (answer or {}).get("requests", [])
            if records and records[0]["outcome"] != "running":
                return records[0]
            await asyncio.sleep(0.1)
        return None

    async def _ready(self) -> list[Finding]:
        answer = await self._ask("GET", "/ready")
        if answer is not None and answer.status_code == httpx.codes.OK:
            return [self._say("ready", "ok", "every model has a worker")]
        return [self._say("ready", "fail", f"/ready answered {_status(answer)}", "start the workers it lacks")]

    def _closed(self, answer: httpx.Response | None) -> Finding:
        fix = "give --token (or WARMROUTE_ADMIN_TOKEN), or run the doctor where the gateway listens on loopback"
        return self._say("admin", "fail", f"/admin/config was answered {_status(answer)}", fix)

    def _config(self, config: dict[str, Any]) -> list[Finding]:
        if config["error"]:
            fix = "mend the file: what was in force before it still is"
            return [self._say("config", "fail", f"the file was refused: {config['error']}", fix)]
        return [self._say("config", "ok", f"from {config['file']}" if config["file"] else "no file, nothing refused")]

    def _clock(self, config: dict[str, Any], middle: float) -> Finding:
        skew = float(config["now"]) - middle
        if abs(skew) > SKEW_S:
            return self._say("clock", "warn", f"{skew:+.1f} s from this machine's", "run NTP on both")
        return self._say("clock", "ok", f"{skew:+.2f} s from this machine's")

    def _limits(self, config: dict[str, Any]) -> Finding:
        settings, files = config["settings"], config["open_files"]
        wanted = 2 * settings["max_in_flight"]["value"] + settings["max_queue"]["value"] + 256
        found = f"{files} files may be open, {wanted} may be needed"
        if files is not None and files < wanted:
            return self._say("limits", "fail", found, "raise ulimit -n, or lower max_in_flight and max_queue")
        return self._say("limits", "ok", found if files is not None else "no limit of open files is known")

    def _routable(self, worker: dict[str, Any]) -> Iterable[Finding]:
        name, reports = worker["name"], worker["reports"]
        if not worker["healthy"]:
            yield self._say("routable", "fail", f"{name} is down: {worker['down_reason']}", "start it, or mend its URL")
            return
        if held := worker.get("held"):
            yield self._say("routable", "warn", f"{name} is up, and held: {held}", "see its pod: kubectl describe pod")
            return
        state = "draining" if worker["draining"] else f"breaker {worker['breaker']}"
        usable = not worker["draining"] and worker["breaker"] == "closed"
        fix = "take it back with /admin/workers/drain" if worker["draining"] else "see the worker's log"
        yield self._say("routable", "ok" if usable else "warn", f"{name} is up, {state}", "" if usable else fix)
        if reports["address"] is not None and not reports["synced"]:
            fix = f"let {reports['address']} be reached from the gateway, with its report_token"
            yield self._say("reports", "fail", f"{name}: {reports['error'] or 'not listed yet'}", fix)
        parity = worker["tokenization"]["parity"]
        fix = "give the gateway the workers' --tokenizer and --chat-template; its log names the first difference"
        grade: Result = "ok" if parity == "exact" else "fail" if parity == "mismatch" else "warn"
        yield self._say("parity", grade, f"{name}: {parity} as the gateway sees it", "" if grade == "ok" else fix)
        if worker["trust"] < 0.5:
            fix = "see predictions at /admin/workers: its tiers may be too small for its load"
            yield self._say("index", "warn", f"{name}: predictions often fall short, trust {worker['trust']}", fix)

    async def _get(self, path: str, **arguments: Any) -> dict[str, Any] | None:
        answer = await self._ask("GET", path, **arguments)
        try:
            return dict(answer.json()) if answer is not None and answer.status_code == httpx.codes.OK else None
        except ValueError:
            return None

    async def _ask(self, method: str, path: str, **arguments: Any) -> httpx.Response | None:
        return await ask(method, self.url + path, **arguments)

    def _say(self, check: str, result: Result, found: str, fix: str = "") -> Finding:
        return Finding(check, self.url, result, found, fix)


async def ask(method: str, url: str, **arguments: Any) -> httpx.Response | None:
    """One request over a connection of its own; None where nobody answered in time."""
    arguments.setdefault("timeout", TIMEOUT_S)
    try:
        async with httpx.AsyncClient() as client:
            return await client.request(method, url, **arguments)
    except (httpx.HTTPError, httpx.InvalidURL):
        return None


async def _is_gateway(spec: WorkerSpec, options: Options) -> bool:
    del options
    answer = await ask("GET", spec.url + "/version")
    try:
        return answer is not None and answer.json().get("product") == "warmroute"
    except (ValueError, AttributeError):
        return False


def _workers(specs: Sequence[WorkerSpec], kinds: Sequence[bool], gateways: Sequence[GatewayExam]) -> list[WorkerSpec]:
    found = {spec.url: spec for spec, is_gateway in zip(specs, kinds, strict=True) if not is_gateway}
    for gateway in gateways:
        for item in gateway.workers:
            address = item["reports"]["address"] or "none"
            found.setdefault(item["url"], WorkerSpec(url=item["url"], reports=address, name=item["name"]))
    return list(found.values())


def _specs(target: str) -> list[WorkerSpec]:
    try:
        return WorkerSpec.all_of(target if "://" in target else f"http://{target}")
    except ValueError as error:
        raise ConfigError(f"{target!r} is neither a gateway's URL nor URL[,reports=HOST:PORT]: {error}") from error


def _compare(workers: Sequence[WorkerExam]) -> Iterable[Finding]:
    """What has to be the same at all workers of a model."""
    for model in sorted({card for worker in workers for card in worker.models}):
        serving = [worker for worker in workers if model in worker.models]
        watched = [worker for worker in serving if worker.hello is not None]
        fix = "start them with the same chunk_size and model name: a prompt then has the same chunks everywhere"
        yield from _same(
            "same-chunks", model, watched, lambda w: (w.hello.model, w.hello.chunk_size), otherwise="fail", fix=fix
        )
        fix = "only needed where they share a store: same weights, KV dtype, parallel sizes"
        yield from _same(
            "same-cache", model, watched, lambda w: w.hello.identity.digest().hex(), otherwise="warn", fix=fix
        )
        fix = "start them with the same tokenizer and --chat-template"
        known = [worker for worker in serving if worker.sample is not None]
        yield from _same("same-tokens", model, known, lambda w: w.sample, otherwise="fail", fix=fix, show=len)
    fix = "finish the rolling upgrade"
    answering = [worker for worker in workers if worker.engine_version]
    yield from _same("same-version", "workers", answering, lambda w: w.versions, otherwise="warn", fix=fix)


def _same(
    check: str,
    target: str,
    workers: Sequence[WorkerExam],
    value: Callable[[Any], Any],
    *,
    otherwise: Result,
    fix: str,
    show: Callable[[Any], Any] = lambda value: value,
) -> Iterable[Finding]:
    if len(workers) < 2:
        return
    groups: dict[Any, list[str]] = {}
    for worker in workers:
        groups.setdefault(value(worker), []).append(worker.spec.title)
    if len(groups) == 1:
        yield Finding(check, target, "ok", f"the same at {len(workers)} workers")
        return
    found = "; ".join(f"{', '.join(names)}: {show(item)}" for item, names in groups.items())
    yield Finding(check, target, otherwise, found, fix)


def _compare_gateways(gateways: Sequence[GatewayExam]) -> Iterable[Finding]:
    if len(gateways) < 2:
        return
    sets = {gateway.url: {worker["url"] for worker in gateway.workers} for gateway in gateways}
    everyone = set().union(*sets.values())
    missing = {url: sorted(everyone - seen) for url, seen in sets.items() if seen != everyone}
    if not missing:
        yield Finding("same-workers", "gateways", "ok", f"all {len(gateways)} watch {len(everyone)} workers")
    for url, lacking in missing.items():
        yield Finding("same-workers", url, "fail", f"does not watch {', '.join(lacking)}", "add them to its settings")


def _status(answer: httpx.Response | None) -> str:
    return "nothing in time" if answer is None else str(answer.status_code)
