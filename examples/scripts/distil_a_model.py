"""ZeroQuant on a model: 4 bits for MLPs, 8 for attention and activations, without and with distillation.

    python examples/scripts/distil_a_model.py [STEPS]

On the embedded model: what every decoder layer still computes wrongly before and after it was trained towards
the original one, on calibration tokens and on held-out ones, and what that does to the whole model.
"""

import sys
import tempfile
from pathlib import Path

import quantloom as ql
import torch


def main() -> None:
    steps = int(sys.argv[1]) if len(sys.argv) > 1 else 60
    folder = Path(__file__).resolve().parents[1] / "tiny-llama"
    original = ql.models.load_reference(folder)
    ids = ql.evaluate.tokens(folder, folder / "valid.txt")
    settings = {"windows": 48, "window": 128, "held_out_windows": 6}
    for distillation in (None, ql.LayerDistillation(steps=steps, checks=4)):
        recipe = ql.Recipe.zeroquant(8, mlp_bits=4, group_size=64, distillation=distillation)
        with tempfile.TemporaryDirectory() as output:
            report = ql.models.quantize(folder, recipe, folder / "calib.txt", output=output, **settings)
            model = ql.models.load(output, torch.float32, dequantized=True)
        for layer in report.distillation:
            print(
                f"{layer.block}: step {layer.best_step} of {layer.steps}, loss {layer.loss_before:.5f} ->"
                f" {layer.loss_after:.5f}, held out {layer.held_out_before:.5f} -> {layer.held_out_after:.5f}"
            )
        result = ql.evaluate.compare(model, original, ids, 128, 24)
        name = "rounded" if distillation is None else f"rounded and distilled ({distillation.spec})"
        print(
            f"{name}: {report.bits_per_weight:.3f} bits per weight, KL divergence {result.kl:.5f} nats,"
            f" perplexity {result.reference_perplexity:.3f} -> {result.perplexity:.3f}"
        )


if __name__ == "__main__":
    main()
