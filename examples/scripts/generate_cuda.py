"""Generate text on a CUDA device with a model whose weights stay packed.

    python examples/scripts/generate_cuda.py [MODEL] [PROMPT]

MODEL is a folder with a model and its tokenizer, quantized by quantloom or not; one that is not is quantized
to 4 bits first, by rounding. examples/tiny-llama by default.
"""

import json
import sys
import tempfile
import time
from pathlib import Path

import quantloom as ql
import torch
import transformers

NEW_TOKENS = 64


def main() -> None:
    here = Path(__file__).resolve().parent
    source = Path(sys.argv[1]) if len(sys.argv) > 1 else here.parent / "tiny-llama"
    prompt = sys.argv[2] if len(sys.argv) > 2 else "And it came to pass"
    possible, reason = ql.can_matmul("uniform:4:g128", 1, "bfloat16", "cuda")
    if not possible:
        raise SystemExit(f"no products on a CUDA device here: {reason}")
    with tempfile.TemporaryDirectory() as scratch:
        folder = source
        if "quantization_config" not in json.loads((source / "config.json").read_text(encoding="utf-8")):
            folder = Path(scratch) / "quantized"
            ql.models.quantize(source, ql.Recipe.parse("uniform:4:g128:asym"), output=folder)
        model = ql.models.load(folder, torch.bfloat16, device="cuda")
    print(f"{torch.cuda.memory_allocated() / 2**20:.0f} MiB on {torch.cuda.get_device_name()}")

    tokenizer = transformers.AutoTokenizer.from_pretrained(source)
    ids = tokenizer(prompt, return_tensors="pt", add_special_tokens=False)["input_ids"].to("cuda")

    def generate(**options: str) -> torch.Tensor:
        return model.generate(
            input_ids=ids,
            attention_mask=torch.ones_like(ids),
            max_new_tokens=NEW_TOKENS,
            min_new_tokens=NEW_TOKENS,
            do_sample=False,
            **options,
        )

    # With a static cache transformers compiles the step of one token into a CUDA graph, in the first run.
    for title, options in (("eager", {}), ("compiled", {"cache_implementation": "static"})):
        with torch.inference_mode():
            generate(**options)
            torch.cuda.synchronize()
            start = time.perf_counter()
            written = generate(**options)
            torch.cuda.synchronize()
        print(f"{title}: {NEW_TOKENS / (time.perf_counter() - start):.1f} tokens/s")
        print(tokenizer.decode(written[0]))


if __name__ == "__main__":
    main()
