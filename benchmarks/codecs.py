"""How small, how exact and how fast the KV encodings are: docs/kv-codecs.md has the table.

    python benchmarks/codecs.py [--tokens 2048] [--seconds 0.25] [--json benchmarks/results/codecs.json]

Ratio and error are measured unit by unit on KV of real forward passes over this repository's documents, and on drawn KV.
The models are made on the spot and have random weights: a Llama and a Qwen2, whose keys have biases, a few of them large,
as trained ones do. Speed is that of one thread, through the library, from and to a cache larger than the processor's
second-level cache, in bytes of raw KV per second; beside it, as a share, what copying without an encoding reached.
"""

import argparse
import json
import platform
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from math import cos, sin
from pathlib import Path
from typing import Any, NamedTuple

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import torch

from worker_connector.codecs import ENCODINGS
from worker_connector.errors import Incompressible, NativeUnavailable
from worker_connector.native import Context, Encoding, InstructionSet, Rotation, View

ROOT = Path(__file__).resolve().parents[1]
BLOCK_TOKENS, HEAD_SIZE, KV_HEADS = 16, 128, 2
SETS = (InstructionSet.PORTABLE, InstructionSet.AVX2, InstructionSet.AVX512, InstructionSet.NEON)


class Kept(NamedTuple):
    """What an encoding makes of some KV: bytes saved; the share of units that it cannot hold and the largest share of
    escapes in a tile (6.25 % fit); errors relative to the norm, of all channels together and of the worst one."""

    ratio: float
    refused_units: float
    most_escapes: float
    key_error: float
    worst_key_channel: float
    value_error: float
    worst_value_channel: float


# KV to measure on: [layer, block, head, token, K and V].


def from_forward_pass(kind: str, tokens: int) -> Any:
    """KV of a forward pass over the documents, by a model with random weights."""
    from router.demo_model import make_model  # noqa: PLC0415 - needs transformers

    with tempfile.TemporaryDirectory() as folder:
        make_model(Path(folder), hidden_size=256, layers=1)
        ids = text_ids(Path(folder), tokens)
    with torch.inference_mode():
        cache = made_model(kind)(ids[None], use_cache=True).past_key_values
    return packed(torch.stack([torch.cat([each.keys, each.values], -1)[0] for each in cache.layers]))


