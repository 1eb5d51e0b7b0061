import json
import os
import random
import threading
from pathlib import Path

import pytest
from tokenizers import Tokenizer as Engine

from kv_protocol.hashing import token_bytes
from router import tokenizer as tokenizer_module
from router import tokenizer_files
from router.errors import ConfigError, Unrenderable
from router.tokenizer import Tokenizer
from router.tokenizer_files import TokenizerFiles, find_directory
from tests.router.prompt_samples import make_tokenizers, random_text, save
from tests.router.vllm_reference import Reference

# Where fastokens is expected to be used: everywhere it can read the tokenizer.
REFERENCE_ONLY = {"llama-class", "llama-legacy", "unigram", "wordpiece"}


@pytest.fixture(scope="module")
def kinds(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    return make_tokenizers(tmp_path_factory.mktemp("tokenizers"))


@pytest.mark.usefixtures("vllm")
def test_ids_and_template_variables_equal_the_workers(kinds: dict[str, Path]) -> None:
    for name, path in kinds.items():
        ours, theirs = Tokenizer.load(path), Reference(path).tokenizer
        assert ours.special_tokens == theirs.special_tokens_map, name
        rng = random.Random(7)
        for _ in range(150):
            text = random_text(rng, 30)
            special = rng.random() < 0.5
            expected = list(theirs(text, add_special_tokens=special)["input_ids"])
            assert ours.encode(text, add_special_tokens=special) == expected, (name, text)


@pytest.mark.usefixtures("vllm")
def test_truncation_equals_the_workers(kinds: dict[str, Path]) -> None:
    rng = random.Random(3)
    for name in ("bytes", "bytes-split", "gemma", "wordpiece"):
        ours, theirs = Tokenizer.load(kinds[name]), Reference(kinds[name]).tokenizer
        for _ in range(30):
            text, length, special = random_text(rng, 40), rng.randrange(3, 20), rng.random() < 0.5
            expected = theirs(text, truncation=True, max_length=length, add_special_tokens=special)["input_ids"]
            assert ours.encode_truncated(text, length, add_special_tokens=special) == list(expected), (name, text)


def test_says_which_backend_it_uses(kinds: dict[str, Path]) -> None:
    backends = {name: Tokenizer.load(path).backend for name, path in kinds.items()}
    assert backends == {name: "tokenizers" if name in REFERENCE_ONLY else "fastokens" for name in kinds}


def test_growing_conversation_gives_the_ids_of_a_fresh_encoding(kinds: dict[str, Path]) -> None:
    for name in ("bytes", "gemma", "metaspace", "added"):
        ours = Tokenizer.load(kinds[name])
        reference = Engine.from_str(ours._reference.to_str())
        rng, text = random.Random(11), ""
        for _ in range(40):
            text += f"<|im_start|>user\n{random_text(rng, 30)}<|im_end|>\n"
            assert ours.encode(text) == reference.encode(text, add_special_tokens=False).ids, name


def test_a_twin_that_differs_anywhere_is_not_used(kinds: dict[str, Path], monkeypatch: pytest.MonkeyPatch) -> None:
    class Wrong:
        def __init__(self, engine: Engine) -> None:
            self.engine = engine

        def enable_segment_cache(self, size: int) -> None: ...

        def encode_batch_flat(self, texts: list[str], add_special_tokens: bool) -> tuple[bytes, bytes]:
            changed = texts[0].replace("\u2028", " ")
            return token_bytes(self.engine.encode(changed, add_special_tokens=add_special_tokens).ids), b""

    class Library:
        class Tokenizer:
            @staticmethod
            def from_json_str(text: str) -> Wrong:
                return Wrong(Engine.from_str(text))

    monkeypatch.setattr(tokenizer_module, "fastokens", Library)
    assert Tokenizer.load(kinds["bytes"]).backend == "tokenizers"


def test_threads_share_it(kinds: dict[str, Path]) -> None:
    ours = Tokenizer.load(kinds["bytes"])
    rng = random.Random(5)
    texts = [random_text(rng, 200) for _ in range(40)]
    expected = [Engine.from_str(ours._reference.to_str()).encode(text).ids for text in texts]
    found: list[list[list[int]]] = []
    threads = [threading.Thread(target=lambda: found.append([ours.encode(text) for text in texts])) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert found == [expected] * 4


def test_unpaired_surrogates_are_left_to_the_worker(kinds: dict[str, Path]) -> None:
    for name in ("bytes", "unigram"):
        with pytest.raises(Unrenderable, match="cannot be encoded"):
            Tokenizer.load(kinds[name]).encode("a\ud800b")


def test_loads_from_the_hugging_face_cache(
    kinds: dict[str, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    repository = tmp_path / "hub" / "models--acme--small"
    (repository / "refs").mkdir(parents=True)
    (repository / "refs" / "main").write_text("c0ffee")
    (repository / "snapshots").mkdir()
    (repository / "snapshots" / "c0ffee").symlink_to(kinds["bytes"])
    monkeypatch.delenv("HF_HUB_CACHE", raising=False)
    monkeypatch.setenv("HF_HOME", str(tmp_path))
    assert Tokenizer.load("acme/small").encode("hi") == Tokenizer.load(kinds["bytes"]).encode("hi")
    assert find_directory(kinds["bytes"] / "tokenizer.json") == kinds["bytes"]
    with pytest.raises(ConfigError, match="HF_HOME"):
        Tokenizer.load("acme/other")
    with pytest.raises(ConfigError, match="not a directory"):
        Tokenizer.load("../../etc/passwd")


@pytest.mark.parametrize(
    ("config", "model", "reason"),
    [
        ({"tokenizer_class": "BertTokenizer"}, {}, "BertTokenizer"),
        ({"tokenizer_class": "X", "auto_map": {"AutoTokenizer": ["a.B", None]}}, {}, "auto_map"),
        ({"fix_mistral_regex": True}, {}, "fix_mistral_regex"),
        ({"fast_tokenizer_files": ["tokenizer.5.json"]}, {}, "version"),
        ({"bos_token": {"content": "<s>"}}, {}, "special token"),
        ({}, {"model_type": "unheard_of"}, "unheard_of"),
    ],
)
def test_what_is_not_known_to_be_equal_is_refused(
    kinds: dict[str, Path], tmp_path: Path, config: dict[str, object], model: dict[str, object], reason: str
) -> None:
    (tmp_path / "tokenizer.json").write_bytes((kinds["bytes"] / "tokenizer.json").read_bytes())
    (tmp_path / "tokenizer_config.json").write_text(json.dumps(config))
    (tmp_path / "config.json").write_text(json.dumps(model))
    with pytest.raises(Unrenderable, match=reason):
        Tokenizer.load(tmp_path)


def test_mistral_format_and_missing_files_are_refused(kinds: dict[str, Path], tmp_path: Path) -> None:
    with pytest.raises(Unrenderable, match=r"tokenizer\.json"):
        Tokenizer.load(tmp_path)
    (tmp_path / "tokenizer.json").write_bytes((kinds["bytes"] / "tokenizer.json").read_bytes())
    (tmp_path / "consolidated.safetensors").touch()
    (tmp_path / "tekken.json").touch()
    with pytest.raises(Unrenderable, match="Mistral"):
        Tokenizer.load(tmp_path)


def test_broken_files_are_named(tmp_path: Path) -> None:
    (tmp_path / "tokenizer.json").write_text("{")
    with pytest.raises(ConfigError, match=r"tokenizer\.json is not a JSON object"):
        Tokenizer.load(tmp_path)
    (tmp_path / "tokenizer.json").write_text('{"model": 5}')
    with pytest.raises(ConfigError, match="cannot be loaded"):
        Tokenizer.load(tmp_path)


@pytest.mark.usefixtures("vllm")
def test_chat_templates_are_found_where_transformers_looks(tmp_path: Path) -> None:
    from transformers import AutoTokenizer

    engine = Engine.from_str(
        Engine.from_file(str(make_tokenizers(tmp_path / "k")["bytes"] / "tokenizer.json")).to_str()
    )
    named = [{"name": "default", "template": "D"}, {"name": "tool_use", "template": "T"}]
    for index, (in_config, jinja, extra) in enumerate(
        [("C", None, {}), (named, None, {}), (named, "J", {}), ("C", "J", {"tool_use": "X"}), (None, None, {})]
    ):
        path = tmp_path / str(index)
        save(path, engine, config={"tokenizer_class": "PreTrainedTokenizerFast", "chat_template": in_config})
        (path / "chat_template.jinja").unlink()
        if jinja:
            (path / "chat_template.jinja").write_text(jinja)
        for name, text in extra.items():
            (path / "additional_chat_templates").mkdir()
            (path / "additional_chat_templates" / f"{name}.jinja").write_text(text)
        assert TokenizerFiles.read(path).chat_templates() == AutoTokenizer.from_pretrained(path).chat_template


def test_the_cache_home_follows_the_environment(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    for variable in ("HF_HUB_CACHE", "HF_HOME"):
        monkeypatch.delenv(variable, raising=False)
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    with pytest.raises(ConfigError, match=str(tmp_path)):
        find_directory("a/b")
    monkeypatch.setenv("HF_HUB_CACHE", str(tmp_path / "elsewhere") + os.sep)
    with pytest.raises(ConfigError, match="elsewhere"):
        find_directory("a/b")


@pytest.mark.usefixtures("vllm")
def test_class_tables_are_those_of_the_installed_library() -> None:
    from transformers.models.auto.tokenization_auto import (
        MODELS_WITH_INCORRECT_HUB_TOKENIZER_CLASS as OVERRULED,
    )
    from transformers.models.auto.tokenization_auto import TOKENIZER_MAPPING_NAMES as CLASSES
    from vllm.tokenizers.registry import _MODEL_TYPES_WITH_INCORRECT_TOKENIZER_CLASS as BY_VLLM

    plain = {"TokenizersBackend", "MistralCommonBackend"}
    listed = tokenizer_files._PLAIN_MODEL_TYPES - BY_VLLM
    assert {name for name in listed if CLASSES.get(name) not in plain} == set()
    rebuilding = tokenizer_files._REBUILDING_CLASSES
    forced = {name: CLASSES[name] for name in OVERRULED if CLASSES.get(name) in rebuilding}
    assert forced == tokenizer_files._FORCED_CLASSES
    assert BY_VLLM <= tokenizer_files._PLAIN_MODEL_TYPES
