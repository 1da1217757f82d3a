"""Formats on a language model at one number of bits: what their files take, and how far predictions move,
right after the cast and after training towards the original's predictions.

    python bench/quality/bench_formats.py MODEL --training calib.txt --validation valid.txt -o formats.json

Each format is fitted to each matrix, encoded and written to a file; what is evaluated is what was read back
from that file, and `measured bits` are the size of the file over the number of parameters. Then a copy of the
model is trained in the same formats (weights, scales, outliers and tables; straight-through), written, read
and evaluated in the same way. Texts are UTF-8 (tokenized by the model's tokenizer) or raw uint16 ids (.u16).
Works on the CPU and, with --device cuda, on a GPU.

Writes a JSON file and beside it a Markdown table; both grow with each format that is done, and a second run
with the same arguments leaves out the formats that are in the file already. The same arguments on the same
device give the same figures.
"""

from __future__ import annotations

import argparse
import copy
import hashlib
import json
import os
import sys
import tempfile
import time
from pathlib import Path

DEFAULT = ("compressed", "sparse", "block-absmax", "channel-absmax", "tensor-absmax", "tensor-rms")


def formats(bits: float) -> dict:
    """What can be named in --formats; the first ones are measured by default."""
    from quantloom import fit as F
    from quantloom import formats as Q

    student = {
        "element_bits": bits,
        "element_family": "t",
        "scale_format": Q.BFLOAT16,
        "args": {"mode": "asymmetric"},
    }
    tensor = {"block_shape": (None, None), "scaling": "rms"}
    outliers = {"sparse_format": Q.BFLOAT16, "sparse_ratio": 2**-10}
    vectors = {"element_family": "lloyd_max", "vq_length": 2, "vq_format": Q.BFLOAT16, "args": {}}
    signmax = {"block_shape": (1, 64), "scaling": "signmax"}
    grid = {**student, **tensor, "element_family": "int", "args": {}}
    return {
        "compressed": F.Scaled(**grid, compressor="rans"),
        "sparse": F.Scaled(**student, **tensor, **outliers),
        "block-absmax": F.Scaled(**student, block_shape=(1, 64), scaling="absmax"),
        "channel-absmax": F.Scaled(**student, block_shape=(1, None), scaling="absmax"),
        "tensor-absmax": F.Scaled(**student, block_shape=(None, None), scaling="absmax"),
        "tensor-rms": F.Scaled(**student, **tensor),
        "huffman": F.Scaled(**grid, compressor="huffman"),
        "compressed-sparse": F.Scaled(**grid, compressor="rans", **outliers),
        "block-signmax": F.Scaled(**student, **signmax),
        "vectors": F.Scaled(**student | vectors, **tensor),
        "vectors-sparse": F.Scaled(**student | vectors, **tensor, **outliers),
        "vectors-signmax": F.Scaled(**student | vectors, **signmax),
    }


def stored(model, tensors: dict, folder: Path) -> tuple[dict, dict[str, float]]:
    """The tensors and the model's other parameters, written to a file and read back; bits per parameter: of
    the file, and of its tensors without names, descriptions and checksums."""
    from quantloom import formats as Q
    from quantloom.experiments import qat

    content = dict(tensors)
    for name, parameter in model.named_parameters():
        if name not in tensors:
            half = parameter.detach().bfloat16()
            content[name] = half if half.to(parameter.dtype).equal(parameter) else parameter.detach()
    file = folder / "model.safetensors"
    Q.save_encoded(file, content)
    count = sum(parameter.numel() for parameter in model.parameters())
    loaded = Q.load_encoded(file)
    bits = {
        "measured_bits": 8 * file.stat().st_size / count,
        "tensor_bits": sum(map(qat.stored_bits, loaded.values())) / count,
    }
    file.unlink()
    return loaded, bits


def evaluated(model, tensors: dict, data, folder: Path) -> dict[str, float]:
    """The figures of `model` with tensors as a file keeps them; the model has them afterwards."""
    from quantloom import quantisation_training as T

    loaded, bits = stored(model, tensors, folder)
    T.load_encoded(model, loaded)
    return {**bits, **losses(model, data)}


def losses(model, data) -> dict[str, float]:
    means = {name: float(values.double().mean()) for name, values in data.evaluate(model).items()}
    return {"kl": means["kl_div"], "cross_entropy": means["cross_entropy"]}


