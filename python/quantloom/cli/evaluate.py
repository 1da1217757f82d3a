"""`quantloom eval`."""

from __future__ import annotations

from enum import Enum
from json import loads as parse
from pathlib import Path
from typing import Annotated

import typer

from quantloom.cli import common


class Prefill(str, Enum):
    quantized = "quantized"
    exact = "exact"


class Dtype(str, Enum):
    float32 = "float32"
    float16 = "float16"
    bfloat16 = "bfloat16"


# Twice the 32 tokens of a passage, and one.
LEAST_NEEDLE_WINDOW = 65


@common.reports_errors
def evaluate(
    model: Annotated[
        Path, typer.Argument(metavar="MODEL", help="Folder of a model, quantized or not.", show_default=False)
    ],
    text: Annotated[Path, typer.Option(help="UTF-8 text, or token ids (.u16).", show_default=False)],
    reference: Annotated[
        Path | None,
        typer.Option(
            help="Folder of the original: adds KL divergence and top-1 agreement.", show_default=False
        ),
    ] = None,
    windows: Annotated[
        int | None, typer.Option(min=1, help="Windows from the start. Default: all.", show_default=False)
    ] = None,
    window: Annotated[int, typer.Option(min=2, help="Tokens in a window.")] = 512,
    packed: Annotated[
        bool,
        typer.Option(
            "--packed",
            help="Multiply straight from packed codes, as a loaded model does. "
            "Default: decode the weights first, which is faster for long texts.",
        ),
    ] = False,
    batch: Annotated[int, typer.Option(min=1, help="Windows fed at once.")] = 4,
    device: Annotated[str, typer.Option(help='Where the models run: "cpu", "cuda", "cuda:1", ...')] = "cpu",
    dtype: Annotated[
        Dtype | None,
        typer.Option(
            help="Dtype of the model's activations; the reference has float32. "
            "Default: float32, but bfloat16 with --packed on a CUDA device, whose kernels take 16 bits.",
            show_default=False,
        ),
    ] = None,
    kv: Annotated[
        str | None,
        typer.Option(
            metavar="FORMAT",
            help='Keep keys and values in this format and attend to them as stored: "kivi:2", "token:4", '
            '"sdr:4"; a file of `quantloom kv-calibrate`; or "float16", "bfloat16". Default: no cache.',
            show_default=False,
        ),
    ] = None,
    kv_chunk: Annotated[
        int, typer.Option(min=1, help="Tokens fed at once with --kv; 1: token by token, as in decoding.")
    ] = 1,
    kv_prefill: Annotated[
        Prefill,
        typer.Option(help="What tokens that are fed at once see of each other: what is stored, or exact."),
    ] = Prefill.quantized,
    needle: Annotated[
        int | None,
        typer.Option(
            min=1,
            help="Also hide so many passages of 32 tokens at 10% and at 50% of a window, and ask for their "
            "second half at its end: the share of tokens that the model ranks first.",
            show_default=False,
        ),
    ] = None,
    json: common.Json = False,
    progress: common.Progress = None,
    traceback: common.Traceback = False,
) -> None:
    """Measure perplexity on a text, and how far a quantized model is from its original.

    Windows do not overlap, each is fed on its own without a token in front, and all of its tokens but the
    first are scored. KL divergence is KL(reference || model) in nats, the mean over all predictions.

    **Examples**

        quantloom eval MODEL --text valid.txt
        quantloom eval OUT --reference MODEL --text valid.txt --windows 48 --json
        quantloom eval OUT --text valid.txt --packed --device cuda
        quantloom eval MODEL --reference MODEL --text valid.txt --kv kivi:2 --batch 16
    """
    common.require_folder(model, "model")
    common.require_file(text, "text")
    if reference is not None:
        common.require_folder(reference, "reference")
    if kv is None and (kv_chunk > 1 or kv_prefill is Prefill.exact):
        raise ValueError("--kv-chunk, --kv-prefill: got without --kv, expected with it")
    if needle is not None and window < LEAST_NEEDLE_WINDOW:
        raise ValueError(f"window: got {window}, expected at least {LEAST_NEEDLE_WINDOW} with --needle")
    common.quiet_libraries()
    import quantloom

    format, calibration = (None, None) if kv is None else _cache_format(kv)
    ids = quantloom.evaluate.tokens(model, text)
    with common.progress_bar(progress) as update:
        update("loading", 0, 1)
        loaded = load_model(model, packed, device, dtype)
        if kv is not None:
            loaded = quantloom.kv.CachedModel(loaded, format, kv_chunk, kv_prefill.value, calibration)
        settings = {"window": window, "windows": windows, "batch": batch}
        settings["progress"] = lambda done, total: update("evaluating", done, total)
        if reference is None:
            used = windows or len(ids) // window
            result = {
                "perplexity": quantloom.evaluate.perplexity(loaded, ids, **settings),
                "tokens": used * (window - 1),
                "windows": used,
            }
        else:
            original = quantloom.models.load_reference(reference, device=device)
            result = common.plain(quantloom.evaluate.compare(loaded, original, ids, **settings))
    result = {"model": str(model), "reference": reference and str(reference), "text": str(text)} | result
    result["window"] = window
    if kv is not None:
        result |= _cache_facts(loaded)
    if needle is not None:
        with common.progress_bar(progress) as update:
            found = quantloom.kv.needle(
                loaded,
                ids,
                context=window,
                count=needle,
                batch=batch,
                progress=lambda done, total: update("hiding", done, total),
            )
        result["needle"] = common.plain(found)
    if json:
        common.print_json(result)
        return
    rows = [["perplexity", f"{result['perplexity']:.4f}"]]
    if reference is not None:
        rows += [
            ["perplexity of the reference", f"{result['reference_perplexity']:.4f}"],
            ["KL divergence (nats)", f"{result['kl']:.5f}"],
            ["top-1 agreement", f"{result['top1_agreement']:.2%}"],
        ]
    if kv is not None:
        pace = "token by token" if kv_chunk == 1 else f"{kv_chunk} tokens at once"
        rows.append(["KV cache", f"{result['kv']}, {pace}"])
        if result["kv_chunk"] > 1:
            rows.append(["  which see each other", "exactly" if kv_prefill is Prefill.exact else "as stored"])
        if "kv_bytes_per_token" in result:
            rows.append(["  bits of a coded element", f"{result['kv_bits']:.3f}"])
            rows.append(["  bytes of a token, window included", f"{result['kv_bytes_per_token']:.1f}"])
    if needle is not None:
        facts = result["needle"]
        rows.append(["hidden passages continued", f"{facts['recall']:.2%} of {facts['tokens']} tokens"])
        rows.append(["  of passages that are not there", f"{facts['baseline']:.2%}"])
    rows.append(["scored tokens", f"{result['tokens']} in {result['windows']} windows of {window}"])
    common.console().print(common.table(str(model), ["measure", "value"], rows))


