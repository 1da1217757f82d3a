"""Quality of many settings on one model: KL divergence, perplexity and top-1 agreement by bits.

    python bench/quality/table.py MODEL --calibration calib.u16 --validation valid.u16 -o quality.json

Texts are UTF-8 (tokenized by the model's tokenizer) or raw uint16 ids (.u16). Writes a JSON file and beside
it a Markdown table; both grow with each setting that is done, and a second run with the same arguments
leaves out the settings that are in the file already.
"""

from __future__ import annotations

import argparse
import dataclasses
import hashlib
import json
import os
import platform
import re
import sys
import tempfile
from pathlib import Path

BITS = (8, 4, 3, 2)
GROUPS = ("g128", "channel")
ROUNDINGS = ("nearest", "gptq")


def settings_of(names: list[str]):
    """`base`, `search`, `sym`, FORMAT=ROUNDING[=ACTIVATIONS] or NAME, a published recipe, in short forms; the
    last two with an =lkd... for distillation, if it is wanted."""
    from quantloom.experiments import Setting

    found = [Setting()]
    for name in names:
        if name in ("base", "search"):
            suffix = ":search" if name == "search" else ""
            found += [
                Setting(f"uniform:{bits}:{group}:asym", rounding + suffix)
                for bits in BITS
                for group in GROUPS
                for rounding in ROUNDINGS
            ]
        elif name == "sym":
            found += [
                Setting(f"uniform:{bits}:{group}:sym", rounding)
                for bits in BITS
                for group in GROUPS
                for rounding in ROUNDINGS
            ]
        elif "=" in name or name.startswith("zeroquant"):
            # Options of roundings, activations and distillation have "=" as well.
            described, *distillation = re.split("=(?=lkd)", name, maxsplit=1)
            format, *rest = described.split("=", 1)
            rounding, activations = None, []
            if rest:
                rounding, *activations = re.split("=(?=int[0-9]|sdr[0-9])", rest[0], maxsplit=1)
            parts = [format, rounding, activations[0] if activations else None, *distillation]
            found.append(Setting(*parts))
        else:
            raise SystemExit(
                f"--settings: got {name!r}, expected base, search, sym, FORMAT=ROUNDING[=ACTIVATIONS] or"
                " zeroquant..., the last two perhaps with =lkd..."
            )
    return list(dict.fromkeys(found))


def conditions(arguments, calibration, validation) -> dict:
    """All that the figures depend on, and where they were taken."""
    import quantloom
    import torch
    import transformers

    def digest(ids) -> str:
        return hashlib.sha256(ids.astype("<i8").tobytes()).hexdigest()[:16]

    return {
        "model": arguments.model.name,
        "calibration": arguments.calibration.name,
        "calibration_ids": digest(calibration),
        "validation": arguments.validation.name,
        "validation_ids": digest(validation),
        "window": arguments.window,
        "calibration_windows": arguments.calibration_windows,
        "held_out_windows": arguments.held_out_windows,
        "evaluation_windows": arguments.evaluation_windows,
        "quantloom": quantloom.__version__,
        "torch": torch.__version__,
        "transformers": transformers.__version__,
        "machine": f"{platform.machine()}, {os.cpu_count()} processors",
        "device": arguments.device,
    }