def fitted_formats(spec, reference, file: Path | None) -> dict:
    """The format of each matrix; from the file if it has them, else fitted, and put into the file."""
    from quantloom import formats as Q
    from quantloom import model_quantisation as M

    known = json.loads(file.read_text(encoding="utf-8")) if file and file.is_file() else {}
    if str(spec) not in known:
        fits = {name: spec.fit(parameter) for name, parameter in M.named_matrices(reference)}
        known[str(spec)] = Q.TensorFormat.save(fits)
        if file:
            file.write_text(json.dumps(known) + "\n", encoding="utf-8")
    return Q.TensorFormat.load(known[str(spec)])


def measure(spec, reference, data, training, arguments, folder: Path) -> dict:
    """One row: the direct cast, and training from it."""
    import torch
    from quantloom import model_quantisation as M
    from quantloom import quantisation_training as T
    from quantloom.experiments import qat

    model = copy.deepcopy(reference)
    fitted = fitted_formats(spec, reference, arguments.fits)
    for name, parameter in M.named_matrices(model):
        M.quantise_parameter_(parameter, fitted[name], encoded=True)
    log = M.no_quantisation(model)
    encoded = {name: entry["encoded"] for name, entry in log["params"].items()}
    row = {"nominal_bits": log["bits_per_param"], "cast": evaluated(model, encoded, data, folder)}
    if not arguments.steps:
        return row
    student = copy.deepcopy(reference)
    T.convert(student, by_layer(student, fitted), arguments.scaling, clip_gradient=False)
    steps = qat.train(
        student,
        reference,
        training,
        steps=arguments.steps,
        learning_rate=arguments.learning_rate,
        centroids_rate=arguments.centroids_rate,
    )
    nominal = T.count_bits(student, torch.bfloat16) / T.count_parameters(student)
    trained = evaluated(model, T.encode(student), data, folder)
    return row | {"trained": {"nominal_bits": nominal, **trained}, "train_loss": [steps[0], steps[-1]]}


def by_layer(model, fitted: dict) -> dict:
    """The formats by the name of each layer's weight: a weight that layers share has one for each name."""
    from quantloom import formats as Q

    names = {parameter: name for name, parameter in model.named_parameters()}
    aliases = model.named_parameters(remove_duplicate=False)
    wanted = {name: names[parameter] for name, parameter in aliases if parameter.ndim == 2}
    return {name: fitted.get(owner, Q.BFLOAT16) for name, owner in wanted.items()}


def markdown(document: dict) -> str:
    facts = document["conditions"]
    lines = [
        f"Model `{facts['model']}` on {facts['device']}: {facts['sequences']} sequences of"
        f" {facts['sequence_length']} tokens of `{facts['validation']}`, cross-entropy of the original"
        f" {document['baseline']['cross_entropy']:.4f}.",
    ]
    if facts["steps"]:
        lines[0] += (
            f" Training: {facts['steps']} steps of {facts['batch']} sequences of `{facts['training']}`,"
            f" learning rate {facts['learning_rate']:.3g}, scales {facts['scaling']}."
        )
    columns = ["format", "nominal bits", "measured bits", "KL", "cross-entropy"]
    if facts["steps"]:
        columns += ["bits, trained", "KL, trained", "cross-entropy, trained"]
    lines += ["", f"| {' | '.join(columns)} |", f"| --- |{' ---: |' * (len(columns) - 1)}"]
    for row in document["rows"]:
        cells = [f"{row['name']}: `{row['format']}`", f"{row['nominal_bits']:.3f}", *figures(row["cast"])]
        cells += figures(row["trained"]) if "trained" in row else []
        lines.append(f"| {' | '.join(cells)} |")
    return "\n".join(lines) + "\n"


def figures(row: dict) -> list[str]:
    return [f"{row['measured_bits']:.3f}", f"{row['kl']:.4f}", f"{row['cross_entropy']:.4f}"]


def conditions(arguments, texts: dict, sequences: int) -> dict:
    """All that the figures depend on, and where they were taken."""
    import quantloom
    import torch
    import transformers

    cuda = torch.device(arguments.device).type == "cuda"
    facts = {
        "model": arguments.model.name,
        "device": torch.cuda.get_device_name(arguments.device) if cuda else "the CPU",
        "sequences": sequences,
        "quantloom": quantloom.__version__,
        "torch": torch.__version__,
        "transformers": transformers.__version__,
    }
    for name in ("bits", "sequence_length", "steps", "batch", "learning_rate", "centroids_rate", "scaling"):
        facts[name] = getattr(arguments, name)
    for name, ids in texts.items():
        facts[name] = getattr(arguments, name).name
        facts[f"{name}_ids"] = hashlib.sha256(ids.astype("<i8").tobytes()).hexdigest()[:16]
    return facts


