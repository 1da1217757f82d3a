"""Steps of the refit of additive tables and scales: conjugate gradients against Adam, as published.

    python bench/quality/refit_steps.py [--formats additive:2x6:g8 ...] [--rates 0.0001 ...]
    python bench/quality/refit_steps.py MODEL --calibration calib.u16 --modules model.layers.1.mlp.down_proj

The losses tr(E H E^T) after so many steps from the same codes, those of the nearest entries, over the loss of
these. A step of either is one product of errors and H. Conjugate gradients take that many for tables, then
for scales, and perhaps turns of both; Adam moves them together. Without MODEL: normal weights [128, 256] and
inputs whose neighbours correlate by 0.7.
"""

from __future__ import annotations

import argparse

STEPS = (1, 2, 5, 10, 20, 50)
ADAM_STEPS = (100, 300, 1000, 3000)


def model_problems(folder: str, text: str, names: list[str]):
    """Name, weights and Hessian of Linears, from 32 windows of 256 tokens."""
    import quantloom as ql
    import torch

    model = ql.models.load_reference(folder)
    ids = torch.from_numpy(ql.evaluate.tokens(folder, text)[: 32 * 256].reshape(32, 256).astype("int64"))
    for name in names:
        linear = model.get_submodule(name)
        hessian = ql.Hessian(linear.in_features)
        hook = linear.register_forward_pre_hook(
            lambda _, inputs, hessian=hessian: hessian.add(inputs[0].flatten(0, -2).float().numpy())
        )
        with torch.no_grad():
            for window in ids:
                model(window[None])
        hook.remove()
        yield f"{name} {list(linear.weight.shape)}", linear.weight.detach().float().numpy(), hessian


def synthetic_problems():
    import numpy as np
    import quantloom as ql

    rng = np.random.default_rng(0)
    x = rng.standard_normal((2048, 256)).astype(np.float32)
    for column in range(1, 256):
        x[:, column] += 0.7 * x[:, column - 1]
    hessian = ql.Hessian(256)
    hessian.add(x)
    yield "normal [128, 256]", rng.standard_normal((128, 256)).astype(np.float32), hessian


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("model", nargs="?")
    parser.add_argument("--calibration")
    parser.add_argument("--modules", nargs="+", default=["model.layers.1.mlp.down_proj"])
    parser.add_argument("--formats", nargs="+", default=["additive:2x6:g8"])
    parser.add_argument("--rates", nargs="+", type=float, default=[1e-4, 1e-3])
    options = parser.parse_args()

    import quantloom as ql
    from quantloom.beam_search import refit_tables

    if options.model:
        problems = model_problems(options.model, options.calibration, options.modules)
    else:
        problems = synthetic_problems()
    print("| matrix | format | solver | " + " | ".join(map(str, (*STEPS, *ADAM_STEPS))) + " |")
    print("| --- | --- | --- |" + " ---: |" * (len(STEPS) + len(ADAM_STEPS)))
    for name, w, hessian in problems:
        for spec in options.formats:
            start = ql.quantize(w, spec, ql.BeamSearch(hessian, rounds=0, refit=0))
            before = ql.proxy_loss(w, start, hessian)

            def after(steps, turns=1, w=w, hessian=hessian, start=start, before=before, **solver):
                q = start
                for _ in range(turns):
                    q = refit_tables(w, q, hessian, steps=steps, **solver)
                return f"{ql.proxy_loss(w, q, hessian) / before:.4f}"

            for turns in (1, 5):
                row = [after(steps, turns) for steps in STEPS] + [""] * len(ADAM_STEPS)
                label = "conjugate gradients" + (f", {turns} turns" if turns > 1 else "")
                print(f"| {name} | {spec} | {label} | " + " | ".join(row) + " |", flush=True)
            for rate in options.rates:
                found = [after(steps, solver="adam", rate=rate) for steps in ADAM_STEPS]
                row = [""] * len(STEPS) + found
                print(f"| {name} | {spec} | Adam, rate {rate:g} | " + " | ".join(row) + " |", flush=True)


if __name__ == "__main__":
    main()