def markdown(document: dict) -> str:
    facts = document["conditions"]
    shown = any(row.get("activations") for row in document["measurements"])
    trained = any(row.get("distillation") for row in document["measurements"])
    columns = "| activations " * shown + "| distillation " * trained
    lines = [
        f"Model `{facts['model']}`; {facts['calibration_windows']} calibration windows of "
        f"`{facts['calibration']}`, {facts['evaluation_windows']} windows of `{facts['validation']}`, "
        f"{facts['window']} tokens each.",
        "",
        f"| format | rounding {columns}| bits/weight | perplexity | KL (nats) | top-1 "
        "| loss/RTN | held out | s |",
        f"| --- | --- {'| --- ' * (shown + trained)}| ---: | ---: | ---: | ---: | ---: | ---: | ---: |",
    ]

    def ratio(value: float | None) -> str:
        return "" if value is None else f"{value:.3f}"

    def activations(row: dict) -> str:
        told = f"| {row.get('activations') or ''} " if shown else ""
        return told + (f"| {row.get('distillation') or ''} " if trained else "")

    lines.extend(
        f"| {row['format']} | {row['rounding']} {activations(row)}"
        f"| {row['bits_per_weight']:.3f} | {row['perplexity']:.4f} "
        f"| {row['kl']:.5f} | {row['top1_agreement']:.2%} | {ratio(row['loss_ratio'])} "
        f"| {ratio(row['held_out_loss_ratio'])} | {row['quantize_seconds']:.1f} |"
        for row in document["measurements"]
    )
    return "\n".join(lines) + "\n"


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("model", type=Path, help="folder of a Hugging Face model")
    parser.add_argument("--calibration", type=Path, required=True, help="text or .u16 ids")
    parser.add_argument("--validation", type=Path, required=True, help="text or .u16 ids")
    parser.add_argument(
        "-o", "--output", type=Path, required=True, help="JSON file to write; .md goes beside it"
    )
    parser.add_argument(
        "--settings",
        nargs="+",
        default=["base"],
        help="base, search, sym, FORMAT=ROUNDING[=ACTIVATIONS][=lkd...], zeroquant...[=lkd...]",
    )
    parser.add_argument("--window", type=int, default=512)
    parser.add_argument("--calibration-windows", type=int, default=64)
    parser.add_argument("--held-out-windows", type=int, default=8)
    parser.add_argument("--evaluation-windows", type=int, default=48)
    parser.add_argument("--threads", type=int, default=0)
    parser.add_argument("--device", default="cpu", help="cpu, cuda or cuda:N")
    arguments = parser.parse_args()

    from quantloom import evaluate
    from quantloom.cli.common import progress_bar, quiet_libraries
    from quantloom.experiments import Setting, measure

    quiet_libraries()
    calibration = evaluate.tokens(arguments.model, arguments.calibration)
    validation = evaluate.tokens(arguments.model, arguments.validation)
    document = {"conditions": conditions(arguments, calibration, validation), "measurements": []}
    if arguments.output.is_file():
        earlier = json.loads(arguments.output.read_text(encoding="utf-8"))
        if earlier["conditions"] != document["conditions"]:
            sys.exit(f"error: {arguments.output} was measured under other conditions; choose another file")
        document = earlier
    known = {
        tuple(row.get(f"setting_{field.name}") for field in dataclasses.fields(Setting))
        for row in document["measurements"]
    }
    settings = [s for s in settings_of(arguments.settings) if dataclasses.astuple(s) not in known]

    pending = iter(settings)

    def keep(row) -> None:
        setting = next(pending)
        names = {f"setting_{name}": value for name, value in dataclasses.asdict(setting).items()}
        document["measurements"].append(names | dataclasses.asdict(row))
        arguments.output.write_text(json.dumps(document, indent=2) + "\n", encoding="utf-8")
        arguments.output.with_suffix(".md").write_text(markdown(document), encoding="utf-8")
        print(f"{setting.label}: KL {row.kl:.5f}, perplexity {row.perplexity:.4f}", flush=True)

    with tempfile.TemporaryDirectory(prefix="quality-") as work, progress_bar(None) as update:
        measure(
            arguments.model,
            settings,
            calibration,
            validation,
            work,
            window=arguments.window,
            calibration_windows=arguments.calibration_windows,
            held_out_windows=arguments.held_out_windows,
            evaluation_windows=arguments.evaluation_windows,
            threads=arguments.threads,
            device=arguments.device,
            progress=update,
            done=keep,
        )


if __name__ == "__main__":
    main()