def _cache_format(kv: str):
    """What --kv stands for: a format, and the calibration of a file."""
    import quantloom

    if kv in ("float16", "bfloat16"):
        return kv, None
    if kv.endswith(".safetensors") or Path(kv).is_file():
        common.require_file(Path(kv), "kv")
        calibration = quantloom.kv.KVCalibration.load(kv)
        return calibration.format, calibration
    format = quantloom.kv.parse_kv_format(kv)
    if format.kind == "kvquant":
        raise ValueError(f"kv: got {kv}, expected for kvquant the file that `quantloom kv-calibrate` wrote")
    return format, None


def _cache_facts(model) -> dict:
    """How the cache was used and what it held at the end of the last windows."""
    facts = {"kv": str(model.format), "kv_chunk": model.chunk, "kv_prefill": model.prefill}
    usage = model.usage
    if usage is not None:
        text = model.config.get_text_config(decoder=True)
        dim = getattr(text, "head_dim", None) or text.hidden_size // text.num_attention_heads
        facts["kv_bits"] = model.format.average_bits(dim)
        facts["kv_bytes_per_token"] = (usage.code_bytes + usage.exact_bytes) / usage.tokens
    return facts


def load_model(folder: Path, packed: bool = False, device: str = "cpu", dtype: Dtype | None = None):
    """A model of transformers, quantized or not."""
    import torch

    import quantloom

    try:
        config = parse((folder / "config.json").read_text(encoding="utf-8"))
    except ValueError as error:
        raise ValueError(f"{folder / 'config.json'}: not JSON: {error}") from None
    if dtype is None:
        dtype = Dtype.bfloat16 if packed and device != "cpu" else Dtype.float32
    torch_dtype = getattr(torch, dtype.value)
    if isinstance(config, dict) and config.get("quantization_config"):
        return quantloom.models.load(folder, torch_dtype, device=device, dequantized=not packed)
    if packed:
        raise ValueError(f"--packed: {folder} is not quantized")
    return quantloom.models.load_reference(folder, torch_dtype, device=device)
