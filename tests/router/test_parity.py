import asyncio
import shutil
from collections.abc import Awaitable, Callable
from pathlib import Path
from typing import Any

import pytest

from router.errors import InvalidRequest
from router.parity import Mismatch, check_parity, probes
from router.prompt import PromptBuilder
from tests.router.prompt_samples import TEMPLATES, make_tokenizers
from tests.router.vllm_reference import Reference, Refused

Tokenize = Callable[[dict[str, Any]], Awaitable[list[int]]]


@pytest.fixture(scope="module")
def kinds(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    return make_tokenizers(tmp_path_factory.mktemp("parity"))


def worker(reference: Reference) -> Tokenize:
    async def tokenize(body: dict[str, Any]) -> list[int]:
        call = reference.tokenize_chat if "messages" in body else reference.tokenize_prompt
        try:
            return await asyncio.to_thread(call, body)
        except (Refused, ValueError) as error:
            raise InvalidRequest(str(error)) from error

    return tokenize


def echoing(builder: PromptBuilder, spoil: Callable[[list[int]], list[int]] = lambda ids: ids) -> Tokenize:
    async def tokenize(body: dict[str, Any]) -> list[int]:
        return spoil(builder.chat(body) if "messages" in body else builder.completion(body)[0])

    return tokenize


@pytest.mark.parametrize("name", TEMPLATES)
@pytest.mark.usefixtures("vllm")
def test_the_workers_own_code_agrees(name: str, kinds: dict[str, Path], tmp_path: Path) -> None:
    path = tmp_path / "model"  # of its own: vLLM remembers content formats by path
    shutil.copytree(kinds["bytes-split"], path)
    (path / "chat_template.jinja").write_text(TEMPLATES[name], encoding="utf-8")
    result = asyncio.run(check_parity(PromptBuilder.load(path), worker(Reference(path))))
    assert result.ok, result.mismatch
    assert result.compared + result.skipped == len(list(probes()))
    assert result.skipped < 20


def test_names_the_first_mismatch(kinds: dict[str, Path]) -> None:
    builder = PromptBuilder.load(kinds["bytes"])
    bad = builder.chat({"messages": [{"role": "user", "content": ""}]})
    wrong = [*bad[:-1], 77]
    result = asyncio.run(check_parity(builder, echoing(builder, lambda ids: wrong if ids == bad else ids)))
    assert not result.ok
    assert result.mismatch == Mismatch("chat/empty", len(bad) - 1, bad[-5:], wrong[-5:])
    assert "chat/empty" in str(result.mismatch)
    shorter = asyncio.run(check_parity(builder, echoing(builder, lambda ids: ids[:-1])))
    assert shorter.mismatch is not None
    assert shorter.mismatch.probe == next(probes())[0]


def test_another_models_worker_is_found_out(kinds: dict[str, Path]) -> None:
    builder, other = PromptBuilder.load(kinds["bytes"]), PromptBuilder.load(kinds["bytes-split"])
    assert not asyncio.run(check_parity(builder, echoing(other))).ok


def test_a_probe_only_the_worker_refuses_is_a_mismatch(kinds: dict[str, Path]) -> None:
    async def refuse(_: dict[str, Any]) -> list[int]:
        raise InvalidRequest("no")

    result = asyncio.run(check_parity(PromptBuilder.load(kinds["bytes"]), refuse))
    assert result.mismatch is not None
    assert result.mismatch.theirs is None


def test_nothing_compared_is_not_parity(kinds: dict[str, Path], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(
        "router.parity.probes", lambda: iter([("only", "chat", {"messages": [], "chat_template": "x"})])
    )
    builder = PromptBuilder.load(kinds["bytes"])
    result = asyncio.run(check_parity(builder, echoing(builder)))
    assert (result.ok, result.compared, result.skipped) == (False, 0, 1)


def test_a_worker_that_cannot_be_reached_ends_the_check(kinds: dict[str, Path]) -> None:
    async def broken(_: dict[str, Any]) -> list[int]:
        raise ConnectionError("gone")

    with pytest.raises(ConnectionError):
        asyncio.run(check_parity(PromptBuilder.load(kinds["bytes"]), broken))


def test_probes_are_always_the_same() -> None:
    first, second = list(probes()), list(probes())
    assert first == second
    assert len({name for name, _, _ in first}) == len(first) > 30
