"""Checkpoints of other libraries: writes what transformers and vLLM load, and reads it back."""

from __future__ import annotations

import json
import os
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import quantloom as ql
from quantloom import _checks
from quantloom.models import exl3
from quantloom.models.checkpoint import (
    INDEX,
    QuantizedFolder,
    copy_companions,
    final_files,
    install,
    packed_linears,
    quantization_config,
)
from quantloom.models.layouts import (
    LAYOUTS,
    aqlm_config,
    awq_config,
    compressed_tensors_config,
    gptq_config,
    read_config,
    refusal,
    spqr_config,
)
from quantloom.models.records import WORK, WorkFolder, write_json
from quantloom.models.source import build_skeleton, model_names, read_json, tensor_files
from quantloom.models.structure import find_blocks

__all__ = ["ExportReport", "export", "import_"]

_GPTQ = ("qweight", "qzeros", "scales", "g_idx")
_AWQ = ("qweight", "qzeros", "scales")
_AQLM = ("codes", "codebooks", "scales")
_SPQR = ("dense_weights", "row_offsets", "col_vals", "in_perm")
_COMPRESSED = ("weight_packed", "weight_scale", "weight_shape", "weight_zero_point", "weight_g_idx")


@dataclass(frozen=True)
class ExportReport:
    """What ``export`` or ``import_`` wrote.

    Attributes:
        output: the folder.
        layout: the layout that was written or read.
        modules: names of the packed modules.
        notes: what a user of the files should know, such as values that loaders will round.
    """

    output: Path
    layout: str
    modules: tuple[str, ...]
    notes: tuple[str, ...]


def export(
    quantized_dir: str | Path,
    output: str | Path,
    layout: str = "compressed-tensors",
    *,
    overwrite: bool = False,
) -> ExportReport:
    """Writes a quantized checkpoint in the layout of another library.

    Args:
        quantized_dir: a folder that ``quantize`` or ``import_`` wrote.
        output: folder of the new checkpoint.
        layout: ``"compressed-tensors"`` (pack-quantized: loaded by vLLM, and by transformers with the
            compressed-tensors package), ``"gptq"`` (zero points minus one, as most files have them),
            ``"gptq_v2"`` (zero points as they are), ``"awq"`` (AutoAWQ's "gemm"), ``"exl3"`` (trellises,
            for exllamav3), ``"spqr"`` (tiles of SpQR's kernels, for transformers with spqr_quant) or
            ``"aqlm"`` (for transformers with aqlm).
        overwrite: replace a checkpoint in `output`.

    Decoded values are those of the quantized checkpoint, bit for bit; a loader that casts scales to the
    model's dtype rounds them, which ``notes`` then says. Raises ValueError naming the modules that the
    layout cannot hold before anything is written.
    """
    if layout not in LAYOUTS:
        raise ValueError(f"layout: got {layout!r}, expected one of {', '.join(LAYOUTS)}")
    folder = QuantizedFolder(quantized_dir, "quantized_dir")
    if folder.activations:
        name, form = next(iter(folder.activations.items()))
        raise ValueError(f"layout: {name}: its inputs are rounded to {form.spec}, which {layout} cannot say")
    target = _check_output(folder.path, output, overwrite)
    model = build_skeleton(folder.path)
    shapes = {}
    for name, (_, linear) in packed_linears(model, folder).items():
        shapes[name] = (linear.out_features, linear.in_features)
    refused = {name: refusal(form, *shapes[name], layout) for name, form in folder.formats.items()}
    refused = {name: reason for name, reason in refused.items() if reason}
    if refused:
        name, reason = next(iter(refused.items()))
        more = f" (and {len(refused) - 1} more modules)" if len(refused) > 1 else ""
        raise ValueError(f"layout: {name}: {reason}{more}")
    if layout == exl3.QUANT_METHOD:
        return _export_exl3(folder, target, shapes)
    left = _unquantized(model, folder, heads=layout in ("awq", "compressed-tensors", "spqr", "aqlm"))
    if layout in ("awq", "aqlm"):  # refuse what they cannot say
        (awq_config if layout == "awq" else aqlm_config)(folder.formats, left)
    permuted = False
    lengths: dict[str, int] = {}  # of the arrays of SpQR

    def convert(name: str, packed: Any) -> dict[str, Any]:
        nonlocal permuted
        permuted |= "group_index" in packed.planes
        try:
            if layout == "compressed-tensors":
                if "group_index" in packed.planes:
                    raise RuntimeError("groups of permuted columns, which loaders no longer take")
                tensors = ql.layouts.to_compressed_tensors(packed)
            elif layout == "awq":
                tensors = ql.layouts.to_awq(packed)
            elif layout == "aqlm":
                tensors = ql.layouts.to_aqlm(packed)
            elif layout == "spqr":
                tensors = ql.layouts.to_spqr(packed)
                lengths.update({f"{name}.{key}": len(value) for key, value in tensors.items()})
            else:
                tensors = ql.layouts.to_gptq(packed, layout)
        except (ValueError, RuntimeError) as error:
            raise ValueError(f"layout: {name}: {error}") from error
        return {f"{name}.{key}": value for key, value in tensors.items()}

    def files() -> Iterable[tuple[str, dict[str, Any]]]:
        for file, tensors in folder.shards():
            written: dict[str, Any] = {}
            for name, value in tensors.items():
                written |= convert(name, value) if name in folder.formats else {name: value}
            yield file.name, written

    def config() -> dict[str, Any]:
        recipe = folder.recipe or {}
        ordered = bool(recipe.get("rounding", {}).get("act_order"))
        if layout == "compressed-tensors":
            return compressed_tensors_config(folder.formats, left, ordered)
        if layout == "awq":
            return awq_config(folder.formats, left)
        if layout == "aqlm":
            return aqlm_config(folder.formats, left)
        if layout == "spqr":
            return spqr_config(lengths, left)
        return gptq_config(folder.formats, left, layout, act_order=permuted)

    extra = {"quantize_config.json": config} if layout in ("gptq", "gptq_v2") else {}
    _write(folder.path, target, folder.config_json, files(), config, extra)
    return ExportReport(target, layout, tuple(folder.formats), tuple(_notes(folder, layout)))


