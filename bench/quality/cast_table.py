"""Scalar, vector and entropy-coded formats, cast directly to the linear layers of one model: KL divergence,
perplexity and top-1 agreement by stored bits, under the conditions of table.py.

    python bench/quality/cast_table.py MODEL --validation valid.u16 --bits 2 2.5 3 4

Formats are those of bench_formats.py, fitted to each matrix; nothing is calibrated or trained. Bits are those
of the encoded matrices. Prints a Markdown table.
"""

from __future__ import annotations

import argparse
import time
from pathlib import Path

DEFAULT = ("compressed", "compressed-sparse", "block-absmax", "vectors")


def cast(model, spec) -> float:
    """Casts all linear layers but the head; the stored bits of a weight."""
    import torch
    from quantloom import model_quantisation as M
    from quantloom.experiments import qat

    weights = [
        module.weight
        for name, module in model.named_modules()
        if isinstance(module, torch.nn.Linear) and name != "lm_head"
    ]
    for weight in weights:
        M.quantise_parameter_(weight, spec.fit(weight.detach().cpu()), encoded=True)
    log = M.no_quantisation(model)
    bits = sum(qat.stored_bits(entry["encoded"]) for entry in log["params"].values() if "encoded" in entry)
    return bits / sum(weight.numel() for weight in weights)


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("model", type=Path, help="folder of a Hugging Face model")
    parser.add_argument("--validation", type=Path, required=True, help="text or .u16 ids")
    parser.add_argument("--bits", type=float, nargs="+", default=[2, 3, 4], help="of an element")
    parser.add_argument("--formats", nargs="+", default=list(DEFAULT), help="of bench_formats.py")
    parser.add_argument("--window", type=int, default=512)
    parser.add_argument("--evaluation-windows", type=int, default=48)
    parser.add_argument("--device", default="cpu", help="cpu, cuda or cuda:N")
    arguments = parser.parse_args()

    from bench_formats import formats
    from quantloom import evaluate, models

    validation = evaluate.tokens(arguments.model, arguments.validation)
    reference = models.load_reference(arguments.model, device=arguments.device)
    print("| format | bits | bits/weight | perplexity | KL (nats) | top-1 | s |", flush=True)
    print("| --- | ---: | ---: | ---: | ---: | ---: | ---: |", flush=True)
    for bits in arguments.bits:
        for name in arguments.formats:
            start = time.perf_counter()
            model = models.load_reference(arguments.model, device=arguments.device)
            stored = cast(model, formats(bits)[name])
            seconds = time.perf_counter() - start
            row = evaluate.compare(
                model, reference, validation, arguments.window, arguments.evaluation_windows
            )
            print(
                f"| {name} | {bits:g} | {stored:.3f} | {row.perplexity:.4f} | {row.kl:.5f} "
                f"| {row.top1_agreement:.2%} | {seconds:.1f} |",
                flush=True,
            )


if __name__ == "__main__":
    main()
