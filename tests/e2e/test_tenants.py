"""Keys and salts on a real engine: tenants share its cache only where they shall, and its own key stays with it."""

import json
from pathlib import Path
from typing import Any

import httpx
import pytest

from router.access import hash_key
from tests.support.engine import serve_engine
from tests.support.gateway import serve_gateway

pytestmark = pytest.mark.engine

KEYS = {name: name * 40 for name in ("a", "b", "c")}
WORKER_KEY = "the-workers-own-key"


def test_tenants_do_not_see_each_others_cache(small_model: str, tmp_path: Path) -> None:
    salts = {"a": "1" * 16, "b": "2" * 16, "c": "1" * 16}
    entries = [{"name": name, "hash": hash_key(key), "cache_salt": salts[name]} for name, key in KEYS.items()]
    keys = tmp_path / "keys.yaml"
    keys.write_text(json.dumps({"keys": entries}))
    keys.chmod(0o600)
    worker_key = tmp_path / "worker-key"
    worker_key.write_text(WORKER_KEY)
    flags = ["--api-key", WORKER_KEY, "--enable-prompt-tokens-details"]
    with serve_engine(small_model, tmp_path, connector={}, flags=flags) as engine:
        worker = f"{engine.url},reports={engine.reports},key=file:{worker_key}"
        with serve_gateway(tmp_path, ["--worker", worker, "--api-keys-file", str(keys)]) as gateway:

            def ask(name: str, path: str = "/v1/chat/completions", **members: Any) -> int:
                """The tokens of the prompt that were in the cache."""
                prompt = {"messages": [{"role": "user", "content": "a prompt of some length " * 40}], "max_tokens": 1}
                if path == "/v1/responses":
                    prompt = {"input": prompt["messages"], "max_output_tokens": 1}
                body = {"model": "small", "temperature": 0, **prompt, **members}
                headers = {"authorization": f"Bearer {KEYS[name]}"}
                answer = httpx.post(gateway.url + path, json=body, headers=headers, timeout=120)
                assert answer.status_code == 200, answer.text
                usage = answer.json()["usage"]
                details = usage.get("prompt_tokens_details") or usage.get("input_tokens_details") or {}
                return int(details.get("cached_tokens") or usage.get("cache_read_input_tokens") or 0)

            assert ask("a") == 0
            assert ask("a") > 0
            assert ask("b") == 0, "another tenant finds nothing"
            assert ask("c") > 0, "but one that shares the salt does"
            assert ask("a", cache_salt="user-1") == 0, "a client can keep its own users apart"
            assert ask("b", cache_salt="user-1") == 0
            assert ask("a", cache_salt="user-1") > 0
            for path in ("/v1/responses", "/v1/messages"):
                other = {"messages": [{"role": "user", "content": path + " asks something else " * 40}]}
                members = other if path == "/v1/messages" else {"input": other["messages"]}
                ask("a", path, **members)
                assert ask("b", path, **members) == 0, path
                assert ask("c", path, **members) > 0, path
            refused = httpx.get(engine.url + "/v1/models", timeout=10)
            assert refused.status_code == 401, "the engine wants its key"
            assert WORKER_KEY not in gateway.log.read_text()
            assert not [key for key in KEYS.values() if key in gateway.log.read_text()]