def _export_exl3(folder: QuantizedFolder, target: Path, shapes: dict[str, tuple[int, int]]) -> ExportReport:
    storage: dict[str, Any] = {}
    rounded: list[str] = []

    def files() -> Iterable[tuple[str, dict[str, Any]]]:
        for file, tensors in folder.shards():
            written: dict[str, Any] = {}
            for name, value in tensors.items():
                module = name.removesuffix(".bias")
                try:
                    if name in folder.formats:
                        written |= exl3.linear_tensors(name, value)
                    elif name.endswith(".bias") and module in folder.formats:
                        written[name] = exl3.bias_tensor(value)
                        if not written[name][: len(value)].to(value.dtype).equal(value):
                            rounded.append(name)
                    else:
                        written[name] = value
                except (TypeError, ValueError, RuntimeError) as error:
                    raise ValueError(f"layout: {name}: {error}") from error
            exl3.describe_storage(written, storage)
            yield file.name, written

    def config() -> dict[str, Any]:
        return exl3.config(folder.formats, shapes)

    config_json = dict(folder.config_json)
    if exl3.HEAD in folder.formats and "tie_word_embeddings" in config_json:
        config_json["tie_word_embeddings"] = False  # the head is stored, whatever the embeddings are
    extra = {"quantization_config.json": lambda: config() | {"tensor_storage": storage}}
    _write(folder.path, target, config_json, files(), config, extra)
    notes = []
    odd = [name for name, (_, k) in shapes.items() if k % 128]
    if odd:
        notes.append(
            f"in_features of {odd[0]} and {len(odd) - 1} more are no multiples of 128, which exllamav3 takes "
            "for few layers"
        )
    if rounded:
        notes.append(f"{len(rounded)} biases were rounded to float16, among them {rounded[0]}")
    return ExportReport(target, exl3.QUANT_METHOD, tuple(folder.formats), tuple(notes))


