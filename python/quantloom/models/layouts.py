"""What other libraries' checkpoint layouts can hold, and the configuration they want beside the tensors.

Pure functions over names and formats; the tensors themselves are converted by ``quantloom.layouts``.
"""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Mapping
from typing import Any

import quantloom as ql
from quantloom._spqr_tiles import tiles_refusal

__all__ = [
    "LAYOUTS",
    "aqlm_config",
    "awq_config",
    "compressed_tensors_config",
    "gptq_config",
    "read_config",
    "refusal",
    "spqr_config",
]

LAYOUTS = ("gptq", "gptq_v2", "awq", "compressed-tensors", "exl3", "spqr", "aqlm")


def refusal(form: Any, n: int, k: int, layout: str) -> str | None:
    """Why a module [n, k] of a format cannot be exported to a layout; None if it can."""
    if layout == "exl3":
        return ql._core.exl3_refusal(form.to_json()) or None
    if layout == "spqr":
        return tiles_refusal(form, n, k)
    if layout == "aqlm":
        return ql._core.aqlm_refusal(form.to_json(), n, k) or None
    if not isinstance(form, ql.Uniform):
        return f"{layout} holds uniform formats only"
    if isinstance(form.group_size, int) and k % form.group_size:
        return (
            f"loaders of {layout} need a group size that divides in_features, got {form.group_size} for {k}"
        )
    if layout == "compressed-tensors":
        if form.bits == 1 and form.symmetric:
            return "compressed-tensors stores integer zero points, that of symmetric 1 bit is 0.5"
        return None
    if layout == "awq":
        if form.bits != 4:
            return f"awq holds 4 bits, got {form.bits}"
        if form.group_size == "tensor" or form.scale_dtype != "float16":
            return "awq holds a float16 scale for each group or row"
        return f"awq needs out_features that are a multiple of 8, got {n}" if n % 8 else None
    if form.bits not in (2, 3, 4, 8):
        return f"{layout} holds 2, 3, 4 and 8 bits, got {form.bits}"
    if form.group_size == "tensor":
        return f"{layout} has a scale per row at least, got one for the whole tensor"
    if form.scale_dtype == "float32":
        return f"{layout} holds float16 and bfloat16 scales, got float32"
    if n % 32 or k % 32:
        return f"{layout} needs out_features and in_features that are multiples of 32, got {n} and {k}"
    return None


def gptq_config(formats: Mapping[str, Any], left: list[str], layout: str, act_order: bool) -> dict[str, Any]:
    """The GPTQ settings of a checkpoint. Modules that differ from most get an entry in ``dynamic``, as do the
    Linears `left` unquantized."""
    common, _ = Counter(formats.values()).most_common(1)[0]
    dynamic: dict[str, dict[str, Any]] = {f"-:^{re.escape(name)}$": {} for name in left}
    for name, form in formats.items():
        if form != common:
            dynamic[f"+:^{re.escape(name)}$"] = _gptq_entry(form)
    config = {
        "quant_method": "gptq",
        **_gptq_entry(common),
        "desc_act": act_order,
        "checkpoint_format": layout,
        "lm_head": False,
        "pack_dtype": "int32",
        "meta": {"quantizer": [f"quantloom:{ql.__version__}"]},
    }
    if dynamic:
        config["dynamic"] = dynamic
    return config


def awq_config(formats: Mapping[str, Any], left: list[str]) -> dict[str, Any]:
    """The AWQ settings of a checkpoint. Raises ValueError if modules differ in their group size."""
    sizes = {form.group_size: name for name, form in formats.items()}
    if len(sizes) > 1:
        named = ", ".join(f"{size} of {name}" for size, name in sizes.items())
        raise ValueError(f"layout: awq has one group size for all modules, got {named}")
    (group_size,) = sizes
    return {
        "quant_method": "awq",
        "bits": 4,
        "group_size": group_size if isinstance(group_size, int) else -1,
        "zero_point": True,
        "version": "gemm",
        "modules_to_not_convert": left or None,
    }


def aqlm_config(formats: Mapping[str, Any], left: list[str]) -> dict[str, Any]:
    """The AQLM settings of a checkpoint. Raises ValueError if modules differ in their format."""
    forms = {form: name for name, form in formats.items()}
    if len(forms) > 1:
        named = ", ".join(f"{form.spec} of {name}" for form, name in forms.items())
        raise ValueError(f"layout: aqlm has one format for all modules, got {named}")
    (form,) = forms
    return {
        "quant_method": "aqlm",
        "in_group_size": form.in_group,
        "out_group_size": form.out_group,
        "num_codebooks": form.codebooks,
        "nbits_per_codebook": form.bits,
        # Some versions of transformers look for a weight's name, others for its module's.
        "linear_weights_not_to_quantize": [f"{name}{end}" for name in left for end in (".weight", "")],
    }


def spqr_config(shapes: Mapping[str, int], left: list[str]) -> dict[str, Any]:
    """The SpQR settings of a checkpoint; `shapes`: of each array of each module, its length."""
    return {
        "quant_method": "spqr",
        "bits": 3,
        "beta1": 16,
        "beta2": 16,
        "shapes": {f"{name}.shape": length for name, length in shapes.items()},
        "modules_to_not_convert": left or None,
    }


def _gptq_entry(form: Any) -> dict[str, Any]:
    group_size = form.group_size if isinstance(form.group_size, int) else -1
    return {"bits": form.bits, "group_size": group_size, "sym": form.symmetric}


