"""Tokenizers and chat templates of every kind, made on the spot, and random chats to try them on."""

import json
import random
import string
from pathlib import Path
from typing import Any

from tokenizers import (
    AddedToken,
    Regex,
    Tokenizer,
    decoders,
    models,
    normalizers,
    pre_tokenizers,
    processors,
    trainers,
)

CHATML = (
    "{% for m in messages %}<|im_start|>{{ m['role'] }}\n{{ m['content'] or '' }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)

LLAMA_LIKE = """{{- bos_token }}
{%- if custom_tools is defined %}
    {%- set tools = custom_tools %}
{%- endif %}
{%- if not date_string is defined %}
    {%- set date_string = strftime_now("%d %b %Y") %}
{%- endif %}
{%- if messages[0]['role'] == 'system' %}
    {%- set system_message = messages[0]['content'] | trim %}
    {%- set messages = messages[1:] %}
{%- else %}
    {%- set system_message = "" %}
{%- endif %}
{{- "<|start_header_id|>system<|end_header_id|>\\n\\n" }}
{%- if tools is not none %}
    {{- "Environment: ipython\\n" }}
{%- endif %}
{{- "Today Date: " + date_string + "\\n\\n" + system_message + "<|eot_id|>" }}
{%- if tools is not none %}
    {%- for t in tools %}
        {{- t | tojson(indent=4) }}
        {{- "\\n\\n" }}
    {%- endfor %}
{%- endif %}
{%- for message in messages %}
    {%- if message.role == 'ipython' or message.role == 'tool' %}
        {{- "<|start_header_id|>ipython<|end_header_id|>\\n\\n" }}
        {%- if message.content is mapping or message.content is iterable %}
            {{- message.content | tojson }}
        {%- else %}
            {{- message.content }}
        {%- endif %}
        {{- "<|eot_id|>" }}
    {%- elif 'tool_calls' in message %}
        {%- if message.tool_calls | length != 1 %}
            {{- raise_exception("This model only supports single tool-calls at once!") }}
        {%- endif %}
        {%- set tool_call = message.tool_calls[0].function %}
        {{- '<|start_header_id|>assistant<|end_header_id|>\\n\\n' }}
        {{- '{"name": "' + tool_call.name + '", "parameters": ' }}
        {{- tool_call.arguments | tojson }}
        {{- "}<|eot_id|>" }}
    {%- else %}
        {{- '<|start_header_id|>' + message['role'] + '<|end_header_id|>\\n\\n' + message['content'] | trim }}
        {{- '<|eot_id|>' }}
    {%- endif %}
{%- endfor %}
{%- if add_generation_prompt %}
    {{- '<|start_header_id|>assistant<|end_header_id|>\\n\\n' }}
{%- endif %}
"""

QWEN_LIKE = """{%- if tools %}
    {{- '<|im_start|>system\\n' }}
    {%- if messages[0].role == 'system' %}{{- messages[0].content + '\\n\\n' }}{%- endif %}
    {{- "# Tools\\n<tools>" }}
    {%- for tool in tools %}
        {{- "\\n" }}
        {{- tool | tojson }}
    {%- endfor %}
    {{- "\\n</tools><|im_end|>\\n" }}
{%- elif messages[0].role == 'system' %}
    {{- '<|im_start|>system\\n' + messages[0].content + '<|im_end|>\\n' }}
{%- endif %}
{%- set ns = namespace(multi_step_tool=true, last_query_index=messages|length - 1) %}
{%- for message in messages[::-1] %}
    {%- set index = (messages|length - 1) - loop.index0 %}
    {%- if ns.multi_step_tool and message.role == "user" and message.content is string %}
        {%- set ns.multi_step_tool = false %}
        {%- set ns.last_query_index = index %}
    {%- endif %}
{%- endfor %}
{%- for message in messages %}
    {%- set content = message.content if message.content is string else '' %}
    {%- if message.role == "user" or (message.role == "system" and not loop.first) %}
        {{- '<|im_start|>' + message.role + '\\n' + content + '<|im_end|>' + '\\n' }}
    {%- elif message.role == "assistant" %}
        {%- set reasoning_content = '' %}
        {%- if message.reasoning_content is string %}
            {%- set reasoning_content = message.reasoning_content %}
        {%- elif '</think>' in content %}
            {%- set reasoning_content = content.split('</think>')[0].rstrip('\\n').split('<think>')[-1].lstrip('\\n') %}
            {%- set content = content.split('</think>')[-1].lstrip('\\n') %}
        {%- endif %}
        {%- if loop.index0 > ns.last_query_index and (loop.last or reasoning_content) %}
            {{- '<|im_start|>assistant\\n<think>\\n' + reasoning_content.strip('\\n') + '\\n</think>\\n\\n' }}
            {{- content.lstrip('\\n') }}
        {%- else %}
            {{- '<|im_start|>' + message.role + '\\n' + content }}
        {%- endif %}
        {%- for tool_call in message.tool_calls or [] %}
            {%- if tool_call.function %}{%- set tool_call = tool_call.function %}{%- endif %}
            {{- '\\n<tool_call>\\n{"name": "' + tool_call.name + '", "arguments": ' }}
            {%- if tool_call.arguments is string %}{{- tool_call.arguments }}
            {%- else %}{{- tool_call.arguments | tojson }}{%- endif %}
            {{- '}\\n</tool_call>' }}
        {%- endfor %}
        {{- '<|im_end|>\\n' }}
    {%- elif message.role == "tool" %}
        {%- if loop.first or (messages[loop.index0 - 1].role != "tool") %}{{- '<|im_start|>user' }}{%- endif %}
        {{- '\\n<tool_response>\\n' + content + '\\n</tool_response>' }}
        {%- if loop.last or (messages[loop.index0 + 1].role != "tool") %}{{- '<|im_end|>\\n' }}{%- endif %}
    {%- endif %}
{%- endfor %}
{%- if add_generation_prompt %}
    {{- '<|im_start|>assistant\\n' }}
    {%- if enable_thinking is defined and enable_thinking is false %}{{- '<think>\\n\\n</think>\\n\\n' }}{%- endif %}
{%- endif %}
"""

MISTRAL_LIKE = """{%- if messages[0]["role"] == "system" %}
    {%- set system_message = messages[0]["content"] %}
    {%- set loop_messages = messages[1:] %}
{%- else %}
    {%- set loop_messages = messages %}
{%- endif %}
{{- bos_token }}
{%- for message in loop_messages %}
    {%- if message["role"] == "user" %}
        {%- if tools is not none and loop.last %}
            {{- "[AVAILABLE_TOOLS] [" }}
            {%- for tool in tools %}
                {%- set tool = tool.function %}
                {{- '{"type": "function", "function": {' }}
                {%- for key, val in tool.items() if key != "return" %}
                    {%- if val is string %}{{- '"' + key + '": "' + val + '"' }}
                    {%- else %}{{- '"' + key + '": ' + val|tojson }}{%- endif %}
                    {%- if not loop.last %}{{- ", " }}{%- endif %}
                {%- endfor %}
                {{- "}}" }}
            {%- endfor %}
            {{- "][/AVAILABLE_TOOLS]" }}
        {%- endif %}
        {%- if loop.first and system_message is defined %}
            {{- "[INST] " + system_message + "\\n\\n" + message["content"] + "[/INST]" }}
        {%- else %}
            {{- "[INST] " + message["content"] + "[/INST]" }}
        {%- endif %}
    {%- elif message["role"] == "tool" %}
        {{- '[TOOL_RESULTS] {"content": ' + message.content|string + ', "call_id": "' }}
        {%- if message.tool_call_id is defined %}{{- message.tool_call_id|string }}{%- endif %}
        {{- '"}[/TOOL_RESULTS]' }}
    {%- elif message.tool_calls is defined and message.tool_calls is not none %}
        {{- "[TOOL_CALLS] [" }}
        {%- for tool_call in message.tool_calls %}
            {{- tool_call|tojson }}
        {%- endfor %}
        {{- "]" + eos_token }}
    {%- elif message["role"] == "assistant" %}
        {{- " " + message["content"]|trim + eos_token}}
    {%- else %}
        {{- raise_exception("Only user and assistant roles are supported, with the exception of an initial system") }}
    {%- endif %}
{%- endfor %}
"""

GEMMA_LIKE = """{{ bos_token }}
{%- if messages[0]['role'] == 'system' -%}
    {%- if messages[0]['content'] is string -%}
        {%- set first_user_prefix = messages[0]['content'] + '\\n\\n' -%}
    {%- else -%}
        {%- set first_user_prefix = messages[0]['content'][0]['text'] + '\\n\\n' -%}
    {%- endif -%}
    {%- set loop_messages = messages[1:] -%}
{%- else -%}
    {%- set first_user_prefix = "" -%}
    {%- set loop_messages = messages -%}
{%- endif -%}
{%- for message in loop_messages -%}
    {%- if (message['role'] == 'user') != (loop.index0 % 2 == 0) -%}
        {{ raise_exception("Conversation roles must alternate user/assistant/user/assistant/...") }}
    {%- endif -%}
    {%- set role = "model" if message['role'] == 'assistant' else message['role'] -%}
    {{ '<start_of_turn>' + role + '\\n' + (first_user_prefix if loop.first else "") }}
    {%- if message['content'] is string -%}
        {{ message['content'] | trim }}
    {%- elif message['content'] is iterable -%}
        {%- for item in message['content'] -%}
            {%- if item['type'] == 'image' -%}{{ '<start_of_image>' }}
            {%- elif item['type'] == 'text' -%}{{ item['text'] | trim }}
            {%- endif -%}
        {%- endfor -%}
    {%- endif -%}
    {{ '<end_of_turn>\\n' }}
{%- endfor -%}
{%- if add_generation_prompt -%}{{'<start_of_turn>model\\n'}}{%- endif -%}
"""

DUMPING = """{%- macro show(content) -%}
    {%- for part in content -%}[{{ part | tojson }}]{%- endfor -%}
{%- endmacro -%}
{%- for message in messages -%}
{%- if message.role == 'developer' -%}!{%- endif -%}
{% generation %}{{ message.role }}:{{ show(message.content) }}{% endgeneration %}
{%- for key, value in message.items() if key != 'content' -%}
{%- if key == 'role' %}{% continue %}{% endif -%}
|{{ key }}={{ value | tojson(sort_keys=true, separators=(',', ':')) }}
{%- endfor -%}
{{ eos_token }}
{%- endfor -%}
{{ [tools, documents, add_generation_prompt, enable_thinking, reasoning_effort, mode] | list | string }}
"""

TEMPLATES = {
    "chatml": CHATML,
    "llama": LLAMA_LIKE,
    "qwen": QWEN_LIKE,
    "mistral": MISTRAL_LIKE,
    "gemma": GEMMA_LIKE,
    "dumping": DUMPING,
}

SPECIALS = [
    "<|endoftext|>",
    "<|im_start|>",
    "<|im_end|>",
    "<|start_header_id|>",
    "<|end_header_id|>",
    "<|eot_id|>",
    "<s>",
    "</s>",
    "<unk>",
    "<bos>",
    "<eos>",
    "<pad>",
    "<mask>",
    "<start_of_turn>",
    "<end_of_turn>",
]
_GPT4_SPLIT = r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
_CORPUS = [
    "The quick brown fox jumps over the lazy dog. It's 2024, and they'll pay $1,234.56!",
    "def f(x):\n    return {'a': [1, 2.5e-3]}  # comment\n\n\nclass A:\n\tpass\n",
    "naïve café Zürich 中文分词 日本語のテキスト 한국어 Привет мир مرحبا שלום हिन्दी ไทย",
    'json {"name": "get_weather", "arguments": {"city": "Zürich"}} user assistant system tool',
    string.printable,
] * 5


def make_tokenizers(directory: Path) -> dict[str, Path]:
    """One directory per kind of tokenizer, each with the files a model has."""
    kinds = {
        "bytes": _byte_level(),
        "bytes-prefix": _byte_level(prefix_space=True),
        "bytes-split": _byte_level(pattern=_GPT4_SPLIT, bos=True),
        "metaspace": _metaspace_bpe(),
        "gemma": _gemma_bpe(),
        "unigram": _unigram(),
        "wordpiece": _wordpiece(),
    }
    special = {"bos_token": "<s>", "eos_token": "</s>", "unk_token": "<unk>"}
    for name, tokenizer in kinds.items():
        save(directory / name, tokenizer, config={"tokenizer_class": "PreTrainedTokenizerFast", **special})
    config = {"tokenizer_class": "LlamaTokenizer", **special, "add_bos_token": True}
    save(directory / "llama-class", kinds["metaspace"], config=config)
    save(directory / "llama-legacy", kinds["metaspace"], config={**config, "legacy": True})
    config = {"tokenizer_class": "Qwen2TokenizerFast", "eos_token": "<|im_end|>", "bos_token": None}
    save(directory / "qwen-class", kinds["bytes-split"], config=config, model_type="qwen3")
    save(directory / "qwen-forced", kinds["bytes"], config={**special, **config}, model_type="qwen2")
    save(directory / "qwen35-class", kinds["bytes"], config={"tokenizer_class": "Qwen3_5Tokenizer"})
    save(directory / "gemma-class", kinds["gemma"], config={"tokenizer_class": "GemmaTokenizer"})
    save(directory / "gpt2-class", kinds["bytes"], config={"tokenizer_class": "GPT2Tokenizer"}, model_type="gpt2")
    neox = {"tokenizer_class": "GPTNeoXTokenizer", "add_prefix_space": True}
    save(directory / "neox-class", kinds["bytes-split"], config=neox)
    overruled = {"tokenizer_class": "LlamaTokenizerFast", **special}
    save(directory / "deepseek", kinds["bytes"], config=overruled, model_type="deepseek_v3")
    save(directory / "added", kinds["bytes"], config=_added_tokens_config(special))
    save(directory / "legacy-added", kinds["bytes"], config={"tokenizer_class": "PreTrainedTokenizerFast"}, legacy=True)
    return {path.name: path for path in sorted(directory.iterdir())}


def save(
    path: Path,
    tokenizer: Tokenizer,
    *,
    config: dict[str, Any],
    model_type: str = "llama",
    legacy: bool = False,
    template: str = CHATML,
) -> None:
    path.mkdir(parents=True)
    tokenizer.save(str(path / "tokenizer.json"))
    (path / "tokenizer_config.json").write_text(json.dumps(config))
    (path / "config.json").write_text(json.dumps({"model_type": model_type}))
    (path / "chat_template.jinja").write_text(template, encoding="utf-8")
    if legacy:
        special = {"eos_token": {"content": "<|fin|>", "lstrip": False, "rstrip": True, "normalized": False}}
        special |= {"bos_token": "<s>", "additional_special_tokens": ["<|tool|>", "<|end|>"]}
        (path / "special_tokens_map.json").write_text(json.dumps(special))
        (path / "added_tokens.json").write_text(json.dumps({"<|plain|>": 9000, "<|end|>": 9001}))


def _added_tokens_config(special: dict[str, str]) -> dict[str, Any]:
    flags = {"lstrip": False, "rstrip": False, "single_word": False, "normalized": False, "special": True}
    return {
        **special,
        "tokenizer_class": "PreTrainedTokenizerFast",
        "eot_token": "<|eot|>",
        "extra_special_tokens": {"image_token": "<|img|>"},
        "pad_token": {"__type": "AddedToken", "content": "<|fill|>", **flags},
        "added_tokens_decoder": {
            "0": {"content": "<|endoftext|>", **flags},
            "9": {"content": "<bos>", **flags, "rstrip": True},
            "5000": {"content": "<|late|>", **flags, "lstrip": True},
            "5001": {"content": "word", **flags, "special": False, "single_word": True, "normalized": True},
        },
    }


def _byte_level(*, prefix_space: bool = False, pattern: str | None = None, bos: bool = False) -> Tokenizer:
    tokenizer = Tokenizer(models.BPE())
    level = pre_tokenizers.ByteLevel(add_prefix_space=prefix_space, use_regex=pattern is None)
    tokenizer.pre_tokenizer = level
    if pattern:
        split = pre_tokenizers.Split(Regex(pattern), behavior="isolated")
        tokenizer.pre_tokenizer = pre_tokenizers.Sequence([split, level])
    tokenizer.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    _train(tokenizer, trainers.BpeTrainer(vocab_size=700, special_tokens=SPECIALS, initial_alphabet=alphabet))
    if bos:
        _with_template(tokenizer, "<s> $A", "<s>")
    return tokenizer


def _metaspace_bpe() -> Tokenizer:
    tokenizer = Tokenizer(models.BPE(unk_token="<unk>", fuse_unk=True, byte_fallback=True))
    tokenizer.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")])
    _train(tokenizer, trainers.BpeTrainer(vocab_size=900, special_tokens=[*SPECIALS, *_byte_pieces()]))
    _with_template(tokenizer, "<s> $A", "<s>")
    return tokenizer


def _gemma_bpe() -> Tokenizer:
    tokenizer = Tokenizer(models.BPE(unk_token="<unk>", fuse_unk=True, byte_fallback=True))
    tokenizer.normalizer = normalizers.Replace(" ", "▁")
    tokenizer.pre_tokenizer = pre_tokenizers.Split(" ", behavior="merged_with_previous")
    _train(tokenizer, trainers.BpeTrainer(vocab_size=900, special_tokens=[*SPECIALS, *_byte_pieces()]))
    _with_template(tokenizer, "<bos> $A", "<bos>")
    return tokenizer


def _unigram() -> Tokenizer:
    tokenizer = Tokenizer(models.Unigram())
    tokenizer.normalizer = normalizers.Sequence([normalizers.NFKC(), normalizers.Replace(Regex(" {2,}"), " ")])
    tokenizer.pre_tokenizer = pre_tokenizers.Metaspace()
    _train(tokenizer, trainers.UnigramTrainer(vocab_size=400, special_tokens=SPECIALS, unk_token="<unk>"))
    _with_template(tokenizer, "$A </s>", "</s>")
    return tokenizer


def _wordpiece() -> Tokenizer:
    tokenizer = Tokenizer(models.WordPiece(unk_token="<unk>"))
    tokenizer.normalizer = normalizers.BertNormalizer(lowercase=True)
    tokenizer.pre_tokenizer = pre_tokenizers.BertPreTokenizer()
    _train(tokenizer, trainers.WordPieceTrainer(vocab_size=500, special_tokens=SPECIALS))
    _with_template(tokenizer, "<s> $A </s>", "<s>", "</s>")
    return tokenizer


def _train(tokenizer: Tokenizer, trainer: Any) -> None:
    trainer.show_progress = False
    tokenizer.train_from_iterator(_CORPUS, trainer)
    tokenizer.add_tokens([AddedToken("<tool_call>", normalized=False), AddedToken("</tool_call>", normalized=True)])


def _byte_pieces() -> list[str]:
    return [f"<0x{byte:02X}>" for byte in range(256)]


def _with_template(tokenizer: Tokenizer, single: str, *tokens: str) -> None:
    pairs = [(token, tokenizer.token_to_id(token)) for token in tokens]
    tokenizer.post_processor = processors.TemplateProcessing(single=single, special_tokens=pairs)


PIECES = [
    *SPECIALS,
    "<tool_call>",
    "</tool_call>",
    "<think>",
    "</think>",
    "<|late|>",
    "<|fin|>",
    "<|plain|>",
    "<|img|>",
    "word",
    "swordfish",
    "CONTINUE_FINAL_MESSAGE_TAG",
    "x-anthropic-billing-header: a=1\n",
    "{{ x }}",
    " ",
    "  ",
    "\n",
    "\n\n",
    "\t",
    "\r\n",
    "\u00a0",
    "\u3000",
    "\u200b",
    "\u2028",
    "\ufeff",
    "\x00",
    "\x7f",
    "▁",
    "é",
    "e\u0301",
    "ﬁ",
    "中文",
    "日本",
    "한국어",
    "مرحبا",
    "हिन्दी",
    "ไทย",
    "👩‍👩‍👧‍👦",
    "🇨🇭",
    "\U0010fffd",
    "\ue000",
    "Hello",
    " world",
    "it's",
    "THEY'LL",
    "1234567",
    "3.14",
    "!?",
    "----",
    "<",
    "&",
    "'",
    '"',
    "\\",
    "İ",
    "ß",
]


def random_text(rng: random.Random, longest: int = 12) -> str:
    return "".join(
        rng.choice(PIECES) if rng.random() < 0.8 else chr(_code_point(rng)) for _ in range(rng.randrange(longest))
    )


def _code_point(rng: random.Random) -> int:
    point = rng.choice([rng.randrange(0x300), rng.randrange(0x3000), rng.randrange(0x110000)])
    return point if not 0xD800 <= point < 0xE000 else 0x20


def random_chat(rng: random.Random) -> dict[str, Any]:
    """A chat body with everything the endpoint takes except media, not all of it acceptable to every template."""
    messages = [_random_message(rng) for _ in range(rng.randrange(1, 6))]
    if rng.random() < 0.6:
        messages = _alternating(rng)
    body: dict[str, Any] = {"messages": messages}
    if rng.random() < 0.3:
        body["tools"] = [_random_tool(rng) for _ in range(rng.randrange(1, 3))]
    if rng.random() < 0.3:
        body["add_generation_prompt"] = rng.random() < 0.3
        if rng.random() < 0.6:
            body["continue_final_message"] = rng.random() < 0.7
    if rng.random() < 0.3:
        arguments = {"enable_thinking": rng.choice([True, False, None, "auto"]), "mode": random_value(rng), "bogus": 1}
        arguments |= {"bos_token": "<BOS>"} if rng.random() < 0.2 else {}
        body["chat_template_kwargs"] = dict(rng.sample(sorted(arguments.items()), rng.randrange(len(arguments))))
    if rng.random() < 0.2:
        body["documents"] = [{"title": random_text(rng), "text": random_text(rng)}]
    if rng.random() < 0.2:
        body["reasoning_effort"] = rng.choice(["none", "low", "high", "max"])
    if rng.random() < 0.2:
        body["add_special_tokens"] = rng.random() < 0.7
    return body


def _alternating(rng: random.Random) -> list[dict[str, Any]]:
    messages = [{"role": "system", "content": _random_content(rng)}] if rng.random() < 0.4 else []
    turns = rng.randrange(1, 6)
    return messages + [_random_message(rng, "assistant" if index % 2 else "user") for index in range(turns)]


def _random_message(rng: random.Random, role: str | None = None) -> dict[str, Any]:
    role = role or rng.choice(["system", "user", "assistant", "tool", "developer", "critic"])
    message: dict[str, Any] = {"role": role, "content": _random_content(rng)}
    if rng.random() < 0.1:
        message["name"] = random_text(rng, 3)
    if rng.random() < 0.1:
        message[rng.choice(["refusal", "audio", "annotations", "x_custom", "function_call", "task"])] = None
    if role == "assistant":
        _make_assistant(rng, message)
    if role == "tool" and rng.random() < 0.8:
        message["tool_call_id"] = rng.choice(["call_1", "", "é"])
    items = list(message.items())
    rng.shuffle(items)
    return dict(items)


def _make_assistant(rng: random.Random, message: dict[str, Any]) -> None:
    if rng.random() < 0.4:
        message["tool_calls"] = [_random_call(rng) for _ in range(rng.choice([0, 1, 1, 2]))]
        if rng.random() < 0.5:
            message["content"] = None
            if rng.random() < 0.3:
                del message["content"]
    if rng.random() < 0.3:
        message[rng.choice(["reasoning", "reasoning_content"])] = rng.choice([None, "", random_text(rng)])
    if rng.random() < 0.05:
        message["tool_calls"] = None


def _random_content(rng: random.Random) -> Any:
    if rng.random() < 0.65:
        return random_text(rng)
    return [_random_part(rng) for _ in range(rng.randrange(4))]


def _random_part(rng: random.Random) -> Any:
    text = random_text(rng, 6)
    part: dict[str, Any] = {"type": "text", "text": text}
    pick = rng.random()
    odd = [
        text,
        {"type": rng.choice(["input_text", "output_text"]), "text": text},
        {"type": "refusal", "refusal": text},
        {"type": "thinking", "thinking": text, "closed": True},
        {"type": "tool_reference", "name": text},
        {"type": "image_url", "image_url": {"url": "data:,"}},
    ]
    if pick < 0.06:
        return rng.choice(odd)
    if pick < 0.5:
        return {"cache_control": {"type": "ephemeral"}, "x": random_value(rng), **part, "name": "n"}
    return part


def _random_call(rng: random.Random) -> dict[str, Any]:
    arguments = rng.choice(
        [json.dumps({"a": random_value(rng)}), "", "{}", "[]", "null", "not json", '{"a": NaN, "a": 1e5}', ' {"b":1} ']
    )
    function = {"name": random_text(rng, 3), "arguments": arguments}
    call: dict[str, Any] = {"type": "function", "id": "call_1", "function": function}
    if rng.random() < 0.3:
        call["index"] = 0
        function["extra"] = random_value(rng)
    return call


def _random_tool(rng: random.Random) -> dict[str, Any]:
    function: dict[str, Any] = {"parameters": {"type": "object", "x": random_value(rng)}, "name": random_text(rng, 3)}
    optional = (("description", random_text(rng)), ("strict", True), ("extra", 1), ("defer_loading", False))
    function |= {key: value for key, value in optional if rng.random() < 0.4}
    tool: dict[str, Any] = {"function": function, "type": "function"}
    if rng.random() < 0.2:
        tool |= {"defer_loading": True, "cache_control": {}}
    return tool


def random_value(rng: random.Random, depth: int = 2) -> Any:
    if depth and rng.random() < 0.4:
        items = [random_value(rng, depth - 1) for _ in range(rng.randrange(3))]
        return items if rng.random() < 0.5 else {random_text(rng, 3): item for item in items}
    return rng.choice([None, True, False, 0, -5, 2**70, 1.5, 1e22, -0.0, "", random_text(rng, 4)])
