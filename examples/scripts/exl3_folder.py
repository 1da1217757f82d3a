"""Read a folder in the EXL3 layout of exllamav3: what is in it, how it scores, and the way back.

    python examples/scripts/exl3_folder.py [FOLDER] [TEXT]

FOLDER is one that exllamav3 wrote, TEXT a file to score it on; without them, the first block of
examples/tiny-llama is quantized to trellises of 3 bits and exported to a folder first.
"""

import sys
import tempfile
from pathlib import Path

import quantloom as ql
import torch


def make_folder(scratch: Path, model: Path) -> Path:
    """An EXL3 folder of our own, with more bits for the last projection."""
    overrides = {r"re:.*layers\.[1-9]\..*": None, r"re:.*\.down_proj": "trellis:4:mcg"}
    recipe = ql.Recipe.parse("trellis:3:mul1", overrides=overrides)
    ql.models.quantize(model, recipe, output=scratch / "quantized")
    return ql.models.export(scratch / "quantized", scratch / "exl3", "exl3").output


def main() -> None:
    tiny = Path(__file__).resolve().parent.parent / "tiny-llama"
    with tempfile.TemporaryDirectory() as scratch:
        folder = Path(sys.argv[1]) if len(sys.argv) > 1 else make_folder(Path(scratch), tiny)
        text = Path(sys.argv[2]) if len(sys.argv) > 2 else tiny / "valid.txt"

        inspection = ql.inspect(folder)
        for entry in [entry for entry in inspection.tensors if entry.quantized][:7]:
            n, k = entry.shape
            print(f"{entry.name:40} {entry.format:16} {n} x {k}  {entry.bits_per_weight:.3f} bits")
        print(f"{inspection.layout}: {inspection.bits_per_weight:.3f} bits per weight")

        # Loaded as it is; weights stay packed, and products decode them on the way.
        model = ql.models.load(folder, torch.float32)
        ids = ql.evaluate.tokens(folder, text)
        print(f"perplexity {ql.evaluate.perplexity(model, ids, windows=4):.2f}")

        # Into our files and back: the same bytes.
        ql.models.import_(folder, Path(scratch) / "ours")
        back = ql.models.export(Path(scratch) / "ours", Path(scratch) / "back", "exl3").output
        name = next(entry.name for entry in inspection.tensors if entry.quantized)
        tensors = [
            {
                name: array
                for file in place.glob("*.safetensors")
                for name, array in ql.load_tensors(file).items()
            }
            for place in (folder, back)
        ]
        same = all((tensors[0][part] == tensors[1][part]).all() for part in tensors[0] if name in part)
        print(f"{name} came back {'unchanged' if same else 'changed'}")


if __name__ == "__main__":
    main()
