"""A request body to the token ids its worker would make of it."""

import asyncio
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, Literal

import msgspec

from router.chat_template import ChatTemplate, ContentFormat
from router.conversation import PlainTexts, conversation_of, plain_texts, tools_of
from router.errors import ConfigError, InvalidRequest, Unrenderable
from router.prompt_ids import PromptIds
from router.splice import Kind, can_carry_ids, splice_token_ids
from router.token_memory import TokenMemory
from router.tokenizer import LOOP_BUDGET_S, MEMORY_BYTES, Tokenizer, build_tokenizer
from router.tokenizer_files import TokenizerFiles
from router.traced_template import TracedTemplate

__all__ = ["PromptBuilder", "can_carry_ids", "splice_token_ids", "tokenize_request"]

_REASONING_EFFORTS = frozenset({"none", "minimal", "low", "medium", "high", "xhigh", "max"})
_TOKENIZE_FIELDS = (
    "model",
    "messages",
    "tools",
    "add_generation_prompt",
    "continue_final_message",
    "add_special_tokens",
    "chat_template",
    "chat_template_kwargs",
    "mm_processor_kwargs",
    "media_io_kwargs",
)
# What the template's output depends on, besides the messages.
_RENDERED_ORDER = (
    "add_generation_prompt",
    "chat_template",
    "chat_template_kwargs",
    "continue_final_message",
    "documents",
    "reasoning_effort",
    "tool_choice",
    "tools",
)
_RENDERED_FIELDS = frozenset(_RENDERED_ORDER)
_INFLUENTIAL_FIELDS = _RENDERED_FIELDS | {
    "add_special_tokens",
    "kv_transfer_params",
    "truncate_prompt_tokens",
    "truncation_side",
}
# Recordings of chats without such fields, and of each of the settings last seen: tools are as good as always the same.
_PLAIN_BYTES = 8 << 20
_SETTING_BYTES = 1 << 20
_MOST_SETTINGS = 32
_LONGEST_SETTING = 128 << 10
_MAX_INT64 = 2**63 - 1
_MOST_MARKS = 3
_MISTRAL_ID_LENGTH = 9
# Rendering is copying, and needs the interpreter's lock anyway: only bodies of many megabytes are worth a thread.
_LONG_BODY = 4 << 20
_MANY_MESSAGES = 1000


