"""Makes the demo's model: ``python -m router.demo_model DIRECTORY``.

A four-layer Llama with a byte-level tokenizer, made in seconds and without a download. Its weights are random, so it
talks nonsense, but spread widely enough that its greedy output depends on every block of its KV cache: wrong bytes
in one loaded block change the tokens, which is what makes it a fair witness.
"""

import sys
import sysconfig
from pathlib import Path
from typing import Any

VOCABULARY = 4096
CONTEXT = 32_768
SPECIAL_TOKENS = ["<|endoftext|>", "<|im_start|>", "<|im_end|>"]
CHAT_TEMPLATE = (
    "{% if tools %}<|im_start|>system\nTools:{% for tool in tools %}\n{{ tool | tojson }}{% endfor %}<|im_end|>\n"
    "{% endif %}"
    "{% for message in messages %}<|im_start|>{{ message['role'] }}\n{{ message['content'] or '' }}"
    "{% for call in message['tool_calls'] or [] %}\n{{ call['function'] | tojson }}{% endfor %}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)


def make_model(directory: Path, *, seed: int = 0, hidden_size: int = 256, layers: int = 4) -> None:
    """Write weights, configuration, tokenizer and chat template; needs torch and transformers. ``hidden_size`` is a
    multiple of 128: heads are 64 wide, two to a KV head."""
    directory.mkdir(parents=True, exist_ok=True)
    _tokenizer().save_pretrained(directory)
    _llama(seed, hidden_size, layers).save_pretrained(directory)


def _tokenizer() -> Any:
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers  # noqa: PLC0415
    from transformers import PreTrainedTokenizerFast  # noqa: PLC0415 - the router itself runs without it

    bpe = Tokenizer(models.BPE())
    bpe.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    bpe.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=VOCABULARY,
        special_tokens=SPECIAL_TOKENS,
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    # The standard library is the one English-like corpus every machine has.
    corpus = sorted(str(path) for path in Path(sysconfig.get_paths()["stdlib"]).glob("*.py"))[:150]
    bpe.train(corpus, trainer)
    end_of_text, _, end_of_turn = SPECIAL_TOKENS
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=bpe, bos_token=end_of_text, eos_token=end_of_turn, pad_token=end_of_text
    )
    tokenizer.chat_template = CHAT_TEMPLATE
    return tokenizer


def _llama(seed: int, hidden_size: int, layers: int) -> Any:
    import torch  # noqa: PLC0415
    from transformers import LlamaConfig, LlamaForCausalLM  # noqa: PLC0415 - the router itself runs without it

    torch.manual_seed(seed)
    model = LlamaForCausalLM(
        LlamaConfig(
            vocab_size=VOCABULARY,
            hidden_size=hidden_size,
            intermediate_size=2 * hidden_size,
            num_hidden_layers=layers,
            num_attention_heads=hidden_size // 64,
            num_key_value_heads=hidden_size // 128,
            head_dim=64,
            max_position_embeddings=CONTEXT,
            bos_token_id=0,
            eos_token_id=2,
        )
    )
    with torch.no_grad():
        for name, weight in model.named_parameters():
            if weight.ndim == 2:
                weight.normal_(0, 1.0 if "embed" in name else 0.15)
    return model.to(torch.bfloat16)


if __name__ == "__main__":
    make_model(Path(sys.argv[1]))
