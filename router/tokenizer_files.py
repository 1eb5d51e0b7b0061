"""A model's tokenizer files, read as the worker's own libraries read them.

vLLM loads tokenizers through transformers (5.x), and what transformers makes of a directory is more than its
``tokenizer.json``: tokens named only in ``tokenizer_config.json`` or ``special_tokens_map.json`` join the vocabulary,
and some tokenizer classes take nothing but vocabulary, merges and post-processor from the file and put their own
normalizer and pre-tokenizer around them. Both are repeated here on a ``tokenizers.Tokenizer``. What is not known to
come out equal raises Unrenderable.
"""

import os
import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, cast

import msgspec
from tokenizers import AddedToken, Regex, normalizers, pre_tokenizers, processors
from tokenizers import Tokenizer as Engine
from tokenizers.models import BPE

from router.errors import ConfigError, Unrenderable

NAMED_TOKENS = ("bos_token", "eos_token", "unk_token", "sep_token", "pad_token", "cls_token", "mask_token")

# Classes that use tokenizer.json as it stands.
_PLAIN_CLASSES = frozenset(
    {"TokenizersBackend", "PythonBackend", "PreTrainedTokenizer", "PreTrainedTokenizerFast", "BloomTokenizer"}
)
# Model types for which AutoTokenizer overrules tokenizer_config.json and uses tokenizer.json as it stands.
_PLAIN_MODEL_TYPES = frozenset(
    """
    aria arctic bigbird_pegasus chameleon chatlm deepseek_ocr deepseek_ocr2 deepseek_v2 deepseek_v3 deepseek_v32
    deepseek_v4 deepseek_vl deepseek_vl_hybrid deepseek_vl_v2 ernie4_5 ernie4_5_moe flex_olmo fuyu glm glm4
    glm4_moe glm4_moe_lite glm4v glm4v_moe gpt_bigcode granite granitemoe granitemoehybrid granitemoeshared
    h2ovl_chat hyperclovax hyperclovax_vlm internlm2 jamba janus kimi_k25 kimi_linear llava llava_next
    mimo_v2_flash ministral ministral3 minicpm3 minicpmv minicpmv4_6 minicpmv4_7 minimax_m2 mistral mistral3
    mixtral modernbert modernbert-decoder molmo molmo2 nemotron nvfp4 olmo2 olmo3 olmo_hybrid opencua openvla
    paddleocr_vl persimmon phi3 phi3_v phimoe pixtral smolvlm stablelm step3_vl step3p5 step3p7 unlimited-ocr
    unlimited_ocr vipllava voxtral voxtral_realtime
    """.split()  # noqa: SIM905 - a table of names
)
# Model types whose class AutoTokenizer takes from its own table, whatever the files say.
_FORCED_CLASSES = {
    "hyperclovax_vision_v2": "GPT2Tokenizer",
    "qwen2": "Qwen2Tokenizer",
    "qwen3_5": "Qwen3_5Tokenizer",
    "qwen3_5_moe": "Qwen3_5Tokenizer",
    "qwen3_5_moe_text": "Qwen3_5Tokenizer",
    "qwen4_exp": "Qwen3_5Tokenizer",
}
# Models whose chats vLLM renders in code of its own instead of a Jinja template.
_OWN_CHAT_ENCODING = frozenset(
    {
        "DeepseekV32ForCausalLM",
        "DeepseekV41ForCausalLM",
        "DeepseekV4ForCausalLM",
        "DeepseekV4ForConditionalGeneration",
        "GptOssForCausalLM",
        "InklingForCausalLM",
        "InklingForConditionalGeneration",
        "KimiK3ForConditionalGeneration",
        "MoonshotKimiaForCausalLM",
    }
)
_ENDOFTEXT = "<|endoftext|>"
_QWEN_END = {"unk_token": _ENDOFTEXT, "bos_token": None, "eos_token": _ENDOFTEXT, "pad_token": _ENDOFTEXT}
_GPT_END = {"unk_token": _ENDOFTEXT, "bos_token": _ENDOFTEXT, "eos_token": _ENDOFTEXT, "pad_token": None}
# Classes that rebuild the tokenizer, with the special tokens they fill in.
_REBUILDING_CLASSES: dict[str, dict[str, str | None]] = {
    "GPT2Tokenizer": _GPT_END,
    "GPTNeoXTokenizer": {**_GPT_END, "pad_token": "<|padding|>"},
    "GemmaTokenizer": {
        "unk_token": "<unk>",
        "bos_token": "<bos>",
        "eos_token": "<eos>",
        "pad_token": "<pad>",
        "mask_token": "<mask>",
    },
    "LlamaTokenizer": {"unk_token": "<unk>", "bos_token": "<s>", "eos_token": "</s>"},
    "Qwen2Tokenizer": _QWEN_END,
    "Qwen3_5Tokenizer": _QWEN_END,
}
_LETTER = {"Qwen2Tokenizer": r"\p{L}", "Qwen3_5Tokenizer": r"[\p{L}\p{M}]"}
_REPOSITORY = re.compile(r"(?:[\w.-]+/)?[\w.-]+")


