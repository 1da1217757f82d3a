"""Quantize a model, load it, measure it against the original, and let it write a line.

    python examples/scripts/quantize_a_model.py [MODEL] [OUTPUT]

MODEL is a folder with a model, its tokenizer, calib.txt and valid.txt; examples/tiny-llama by default.
"""

import sys
import tempfile
from pathlib import Path

import quantloom as ql
import torch
import transformers


def main() -> None:
    here = Path(__file__).resolve().parent
    model = Path(sys.argv[1]) if len(sys.argv) > 1 else here.parent / "tiny-llama"
    with tempfile.TemporaryDirectory() as scratch:
        output = Path(sys.argv[2]) if len(sys.argv) > 2 else Path(scratch) / "quantized"

        # 3 bits everywhere, but 4 for the last projection of each block, and the head as it is.
        recipe = ql.Recipe(
            ql.Uniform(3, 128, symmetric=False),
            rounding=ql.GPTQ(),
            overrides={r"re:.*\.down_proj": ql.Uniform(4, 128, symmetric=False)},
        )
        report = ql.models.quantize(model, recipe, calibration=model / "calib.txt", output=output, windows=16)
        print(f"{len(report.modules)} layers at {report.bits_per_weight:.3f} bits per weight")

        quantized, original = ql.models.load(output), ql.models.load_reference(model)
        ids = ql.evaluate.tokens(model, model / "valid.txt")
        result = ql.evaluate.compare(quantized, original, ids, windows=8)
        print(f"perplexity {result.reference_perplexity:.2f} -> {result.perplexity:.2f}")
        print(f"KL divergence {result.kl:.4f} nats, top-1 agreement {result.top1_agreement:.1%}")

        tokenizer = transformers.AutoTokenizer.from_pretrained(model)
        prompt = tokenizer("And it came to pass", return_tensors="pt", add_special_tokens=False)
        with torch.inference_mode():
            written = quantized.generate(
                input_ids=prompt["input_ids"],
                attention_mask=torch.ones_like(prompt["input_ids"]),
                max_new_tokens=24,
                do_sample=False,
            )
        print(tokenizer.decode(written[0]))


if __name__ == "__main__":
    main()
