"""The doctor's examination of one worker, without any gateway."""

import asyncio
import random
import time
from email.utils import parsedate_to_datetime
from typing import TYPE_CHECKING, Any, NamedTuple

import httpx
import msgspec

from kv_protocol.errors import ProtocolError
from kv_protocol.hashing import chunk_hashes, root_hash
from kv_protocol.messages import Hello
from router.config import WorkerSpec
from router.errors import ConfigError, InvalidRequest, Unrenderable
from router.event_probe import examine_events
from router.findings import Finding, Result
from router.parity import check_parity
from router.prompt import PromptBuilder
from router.report_probe import ReportProbe

if TYPE_CHECKING:
    from router.doctor import Options

TIMEOUT_S = 5.0
PROBE_TIMEOUT_S = 60.0
SKEW_S = 3.0
"""A Date header tells whole seconds."""
_SAMPLE = [
    {"role": "system", "content": "Be terse.\n"},
    {"role": "user", "content": "Naïve 中文  {x}?"},
    {"role": "assistant", "content": "Yes."},
    {"role": "user", "content": "Why?"},
]


class Proof(NamedTuple):
    """A prompt the worker computed and reported."""

    model: str
    ids: list[int]
    chunk_size: int


class WorkerExam:
    """What can be seen of one worker; members hold what later comparisons need."""

    def __init__(self, spec: WorkerSpec, options: "Options") -> None:
        self.spec = spec
        self.models: dict[str, dict[str, Any]] = {}
        self.hello: Hello | None = None
        self.sample: tuple[int, ...] | None = None
        self.engine_version = ""
        self.proof: Proof | None = None
        self._options = options
        key = spec.key.get_secret_value() or options.api_key
        self._headers = {"authorization": f"Bearer {key}"} if key else {}
        self._base = spec.url.partition("#")[0]
        if spec.rank is not None:
            self._headers["x-data-parallel-rank"] = str(spec.rank)

    @property
    def versions(self) -> tuple[str, str]:
        """Of engine and connector."""
        return self.engine_version, self.hello.version if self.hello is not None else ""

    async def examine(self) -> list[Finding]:
        """Every check, as far as the ones before allow."""
        async with httpx.AsyncClient(base_url=self._base, headers=self._headers, timeout=TIMEOUT_S) as client:
            try:
                began = time.time()
                health = await client.get("/health")
            except httpx.HTTPError as error:
                return [self._unreachable(error)]
            skewed = self._clock(health, (began + time.time()) / 2)
            if health.status_code != httpx.codes.OK:
                answered = f"/health answered {health.status_code}"
                return [self._say("reachable", "fail", answered, "see the engine's log"), skewed]
            found = [self._say("reachable", "ok", "answers"), skewed, await self._version(client)]
            return found + await self._examine_models(client)

    async def _examine_models(self, client: httpx.AsyncClient) -> list[Finding]:
        found = [await self._models(client)]
        base = next((name for name, card in self.models.items() if not card.get("parent")), None)
        if base is None:
            return found
        found += [await self._tokenize(client, base), await self._parity(client, base)]
        if self._options.probe:
            found.append(await self._token_ids(client, base))
        address = self.spec.report_address
        if address is None:
            fix = "run the engine with the connector, and name its report port, for exact routing by cache"
            return [
                *found,
                self._say("reports", "skip", "no report port is named", fix),
                self._say("events", *await examine_events(client, self.spec)),
            ]
        return found + await self._examine_reports(client, base, address)

    async def _examine_reports(self, client: httpx.AsyncClient, model: str, address: tuple[str, int]) -> list[Finding]:
        where = "{}:{}".format(*address)
        try:
            async with ReportProbe(address, self._options.report_token, TIMEOUT_S) as probe:
                self.hello = probe.hello
                found = [await self._reports(probe, where), self._limits(model)]
                if self._options.probe and self.sample is not None:
                    found += await self._prove(client, probe, model)
                return found
        except TimeoutError:
            fix = "see the engine's log: the port is open, and nobody speaks"
            return [self._say("reports", "fail", f"{where} said nothing within {TIMEOUT_S:g} s", fix)]
        except OSError as error:
            fix = "start the engine with WarmrouteConnector; let report_host and report_port be reached from here"
            return [self._say("reports", "fail", f"{where} cannot be reached: {error}", fix)]
        except ProtocolError as error:
            fix = "give --report-token as the worker has it; run the same major version on both sides"
            return [self._say("reports", "fail", f"{where}: {error}", fix)]

    async def _version(self, client: httpx.AsyncClient) -> Finding:
        answer = await _json(client, "GET", "/version")
        self.engine_version = str((answer or {}).get("version", ""))
        if not self.engine_version:
            return self._say("version", "warn", "/version does not say", "is this a vLLM server?")
        return self._say("version", "ok", f"vLLM {self.engine_version}")

    async def _models(self, client: httpx.AsyncClient) -> Finding:
        answer = await _json(client, "GET", "/v1/models")
        cards = (answer or {}).get("data") or []
        self.models = {card["id"]: card for card in cards if isinstance(card, dict) and "id" in card}
        if not self.models:
            fix = "give --api-key if the worker wants one; see the engine's log"
            return self._say("models", "fail", "/v1/models names none", fix)
        return self._say("models", "ok", ", ".join(self.models))

    def _clock(self, answer: httpx.Response, middle: float) -> Finding:
        try:
            told = parsedate_to_datetime(answer.headers["date"]).timestamp() + 0.5
        except (KeyError, ValueError, TypeError):
            return self._say("clock", "skip", "it sends no date")
        if abs(told - middle) > SKEW_S:
            return self._say("clock", "warn", f"{told - middle:+.0f} s from this machine's", "run NTP on both")
        return self._say("clock", "ok", "within a second or two of this machine's")

    async def _tokenize(self, client: httpx.AsyncClient, model: str) -> Finding:
        ids = await _tokens(client, {"model": model, "messages": _SAMPLE})
        self.sample = tuple(ids) if ids is not None else None
        if ids is None:
            fix = "without /tokenize nothing can be compared, and prompts that are not rendered here go by load"
            return self._say("tokenize", "fail", "/tokenize gave no token ids for a chat", fix)
        return self._say("tokenize", "ok", f"{len(ids)} tokens for a chat of {len(_SAMPLE)} messages")

    async def _parity(self, client: httpx.AsyncClient, model: str) -> Finding:
        where = self._options.tokenizer or str(self.models[model].get("root") or "")
        template = self._options.chat_template or None
        longest = self.models[model].get("max_model_len")
        try:
            builder = await asyncio.to_thread(PromptBuilder.load, where, template, max_model_len=longest)
        except (ConfigError, Unrenderable) as error:
            fix = "give --tokenizer with a copy of the model's tokenizer files"
            return self._say("parity", "skip", f"no tokenizer to compare with here: {error}", fix)

        async def tokenize(request: dict[str, Any]) -> list[int]:
            ids = await _tokens(client, {"model": model, **request})
            if ids is None:
                raise InvalidRequest("refused")
            return ids

        parity = await check_parity(builder, tokenize)
        if parity.ok:
            return self._say(
                "parity", "ok", f"{parity.compared} prompts gave equal tokens, {parity.skipped} not compared"
            )
        fix = "use the tokenizer files and --chat-template the worker was started with"
        return self._say("parity", "fail", f"tokens differ: {parity.mismatch}", fix)

    async def _token_ids(self, client: httpx.AsyncClient, model: str) -> Finding:
        message = [{"role": "user", "content": "x"}]
        ids = await _tokens(client, {"model": model, "messages": message})
        if ids is None:
            return self._say("token-ids", "skip", "no ids to send")
        body = {
            "model": model,
            "messages": message,
            "max_tokens": 1,
            "kv_transfer_params": {"prompt_token_ids": ids * 2},
        }
        answer = await _json(client, "POST", "/v1/chat/completions", json=body, timeout=PROBE_TIMEOUT_S)
        counted = ((answer or {}).get("usage") or {}).get("prompt_tokens")
        if counted == 2 * len(ids):
            return self._say("token-ids", "ok", "a chat's token ids are taken in place of its text")
        fix = "nothing is wrong: the worker tokenizes again what the gateway did; run the connector to spare it that"
        return self._say("token-ids", "warn", f"ids were not taken: {counted} tokens counted of {2 * len(ids)}", fix)

    async def _reports(self, probe: ReportProbe, where: str) -> Finding:
        assert probe.hello is not None, "the probe was entered"
        if not await probe.until("complete"):
            fix = "see the engine's log"
            return self._say("reports", "fail", f"{where}: no whole listing: {probe.error or 'too slow'}", fix)
        if not await probe.until("heartbeat"):
            return self._say("reports", "fail", f"{where}: no heartbeat within {TIMEOUT_S:g} s", "see the engine's log")
        tiers = ", ".join(f"{tier.name} {tier.capacity_chunks:,}" for tier in probe.hello.tiers)
        found = f"{where}: connector {probe.hello.version or '?'}, chunks of {probe.hello.chunk_size} tokens; room for {tiers}"
        return self._say("reports", "ok", found)

    def _limits(self, model: str) -> Finding:
        assert self.hello is not None, "reports were read"
        room = self.models[model].get("max_model_len") or 0
        size = self.hello.chunk_size
        if room and room <= size:
            fix = "set a smaller chunk_size"
            return self._say("limits", "fail", f"no prompt of {room} tokens fills a chunk of {size}", fix)
        return self._say("limits", "ok", f"a context of {room or '?'} tokens, chunks of {size}")

    async def _prove(self, client: httpx.AsyncClient, probe: ReportProbe, model: str) -> list[Finding]:
        """Have a prompt computed that nobody has seen: its chunk must be reported, and be reused."""
        assert self.hello is not None, "reports were read"
        size = self.hello.chunk_size
        ids = await self._unseen(client, model, size + 2)
        room = self.models[model].get("max_model_len") or len(ids) + 1
        if len(ids) < size or len(ids) >= room:
            return [self._say("chunk-hash", "skip", f"a prompt of {size} tokens could not be made")]
        expected = chunk_hashes(root_hash(chunk_size=size, model=self.hello.model), ids, size)[0]
        first = await self._complete(client, model, ids)
        if first is None:
            return [self._say("chunk-hash", "fail", "a prompt of one chunk was not answered", "see the engine's log")]
        if not await probe.until_true(lambda: expected in probe.fresh):
            return [self._unproven(probe, expected)]
        self.proof = Proof(model, ids, size)
        proven = self._say("chunk-hash", "ok", f"computed {len(ids)} tokens; the chunk came as {expected.hex()[:12]}…")
        probe.admitted.clear()
        second = await self._complete(client, model, ids)
        return [proven, await self._cached(probe, second, size)]

    def _unproven(self, probe: ReportProbe, expected: bytes) -> Finding:
        if probe.fresh:
            found = f"{len(probe.fresh)} other chunks were reported, {expected.hex()[:12]}… was not"
            return self._say("chunk-hash", "fail", found, "the hashes differ: run the same version on both sides")
        fix = "leave vLLM's prefix caching on (no --no-enable-prefix-caching), and see the engine's log"
        return self._say("chunk-hash", "fail", "a chunk was computed and nothing was reported", fix)

    async def _cached(self, probe: ReportProbe, answer: dict[str, Any] | None, size: int) -> Finding:
        usage = (answer or {}).get("usage") or {}
        told = (usage.get("prompt_tokens_details") or {}).get("cached_tokens")
        await probe.until("admitted")
        reused = max((sum(message.hit_tokens.values()) for message in probe.admitted), default=0)
        if told is not None and told < size <= reused:
            told = None
        if told is None and reused >= size:
            fix = "start vLLM with --enable-prompt-tokens-details, so that clients see it too"
            return self._say("cached-tokens", "warn", f"{reused} tokens reused, said by report only", fix)
        if told is not None and told >= size:
            return self._say("cached-tokens", "ok", f"the same prompt again: {told} tokens reused, {reused} by report")
        fix = (
            "start vLLM with --enable-prompt-tokens-details, and see whether its cache is large enough to keep a chunk"
        )
        return self._say("cached-tokens", "fail", f"the same prompt again: {told} reused tokens were told", fix)

    async def _unseen(self, client: httpx.AsyncClient, model: str, least: int) -> list[int]:
        """Token ids that are the worker's own, in an order nobody has sent before."""
        text = " ".join(f"{word}{random.randrange(10**6)}" for word in ("salt", "pepper", "thyme", "sage") * 8)  # noqa: S311
        ids = await _tokens(client, {"model": model, "prompt": text}) or []
        return [random.choice(ids) for _ in range(least)] if ids else []  # noqa: S311 - no secret

    async def _complete(self, client: httpx.AsyncClient, model: str, ids: list[int]) -> dict[str, Any] | None:
        body = {"model": model, "prompt": ids, "max_tokens": 1, "temperature": 0}
        return await _json(client, "POST", "/v1/completions", json=body, timeout=PROBE_TIMEOUT_S)

    def _unreachable(self, error: httpx.HTTPError) -> Finding:
        fix = "start it, mend the URL, or run the doctor where the workers can be reached"
        return self._say("reachable", "fail", f"no answer: {str(error) or type(error).__name__}", fix)

    def _say(self, check: str, result: Result, found: str, fix: str = "") -> Finding:
        return Finding(check, self.spec.title, result, found, fix)


async def _json(client: httpx.AsyncClient, method: str, path: str, **arguments: Any) -> dict[str, Any] | None:
    """The answer's object; None where there is none, or no success."""
    try:
        answer = await client.request(method, path, **arguments)
        content = msgspec.json.decode(answer.content) if answer.status_code == httpx.codes.OK else None
    except (httpx.HTTPError, msgspec.DecodeError, UnicodeDecodeError):
        return None
    return content if isinstance(content, dict) else None


async def _tokens(client: httpx.AsyncClient, request: dict[str, Any]) -> list[int] | None:
    answer = await _json(client, "POST", "/tokenize", json=request)
    tokens = (answer or {}).get("tokens")
    return tokens if isinstance(tokens, list) and all(type(item) is int for item in tokens) else None
