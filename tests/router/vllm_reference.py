"""What a vLLM worker makes of a request, asked of vLLM's own code without a server."""

import asyncio
from pathlib import Path
from types import SimpleNamespace
from typing import Any


class Refused(Exception):
    """The worker would answer 4xx or 5xx."""


class Reference:
    """vLLM's request models, renderer and tokenizer over one directory."""

    def __init__(self, path: Path, *, chat_template: str | None = None, max_model_len: int = 100_000) -> None:
        from vllm.renderers.hf import HfRenderer
        from vllm.renderers.online_renderer import OnlineRenderer
        from vllm.tokenizers import get_tokenizer

        config = SimpleNamespace(
            hf_config=SimpleNamespace(model_type="llama"),
            model=str(path),
            tokenizer=str(path),
            revision=None,
            tokenizer_revision=None,
            code_revision=None,
            trust_remote_code=False,
            multimodal_config=None,
            supports_multimodal_inputs=False,
            enable_prompt_embeds=False,
            encoder_config=None,
            is_encoder_decoder=False,
            renderer_num_workers=1,
            get_vocab_size=lambda: 1_000_000,
            max_model_len=max_model_len,
        )
        parallel = SimpleNamespace(_api_process_rank=0)
        self.tokenizer = get_tokenizer(str(path))
        renderer = HfRenderer(SimpleNamespace(model_config=config, parallel_config=parallel), self.tokenizer)
        self._online = OnlineRenderer(
            config,
            renderer,
            request_logger=None,
            chat_template=chat_template,
            chat_template_content_format="auto",
            enable_auto_tools=True,
        )
        self._online.parser = None

    def chat(self, body: dict[str, Any]) -> list[int]:
        """Ids /v1/chat/completions uses. Raises Refused."""
        from vllm.entrypoints.openai.chat_completion.protocol import ChatCompletionRequest

        return self._ids(self._chat(ChatCompletionRequest, {"tool_choice": "none", **body}))[0]

    def tokenize_chat(self, body: dict[str, Any]) -> list[int]:
        """Ids /tokenize answers with to a body with messages. Raises Refused."""
        from vllm.entrypoints.serve.tokenize.protocol import TokenizeChatRequest

        return self._ids(self._chat(TokenizeChatRequest, body))[0]

    def tokenize_prompt(self, body: dict[str, Any]) -> list[int]:
        from vllm.entrypoints.serve.tokenize.protocol import TokenizeCompletionRequest

        request = TokenizeCompletionRequest.model_validate(body)
        return self._ids(self._online.preprocess_completion(request, request.prompt, None))[0]

    def completion(self, body: dict[str, Any]) -> list[list[int]]:
        """Ids /v1/completions uses. Raises Refused."""
        return self._ids(self._completion(body))

    async def _completion(self, body: dict[str, Any]) -> Any:
        from vllm.entrypoints.openai.completion.protocol import CompletionRequest

        return await self._online.render_completion(CompletionRequest.model_validate(body))

    async def _chat(self, model: Any, body: dict[str, Any]) -> Any:
        request = model.model_validate(body)
        tools = None if request.tools is None else [tool.model_dump() for tool in request.tools]
        _, inputs = await self._online.preprocess_chat(
            request,
            request.messages,
            default_template=self._online.chat_template,
            default_template_content_format="auto",
            default_template_kwargs={},
            tool_dicts=tools,
        )
        return inputs

    def _ids(self, rendering: Any) -> list[list[int]]:
        try:
            inputs = asyncio.run(rendering)
            return [list(item["prompt_token_ids"]) for item in inputs]
        except Exception as error:
            raise Refused(f"{type(error).__name__}: {error}") from error