@dataclass(frozen=True)
class TokenizerFiles:
    """The parsed JSON files of one model directory; a file that is not there is an empty object."""

    directory: Path
    tokenizer: dict[str, Any]
    config: dict[str, Any]
    model: dict[str, Any]
    special_tokens_map: dict[str, Any]
    added_tokens: dict[str, Any]

    @classmethod
    def read(cls, where: str | Path) -> "TokenizerFiles":
        """Read a directory, or a repository in the local Hugging Face cache; nothing is fetched.

        Raises:
            ConfigError: there is no such directory and no such cached repository, or a file is not JSON.
            Unrenderable: there is no ``tokenizer.json``.
        """
        directory = find_directory(where)
        if not (directory / "tokenizer.json").is_file():
            reason = "only the worker can convert its tokenizer"
            if is_mistral_format(directory):
                reason = "the worker tokenizes with mistral-common"
            raise Unrenderable(f"{directory} has no tokenizer.json; {reason}")
        config = _read_object(directory, "tokenizer_config.json")
        versions = config.get("fast_tokenizer_files")
        if versions:
            raise Unrenderable("tokenizer_config.json chooses among several tokenizer files by library version")
        return cls(
            directory,
            _read_object(directory, "tokenizer.json"),
            config,
            _read_object(directory, "config.json"),
            _read_object(directory, "special_tokens_map.json"),
            _read_object(directory, "added_tokens.json"),
        )

    def own_chat_encoding(self) -> str | None:
        """The architecture, when vLLM renders this model's chats without a Jinja template."""
        architectures = self.model.get("architectures") or []
        if self.model.get("model_type") == "gpt_oss":
            return "gpt_oss"
        return next((name for name in architectures if name in _OWN_CHAT_ENCODING), None)

    def chat_templates(self) -> str | dict[str, str] | None:
        """The template, or the named templates, in the order of precedence transformers uses."""
        named = {}
        default = self.directory / "chat_template.jinja"
        if default.is_file():
            named["default"] = default.read_text(encoding="utf-8")
        extra = self.directory / "additional_chat_templates"
        for path in sorted(extra.glob("*.jinja")) if extra.is_dir() else []:
            named[path.name.removesuffix(".jinja")] = path.read_text(encoding="utf-8")
        if named:
            return named["default"] if named.keys() == {"default"} else named
        return _templates_from(self.config.get("chat_template"))

    def processor_template(self) -> str | None:
        """The template of a multimodal model's processor, which vLLM prefers for chats without tools."""
        legacy = _read_object(self.directory, "chat_template.json").get("chat_template")
        has_processor = any(
            (self.directory / name).is_file() for name in ("processor_config.json", "preprocessor_config.json")
        )
        return legacy if has_processor and isinstance(legacy, str) else None


@dataclass
class BuiltTokenizer:
    """``special_tokens`` holds the variables a chat template sees, such as ``bos_token``."""

    engine: Engine
    special_tokens: dict[str, str]
    split_special_tokens: bool = False
    class_name: str = "TokenizersBackend"


