"""Decode attention over caches of keys and values: from codes, and by PyTorch over float16.

    python bench/gpu/kv_attention.py [--formats kivi:2 kivi:4] [--batches 1 16] [--contexts 4096 32768 131072]
        [--head-dim 128]

One token of each sequence attends to its cache: 32 heads, 8 KV heads. For each case:
microseconds of our kernel, GB/s of the bytes it reads (codes, scales and exact tokens), its speed relative to
PyTorch summing as many bytes ("of floor"), and relative to scaled_dot_product_attention on the same cache in
float16, of whose backends and layouts the fastest counts. Launches follow each other in a CUDA graph; best of
five runs. Formats of the kind kvquant have evenly spaced tables and take rotary embeddings off the keys.
"""

import argparse
import functools
import math

import numpy as np
import quantloom as ql
import torch
from torch.nn.attention import SDPBackend, sdpa_kernel

HEADS, KV_HEADS = 32, 8
PIECE = 4096  # tokens that are appended at a time


def microseconds(run, repeats=20):
    """Of one run, from a CUDA graph of `repeats`."""
    stream = torch.cuda.Stream()
    with torch.cuda.stream(stream):
        for _ in range(3):
            run()
        torch.cuda.synchronize()
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph, stream=stream):
            for _ in range(repeats):
                run()
        best = math.inf
        for _ in range(5):
            start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
            start.record()
            graph.replay()
            end.record()
            torch.cuda.synchronize()
            best = min(best, start.elapsed_time(end) * 1000 / repeats)
    return best


def pytorch(batch, context, queries):
    """The fastest of PyTorch's ways, as microseconds and its name."""
    head_dim = queries.shape[-1]
    shape = (batch, KV_HEADS, context, head_dim)
    keys, values = (torch.randn(shape, dtype=torch.float16, device="cuda") for _ in range(2))
    # Heads that share a KV head as queries of one head: the same products, for backends without sharing.
    together = queries.view(batch, KV_HEADS, HEADS // KV_HEADS, head_dim)
    attend = torch.nn.functional.scaled_dot_product_attention
    results = []
    for backend in (SDPBackend.FLASH_ATTENTION, SDPBackend.CUDNN_ATTENTION, SDPBackend.EFFICIENT_ATTENTION):
        for layout, q, shared in (("shared heads", queries, True), ("heads as queries", together, False)):
            try:
                with sdpa_kernel(backend):
                    time = microseconds(functools.partial(attend, q, keys, values, enable_gqa=shared))
            except RuntimeError:  # a backend that does not take the case
                continue
            results.append((time, f"{backend.name.lower().removesuffix('_attention')}, {layout}"))
    return min(results)


def tables(format, positions, head_dim):
    """For kvquant, of elements whose deviation is 1."""
    format = ql.kv.parse_kv_format(format)
    if format.kind != "kvquant":
        return None
    spaced = [
        np.linspace(-1, 1, 2**bits).astype(np.float16).astype(np.float32)
        for bits in (format.key_bits, format.value_bits)
    ]
    scale = np.full((KV_HEADS, head_dim), 3, np.float32)
    ends = [array for values in spaced for array in ((values[1:] + values[:-1]) / 2, values)]
    layer = ql.kv.KVTables(*ends, scale, np.zeros_like(scale))
    frequencies = (500000.0 ** -(np.arange(head_dim // 2) / (head_dim // 2))).astype(np.float32)
    calibration = ql.kv.KVCalibration(format, (layer,), ql.kv.RotaryEmbedding(frequencies))
    return calibration.core_tables(0, positions)


def ours(batch, context, queries, format):
    """Microseconds, and the bytes that are read."""
    head_dim = queries.shape[-1]
    fitted = tables(format, context, head_dim)
    cache = ql.kv.KVCache(format, batch, KV_HEADS, head_dim, "float16", context, fitted, device="cuda")
    for first in range(0, context, PIECE):
        shape = (batch, KV_HEADS, min(PIECE, context - first), head_dim)
        keys, values = (torch.randn(shape, dtype=torch.float16, device="cuda") for _ in range(2))
        cache.append(keys, values)
    time = microseconds(lambda: cache.attend(queries))
    usage = cache.usage()
    return time, usage.code_bytes + usage.exact_bytes


def floor(size):
    """Microseconds of a sum over as many bytes."""
    x = torch.ones(max(1, size // 4), dtype=torch.float32, device="cuda")
    return microseconds(lambda: torch.sum(x))


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--formats", nargs="+", default=["kivi:2", "kivi:4", "kivi:8", "token:4"])
    parser.add_argument("--batches", nargs="+", type=int, default=[1, 16])
    parser.add_argument("--contexts", nargs="+", type=int, default=[4096, 32768, 131072])
    parser.add_argument("--head-dim", type=int, default=128)
    options = parser.parse_args()
    torch.manual_seed(0)
    print(f"{torch.cuda.get_device_name()}, PyTorch {torch.__version__}")
    print("| batch | context | format | us | GB/s | of floor | PyTorch us (backend) | times PyTorch |")
    print("|---|---|---|---|---|---|---|---|")
    for batch in options.batches:
        for context in options.contexts:
            queries = torch.randn(batch, HEADS, 1, options.head_dim, dtype=torch.float16, device="cuda")
            theirs, backend = pytorch(batch, context, queries)
            for format in options.formats:
                time, size = ours(batch, context, queries, format)
                torch.cuda.empty_cache()
                print(
                    f"| {batch} | {context} | {format} | {time:.1f} | {size / time / 1e3:.0f}"
                    f" | {floor(size) / time:.2f} | {theirs:.1f} ({backend}) | {theirs / time:.2f} |",
                    flush=True,
                )


if __name__ == "__main__":
    main()