def import_(path: str | Path, output: str | Path, *, overwrite: bool = False) -> ExportReport:
    """Reads a GPTQ (v1, v2), AWQ ("gemm"), compressed-tensors (pack-quantized), EXL3, SpQR or AQLM checkpoint
    into ours.

    The packed values are taken over as they are; nothing is quantized again. Raises ValueError naming file
    and module for tensors that contradict the checkpoint's settings, such as zero points by the other
    version's rule.
    """
    source = _checks.path("path", path)
    if not (source / "config.json").is_file():
        raise FileNotFoundError(f"path: {source} holds no config.json")
    config_json = read_json(source / "config.json")
    settings = config_json.get("quantization_config")
    if settings is None and (source / "quantize_config.json").is_file():
        settings = {"quant_method": "gptq"} | read_json(source / "quantize_config.json")
    if not isinstance(settings, dict):
        raise ValueError(f"path: {source} is not quantized: config.json has no quantization_config")
    method = settings.get("quant_method")
    if method == exl3.QUANT_METHOD:
        return _import_exl3(source, output, overwrite)
    suffixes, marker, reader = {
        "gptq": (_GPTQ, "qweight", ql.layouts.from_gptq),
        "awq": (_AWQ, "qweight", ql.layouts.from_awq),
        "spqr": (_SPQR, "dense_weights", ql.layouts.from_spqr),
        "aqlm": (_AQLM, "codebooks", ql.layouts.from_aqlm),
    }.get(method, (_COMPRESSED, "weight_packed", ql.layouts.from_compressed_tensors))
    read_config(settings, [], str(source))
    target = _check_output(source, output, overwrite)
    formats: dict[str, str] = {}
    skeleton = build_skeleton(source) if method == "spqr" else None

    def files() -> Iterable[tuple[str, dict[str, Any]]]:
        for file in tensor_files(source):
            tensors = ql.load_tensors(str(file), kind="torch")
            modules = sorted(
                name.removesuffix(f".{marker}") for name in tensors if name.endswith(f".{marker}")
            )
            arguments = read_config(settings, modules, str(source))
            if skeleton is not None:
                arguments = {name: (_linear_shape(skeleton, name, source),) for name in modules}
            written: dict[str, Any] = {}
            for name in modules:
                parts = {
                    part: tensors.pop(f"{name}.{part}") for part in suffixes if f"{name}.{part}" in tensors
                }
                try:
                    written[name] = reader(parts, *arguments[name])
                except (TypeError, ValueError, RuntimeError) as error:
                    raise ValueError(f"{file}: {name}: {error}") from error
                formats[name] = written[name].format.to_json()
            stray = [name for name in tensors if name.rpartition(".")[2] in suffixes]
            if stray:
                raise ValueError(f"{file}: {stray[0]} has no {marker} beside it")
            yield file.name, written | tensors

    def config() -> dict[str, Any]:
        if not formats:
            raise ValueError(f"path: {source} holds no tensor named *.{marker}")
        return quantization_config(None, dict(sorted(formats.items())))

    _write(source, target, config_json, files(), config, {})
    return ExportReport(target, str(method), tuple(sorted(formats)), ())


def _linear_shape(model: Any, name: str, source: Path) -> tuple[int, int]:
    import torch

    places, _ = model_names(model, [f"{name}.weight"])
    place = places.get(f"{name}.weight", "").removesuffix(".weight")
    linear = model.get_submodule(place) if place else None
    if not isinstance(linear, torch.nn.Linear):
        raise ValueError(f"{source}: {name} is packed, but no Linear of the model")
    return linear.out_features, linear.in_features


def _import_exl3(source: Path, output: Any, overwrite: bool) -> ExportReport:
    folder = exl3.Exl3Folder(source)
    target = _check_output(source, output, overwrite)
    formats = {name: form.to_json() for name, form in sorted(folder.formats.items())}
    files = ((file.name, tensors) for file, tensors in folder.shards())
    _write(source, target, folder.config_json, files, lambda: quantization_config(None, formats), {})
    notes = []
    if folder.left_out:
        notes.append(
            f"{len(folder.left_out)} tensors were left out, as exllamav3 does, such as {folder.left_out[0]}"
        )
    return ExportReport(target, exl3.QUANT_METHOD, tuple(formats), tuple(notes))