def find_directory(where: str | Path) -> Path:
    """A directory as given, or the snapshot of a repository's ``main`` in the local Hugging Face cache."""
    directory = Path(where).expanduser()
    if directory.is_dir():
        return directory
    if directory.is_file() and directory.name == "tokenizer.json":
        return directory.parent
    name = str(where)
    if not _REPOSITORY.fullmatch(name):
        raise ConfigError(f"tokenizer {name!r} is not a directory; give a directory or a repository name")
    repository = _hub_cache() / f"models--{name.replace('/', '--')}"
    reference = repository / "refs" / "main"
    if reference.is_file():
        snapshot = repository / "snapshots" / reference.read_text(encoding="utf-8").strip()
        if snapshot.is_dir():
            return snapshot
    raise ConfigError(
        f"tokenizer {name!r} is neither a directory nor in the Hugging Face cache at {_hub_cache()}; "
        "give the directory that holds its tokenizer.json, or set HF_HOME"
    )


def is_mistral_format(where: str | Path) -> bool:
    """Whether the files there are those of Mistral's own tokenizer, which vLLM uses by way of mistral-common."""
    try:
        directory = find_directory(where)
    except ConfigError:
        return False
    return (directory / "tekken.json").is_file() or any(directory.glob("tokenizer.model.v*"))


def _hub_cache() -> Path:
    if cache := os.environ.get("HF_HUB_CACHE"):
        return Path(cache)
    if home := os.environ.get("HF_HOME"):
        return Path(home).expanduser() / "hub"
    base = os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache"
    return Path(base) / "huggingface" / "hub"


def _read_object(directory: Path, name: str) -> dict[str, Any]:
    path = directory / name
    if not path.is_file():
        return {}
    try:
        return msgspec.json.decode(path.read_bytes(), type=dict[str, Any])
    except (msgspec.DecodeError, UnicodeDecodeError) as error:
        raise ConfigError(f"{path} is not a JSON object: {error}") from error


def _templates_from(value: Any) -> str | dict[str, str] | None:
    if isinstance(value, list):
        value = {entry["name"]: entry["template"] for entry in value}
    if value is None or isinstance(value, str):
        return value
    if isinstance(value, dict) and all(isinstance(text, str) for text in value.values()):
        return value
    raise Unrenderable("chat_template in tokenizer_config.json is neither text nor a list of named templates")


def build(files: TokenizerFiles) -> BuiltTokenizer:
    """The tokenizer a worker ends up with.

    Raises:
        Unrenderable: this model's tokenizer class, or one of its settings, is not known to be reproduced exactly.
    """
    _refuse_unknown(files)
    class_name = _class_name(files)
    tokens = _Tokens.collect(files, _REBUILDING_CLASSES.get(class_name, {}))
    if class_name in _PLAIN_CLASSES:
        engine = Engine.from_file(str(files.directory / "tokenizer.json"))
    else:
        engine = _rebuild(class_name, files, tokens)
    engine.no_padding()
    engine.no_truncation()
    split = bool(files.config.get("split_special_tokens", False))
    engine.encode_special_tokens = split
    tokens.add_to(engine)
    if class_name == "Qwen2Tokenizer":
        engine.add_tokens([AddedToken(text, special=True) for text in dict.fromkeys(tokens.all_texts())])
    return BuiltTokenizer(engine, tokens.variables(), split, class_name)


def _refuse_unknown(files: TokenizerFiles) -> None:
    auto_map = files.config.get("auto_map")
    if auto_map and not (isinstance(auto_map, dict) and "AutoTokenizer" not in auto_map):
        raise Unrenderable("the tokenizer comes with code of its own (auto_map)")
    if files.config.get("fix_mistral_regex"):
        raise Unrenderable("fix_mistral_regex replaces the tokenizer's pattern when it is loaded")
    if any(files.directory.glob("consolidated*.safetensors")) and is_mistral_format(files.directory):
        raise Unrenderable("vLLM uses Mistral's own tokenizer for this model")


def _class_name(files: TokenizerFiles) -> str:
    model_type = files.model.get("model_type")
    if model_type in _FORCED_CLASSES:
        return _FORCED_CLASSES[model_type]
    named = files.config.get("tokenizer_class") or files.model.get("tokenizer_class")
    if model_type in _PLAIN_MODEL_TYPES or named in _PLAIN_CLASSES:
        return "TokenizersBackend"
    name = str(named).removesuffix("Fast") if named else ""
    if name in _PLAIN_CLASSES or (not name and model_type in (None, "llama")):
        return "TokenizersBackend"
    if name in _REBUILDING_CLASSES:
        return name
    raise Unrenderable(f"tokenizer class {named or model_type!r} is not one whose construction is known here")


