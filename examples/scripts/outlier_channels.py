"""Outlier channels in activations: what they cost 8-bit and 6-bit products, and what helps.

python examples/scripts/outlier_channels.py [FACTOR]

One matrix of the embedded model and its real inputs, with three channels made FACTOR times as large (and the
columns of the matrix that read them as much smaller).
"""

import sys
from pathlib import Path

import numpy as np
import quantloom as ql
import torch

factor = float(sys.argv[1]) if len(sys.argv) > 1 else 50.0
folder = Path(__file__).parents[1] / "tiny-llama"
model = ql.models.load_reference(folder)
linear = model.get_submodule("model.layers.1.mlp.up_proj")
inputs = []
linear.register_forward_pre_hook(lambda _, args: inputs.append(args[0].reshape(-1, linear.in_features)))
ids = torch.from_numpy(ql.evaluate.tokens(folder, folder / "calib.txt")[: 8 * 256].reshape(8, 256))
with torch.no_grad():
    for window in ids:
        model(window[None].long())
x = torch.cat(inputs).numpy()
w = linear.weight.detach().float().numpy()
channels = [7, 100, 201]
x[:, channels] *= factor
w[:, channels] /= factor
train, test = x[:1024], x[1024:]
exact = test.astype(np.float64) @ w.T.astype(np.float64)


def error(q, activations):
    return np.sqrt(
        np.square(ql.matmul(test, q, activations=activations) - exact).sum() / np.square(exact).sum()
    )


largest = np.abs(train).max(0)
print(f"inputs: largest {largest.max():.1f}, median channel {np.median(largest):.2f}")
print(f"{'':34} {'8 bits':>9} {'6 bits':>9}")
for name, rounding, suffix in (
    ("a scale for each token", ql.Nearest(), ""),
    ("SmoothQuant, alpha 0.5", ql.SmoothQuant(inputs=train), ""),
    ("SmoothQuant, alpha searched", ql.SmoothQuant(alpha=None, inputs=train), ""),
    ("LLM.int8(): outlier columns", ql.Nearest(), f":outliers={largest.max() / 4:g}"),
):
    row = [error(ql.quantize(w, f"uniform:{b}:channel", rounding), f"int{b}:token{suffix}") for b in (8, 6)]
    print(f"{name:34} {row[0]:9.2%} {row[1]:9.2%}")
# The same with the columns of weights that read outliers in float16.
fixed = f":outliers=1:columns={','.join(map(str, channels))}"
row = [
    error(ql.keep_columns(ql.quantize(w, f"uniform:{b}:channel"), w, channels), f"int{b}:token{fixed}")
    for b in (8, 6)
]
print(f"{'  with their weights in float16':34} {row[0]:9.2%} {row[1]:9.2%}")