def parsed() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("model", type=Path, help="folder of a Hugging Face model")
    parser.add_argument("--training", type=Path, required=True, help="text or .u16 ids to train on")
    parser.add_argument("--validation", type=Path, required=True, help="text or .u16 ids to evaluate on")
    parser.add_argument(
        "-o", "--output", type=Path, required=True, help="JSON file to write; .md goes beside it"
    )
    parser.add_argument("--formats", nargs="+", default=list(DEFAULT), help=f"of {', '.join(formats(3))}")
    parser.add_argument("--bits", type=float, default=3, help="bits of an element, or its entropy")
    parser.add_argument("--device", default="cpu", help="cpu, cuda, cuda:1, ...")
    parser.add_argument(
        "--fits", type=Path, help="JSON file that keeps fitted formats: fits can be made on another machine"
    )
    parser.add_argument("--fit-only", action="store_true", help="fill the file of --fits and end")
    parser.add_argument("--sequence-length", type=int, default=512)
    parser.add_argument("--sequences", type=int, help="validation sequences, drawn with a fixed seed; all")
    parser.add_argument("--steps", type=int, default=200, help="of training; 0: no training")
    parser.add_argument("--batch", type=int, default=16, help="sequences of a step")
    parser.add_argument("--learning-rate", type=float, help="by default 2^(-10 - bits)")
    parser.add_argument("--centroids-rate", type=float, default=1.0, help="of tables, over that of weights")
    parser.add_argument(
        "--scaling",
        choices=("dynamic", "parameter"),
        default="dynamic",
        help="compute scales, or train them: a trained scale of an entropy-coded grid shrinks, so that its"
        " codes take more bits",
    )
    arguments = parser.parse_args()
    if arguments.learning_rate is None:
        arguments.learning_rate = 2.0 ** (-10 - arguments.bits)
    if arguments.fit_only and not arguments.fits:
        parser.error("--fit-only: got no --fits, expected the file to fill")
    unknown = set(arguments.formats) - set(formats(3))
    if unknown:
        parser.error(f"--formats: got {sorted(unknown)[0]!r}, expected some of {', '.join(formats(3))}")
    return arguments


def main() -> None:
    # Deterministic matrix products; read when CUDA starts.
    os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")
    arguments = parsed()
    import torch
    from quantloom import evaluate
    from quantloom.cli.common import quiet_libraries
    from quantloom.experiments import RequantisableModel, token_prediction

    quiet_libraries()
    torch.use_deterministic_algorithms(True, warn_only=True)
    start = time.monotonic()
    texts = {
        name: evaluate.tokens(arguments.model, getattr(arguments, name))
        for name in ("training", "validation")
    }
    reference = RequantisableModel.load(arguments.model, arguments.device).model
    chosen = formats(arguments.bits)
    if arguments.fit_only:
        for name in arguments.formats:
            fitted_formats(chosen[name], reference, arguments.fits)
        return
    size = {"sequence_length": arguments.sequence_length}
    data = token_prediction.Dataset.load(
        reference, texts["validation"], **size, batch_size=8, sequence_limit=arguments.sequences
    )
    training = None
    if arguments.steps:
        training = token_prediction.Dataset.load(
            reference, texts["training"], **size, batch_size=arguments.batch, kl_topk=0
        )
    facts = conditions(arguments, texts, int(data.masks.sum()))
    document = {"conditions": facts, "baseline": losses(reference, data), "rows": []}
    if arguments.output.is_file():
        earlier = json.loads(arguments.output.read_text(encoding="utf-8"))
        if earlier["conditions"] != facts:
            sys.exit(f"error: {arguments.output} was measured under other conditions; choose another file")
        document = earlier
    known = {row["name"] for row in document["rows"]}
    for name in dict.fromkeys(arguments.formats):
        if name in known:
            continue
        with tempfile.TemporaryDirectory(prefix="formats-") as folder:
            row = measure(chosen[name], reference, data, training, arguments, Path(folder))
        document["rows"].append({"name": name, "format": str(chosen[name]), **row})
        arguments.output.write_text(json.dumps(document, indent=2) + "\n", encoding="utf-8")
        arguments.output.with_suffix(".md").write_text(markdown(document), encoding="utf-8")
        after = f", trained {row['trained']['kl']:.4f}" if "trained" in row else ""
        print(
            f"{name}: {row['cast']['measured_bits']:.3f} bits, KL {row['cast']['kl']:.4f}{after}"
            f" ({time.monotonic() - start:.0f} s)",
            flush=True,
        )


if __name__ == "__main__":
    main()
