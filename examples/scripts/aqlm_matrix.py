"""AQLM on one matrix of the embedded model: the loss over rounds, and what beam, order and start do to it.

python examples/scripts/aqlm_matrix.py [MODULE] [FIGURE.png]
"""

import sys
from pathlib import Path

import quantloom as ql
import torch
from quantloom.beam_search import refit_tables, search_codes

folder = Path(__file__).parents[1] / "tiny-llama"
module = sys.argv[1] if len(sys.argv) > 1 else "model.layers.1.mlp.down_proj"
model = ql.models.load_reference(folder)
linear = model.get_submodule(module)
hessian, held_out = ql.Hessian(linear.in_features), ql.Hessian(linear.in_features)
ids = torch.from_numpy(ql.evaluate.tokens(folder, folder / "calib.txt")[: 20 * 256].reshape(20, 256))
for part, windows in ((hessian, ids[:16]), (held_out, ids[16:])):
    hook = linear.register_forward_pre_hook(
        lambda _, inputs, part=part: part.add(inputs[0].reshape(-1, linear.in_features).numpy())
    )
    with torch.no_grad():
        for window in windows:
            model(window[None].long())
    hook.remove()
w = linear.weight.detach().float().numpy()
form = ql.Additive(codebooks=2, bits=6, in_group=8)

# The two steps by hand, from tables by residual k-means and the nearest codes.
print(
    f"{module} {w.shape}, {form}: {form.average_bits(*w.shape):.3f} bits per weight, {hessian.tokens} tokens"
)
q = ql.quantize(w, form, ql.BeamSearch(hessian, rounds=0, refit=0))
print(f"{'start':24} {ql.proxy_loss(w, q, hessian):9.5f}")
for turn in range(3):
    q = refit_tables(w, q, hessian)
    print(f"{'tables and scales':24} {ql.proxy_loss(w, q, hessian):9.5f}")
    q = search_codes(w, q, hessian, order="shuffled", seed=turn)
    print(f"{'codes':24} {ql.proxy_loss(w, q, hessian):9.5f}")

curves = {}
print(
    f"{'rounding':44} {'rounds':>6} {'loss':>9} {'held out':>9}   loss after each round, of that of the start"
)
for spec in (
    "beam_search",
    "beam_search:natural",
    "beam_search:beam=4",
    "beam_search:gptq",
    "beam_search:beam=4:tolerance=0.001",
):
    options = ql.parse_rounding(spec).__dict__ | {"hessian": hessian, "held_out": held_out}
    report = ql.quantize(w, form, ql.BeamSearch(**options)).report
    curves[spec] = report.losses
    course = " ".join(f"{loss / curves['beam_search'][0]:.3f}" for loss in report.losses)
    loss, held = report.proxy_loss, report.held_out_loss
    print(f"{spec:44} {len(report.losses) - 1:6} {loss:9.5f} {held:9.5f}   {course}")
for rounding in (ql.Nearest(hessian=hessian, held_out=held_out), ql.GPTQ(hessian, held_out=held_out)):
    report = ql.quantize(w, form, rounding).report
    print(f"{rounding.spec:44} {'':6} {report.proxy_loss:9.5f} {report.held_out_loss:9.5f}")

if len(sys.argv) > 2:
    import matplotlib.pyplot as plt

    for name, losses in curves.items():
        plt.plot(losses, marker="o", label=name)
    plt.xlabel("round")
    plt.ylabel("mean squared output error")
    plt.legend()
    plt.savefig(sys.argv[2], dpi=150)