def compressed_tensors_config(formats: Mapping[str, Any], left: list[str], act_order: bool) -> dict[str, Any]:
    """The compressed-tensors settings of a checkpoint: one group of modules for each format."""
    groups: dict[Any, list[str]] = {}
    for name, form in formats.items():
        groups.setdefault(form, []).append(name)
    return {
        "quant_method": "compressed-tensors",
        "format": "pack-quantized",
        "quantization_status": "compressed",
        "config_groups": {
            f"group_{index}": {
                "targets": ["Linear"] if len(groups) == 1 else names,
                "weights": _scheme(form, act_order),
                "input_activations": None,
                "output_activations": None,
                "format": "pack-quantized",
            }
            for index, (form, names) in enumerate(groups.items())
        },
        "ignore": left,
        "kv_cache_scheme": None,
        "global_compression_ratio": None,
    }


def _scheme(form: Any, act_order: bool) -> dict[str, Any]:
    grouped = isinstance(form.group_size, int)
    return {
        "num_bits": form.bits,
        "type": "int",
        "symmetric": form.symmetric,
        "strategy": "group" if grouped else form.group_size,
        "group_size": form.group_size if grouped else None,
        "dynamic": False,
        # "weight": columns were walked in another order while the codes were chosen; nothing is permuted.
        "actorder": "weight" if act_order else None,
        "observer": "minmax",
    }


def read_config(settings: Mapping[str, Any], modules: list[str], origin: str) -> dict[str, tuple[Any, ...]]:
    """The settings of each packed module of a GPTQ, AWQ or compressed-tensors checkpoint.

    Returns, by module, the arguments of ``from_gptq`` (bits, group_size, symmetric, version), of
    ``from_compressed_tensors`` (without version) or of ``from_awq`` (group_size); none for SpQR, whose
    ``from_spqr`` wants sizes of the model, and for AQLM. Raises ValueError naming what cannot be read.
    """
    method = settings.get("quant_method")
    if method == "gptq":
        return {name: _read_gptq(settings, name, origin) for name in modules}
    if method == "compressed-tensors":
        return {name: _read_compressed(settings, name, origin) for name in modules}
    if method == "awq":
        group_size = _read_awq(settings, origin)
        return dict.fromkeys(modules, (group_size,))
    if method == "aqlm":
        return dict.fromkeys(modules, ())
    if method == "spqr":
        for name, expected in (("bits", 3), ("beta1", 16), ("beta2", 16)):
            if settings.get(name, expected) != expected:
                got = settings[name]
                raise ValueError(f"{origin}: got {name} {got!r} of an SpQR checkpoint, expected {expected}")
        return {}
    raise ValueError(
        f"{origin}: got quant_method {method!r}, expected 'gptq', 'awq', 'compressed-tensors', 'exl3', "
        "'spqr' or 'aqlm'"
    )


def _read_awq(settings: Mapping[str, Any], origin: str) -> int | str:
    bits = settings.get("bits", settings.get("w_bit"))
    version = str(settings.get("version", "gemm")).lower()
    group_size = settings.get("group_size", settings.get("q_group_size"))
    for name, got, expected in (
        ("bits", bits, 4),
        ("version", version, "gemm"),
        ("zero_point", settings.get("zero_point", True), True),
    ):
        if got != expected:
            raise ValueError(f"{origin}: got {name} {got!r} of an AWQ checkpoint, expected {expected!r}")
    if group_size is None:
        raise ValueError(f"{origin}: quantization_config lacks 'group_size'")
    return "channel" if group_size == -1 else group_size


def _read_gptq(settings: Mapping[str, Any], module: str, origin: str) -> tuple[Any, ...]:
    merged = dict(settings)
    for pattern, change in (settings.get("dynamic") or {}).items():
        kind, _, expression = pattern.partition(":") if pattern[:2] in ("-:", "+:") else ("+", "", pattern)
        if re.match(expression, module):
            if kind == "-":
                raise ValueError(f"{origin}: {module} is packed, but excluded by {pattern!r} in dynamic")
            merged |= change
            break
    version = merged.get("checkpoint_format", "gptq")
    if version not in ("gptq", "gptq_v2"):
        raise ValueError(f"{origin}: got checkpoint_format {version!r}, expected 'gptq' or 'gptq_v2'")
    try:
        bits, group_size, symmetric = merged["bits"], merged["group_size"], merged["sym"]
    except KeyError as error:
        raise ValueError(f"{origin}: quantization_config lacks {error}") from None
    return bits, "channel" if group_size == -1 else group_size, symmetric, version


def _read_compressed(settings: Mapping[str, Any], module: str, origin: str) -> tuple[Any, ...]:
    if settings.get("format") not in ("pack-quantized", "mixed-precision"):
        raise ValueError(f"{origin}: got format {settings.get('format')!r}, expected 'pack-quantized'")
    groups = settings.get("config_groups")
    groups = groups.values() if isinstance(groups, dict) else ()
    # A name goes before an expression, and that before a class.
    for matches in (
        lambda target: target == module,
        lambda target: target.startswith("re:") and re.match(target[3:], module) is not None,
        lambda target: target == "Linear",
    ):
        for group in groups:
            if not any(matches(target) for target in group.get("targets", ())):
                continue
            weights = group.get("weights") or {}
            if weights.get("type") != "int" or group.get("input_activations"):
                raise ValueError(f"{origin}: {module}: expected integer weights and activations as they are")
            strategy = weights.get("strategy")
            group_size = weights.get("group_size") if strategy == "group" else strategy
            if strategy not in ("group", "channel", "tensor"):
                raise ValueError(
                    f"{origin}: {module}: got strategy {strategy!r}, expected group, channel or tensor"
                )
            return weights.get("num_bits"), group_size, weights.get("symmetric")
    raise ValueError(f"{origin}: {module} is packed, but no entry of config_groups targets it")
