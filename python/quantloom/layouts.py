"""Layouts of other libraries' checkpoints: pure functions between them and packed tensors.

The arrays that come out are of the kind of the arrays that went in.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from quantloom import _arrays, _checks, _core
from quantloom._spqr_tiles import from_spqr, to_spqr
from quantloom.formats import group_columns
from quantloom.tensors import PackedTensor, load_tensors

__all__ = [
    "from_aqlm",
    "from_awq",
    "from_compressed_tensors",
    "from_exl3",
    "from_gptq",
    "from_spqr",
    "read_exl3",
    "sdr_to_uniform",
    "to_aqlm",
    "to_awq",
    "to_bcq",
    "to_compressed_tensors",
    "to_exl3",
    "to_gptq",
    "to_spqr",
]


def _version(value: Any) -> int:
    return ("gptq", "gptq_v2").index(_checks.choice("version", value, ("gptq", "gptq_v2"))) + 1


def _tensors(tensors: Any) -> tuple[dict[str, _core.ArrayRef], str]:
    if not isinstance(tensors, Mapping):
        raise TypeError(f"tensors: got {_checks.type_name(tensors)}, expected a mapping of names to arrays")
    arrays = {}
    for name, value in tensors.items():
        _checks.string("tensors", name, "names that are strings")
        array = _arrays.plane(f"tensors[{name!r}]", value)
        _arrays.require_cpu(f"tensors[{name!r}]", array)
        arrays[name] = array
    kinds = {array.kind for array in arrays.values()}
    if len(kinds) > 1:
        raise TypeError("tensors: got NumPy arrays and torch tensors, expected one kind")
    return {name: array.core for name, array in arrays.items()}, kinds.pop() if kinds else "numpy"


def _packed(q: Any) -> PackedTensor:
    if not isinstance(q, PackedTensor):
        raise TypeError(f"q: got {_checks.type_name(q)}, expected a PackedTensor")
    if q.transform is not None:
        raise RuntimeError(f"q: got the transform {q.transform.spec}, which the layout cannot hold")
    return q.to("cpu")


def _bits(value: Any) -> int:
    return _checks.integer("bits", value, 1, "an integer from 1 to 8")


def to_gptq(q: PackedTensor, version: str = "gptq") -> dict[str, Any]:
    """The arrays of the GPTQ layout: ``qweight, qzeros, scales, g_idx``.

    Args:
        q: uniform, 2, 3, 4 or 8 bits, n and k multiples of 32, scales in float16 or bfloat16.
        version: ``"gptq"`` stores zero points minus one, ``"gptq_v2"`` as they are.

    Raises RuntimeError for what the layout cannot hold, among others zero points 0 in ``"gptq"``.
    """
    version = _version(version)
    q = _packed(q)
    arrays = _core.to_gptq(q._core(), version)
    return {name: _arrays.to_kind(array, dtype, q.kind) for name, (dtype, array) in arrays.items()}


def from_gptq(
    tensors: Mapping[str, Any], bits: int, group_size: int | str, symmetric: bool, version: str = "gptq"
) -> PackedTensor:
    """The packed tensor of the arrays ``qweight, qzeros, scales, g_idx``.

    Args:
        tensors: the arrays by name, without the module's prefix.
        bits, group_size, symmetric, version: as the checkpoint's configuration says; a group size of -1
            there is ``"channel"`` here.

    Raises ValueError naming the array that contradicts the settings, such as zero points stored by the other
    version's rule.
    """
    version = _version(version)
    bits, columns = _bits(bits), group_columns(group_size)
    _checks.boolean("symmetric", symmetric)
    cores, kind = _tensors(tensors)
    return PackedTensor._from_core(
        _core.from_gptq(cores, bits, columns, symmetric, version), kind, shared=True
    )


def to_awq(q: PackedTensor) -> dict[str, Any]:
    """The arrays of AutoAWQ's layout "gemm": ``qweight, qzeros, scales``. Scales of input channels are no
    part of it: they have to be in the layer before.

    Args:
        q: uniform, 4 bits, scales in float16, groups that divide k, n a multiple of 8. Symmetric tensors get
            the zero point 8.

    Raises RuntimeError for what the layout cannot hold.
    """
    q = _packed(q)
    arrays = _core.to_awq(q._core())
    return {name: _arrays.to_kind(array, dtype, q.kind) for name, (dtype, array) in arrays.items()}


def from_awq(tensors: Mapping[str, Any], group_size: int | str) -> PackedTensor:
    """The packed tensor, asymmetric with 4 bits, of the arrays ``qweight, qzeros, scales``.

    Args:
        tensors: the arrays by name, without the module's prefix.
        group_size: as the checkpoint's configuration says; a group size of -1 there is ``"channel"`` here.

    Raises TypeError or ValueError naming the array with a wrong dtype or shape.
    """
    columns = group_columns(group_size)
    cores, kind = _tensors(tensors)
    return PackedTensor._from_core(_core.from_awq(cores, columns), kind, shared=True)


def to_bcq(q: PackedTensor, scale_dtype: str | None = None) -> PackedTensor:
    """A uniform tensor as binary coding (``BCQ``), with the bits of its codes as signs.

    Args:
        q: of the uniform format, whatever rounding made it; its transform stays.
        scale_dtype: of scales and offsets; None: that of `q`. Scales of 16 bits become ``"float32"`` without
            changing a bit of any value, and so do they in their own dtype if `q` is symmetric (in float16
            above ``2**-13``); offsets of others are rounded, and so are sums of scales in float32.

    Raises ValueError for other formats and for scales beyond the range of `scale_dtype`.
    """
    if not isinstance(q, PackedTensor):
        raise TypeError(f"q: got {_checks.type_name(q)}, expected a PackedTensor")
    if scale_dtype is not None:
        _checks.choice("scale_dtype", scale_dtype, ("float16", "bfloat16", "float32"))
    device = q.device
    host = PackedTensor(q.format, q.shape, q.to("cpu").planes)
    packed = _core.to_bcq(host._core(), scale_dtype)
    result = PackedTensor._from_core(packed, q.kind, transform=q.transform)
    return result if device == "cpu" else result.to(device)


def sdr_to_uniform(q: PackedTensor, by_groups: bool = False) -> PackedTensor:
    """A tensor of significant digits (``SDR``) in the format ``Uniform``, without changing a bit of a value:
    for kernels and layouts that take only that.

    Args:
        q: of the format sdr, whatever rounding made it; its transform stays.
        by_groups: False: 8-bit codes with one scale for each row. True: the codes as they are, with the
            scale times ``2**shift`` of each group, in float32.

    Raises ValueError for other formats, and for scales that ``2**shift`` takes out of float32.
    """
    if not isinstance(q, PackedTensor):
        raise TypeError(f"q: got {_checks.type_name(q)}, expected a PackedTensor")
    _checks.boolean("by_groups", by_groups)
    host = PackedTensor(q.format, q.shape, q.to("cpu").planes)
    result = PackedTensor._from_core(
        _core.sdr_to_uniform(host._core(), by_groups), q.kind, transform=q.transform
    )
    return result if q.device == "cpu" else result.to(q.device)


def to_compressed_tensors(q: PackedTensor) -> dict[str, Any]:
    """The arrays of the compressed-tensors layout ``pack-quantized``: ``weight_packed, weight_scale,
    weight_shape`` and, where needed, ``weight_zero_point`` and ``weight_g_idx``.

    Raises RuntimeError for symmetric 1 bit, whose zero point is no integer.
    """
    q = _packed(q)
    arrays = _core.to_compressed_tensors(q._core())
    return {name: _arrays.to_kind(array, dtype, q.kind) for name, (dtype, array) in arrays.items()}


def from_compressed_tensors(
    tensors: Mapping[str, Any], bits: int, group_size: int | str, symmetric: bool
) -> PackedTensor:
    """The packed tensor of arrays in the compressed-tensors layout ``pack-quantized``.

    Both layouts of widths that do not divide 32 are taken, told apart by the number of columns. Raises
    ValueError naming the array that contradicts the settings.
    """
    bits, columns = _bits(bits), group_columns(group_size)
    _checks.boolean("symmetric", symmetric)
    cores, kind = _tensors(tensors)
    return PackedTensor._from_core(
        _core.from_compressed_tensors(cores, bits, columns, symmetric), kind, shared=True
    )


def to_exl3(q: PackedTensor) -> dict[str, Any]:
    """The arrays of the EXL3 layout: ``trellis, suh, svh`` and, for the codebooks ``mcg`` and ``mul1``, a
    marker of that name. Not a bit of codes and scales changes.

    Args:
        q: a rotated trellis with a window of 16 and the codebook ``3inst``, ``mcg`` or ``mul1``, the latter
            two with EXL3's own multipliers; half bits with ``mul1`` only. Sizes are padded to multiples of
            128.

    Raises RuntimeError naming what the layout cannot hold.
    """
    q = _packed(q)
    arrays = _core.to_exl3(q._core())
    return {name: _arrays.to_kind(array, dtype, q.kind) for name, (dtype, array) in arrays.items()}


def from_exl3(tensors: Mapping[str, Any], shape: tuple[int, int] | None = None) -> PackedTensor:
    """The packed tensor of arrays in the EXL3 layout, over their memory.

    Args:
        tensors: ``trellis``; ``suh`` and ``svh``, or in their place the signs ``su`` and ``sv`` of the oldest
            files; ``mcg`` or ``mul1`` or neither; by name, without the module's prefix.
        shape: ``(out_features, in_features)``, which files do not hold: tensors are padded to multiples of
            128. None: the padded sizes.

    Raises TypeError or ValueError naming the array with a wrong dtype or shape, with scales that are not
    finite, or with a multiplier that exllamav3 would not use.
    """
    n, k = -1, -1
    if shape is not None:
        if not isinstance(shape, (tuple, list)) or len(shape) != 2:
            raise TypeError(f"shape: got {shape!r}, expected a pair (out_features, in_features)")
        n, k = (_checks.integer("shape", size, 1) for size in shape)
    cores, kind = _tensors(tensors)
    return PackedTensor._from_core(_core.from_exl3(cores, n, k), kind, shared=True)


def to_aqlm(q: PackedTensor) -> dict[str, Any]:
    """The arrays of AQLM's layout: ``codes, codebooks, scales``. Not a bit changes; codes are unpacked to
    int8, or int16 above 8 bits.

    Args:
        q: of the format additive, with one float16 scale for each group of rows, of whole blocks.

    Raises RuntimeError naming what the layout cannot hold.
    """
    q = _packed(q)
    arrays = _core.to_aqlm(q._core())
    return {name: _arrays.to_kind(array, dtype, q.kind) for name, (dtype, array) in arrays.items()}


def from_aqlm(tensors: Mapping[str, Any]) -> PackedTensor:
    """The packed tensor of the arrays ``codes, codebooks, scales`` of AQLM's layout, by name, without the
    module's prefix.

    Raises TypeError or ValueError naming the array with a wrong dtype or shape, or with codes beyond the
    codebooks.
    """
    cores, kind = _tensors(tensors)
    return PackedTensor._from_core(_core.from_aqlm(cores), kind)


_EXL3_PARTS = ("trellis", "suh", "svh", "su", "sv", "mcg", "mul1")


def read_exl3(
    path: Any, shapes: Mapping[str, tuple[int, int]] | None = None, kind: str = "numpy"
) -> dict[str, Any]:
    """Reads a file or a folder in the EXL3 layout: maps names of layers to packed tensors, names of all other
    tensors to arrays.

    Needs neither the model's code nor torch (for ``kind="numpy"``; tensors of bfloat16 then need ml_dtypes),
    so that it reads models that ``quantloom.models.load`` cannot build, such as mixtures of experts. Tensors
    ``scale`` of the oldest files are left out, as exllamav3 does.

    Args:
        path: a safetensors file, or a folder; its config is not read.
        shapes: ``(out_features, in_features)`` by layer, where they are no multiples of 128; see
            ``from_exl3``. Biases stay as they are stored, padded like the outputs.
        kind: as of ``quantloom.load_tensors``.

    Raises OSError if there is nothing to read, ValueError naming file and layer.
    """
    folder = _checks.path("path", path)
    files = sorted(folder.glob("*.safetensors")) if folder.is_dir() else [folder]
    if not files:
        raise FileNotFoundError(f"path: no safetensors file in {folder}")
    homes: dict[str, Path] = {}
    tensors: dict[str, Any] = {}
    for file in files:
        for name, value in load_tensors(file, kind).items():
            if name in homes:
                raise ValueError(f"{file}: {name} is stored in {homes[name].name} too")
            homes[name], tensors[name] = file, value
    layers = [name.removesuffix(".trellis") for name in tensors if name.endswith(".trellis")]
    unknown = sorted(set(shapes or ()) - set(layers))
    if unknown:
        raise ValueError(f"shapes: got {unknown[0]!r}, which is no layer of {folder}")
    result: dict[str, Any] = {}
    for name in layers:
        tensors.pop(f"{name}.scale", None)
        parts = {part: tensors.pop(f"{name}.{part}") for part in _EXL3_PARTS if f"{name}.{part}" in tensors}
        try:
            result[name] = from_exl3(parts, (shapes or {}).get(name))
        except (TypeError, ValueError) as error:
            raise type(error)(f"{homes[f'{name}.trellis']}: {name}: {error}") from None
    return result | tensors
