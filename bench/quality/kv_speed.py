"""Single tokens of a whole model behind a long context: quantized caches and those of transformers.

    python bench/quality/kv_speed.py --device cuda [--contexts 4096 32768] [--batches 1 8] [--layers 32]
        [--formats kivi:2 kivi:4] [--json FILE]

A Llama with layers of the shapes of Llama 3.1 8B and a vocabulary of 32000, random weights in bfloat16. The
context is random keys and values, stored as a prompt is. Then single tokens, each the likeliest after the one
before: the mean of --tokens steps after some that are not timed; eager, and as a captured CUDA graph where
the cache allows for it. Memory is what the device has less of with the cache than without.
"""

from __future__ import annotations

import argparse
import gc
import json
import time
from pathlib import Path

import quantloom as ql
import torch
import transformers
from quantloom.kv import generation

WARM = 4


def make_model(arguments: argparse.Namespace) -> transformers.PreTrainedModel:
    config = transformers.LlamaConfig(
        hidden_size=arguments.hidden,
        intermediate_size=arguments.hidden * 7 // 2,
        num_hidden_layers=arguments.layers,
        num_attention_heads=arguments.hidden // 128,
        num_key_value_heads=max(arguments.hidden // 512, 1),
        head_dim=128,
        vocab_size=32000,
        max_position_embeddings=1 << 20,
    )
    torch.manual_seed(0)
    with torch.device(arguments.device):
        model = transformers.AutoModelForCausalLM.from_config(config, dtype=torch.bfloat16)
    return model.eval()


def wait(device: str) -> None:
    if device != "cpu":
        torch.cuda.synchronize()


def free_bytes(device: str) -> int:
    if device == "cpu":
        return 0
    gc.collect()
    torch.cuda.empty_cache()
    torch.cuda.synchronize()
    return torch.cuda.mem_get_info()[0]


def fill(model, cache, batch: int, context: int) -> None:
    """Stores random keys and values as those of a prompt."""
    config = model.config
    shape = (batch, config.num_key_value_heads, context, config.head_dim)
    for layer, block in enumerate(model.model.layers):
        keys, values = (torch.randn(shape, dtype=torch.bfloat16, device=model.device) for _ in range(2))
        stored = cache.update(keys, values, layer)
        if isinstance(cache, ql.kv.QuantizedKVCache):
            generation.attention(block.self_attn, keys, *stored, None)


def seconds_of(step, arguments: argparse.Namespace) -> float:
    for _ in range(WARM):
        step()
    wait(arguments.device)
    begin = time.perf_counter()
    for _ in range(arguments.tokens):
        step()
    wait(arguments.device)
    return (time.perf_counter() - begin) / arguments.tokens


@torch.inference_mode()
def measure(model, name: str, batch: int, context: int, arguments: argparse.Namespace) -> dict:
    total = context + 4 * (arguments.tokens + 2 * WARM)
    free = free_bytes(arguments.device)
    if name == "dynamic":
        model.set_attn_implementation("sdpa")
        cache = transformers.DynamicCache(config=model.config)
    elif name == "static":
        model.set_attn_implementation("sdpa")
        cache = transformers.StaticCache(config=model.config, max_cache_len=total)
    else:
        ql.kv.use_attention(model)
        cache = ql.kv.QuantizedKVCache(model.config, name, capacity=total)
    fill(model, cache, batch, context)
    row = {"cache": name, "batch": batch, "context": context}
    row["bytes"] = free - free_bytes(arguments.device)
    token = torch.ones((batch, 1), dtype=torch.long, device=arguments.device)
    place = torch.full((batch, 1), context, device=arguments.device)

    def step() -> None:
        logits = model(token, position_ids=place, past_key_values=cache).logits
        token.copy_(logits[:, -1:].argmax(-1))
        place.add_(1)

    row["eager_s"] = seconds_of(step, arguments)
    if name != "dynamic" and arguments.device != "cpu":
        if isinstance(cache, ql.kv.QuantizedKVCache):
            cache.reserve(total)
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            step()
        row["captured_s"] = seconds_of(graph.replay, arguments)
    return row


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--contexts", nargs="+", type=int, default=[4096, 32768])
    parser.add_argument("--batches", nargs="+", type=int, default=[1, 8])
    parser.add_argument("--formats", nargs="*", default=["kivi:2", "kivi:4"])
    parser.add_argument("--theirs", nargs="*", default=["dynamic", "static"])
    parser.add_argument("--layers", type=int, default=32)
    parser.add_argument("--hidden", type=int, default=4096)
    parser.add_argument("--tokens", type=int, default=32)
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--json", metavar="FILE")
    arguments = parser.parse_args()
    model = make_model(arguments)
    name = "cpu" if arguments.device == "cpu" else torch.cuda.get_device_name()
    report = {"device": name, "torch": torch.__version__, "transformers": transformers.__version__}
    report |= {"layers": arguments.layers, "hidden": arguments.hidden, "rows": []}
    print("| context | sequences | cache | GiB | ms a token | captured |")
    print("| ---: | ---: | --- | ---: | ---: | ---: |")
    for context in arguments.contexts:
        for batch in arguments.batches:
            for cache in (*arguments.theirs, *arguments.formats):
                row = measure(model, cache, batch, context, arguments)
                captured = f"{row['captured_s'] * 1e3:.2f}" if "captured_s" in row else ""
                print(
                    f"| {context} | {batch} | `{cache}` | {row['bytes'] / 2**30:.2f} |"
                    f" {row['eager_s'] * 1e3:.2f} | {captured} |",
                    flush=True,
                )
                report["rows"].append(row)
    if arguments.json:
        Path(arguments.json).write_text(json.dumps(report, indent=2) + "\n")


if __name__ == "__main__":
    main()
