"""Scales of input channels, kept beside a packed matrix."""

from __future__ import annotations

import base64
import binascii
import json
from typing import Any

import numpy as np

from quantloom import _arrays, _checks, _core
from quantloom.transforms import Transform

__all__ = ["ChannelScales"]

_LARGEST = _core.LARGEST_SCALE_CODE


class ChannelScales(Transform):
    """Input channels in other units: ``W diag(s)`` is stored, and products divide their inputs by s.

    A scale is ``2**(code / 16)``, one byte for each channel, which ``PackedTensor.size_in_bits`` counts.
    ``AWQ`` chooses them.

    Args:
        codes: integers from -112 to 112, ``[k]``.
    """

    __slots__ = ("_codes", "_scales")

    def __init__(self, codes: Any) -> None:
        array = np.asarray(codes)
        if array.ndim != 1 or (array.size and array.dtype.kind not in "iu"):
            raise TypeError(
                f"codes: got {array.dtype} of shape {_arrays.shape_text(array.shape)}, expected integers [k]"
            )
        if array.size and (array.min() < -_LARGEST or array.max() > _LARGEST):
            raise ValueError(
                f"codes: got values from {array.min()} to {array.max()}, expected -{_LARGEST} to {_LARGEST}"
            )
        self._codes = array.astype(np.int8)
        self._codes.setflags(write=False)
        self._scales = np.asarray(_core.channel_scales(self._codes.tobytes()), np.float32)
        self._scales.setflags(write=False)

    @property
    def codes(self) -> np.ndarray:
        """int8 ``[k]``."""
        return self._codes

    @property
    def scales(self) -> np.ndarray:
        """s, float32 ``[k]``."""
        return self._scales

    @property
    def spec(self) -> str:
        return f"channel_scales[{self._codes.size}]"

    def to_json(self) -> str:
        fields = {
            "codes": base64.b64encode(self._codes.tobytes()).decode(),
            "transform": "channel_scales",
            "version": 1,
        }
        return json.dumps(fields, sort_keys=True, separators=(",", ":"))

    @classmethod
    def from_fields(cls, fields: dict[str, Any]) -> ChannelScales:
        """Reads the fields of ``to_json`` back. Raises ValueError."""
        codes = fields.get("codes")
        if set(fields) != {"codes", "transform", "version"} or fields["version"] != 1:
            raise ValueError(f"transform: got keys {sorted(fields)}, expected codes, transform and version 1")
        try:
            data = base64.b64decode(_checks.string("codes", codes, "text in base64"), validate=True)
        except (TypeError, binascii.Error, ValueError) as error:
            raise ValueError(f"transform: codes of channel_scales: {error}") from None
        return cls(np.frombuffer(data, np.int8))

    has_input = True
    has_output = False

    @property
    def size_in_bits(self) -> int:
        return 8 * self._codes.size

    def check(self, n: int, k: int) -> None:
        """Raises ValueError unless W can be ``[n, k]``."""
        if k != self._codes.size:
            raise ValueError(
                f"transform: got {self._codes.size} channel scales, expected {k}, as W has columns"
            )

    def rotate_input(self, x: Any, inverse: bool = False, threads: int = 0) -> Any:
        """``x / s`` (or, inverse, ``x * s``) of the last axis of `x` ``[..., k]``, in its dtype."""
        return _multiplied(x, self._scales if inverse else 1 / self._scales)

    def rotate_output(self, y: Any, inverse: bool = False, threads: int = 0) -> Any:
        """`y` as it is."""
        return y

    def rotate_weight(self, w: Any, inverse: bool = False, threads: int = 0) -> Any:
        """``W diag(s)`` (or, inverse, the W of which this is that), in its dtype."""
        return _multiplied(w, 1 / self._scales if inverse else self._scales)

    def rotate_hessian(self, h: np.ndarray) -> np.ndarray:
        """The Hessian ``[k, k]`` of inputs that were divided by s, in its dtype."""
        inverse = 1 / self._scales.astype(np.float64)
        return (h * np.outer(inverse, inverse)).astype(h.dtype)

    def __eq__(self, other: object) -> bool:
        return isinstance(other, ChannelScales) and np.array_equal(self._codes, other._codes)

    def __hash__(self) -> int:
        return hash(self._codes.tobytes())

    def __repr__(self) -> str:
        return f"ChannelScales({self._codes.size} codes)"

    def __reduce__(self) -> tuple[Any, ...]:
        return ChannelScales, (np.array(self._codes),)


def _multiplied(x: Any, factors: np.ndarray) -> Any:
    """Times a factor for each entry of the last axis: in float32, rounded once to the dtype of x."""
    if _arrays.is_torch(x):
        import torch

        return (x.float() * torch.from_numpy(factors.copy()).to(x.device)).to(x.dtype)
    return (np.asarray(x).astype(np.float32) * factors).astype(x.dtype)