def _check_output(source: Path, output: Any, overwrite: bool) -> Path:
    target = _checks.path("output", output)
    if target.exists() and not target.is_dir():
        raise ValueError(f"output: {target} is a file, expected a folder")
    if target.exists() and target.samefile(source):
        raise ValueError(f"output: got the checkpoint's own folder {target}, expected another one")
    if (target / WORK / "manifest.json").exists():
        raise ValueError(f"output: {target} holds an unfinished run of quantize, expected another folder")
    taken = final_files(target)
    if taken and not overwrite:
        raise ValueError(f"output: {target} holds {taken[0].name} already; pass overwrite=True to replace it")
    return target


def _write(
    source: Path,
    target: Path,
    config_json: dict[str, Any],
    files: Iterable[tuple[str, dict[str, Any]]],
    config: Callable[[], dict[str, Any]],
    extra: dict[str, Callable[[], dict[str, Any]]],
) -> None:
    """Writes a checkpoint file by file aside, then moves it in place."""
    existed = target.exists()
    target.mkdir(parents=True, exist_ok=True)
    with WorkFolder(target) as work:
        try:
            work.clear()
            work.staging.mkdir()
            _stage(source, work.staging, config_json, files, config, extra)
            install(work)
        except BaseException:
            work.remove()
            if not existed:
                target.rmdir()
            raise
        work.remove()


def _stage(
    source: Path,
    staging: Path,
    config_json: dict[str, Any],
    files: Iterable[tuple[str, dict[str, Any]]],
    config: Callable[[], dict[str, Any]],
    extra: dict[str, Callable[[], dict[str, Any]]],
) -> None:
    weight_map: dict[str, str] = {}
    total = 0
    for name, tensors in files:
        ql.save_tensors(str(staging / name), tensors)
        for key, value in tensors.items():
            parts = value.planes if isinstance(value, ql.PackedTensor) else None
            weight_map |= {f"{key}.{part}": name for part in parts} if parts else {key: name}
            total += sum(part.nbytes for part in parts.values()) if parts else value.nbytes
    if len(set(weight_map.values())) > 1:
        index = {"metadata": {"total_size": total}, "weight_map": dict(sorted(weight_map.items()))}
        write_json(staging / INDEX, index)
    written = dict(config_json)
    written["quantization_config"] = config()
    for name, content in extra.items():
        write_json(staging / name, content())
    copy_companions(source, staging)
    write_json(staging / "config.json", written)
    write_json(staging / "COMPLETE", {"files": sorted(os.listdir(staging))})


def _unquantized(model: Any, folder: QuantizedFolder, heads: bool) -> list[str]:
    """Linears that are not packed; without `heads`, only those inside the decoder blocks."""
    import torch

    if heads:
        names = [name for name, module in model.named_modules() if isinstance(module, torch.nn.Linear)]
    else:
        names = [name for block in find_blocks(model) for name in block.linears]
    packed = {place for place, _ in packed_linears(model, folder).values()}
    return [name for name in names if name not in packed]


def _notes(folder: QuantizedFolder, layout: str) -> list[str]:
    if layout == "spqr":
        return ["kernels of this layout compute in float16, with outliers added to decoded weights"]
    if layout == "aqlm":
        return ["codes take 8 or 16 bits each in this layout"]
    notes = []
    dtype = folder.config_json.get("dtype") or folder.config_json.get("torch_dtype")
    scales = {form.scale_dtype for form in folder.formats.values()}
    if layout == "compressed-tensors" and dtype is not None and scales - {dtype}:
        notes.append(
            f"scales are {', '.join(sorted(scales))}, the model's dtype is {dtype}: loaders that cast scales "
            f"to it round them; quantize with scale_dtype={dtype!r}, or load in {sorted(scales)[0]}"
        )
    if layout != "compressed-tensors" and not all(form.symmetric for form in folder.formats.values()):
        notes.append("asymmetric GPTQ checkpoints are not loaded by recent vLLM")
    if json.dumps(folder.recipe or {}).find('"act_order": true') >= 0 and layout != "compressed-tensors":
        notes.append(
            "columns were walked by activation order with static groups: desc_act is false, g_idx is i // g"
        )
    return notes