@dataclass
class _Tokens:
    """Every token the files name, on its way into the vocabulary."""

    named: dict[str, Any] = field(default_factory=dict)
    extra: list[Any] = field(default_factory=list)
    added: dict[int, AddedToken] = field(default_factory=dict)

    @classmethod
    def collect(cls, files: TokenizerFiles, defaults: Mapping[str, str | None]) -> "_Tokens":
        config = dict(files.config)
        if "additional_special_tokens" in config and not config.get("extra_special_tokens"):
            config["extra_special_tokens"] = config.pop("additional_special_tokens")
        specific = _pop_model_specific(config)
        if "added_tokens_decoder" in config:
            added = {int(index): AddedToken(**token) for index, token in config["added_tokens_decoder"].items()}
        else:
            added = _legacy_added(files, config, specific)
        config = _revive(config)
        by_text = {token.content: token for token in added.values()}
        named: dict[str, Any] = dict.fromkeys(NAMED_TOKENS)
        for key in NAMED_TOKENS:
            value = config.get(key, defaults.get(key))
            named[key] = by_text.get(_text(value), value) if key in config and value is not None else value
        for key, value in config.items():
            if key.endswith("_token") and isinstance(value, AddedToken):
                named.setdefault(key, value)
        named |= specific
        if "additional_special_tokens" in config and "extra_special_tokens" not in config:
            config["extra_special_tokens"] = config["additional_special_tokens"]
        extra = config.get("extra_special_tokens") or []
        tokens = cls(named, list(extra), added)
        tokens.check()
        return tokens

    def check(self) -> None:
        for token in (*self.named.values(), *self.extra):
            if token is not None and not isinstance(token, str | AddedToken):
                raise Unrenderable("a special token is given in a form whose meaning differs between versions")

    def all_texts(self) -> list[str]:
        return [_text(token) for token in (*self.named.values(), *self.extra) if token is not None]

    def variables(self) -> dict[str, str]:
        return {name: _text(token) for name, token in self.named.items() if token is not None}

    def add_to(self, engine: Engine) -> None:
        queue: list[Any] = [token for _, token in sorted(self.added.items())]
        known = {token.content for token in engine.get_added_tokens_decoder().values()}
        known |= {token.content for token in queue}
        for token in (*self.named.values(), *self.extra):
            if token is not None and _text(token) not in known and token not in queue:
                queue.append(token)
        names = {_text(token) for token in self.named.values() if token}
        engine.add_tokens([_as_special(token, names) for token in queue])


def _pop_model_specific(config: dict[str, Any]) -> dict[str, Any]:
    keys = [k for k, v in config.items() if k.endswith("_token") and k not in NAMED_TOKENS and isinstance(v, str)]
    specific = {key: config.pop(key) for key in keys}
    if isinstance(config.get("extra_special_tokens"), dict):
        specific |= _revive(config.pop("extra_special_tokens"))
    return specific


def _legacy_added(files: TokenizerFiles, config: dict[str, Any], specific: dict[str, Any]) -> dict[int, AddedToken]:
    for key, value in files.special_tokens_map.items():
        config[key] = _legacy_value(key, value, config)
    if isinstance(config.get("extra_special_tokens"), dict):
        specific |= config.pop("extra_special_tokens")
    special = {_text(config[key]) for key in NAMED_TOKENS if config.get(key)}
    special |= {_text(token) for token in config.get("extra_special_tokens") or []}
    added = {
        index: AddedToken(text, rstrip=False, lstrip=False, normalized=text not in special, special=text in special)
        for text, index in files.added_tokens.items()
    }
    for token in files.tokenizer.get("added_tokens", []):
        added[token["id"]] = AddedToken(**{key: value for key, value in token.items() if key != "id"})
    return added


def _legacy_value(key: str, value: Any, config: Mapping[str, Any]) -> Any:
    if key == "extra_special_tokens" and isinstance(value, list):
        merged = list(config.get(key) or [])
        merged += [_special(token) for token in value if _special(token) not in merged]
        return merged
    return _special(value) if key != "extra_special_tokens" else value


def _special(value: Any) -> Any:
    if not isinstance(value, dict):
        return value
    flags = {key: flag for key, flag in value.items() if key not in ("special", "__type")}
    return AddedToken(**flags, special=True)


