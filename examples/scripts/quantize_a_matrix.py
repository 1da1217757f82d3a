"""Quantize one matrix: to nearest, by AWQ and by GPTQ, what each costs, and the way to a file and back.

python examples/scripts/quantize_a_matrix.py
"""

import tempfile
from pathlib import Path

import numpy as np
import quantloom as ql

rng = np.random.default_rng(0)
n, k, tokens = 256, 512, 2048
w = rng.standard_normal((n, k), dtype=np.float32)
# Activations of a few strong directions, as layers of real models see them.
directions = (
    rng.standard_normal((k, k), dtype=np.float32) * np.geomspace(3, 0.05, k, dtype=np.float32)[:, None]
)
x = rng.standard_normal((tokens, k), dtype=np.float32) @ directions / np.sqrt(k, dtype=np.float32)

# What the rounding should care about: H, the sum of x x^T over the tokens.
hessian = ql.Hessian(k)
hessian.add(x)

exact = x @ w.T
print(f"{'format':34} {'rounding':8} {'bits/weight':>11} {'output error':>12}")
SPECS = (
    "uniform:8:g128",
    "uniform:4:g128:asym",
    "vector_codebook:64x2:g128",
    "outliers:1%:uniform:3:g128",
    "uniform:3:g128:asym",
    "bcq:3:g128:offset",
    "uniform:2:g64:asym",
)
for spec in SPECS:
    for name, rounding in (
        ("nearest", ql.Nearest()),
        ("awq", ql.AWQ(hessian=hessian)),
        ("gptq", ql.GPTQ(hessian)),
    ):
        q = ql.quantize(w, spec, rounding)
        # A product straight from the packed codes.
        error = np.linalg.norm(ql.matmul(x, q) - exact) / np.linalg.norm(exact)
        print(f"{q.format.spec:34} {name:8} {q.bits_per_weight:11.3f} {error:12.4f}")

with tempfile.TemporaryDirectory() as folder:
    file = Path(folder) / "layer.safetensors"
    ql.save_tensors(file, {"layer": q, "bias": np.zeros(n, dtype=np.float32)})
    loaded = ql.load_tensors(file)["layer"]
    assert np.array_equal(loaded.dequantize(), q.dequantize())
    print(f"saved and loaded {loaded}: {file.stat().st_size} bytes, {w.nbytes} as float32")
