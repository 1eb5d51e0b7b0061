"""Makes a small model that reads images: ``python -m tests.worker_connector.vision_model DIRECTORY``.

A BLIP-2 of two layers with random weights, spread so widely that its greedy output depends on the image. An image is 16
embeddings. Its processor works without torchvision, which has no build for the CPU build of PyTorch that vLLM brings.
"""

import sys
from pathlib import Path
from typing import Any

import torch
from transformers import Blip2Config, Blip2ForConditionalGeneration, Blip2Processor, BlipImageProcessorPil

from router.demo_model import _tokenizer

IMAGE = 56
QUERIES = 16


def make_model(directory: Path) -> None:
    """Write weights, configuration and processor."""
    tokenizer = _tokenizer()
    tokenizer.chat_template = None
    processor = Blip2Processor(
        BlipImageProcessorPil(size={"height": IMAGE, "width": IMAGE}), tokenizer, num_query_tokens=QUERIES
    )
    _blip2(processor.tokenizer).save_pretrained(directory)
    processor.save_pretrained(directory)


def _blip2(tokenizer: Any) -> Any:
    layers = {"intermediate_size": 128, "num_hidden_layers": 2, "num_attention_heads": 2}
    config = Blip2Config(
        vision_config={"hidden_size": 64, "image_size": IMAGE, "patch_size": 14, **layers},
        qformer_config={
            "vocab_size": 64,
            "hidden_size": 64,
            "encoder_hidden_size": 64,
            "cross_attention_frequency": 1,
            **layers,
        },
        text_config={
            "model_type": "opt",
            "vocab_size": -(-len(tokenizer) // 64) * 64,
            "hidden_size": 128,
            "word_embed_proj_dim": 128,
            "ffn_dim": 256,
            "num_hidden_layers": 2,
            "num_attention_heads": 2,
            "max_position_embeddings": 1024,
            "bos_token_id": 0,
            "eos_token_id": 2,
            "pad_token_id": 1,
        },
        num_query_tokens=QUERIES,
        image_token_index=tokenizer.convert_tokens_to_ids("<image>"),
    )
    torch.manual_seed(0)
    model = Blip2ForConditionalGeneration(config)
    with torch.no_grad():
        for name, weight in model.named_parameters():
            if weight.ndim >= 2:
                weight.normal_(0, 1.0 if "embed" in name or "query_tokens" in name else 0.15)
    return model


if __name__ == "__main__":
    make_model(Path(sys.argv[1]))