def _revive(value: Any) -> Any:
    """Serialized AddedTokens, at any depth, as AddedTokens."""
    if isinstance(value, dict):
        if value.get("__type") == "AddedToken":
            return AddedToken(**{key: flag for key, flag in value.items() if key != "__type"})
        return {key: _revive(item) for key, item in value.items()}
    return [_revive(item) for item in value] if isinstance(value, list) else value


def _as_special(token: Any, names: set[str]) -> AddedToken:
    if isinstance(token, str):
        return AddedToken(token, special=True)
    if not token.special and token.content in names:
        token.special = True
    return token  # type: ignore[no-any-return]


def _text(token: Any) -> str:
    return token.content if isinstance(token, AddedToken) else str(token)


def _rebuild(class_name: str, files: TokenizerFiles, tokens: _Tokens) -> Engine:
    model = files.tokenizer.get("model", {})
    if model.get("type") != "BPE" or not isinstance(model.get("vocab"), dict):
        raise Unrenderable(f"{class_name} rebuilds its tokenizer from a vocabulary that is not BPE")
    pairs = (merge.split(" ") if isinstance(merge, str) else merge for merge in model["merges"])
    merges = [(left, right) for left, right in pairs]
    engine = Engine(BPE(vocab=model["vocab"], merges=merges, **_bpe_flags(class_name, tokens)))
    prefix_space = files.config.get("add_prefix_space")
    if class_name in ("GPT2Tokenizer", "GPTNeoXTokenizer"):
        engine.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=bool(prefix_space))
    if class_name in _LETTER:
        engine.pre_tokenizer = _qwen_pre_tokenizer(_LETTER[class_name], prefix_space=bool(prefix_space))
    if class_name in _LETTER or class_name == "GPTNeoXTokenizer":
        engine.normalizer = normalizers.NFC()
    if class_name == "GemmaTokenizer":
        engine.normalizer = normalizers.Replace(" ", "▁")
        engine.pre_tokenizer = pre_tokenizers.Split(pattern=" ", behavior="merged_with_previous", invert=False)
    if class_name == "LlamaTokenizer":
        engine.pre_tokenizer = _llama_pre_tokenizer(files.config)
    # GPT-NeoX also rebuilds the post-processor, and adds no special token unless its class is told to.
    if class_name != "GPTNeoXTokenizer" and files.tokenizer.get("post_processor") is not None:
        engine.post_processor = _post_processor(files)
    return engine


def _bpe_flags(class_name: str, tokens: _Tokens) -> dict[str, Any]:
    if class_name == "LlamaTokenizer":
        return {"fuse_unk": True, "byte_fallback": True}
    if class_name == "GemmaTokenizer":
        return {"fuse_unk": True, "byte_fallback": True, "unk_token": _text(tokens.named["unk_token"])}
    return {"continuing_subword_prefix": "", "end_of_word_suffix": "", "fuse_unk": False}


def _llama_pre_tokenizer(config: Mapping[str, Any]) -> pre_tokenizers.PreTokenizer:
    prefix_space = config.get("add_prefix_space")
    scheme = "never" if prefix_space is False else "always" if config.get("legacy", False) else "first"
    return pre_tokenizers.Metaspace(replacement="▁", prepend_scheme=scheme, split=False)


def _qwen_pre_tokenizer(letter: str, *, prefix_space: bool) -> pre_tokenizers.PreTokenizer:
    mark = r"\p{M}" if letter != r"\p{L}" else ""
    words = (
        r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?" + letter + r"+|\p{N}"
        r"| ?[^\s\p{L}" + mark + r"\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
    )
    split = pre_tokenizers.Split(Regex(words), behavior="isolated", invert=False)
    return pre_tokenizers.Sequence([split, pre_tokenizers.ByteLevel(add_prefix_space=prefix_space, use_regex=False)])


def _post_processor(files: TokenizerFiles) -> processors.PostProcessor:
    stub = {**files.tokenizer, "model": {**files.tokenizer["model"], "vocab": {}, "merges": []}, "added_tokens": []}
    engine = Engine.from_str(msgspec.json.encode(stub).decode())
    return cast("processors.PostProcessor", engine.post_processor)