class PromptBuilder:
    """Builds prompts for one model. Holds no request state: safe to share by threads and tasks.

    ``backend`` names the tokenizer in use, "fastokens" or "tokenizers".
    """

    def __init__(
        self,
        tokenizer: Tokenizer,
        templates: str | Mapping[str, str] | None,
        *,
        chat_template: str | None = None,
        processor_template: str | None = None,
        content_format: Literal["auto", "string", "openai"] = "auto",
        default_template_kwargs: Mapping[str, Any] | None = None,
        drop_tools_when_tool_choice_none: bool = False,
        max_model_len: int | None = None,
        own_chat_encoding: str | None = None,
        memory_bytes: int = MEMORY_BYTES,
    ) -> None:
        self.tokenizer = tokenizer
        self.backend = tokenizer.backend
        self.max_model_len = max_model_len
        self._named = {"default": templates} if isinstance(templates, str) else dict(templates or {})
        self._chat_template = chat_template
        self._processor_template = processor_template
        self._content_format = content_format
        self._default_arguments = dict(default_template_kwargs or {})
        self._drop_tools = drop_tools_when_tool_choice_none
        self._own_chat_encoding = own_chat_encoding
        self._compiled: dict[str, ChatTemplate] = {}
        self.renders_by_heart = 0
        self._by_heart = self._learn({}, _PLAIN_BYTES)
        self._settings: dict[bytes, TracedTemplate | None] = {}
        self.memory: TokenMemory | None = tokenizer.memory(self._marks(), memory_bytes)

    @classmethod
    def load(cls, tokenizer_path: str | Path, chat_template: str | None = None, **settings: Any) -> "PromptBuilder":
        """Load from a directory, or by repository name from the local Hugging Face cache.

        ``chat_template`` and ``settings`` repeat the flags the worker was started with: a path, a template's text or
        the name of one of the model's templates (--chat-template), ``content_format`` (--chat-template-content-format),
        ``default_template_kwargs`` (--default-chat-template-kwargs), ``drop_tools_when_tool_choice_none``
        (--exclude-tools-when-tool-choice-none) and ``max_model_len``, which some truncations depend on.

        Raises:
            ConfigError: the files are missing or broken.
            Unrenderable: this tokenizer is not known to be reproduced exactly.
        """
        files = TokenizerFiles.read(tokenizer_path)
        templates = files.chat_templates()
        return cls(
            Tokenizer(build_tokenizer(files)),
            templates,
            chat_template=_given_template(chat_template, templates),
            processor_template=files.processor_template(),
            own_chat_encoding=files.own_chat_encoding(),
            **settings,
        )

    def figures(self) -> dict[str, float]:
        """What tokenizing cost and saved so far; seconds are of encoding, in threads and in the event loop."""
        memory = self.memory
        return {
            "tokens_remembered": memory.tokens_remembered if memory is not None else 0,
            "tokens_encoded": memory.tokens_encoded if memory is not None else 0,
            "encode_seconds": memory.seconds if memory is not None else 0.0,
            "prompt_memory_bytes": memory.used if memory is not None else 0,
            "prompt_memory_evictions": memory.evicted if memory is not None else 0,
            "renders_by_heart": self.renders_by_heart,
        }

    def chat(self, body: dict[str, Any]) -> list[int]:
        """Token ids of a /v1/chat/completions body.

        Raises:
            InvalidRequest: a field has a type no OpenAI-compatible server takes; names it.
            Unrenderable: only the worker can tell.
        """
        return self._chat_now(body).tolist()

    async def chat_async(self, body: dict[str, Any]) -> PromptIds:
        """Like ``chat``, for the event loop: what takes long is done in a thread. Costs what was not seen before."""
        if _is_long(body):
            return await asyncio.to_thread(self._chat_now, body)
        return await self._finish(self._chat(body))

    def plain_chat(self, body: dict[str, Any], plain: PlainTexts) -> PromptIds | None:
        """What ``chat_async`` gives for a chat of these texts that has no member of influence on its prompt, where that
        takes no longer than the event loop can bear; None for every other.

        Raises:
            Unrenderable: only the worker can tell.
        """
        by_heart, memory = self._by_heart, self.memory
        if by_heart is None or memory is None or not _INFLUENTIAL_FIELDS.isdisjoint(body):
            return None
        roles, texts = plain
        if len(texts) > _MANY_MESSAGES or sum(map(len, texts)) > _LONG_BODY:
            return None
        text = by_heart.render(roles, texts)
        if text is None:
            return None
        found = memory.find(text)
        if self.tokenizer.seconds_for(found.missing) > LOOP_BUDGET_S:
            return None
        self.renders_by_heart += 1
        return memory.finish(found)

    def _chat_now(self, body: dict[str, Any]) -> PromptIds:
        return self._chat(body)()

    def _chat(self, body: dict[str, Any]) -> "_Pending":
        if (ids := _forwarded_ids(body)) is not None:
            return _Pending.done(_checked(ids))
        text = self.render(body)
        return self._tokens(text, body, special=_flag(body, "add_special_tokens", default=False))

    def render(self, body: dict[str, Any]) -> str:
        """The text the chat template makes of a /v1/chat/completions body. Raises as ``chat`` does.

        Some 0.3 µs per message where all of them are plain texts, some 3 µs per message otherwise.
        """
        plain = plain_texts(body.get("messages"))
        if plain is not None and (by_heart := self._known_by_heart(body)) is not None:
            text = by_heart.render(*plain)
            if text is not None:
                self.renders_by_heart += 1
                return text
        return self.render_in_full(body)

    def render_in_full(self, body: dict[str, Any]) -> str:
        """``render`` without what is known by heart."""
        if self._own_chat_encoding:
            raise Unrenderable(f"vLLM encodes chats for {self._own_chat_encoding} without a chat template")
        if body.get("chat_template") is not None:
            raise Unrenderable("the request brings its own chat template")
        template, variables = self._setting(body)
        _, resume = _continuation(body)
        conversation = conversation_of(body.get("messages"), self._format_for(template))
        return template.render(conversation, continue_final_message=resume, **variables)

    def _setting(self, body: dict[str, Any]) -> tuple[ChatTemplate, dict[str, Any]]:
        """The template a body is rendered with, and all it is given but the messages."""
        tools = tools_of(body.get("tools"))
        if self._drop_tools and body.get("tool_choice") == "none":
            tools = None
        template = self._template(with_tools=tools is not None)
        arguments = self._arguments(body)
        generate, _ = _continuation(body)
        documents = _documents(body, arguments)
        given = {"tools": tools, "documents": documents, "add_generation_prompt": generate, "arguments": arguments}
        return template, given

    def completion(self, body: dict[str, Any]) -> list[list[int]]:
        """Token ids of a /v1/completions body, one list per prompt; prompts given as ids pass through.

        Raises:
            InvalidRequest: ``prompt`` is missing, empty or of a type no OpenAI-compatible server takes.
            Unrenderable: only the worker can tell.
        """
        return [_some(pending()).tolist() for pending in self._completion(body)]

    async def completion_async(self, body: dict[str, Any]) -> list[PromptIds]:
        """Like ``completion``, for the event loop: what takes long is done in a thread."""
        return [_some(await self._finish(pending)) for pending in self._completion(body)]

    def _completion(self, body: dict[str, Any]) -> list["_Pending"]:
        for key in ("suffix", "prompt_embeds"):
            if body.get(key) is not None:
                raise Unrenderable(f"{key} is set")
        special = _flag(body, "add_special_tokens", default=True)
        prompts = []
        for prompt in _prompts(body.get("prompt")):
            if isinstance(prompt, str):
                prompts.append(self._tokens(prompt, body, special=special))
            else:
                prompts.append(_Pending.done(_checked(self._cut(prompt, body))))
        return prompts

    async def _finish(self, pending: "_Pending") -> PromptIds:
        if self.tokenizer.seconds_for(pending.characters) <= LOOP_BUDGET_S:
            return pending()
        return await asyncio.to_thread(pending)

    def _known_by_heart(self, body: dict[str, Any]) -> TracedTemplate | None:
        """What renders plain chats with the settings of ``body``, by their content."""
        if _RENDERED_FIELDS.isdisjoint(body):
            return self._by_heart
        setting = {field: body[field] for field in _RENDERED_ORDER if field in body}
        try:
            key = msgspec.json.encode(setting)
        except (TypeError, ValueError, OverflowError, RecursionError):
            return None
        if key not in self._settings:
            if len(key) > _LONGEST_SETTING:
                return None
            self._settings[key] = self._learn(body, _SETTING_BYTES)
            if len(self._settings) > _MOST_SETTINGS:
                self._settings.pop(next(iter(self._settings)), None)
        return self._settings.get(key)

    def _learn(self, body: dict[str, Any], limit: int) -> TracedTemplate | None:
        if self._own_chat_encoding or body.get("chat_template") is not None or body.get("continue_final_message"):
            return None
        try:
            template, variables = self._setting(body)
        except (Unrenderable, InvalidRequest):
            return None
        return template.by_heart(self._format_for(template), limit=limit, **variables)

    def _format_for(self, template: ChatTemplate) -> ContentFormat:
        return template.content_format if self._content_format == "auto" else self._content_format

    def _marks(self) -> list[str]:
        """Special tokens that open or close the turns of this model's chats, the most frequent first."""
        turns = [{"role": role, "content": "x"} for role in ("user", "assistant", "user", "assistant", "user")]
        try:
            text = self.render({"messages": turns})
        except Unrenderable:
            text = ""
        counts = {token: text.count(token) for token in self.tokenizer.added_tokens() if token in text}
        counts = counts or dict.fromkeys(self.tokenizer.special_tokens.values(), 1)
        most = max(counts.values(), default=0)
        often = [token for token in counts if counts[token] > most // 2]
        return sorted(often, key=lambda token: -counts[token])[:_MOST_MARKS]

    def template_source(self, *, with_tools: bool) -> str | None:
        """The chat template in use for chats with or without tools; None where the model has none."""
        source = self._chat_template
        if source is None and not with_tools:
            source = self._processor_template
        if source is None and with_tools:
            source = self._named.get("tool_use")
        return self._named.get("default") if source is None else source

    def _template(self, *, with_tools: bool) -> ChatTemplate:
        source = self.template_source(with_tools=with_tools)
        if source is None:
            raise Unrenderable("the model has no default chat template")
        if source not in self._compiled:
            self._compiled[source] = ChatTemplate(source, self.tokenizer.special_tokens)
        return self._compiled[source]

    def _arguments(self, body: Mapping[str, Any]) -> dict[str, Any]:
        given = body.get("chat_template_kwargs")
        if given is not None and not isinstance(given, dict):
            raise InvalidRequest("chat_template_kwargs must be an object", param="chat_template_kwargs")
        arguments = dict(given or {})
        effort = body.get("reasoning_effort")
        if effort is not None:
            if not isinstance(effort, str) or effort not in _REASONING_EFFORTS:
                raise Unrenderable("reasoning_effort has a value that only some workers know")
            arguments.setdefault("enable_thinking", effort != "none")
            arguments["reasoning_effort"] = effort
        if body.get("documents") is not None:
            arguments["documents"] = body["documents"]
        for field in ("add_generation_prompt", "continue_final_message"):
            arguments.pop(field, None)
        given = {key: value for key, value in arguments.items() if not _is_unset(value)}
        return self._default_arguments | given

    def _tokens(self, text: str, body: Mapping[str, Any], *, special: bool) -> "_Pending":
        keep, side = self._truncation(body)
        if keep is None:
            encode = self.tokenizer.encode_bytes
            if (memory := self.memory) is None:
                return _Pending(len(text), lambda: PromptIds((), encode(text, add_special_tokens=special)))
            found = memory.find(text, special=special)
            return _Pending(found.missing, lambda: memory.finish(found))
        return _Pending(len(text), lambda: _checked(self._truncated(text, keep, side, body, special=special)))

    def _truncated(
        self, text: str, keep: int, side: str | None, body: Mapping[str, Any], *, special: bool
    ) -> list[int]:
        if side is None:
            # Cut again: the tokenizer leaves a text alone when there is no room for its special tokens.
            return self._cut(self.tokenizer.encode_truncated(text, keep, add_special_tokens=special), body)
        longest = (self.max_model_len or 0) * self.tokenizer.max_chars_per_token
        if len(text) > longest:
            raise Unrenderable("truncation_side cuts the text itself, at a length that depends on the model's context")
        return self._cut(self.tokenizer.encode(text, add_special_tokens=special), body)

    def _cut(self, ids: list[int], body: Mapping[str, Any]) -> list[int]:
        keep, side = self._truncation(body)
        if keep is None or keep >= len(ids):
            return ids
        return ids[:keep] if side == "right" else ids[-keep:]

    def _truncation(self, body: Mapping[str, Any]) -> tuple[int | None, str | None]:
        """How many tokens to keep and at which end they are dropped; vLLM drops on the left unless told."""
        keep, side = body.get("truncate_prompt_tokens"), body.get("truncation_side")
        if side not in (None, "left", "right"):
            raise InvalidRequest('truncation_side must be "left" or "right"', param="truncation_side")
        if keep is None:
            return None, side
        if type(keep) is not int or not -1 <= keep <= _MAX_INT64:
            raise Unrenderable("truncate_prompt_tokens is not a whole number from -1 on")
        if keep == 0 or (self.max_model_len is not None and keep > self.max_model_len):
            raise Unrenderable("truncate_prompt_tokens keeps nothing, or more than the model's context")
        if keep == -1:
            keep = self._whole_context(body)
        return keep, side

    def _whole_context(self, body: Mapping[str, Any]) -> int:
        if self.max_model_len is None:
            raise Unrenderable("truncate_prompt_tokens is -1 and the model's context length is not known here")
        limit = body.get("max_completion_tokens")
        if limit is None:
            # Completions generate 16 tokens unless told otherwise, chats as many as fit.
            limit = body.get("max_tokens", 16 if "prompt" in body else None)
        return self.max_model_len - 1 if limit else self.max_model_len


class _Pending:
    """A prompt up to the step that may take long; ``characters`` are those this step has to encode."""

    __slots__ = ("_finish", "characters")

    def __init__(self, characters: int, finish: Callable[[], PromptIds]) -> None:
        self.characters = characters
        self._finish = finish

    @classmethod
    def done(cls, ids: PromptIds) -> "_Pending":
        return cls(0, lambda: ids)

    def __call__(self) -> PromptIds:
        return self._finish()


def tokenize_request(body: Mapping[str, Any], kind: Kind, *, short_call_ids: bool = False) -> dict[str, Any]:
    """The /tokenize body whose answer is what the worker makes of ``body``; for completions of one text prompt.

    /tokenize itself ignores ``documents`` and ``reasoning_effort``, so they travel as template arguments. For models with
    Mistral's own tokenizer vLLM keeps the last nine characters of tool-call ids in chats, and /tokenize refuses longer
    ones: ``short_call_ids`` shortens them.

    Raises:
        Unrenderable: /tokenize has no way to say it (truncation, a suffix, prompts that are not one text).
    """
    for key in ("truncate_prompt_tokens", "suffix", "prompt_embeds"):
        if body.get(key) is not None:
            raise Unrenderable(f"/tokenize knows no {key}")
    if kind == "completions":
        if not isinstance(body.get("prompt"), str):
            raise Unrenderable("/tokenize takes one text")
        return {key: body[key] for key in ("model", "prompt", "add_special_tokens") if key in body}
    request = {key: body[key] for key in _TOKENIZE_FIELDS if key in body}
    if isinstance(request.get("messages"), list):
        request["messages"] = [_with_reasoning(message) for message in request["messages"]]
        if short_call_ids:
            request["messages"] = [_with_short_ids(message) for message in request["messages"]]
    arguments = dict(request.get("chat_template_kwargs") or {})
    if (effort := body.get("reasoning_effort")) is not None:
        arguments.setdefault("enable_thinking", effort != "none")
        arguments["reasoning_effort"] = effort
    if body.get("documents") is not None:
        arguments["documents"] = body["documents"]
    return request | ({"chat_template_kwargs": arguments} if arguments else {})


def _with_reasoning(message: Any) -> Any:
    if not isinstance(message, dict) or "reasoning_content" not in message:
        return message
    renamed = {key: value for key, value in message.items() if key != "reasoning_content"}
    if renamed.get("reasoning") is None and message["reasoning_content"] is not None:
        renamed["reasoning"] = message["reasoning_content"]
    return renamed


def _with_short_ids(message: Any) -> Any:
    if not isinstance(message, dict):
        return message
    shortened = dict(message)
    if isinstance(name := message.get("tool_call_id"), str):
        shortened["tool_call_id"] = name[-_MISTRAL_ID_LENGTH:]
    if isinstance(calls := message.get("tool_calls"), list):
        shortened["tool_calls"] = [_with_short_id(call) for call in calls]
    return shortened


def _with_short_id(call: Any) -> Any:
    if not isinstance(call, dict) or not isinstance(call.get("id"), str):
        return call
    return {**call, "id": call["id"][-_MISTRAL_ID_LENGTH:]}


def _given_template(chat_template: str | None, templates: str | Mapping[str, str] | None) -> str | None:
    if chat_template is None:
        return None
    if any(character in chat_template for character in "{}\n"):
        return chat_template
    if isinstance(templates, Mapping) and chat_template in templates:
        return templates[chat_template]
    path = Path(chat_template).expanduser()
    if not path.is_file():
        raise ConfigError(f"chat template {chat_template!r} is neither a file nor a template of the model")
    return path.read_text(encoding="utf-8")


def _forwarded_ids(body: Mapping[str, Any]) -> list[int] | None:
    """Ids the client itself sends along, which the worker then uses as they are."""
    params = body.get("kv_transfer_params")
    ids = params.get("prompt_token_ids") if isinstance(params, dict) else None
    if ids is None or body.get("echo"):
        return None
    if not isinstance(ids, list) or not ids or any(type(item) is not int or item < 0 for item in ids):
        field = "kv_transfer_params.prompt_token_ids"
        raise InvalidRequest(f"{field} must be a non-empty list of non-negative integers", param=field)
    conversation_of(body.get("messages") or [{"role": "user"}], "string")
    return ids


def _continuation(body: Mapping[str, Any]) -> tuple[bool, bool]:
    generate = _flag(body, "add_generation_prompt", default=True)
    resume = _flag(body, "continue_final_message", default=False)
    if not (generate and resume):
        return generate, resume
    if "add_generation_prompt" in body:
        message = "add_generation_prompt and continue_final_message cannot both be true"
        raise InvalidRequest(message, param="continue_final_message")
    raise Unrenderable("continue_final_message is set without add_generation_prompt=false")


def _documents(body: Mapping[str, Any], arguments: dict[str, Any]) -> list[dict[str, Any]] | None:
    documents = arguments.pop("documents", None)
    if documents is None:
        return None
    if not isinstance(documents, list) or not all(isinstance(item, dict) for item in documents):
        raise InvalidRequest("documents must be a list of objects", param="documents")
    if body.get("documents") is not None and not all(
        isinstance(value, str) for item in documents for value in item.values()
    ):
        raise InvalidRequest("documents must hold strings only", param="documents")
    return documents


def _flag(body: Mapping[str, Any], name: str, *, default: bool) -> bool:
    value = body.get(name, default)
    if isinstance(value, list | dict):
        raise InvalidRequest(f"{name} must be true or false, got {type(value).__name__}", param=name)
    if not isinstance(value, bool):
        # Workers read 1, "yes" and their like as booleans, each version its own way.
        raise Unrenderable(f"{name} is neither true nor false")
    return value


def _is_unset(value: Any) -> bool:
    return value is None or value == "auto"


def _prompts(prompt: Any) -> list[str] | list[list[int]]:
    if prompt is None or prompt in ("", []):
        raise InvalidRequest("prompt must not be empty", param="prompt")
    if isinstance(prompt, str):
        return [prompt]
    if not isinstance(prompt, list):
        raise InvalidRequest(
            f"prompt must be a string, a list of strings, or token ids, got {type(prompt).__name__}", param="prompt"
        )
    if all(isinstance(item, str) for item in prompt):
        return prompt
    if all(isinstance(item, list) for item in prompt):
        return [_checked_ids(item, f"prompt[{index}]") for index, item in enumerate(prompt)]
    return [_checked_ids(prompt, "prompt")]


def _checked_ids(ids: list[Any], where: str) -> list[int]:
    for index, item in enumerate(ids):
        if type(item) is int and item >= 0:
            continue
        if isinstance(item, bool | float | str):
            raise Unrenderable(f"{where} mixes token ids with {type(item).__name__}")
        raise InvalidRequest(f"{where}[{index}] must be a non-negative integer", param=f"{where}[{index}]")
    return ids


def _checked(ids: list[int]) -> PromptIds:
    try:
        return PromptIds.of(ids)
    except ValueError as error:
        raise InvalidRequest(f"a token id is beyond every vocabulary: {error}", param=None) from error


def _some(ids: PromptIds) -> PromptIds:
    if not ids:
        raise Unrenderable("a prompt has no tokens")
    return ids


def _is_long(body: Mapping[str, Any]) -> bool:
    messages = body.get("messages")
    if not isinstance(messages, list):
        return False
    if len(messages) > _MANY_MESSAGES:
        return True
    return sum(_text_length(message.get("content")) for message in messages if isinstance(message, dict)) > _LONG_BODY


def _text_length(content: Any) -> int:
    """Characters in a string, or in the strings and text parts of a list; whatever else it holds counts nothing."""
    if isinstance(content, str):
        return len(content)
    texts = (
        (item.get("text") if isinstance(item, dict) else item for item in content) if isinstance(content, list) else ()
    )
    return sum(len(text) for text in texts if isinstance(text, str))
