"""SpQR on one matrix of the embedded model: what outliers buy at equal bits, and where they lie.

python examples/scripts/spqr_matrix.py [MODULE]
"""

import sys
from dataclasses import replace
from pathlib import Path

import numpy as np
import quantloom as ql
import torch

folder = Path(__file__).parents[1] / "tiny-llama"
module = sys.argv[1] if len(sys.argv) > 1 else "model.layers.1.mlp.down_proj"
model = ql.models.load_reference(folder)
linear = model.get_submodule(module)
hessian = ql.Hessian(linear.in_features)
linear.register_forward_pre_hook(
    lambda _, inputs: hessian.add(inputs[0].reshape(-1, linear.in_features).numpy())
)
ids = torch.from_numpy(ql.evaluate.tokens(folder, folder / "calib.txt")[: 16 * 256].reshape(16, 256))
with torch.no_grad():
    for window in ids:
        model(window[None].long())
w = linear.weight.detach().float().numpy()

print(f"{module} {w.shape}, {hessian.tokens} tokens")
print(f"{'format':40} {'rounding':42} {'bits/weight':>11} {'loss':>9} {'outliers':>8}")
walk = "gptq:search=8:dynamic-groups"
for spec, rounding in (
    ("uniform:4:channel:asym", "gptq:search=8"),
    ("uniform:3:g32:asym", walk),
    ("uniform:3:g32:asym", f"{walk}:bits=4.2"),
    ("spqr:3:g16:s3:z3:b16", walk),
    ("spqr:3:g16:s4:z4:b64", f"{walk}:bits=4.2"),
    ("spqr:3:g16:s3:z3:b16", f"{walk}:outliers=1%"),
):
    q = ql.quantize(w, spec, replace(ql.parse_rounding(rounding), hessian=hessian))
    report = q.report
    loss = report.proxy_loss
    print(f"{spec:40} {rounding:42} {q.bits_per_weight:11.3f} {loss:9.5f} {report.outliers:8}")

# Outliers of the last: how uneven rows and columns are, and how they differ from the largest weights.
rows = np.diff(q.planes["outlier_offsets"])
columns = np.bincount(q.planes["outlier_columns"], minlength=w.shape[1])
places = np.repeat(np.arange(len(rows)), rows) * w.shape[1] + q.planes["outlier_columns"]
largest = np.argsort(-np.abs(w).ravel())[: len(places)]
print(f"outliers in a row: {rows.min()} to {rows.max()}; in a column: {columns.min()} to {columns.max()}")
print(f"of the {len(places)} largest weights {np.isin(places, largest).mean():.0%} are outliers")
formula = q.format.dense.average_bits(report.outliers / w.size)
print(f"bits by the paper's formula: {formula:.3f}; stored: {q.bits_per_weight:.3f}")
