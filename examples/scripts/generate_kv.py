"""Generate text with quantized caches: the same prompts, a batch with padding on the left, beams.

    python examples/scripts/generate_kv.py [MODEL] [TEXT] [--device cuda]

MODEL is a folder with a model and its tokenizer, TEXT what KVQuant is calibrated on. examples/tiny-llama and
its calib.txt by default.
"""

import argparse
from pathlib import Path

import quantloom as ql
import torch
import transformers

PROMPTS = [
    "And it came to pass, when",
    "The LORD said unto Moses, Speak unto the children of Israel, and say",
]
NEW_TOKENS = 200


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("model", type=Path, nargs="?", help="folder of a model and its tokenizer")
    parser.add_argument("text", type=Path, nargs="?", help="what KVQuant is calibrated on")
    parser.add_argument("--device", default="cpu", help="cpu, cuda or cuda:N")
    arguments = parser.parse_args()
    folder = arguments.model or Path(__file__).resolve().parent.parent / "tiny-llama"
    text = arguments.text or folder / "calib.txt"
    model = ql.models.load_reference(folder, device=arguments.device)
    tokenizer = transformers.AutoTokenizer.from_pretrained(folder, padding_side="left")
    tokenizer.pad_token = tokenizer.pad_token or tokenizer.eos_token
    inputs = tokenizer(PROMPTS, return_tensors="pt", padding=True, add_special_tokens=False)
    inputs.pop("token_type_ids", None)
    inputs = inputs.to(arguments.device)

    ids = ql.evaluate.tokens(folder, text)
    calibration = ql.kv.calibrate(model, ids, "kvquant:3:1%", windows=8, window=256)
    ql.kv.use_attention(model)
    config = model.config
    caches = {
        "16 bits": lambda: None,
        "KIVI, 4 bits": lambda: ql.kv.KIVICache(config, bits=4, window=32),
        "KIVI, 2 bits": lambda: ql.kv.KIVICache(config, bits=2, window=32),
        "KVQuant, 3 bits": lambda: ql.kv.KVQuantCache(config, calibration),
        "by token, 4 bits, rotated": lambda: ql.kv.QuantizedKVCache(config, "token:4:hadamard"),
    }
    for beams in (1, 3):
        for name, make in caches.items():
            cache = make()
            with torch.inference_mode():
                written = model.generate(
                    **inputs,
                    past_key_values=cache,
                    max_new_tokens=NEW_TOKENS,
                    do_sample=False,
                    num_beams=beams,
                    pad_token_id=tokenizer.pad_token_id,
                )
            print(f"\n{name}, {beams} beam{'s' if beams > 1 else ''}")
            if cache is not None:
                usage = cache.usage()
                each = (usage.code_bytes + usage.exact_bytes) / usage.tokens
                print(f"{each:.0f} bytes for a token with its share of the window, {usage.tokens} tokens")
            for line in tokenizer.batch_decode(written, skip_special_tokens=True):
                print("   ", " ".join(line.split())[-100:])


if __name__ == "__main__":
    main()
