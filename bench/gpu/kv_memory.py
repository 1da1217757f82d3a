"""Memory of the caches of a whole model behind a long context, against what their format says.

    python bench/gpu/kv_memory.py [--formats kivi:2 kivi:4] [--context 131072] [--layers 32]

Caches of layers with 8 KV heads of 128 channels in float16, filled with random tokens. The formula counts
layers * KV heads * (pages * bytes of a record + exact tokens * 2 * 128 * 2 bytes); "device" is what the
device has less of than before, and "later" what single tokens take after that.
"""

import argparse

import quantloom as ql
import torch

KV_HEADS, HEAD_DIM, PIECE, LATER = 8, 128, 4096, 64


def free_bytes():
    torch.cuda.synchronize()
    torch.cuda.empty_cache()
    return torch.cuda.mem_get_info()[0]


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--formats", nargs="+", default=["kivi:2", "kivi:4"])
    parser.add_argument("--context", type=int, default=131072)
    parser.add_argument("--layers", type=int, default=32)
    options = parser.parse_args()
    print(f"{torch.cuda.get_device_name()}, {options.layers} layers, {options.context} tokens")
    print("| format | formula, MiB | device, MiB | in use, MiB | later, bytes | float16, MiB |")
    print("|---|---|---|---|---|---|")
    shape = (1, KV_HEADS, PIECE, HEAD_DIM)
    keys, values = (torch.randn(shape, dtype=torch.float16, device="cuda") for _ in range(2))
    capacity = options.context + LATER
    for spec in options.formats:
        before = free_bytes()
        caches = [
            ql.kv.KVCache(spec, 1, KV_HEADS, HEAD_DIM, "float16", capacity, device="cuda")
            for _ in range(options.layers)
        ]
        for first in range(0, options.context, PIECE):
            count = min(PIECE, options.context - first)
            for cache in caches:
                cache.append(keys[:, :, :count], values[:, :, :count])
        filled = free_bytes()
        for _ in range(LATER):
            for cache in caches:
                cache.append(keys[:, :, :1], values[:, :, :1])
        later = filled - free_bytes()
        format = caches[0].format
        layout = ql.kv.KVCache(format, 1, KV_HEADS, HEAD_DIM)._core.layout()
        pages = -(-max(0, capacity - format.first) // layout["page_tokens"])
        exact = (format.first + format.window) * 2 * HEAD_DIM * 2
        formula = options.layers * KV_HEADS * (pages * layout["record_bytes"] + exact)
        used = sum(cache.usage().page_bytes + cache.usage().exact_bytes for cache in caches)
        dense = options.layers * KV_HEADS * options.context * HEAD_DIM * 2 * 2
        figures = [f"{size / 2**20:.1f}" for size in (formula, before - filled, used)]
        print(f"| {spec} | {' | '.join(figures)} | {later} | {dense / 2**20:.0f} |", flush=True)
        del caches, cache


if __name__ == "__main__":
    main()