def text_ids(folder: Path, tokens: int) -> Any:
    from transformers import AutoTokenizer  # noqa: PLC0415

    text = "\n".join(path.read_text(encoding="utf-8") for path in sorted((ROOT / "docs").glob("*.md")))
    ids = AutoTokenizer.from_pretrained(folder)(text).input_ids[:tokens]
    return torch.tensor(ids[: len(ids) // BLOCK_TOKENS * BLOCK_TOKENS])


def made_model(kind: str) -> Any:
    """Six layers with the shapes of a Llama-3 or a Qwen2, initialized as theirs are before training; norms vary by
    channel. The Qwen2's keys have biases of unit size, and of twenty to a hundred in four channels of each head."""
    from transformers import LlamaConfig, LlamaForCausalLM, Qwen2Config, Qwen2ForCausalLM  # noqa: PLC0415

    shape = {
        "vocab_size": 4096,
        "hidden_size": 1024,
        "intermediate_size": 2048,
        "num_hidden_layers": 6,
        "num_attention_heads": 8,
        "num_key_value_heads": KV_HEADS,
    }
    torch.manual_seed(0)
    model: Any
    if kind == "llama":
        model = LlamaForCausalLM(LlamaConfig(head_dim=HEAD_SIZE, **shape))
    else:
        model = Qwen2ForCausalLM(Qwen2Config(**shape))
    with torch.no_grad():
        for name, weight in model.named_parameters():
            if "norm" in name:
                weight.copy_(torch.exp(0.5 * torch.randn_like(weight)))
            if name.endswith("k_proj.bias"):
                weight.normal_()
                for head in weight.view(KV_HEADS, HEAD_SIZE):
                    head[torch.randperm(HEAD_SIZE)[:4]] = torch.tensor([20.0, -40.0, 70.0, 100.0])
    return model.to(torch.bfloat16).eval()


def drawn(outliers: float, spread: float, tokens: int) -> Any:
    """Normal KV whose channels differ in size by ``exp(spread · normal)``, four of K's by ``outliers`` more."""
    generator = torch.Generator().manual_seed(1)
    shape = (6, KV_HEADS, tokens, 2 * HEAD_SIZE)
    sizes = torch.exp(spread * torch.randn((6, KV_HEADS, 1, 2 * HEAD_SIZE), generator=generator))
    sizes[..., : HEAD_SIZE : HEAD_SIZE // 4] *= outliers
    return packed((torch.randn(shape, generator=generator) * sizes).to(torch.bfloat16))


def packed(content: Any) -> Any:
    """``[layer, head, token, content]`` as blocks."""
    layers, heads, tokens, width = content.shape
    blocks = content.reshape(layers, heads, tokens // BLOCK_TOKENS, BLOCK_TOKENS, width)
    return blocks.transpose(1, 2).contiguous()


# Ratio and error.


def measure(context: Context, content: Any, encoding: Encoding) -> Kept:
    kept, refused, escapes, decoded = 0, 0, 0.0, content.clone()
    units = list(zip(content.flatten(0, 2), decoded.flatten(0, 2), strict=True))
    for before, after in units:
        source, target = (View.of_arrays([unit[None, None]]) for unit in (before, after))
        form = torch.empty(context.unit_bytes(source, encoding), dtype=torch.uint8)
        try:
            context.gather(source, [0], [context.span(form, 1)], encoding=encoding)
        except Incompressible:
            refused += 1
            continue
        kept += form.numel()
        escapes = max(escapes, escaped_share(form) if encoding is Encoding.EXP12 else 0.0)
        after.zero_()
        context.scatter(target, [0], [context.span(form, 1)], encoding=encoding)
    raw = content[0, 0, 0].numel() * content.element_size()
    ratio = raw * (len(units) - refused) / max(1, kept)
    halves = zip(content.double().chunk(2, -1), decoded.double().chunk(2, -1), strict=True)
    errors = [error for before, after in halves for error in relative_errors(before, after)]
    return Kept(round(ratio, 3), refused / len(units), round(escapes, 5), *errors)


def escaped_share(form: Any) -> float:
    """Of the tile that has most: each of the unit's two tiles is a table, room for escapes, codes and low bytes."""
    elements = BLOCK_TOKENS * HEAD_SIZE
    codes = form.reshape(2, -1)[:, 16 + elements // 16 :][:, : elements // 2]
    return float(((codes & 15 == 15).sum(1) + (codes >> 4 == 15).sum(1)).max()) / elements


def relative_errors(before: Any, after: Any) -> tuple[float, float]:
    """Of everything, and of the worst channel of a layer and head: ``[layer, block, head, token, channel]``."""
    by_channel = [each.transpose(1, 2).flatten(2, 3).norm(dim=2) for each in (after - before, before)]
    whole = (after - before).norm() / before.norm()
    return round(float(whole), 5), round(float((by_channel[0] / by_channel[1]).max()), 5)


# Speed.


def rate(call: Callable[[], object], nbytes: int, seconds: float) -> float:
    """GB/s of the fastest of the calls that fit into ``seconds``, by the processor time of this thread, which does all
    the work: a busy machine disturbs it least."""
    call()
    best, end = float("inf"), time.perf_counter() + seconds
    while time.perf_counter() < end:
        began = time.thread_time()
        call()
        best = min(best, time.thread_time() - began)
    return nbytes / best / 1e9


def speeds(instruction_set: InstructionSet, dtype: Any, seconds: float) -> Iterator[tuple[str, float]]:
    """Name and GB/s of raw KV. 32 blocks of 4 layers with 8 heads: 8 MiB for 16-bit elements."""
    context = Context("cpu", threads=1, instruction_set=instruction_set)
    generator = torch.Generator().manual_seed(2)
    cache = torch.randn((4, 32, 8, BLOCK_TOKENS, 2 * HEAD_SIZE), generator=generator).to(dtype)
    view, blocks = View.of_arrays(list(cache)), list(range(32))
    nbytes = cache.numel() * cache.element_size()
    for name, encoding in ENCODINGS.items():
        if name == "exp12" and dtype is not torch.bfloat16:
            continue
        form = torch.zeros(4 * 32 * 8 * context.unit_bytes(view, encoding), dtype=torch.uint8)
        spans = [context.span(form, 32)]
        for what, call in (("encode", context.gather), ("decode", context.scatter)):
            work = lambda call=call, spans=spans, encoding=encoding: call(view, blocks, spans, encoding=encoding)  # noqa: E731
            yield f"{what} {name}", rate(work, nbytes, seconds)
    raw = torch.zeros_like(cache)  # alive as long as its span is used
    spans = [context.span(raw, 32)]
    for form, interleaved in (("neox", False), ("interleaved", True)):
        angles = [pair / 7 for pair in range(HEAD_SIZE // 2)]
        turn = Rotation(map(cos, angles), map(sin, angles), interleaved=interleaved)
        yield f"rotate {form}", rate(lambda turn=turn: context.rotate(view, blocks, turn), nbytes // 2, seconds)
        load = lambda turn=turn, spans=spans: context.scatter(view, blocks, spans, rotation=turn)  # noqa: E731
        yield f"decode raw and rotate {form}", rate(load, nbytes, seconds)


def all_speeds(seconds: float) -> dict[str, dict[str, float]]:
    found = {}
    for instruction_set in SETS:
        for dtype in (torch.bfloat16, torch.float16, torch.float32):
            name = f"{instruction_set.name.lower()} {str(dtype).removeprefix('torch.')}"
            try:
                found[name] = {what: round(speed, 2) for what, speed in speeds(instruction_set, dtype, seconds)}
            except NativeUnavailable:
                continue
    return found


def kept_of_all(tokens: int) -> dict[str, dict[str, Kept]]:
    sources: dict[str, Callable[[], Any]] = {
        "llama": lambda: from_forward_pass("llama", tokens),
        "qwen2, keys with biases": lambda: from_forward_pass("qwen2", tokens),
        "drawn": lambda: drawn(1, 0, tokens),
        "drawn, channels differ": lambda: drawn(1, 1, tokens),
        "drawn, outlier channels": lambda: drawn(50, 0.5, tokens),
    }
    found = {}
    with Context("cpu", threads=1) as context:
        for name, make in sources.items():
            content = make()
            found[name] = {each: measure(context, content, encoding) for each, encoding in ENCODINGS.items()}
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--tokens", type=int, default=2048)
    parser.add_argument("--seconds", type=float, default=0.25, help="for each speed")
    parser.add_argument("--json", type=Path)
    options = parser.parse_args()
    torch.set_num_threads(1)
    kept, rates = kept_of_all(options.tokens), all_speeds(options.seconds)
    for source, encodings in kept.items():
        for name, result in encodings.items():
            print(f"{source:28} {name:6} {result}")
    for name, figures in rates.items():
        copy = figures["decode raw"]
        for what, speed in figures.items():
            print(f"{name:18} {what:32} {speed:6.2f} GB/s, {speed / copy:.2f} of a copy")
    if options.json:
        result = {
            "machine": {
                "processor": platform.machine(),
                "system": platform.platform(),
                "library": Context().description,
            },
            "tokens": options.tokens,
            "kept": {source: {name: each._asdict() for name, each in by.items()} for source, by in kept.items()},
            "gigabytes_per_second": rates,
        }
        options.json.write_text(json.dumps(result, indent=2) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
