"""Entropy-coded tables."""

from __future__ import annotations

import bz2
import heapq
import math
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import Tensor

from quantloom import _arrays, _checks, _core, _devices
from quantloom.formats import _numerics
from quantloom.formats.base import Compressor, ScalarFormat, Shape, TensorFormat
from quantloom.formats.tables import LUTFormat, lut_grid, numbers

if TYPE_CHECKING:
    from quantloom.formats.encoded import Planes

__all__ = ["CompressedLUTFormat"]

_COMPRESSORS = ("optimal", "huffman", "rans", "arithmetic", "bz2")
_LEAST_ARITHMETIC = 2e-4


@dataclass(eq=False)
class CompressedLUTFormat(TensorFormat):
    """A table whose codes are entropy-coded: ``LUT6[GRID{0.58}]+Zoptimal``.

    Values are those of the table; only bits differ, and they depend on the data, so ``count_bits(shape)``
    raises NotImplementedError. Use it as an element format inside the other wrappers, or alone.

    Args:
        lut: the table.
        model_logp: natural logarithms of the probability of each code, kept as a float32 tensor on the CPU;
            probabilities must sum to 1 within 1e-4. Logarithms below -1e4 count as -1e4.
        compressor: what ``count_bits_tensor`` counts; see ``count_bits_compressed``. ``encode`` writes real
            streams: canonical Huffman for ``"huffman"``, rANS for all others, with the frequencies of the
            tensor at hand, which are stored.
    """

    lut: LUTFormat
    model_logp: Tensor
    compressor: Compressor
    _type: str = "compressed_lut"

    def __post_init__(self) -> None:
        if not isinstance(self.lut, LUTFormat):
            raise TypeError(f"lut: got {_checks.type_name(self.lut)}, expected a LUTFormat")
        _checks.choice("compressor", self.compressor, _COMPRESSORS)
        self.model_logp = _log_probabilities(self.lut, self.model_logp)
        total = float(self.model_logp.double().exp().sum())
        if abs(total - 1) > 1e-4:
            raise ValueError(f"model_logp: got probabilities that sum to {total:.6g}, expected 1 within 1e-4")

    def __eq__(self, other: object) -> bool:
        if type(other) is not type(self):
            return NotImplemented
        same = (self.lut, self.compressor) == (other.lut, other.compressor)
        return same and torch.equal(self.model_logp, other.model_logp)

    def __str__(self) -> str:
        return f"{self.lut}+Z{self.compressor}"

    @property
    def range(self) -> tuple[float, float]:
        """That of the table."""
        return self.lut.range

    @property
    def centroids(self) -> tuple[float, ...]:
        """The values of the table."""
        return self.lut.centroids

    @classmethod
    def train(
        cls, lut: LUTFormat, data: Tensor, smoothing: float = 1.0, compressor: Compressor = "optimal"
    ) -> CompressedLUTFormat:
        """A model of the codes of `data`: (count + smoothing), normalised."""
        counts = _counts(lut.to_idx(data), len(lut.values)).astype(np.float64) + _checks.real(
            "smoothing", smoothing
        )
        if not (counts.sum() > 0 and counts.min() >= 0):
            raise ValueError(
                f"smoothing: got {smoothing} for {data.numel()} values, expected positive counts"
            )
        with np.errstate(divide="ignore"):
            logp = np.log(counts / counts.sum())
        return cls(lut, torch.from_numpy(logp), compressor)

    @classmethod
    def train_grid(cls, data: Tensor, resolution: float, **train_args: Any) -> CompressedLUTFormat:
        """``train`` on the multiples of `resolution` that reach the largest magnitude of `data`."""
        return cls.train(lut_grid(resolution, float(data.abs().max())), data, **train_args)

    @staticmethod
    def count_bits_compressed(
        t: Tensor, lut: LUTFormat, compressor: Compressor, model_logp: Any = None
    ) -> float:
        """Bits of the codes of `t`, without any table of probabilities or code lengths.

        Args:
            model_logp: natural logarithms of the coder's probabilities; None: the frequencies in `t`.
            compressor:
                - ``"optimal"``: the sum of -log2 p, which need not be whole; in float64 whatever the dtype of
                  `t` (a sum in bfloat16 would be 0.25% too large)
                - ``"huffman"``: the lengths of an optimal prefix code for p
                - ``"rans"``: as ``"optimal"``; a real stream is within 0.01 bit of it
                - ``"arithmetic"``: -log2 of p cut off below 2e-4, plus 2 bits to end the code
                - ``"bz2"``: real, of the codes as uint32
        """
        _checks.choice("compressor", compressor, _COMPRESSORS)
        codes = lut.to_idx(t)
        if compressor == "bz2":
            return 8 * len(bz2.compress(codes.to(torch.int32).cpu().numpy().tobytes()))
        logp = None if model_logp is None else _log_probabilities(lut, model_logp).double().numpy()
        return bits_of_counts(_counts(codes, len(lut.values)), logp, compressor)

    def count_bits(self, shape: Shape) -> int:
        raise NotImplementedError(f"{self}: bits depend on the values; use count_bits_tensor(tensor)")

    def count_bits_tensor(self, tensor: Tensor) -> float:
        return self.count_bits_compressed(tensor, self.lut, self.compressor, self.model_logp)

    def quantise(self, tensor: Tensor) -> Tensor:
        return self.lut.quantise(tensor)

    def _codes_of(self) -> ScalarFormat:
        return self.lut

    def _put_codes(self, codes: Tensor | _numerics.Rounded, planes: Planes) -> None:
        codes = _numerics.as_codes(codes)
        planes.child("lut").put_table("codebook", self.lut.values)
        width = np.uint8 if len(self.lut.values) <= 256 else np.uint16
        symbols = codes.reshape(-1).to(torch.int32).cpu().numpy().astype(width)
        coder = "huffman" if self.compressor == "huffman" else "rans"
        planes.put("stream", torch.from_numpy(np.array(_core.entropy_encode(symbols, coder=coder))))

    def _get_codes(self, planes: Planes, count: int) -> Tensor:
        planes.child("lut").check_table("codebook", self.lut.values)
        stream = planes.get("stream", torch.uint8, None).contiguous()
        symbols = _core.entropy_decode(stream.numpy(), expected=count)
        return torch.from_numpy(symbols.astype(np.int32))

    def _get_codes_on(self, planes: Planes, count: int, device: torch.device) -> Tensor | _numerics.Packed:
        if device.type != "cuda" or len(self.lut.values) > 256 or not _core.built_with_cuda():
            return super()._get_codes_on(planes, count, device)
        planes.child("lut").check_table("codebook", self.lut.values)
        stream = planes.get("stream", torch.uint8, None).contiguous().numpy()
        described = _core.entropy_describe(stream)
        if described["count"] != count or described["alphabet"] > len(self.lut.values):
            return super()._get_codes_on(planes, count, device)  # which says what is wrong
        with _devices.current(_devices.device_name("device", device)) as cuda_stream:
            symbols = torch.empty(count, dtype=torch.uint8, device=device)
            if count:
                coded = _core.CudaEntropyStream(stream, cuda_stream)
                coded.decode(0, _arrays.describe("symbols", symbols).core, cuda_stream)
                coded.check(cuda_stream)
        return symbols

    def _encode(self, tensor: Tensor, planes: Planes) -> None:
        self._put_codes(self.lut.to_idx(tensor), planes)

    def _decode(self, planes: Planes, shape: Shape, dtype: torch.dtype, device: torch.device) -> Tensor:
        codes = self._get_codes_on(planes, math.prod(shape), device)
        return _numerics.decode(self.lut._elements(), codes, shape, dtype).to(device)


def bits_of_counts(counts: np.ndarray, logp: np.ndarray | None, compressor: Compressor) -> float:
    """Bits of codes that occur `counts` times under a model (None: their own frequencies); not bz2."""
    if logp is None:
        with np.errstate(divide="ignore"):
            logp = np.log(counts / max(1, counts.sum()))
    if compressor == "huffman":
        lengths = _huffman_lengths((np.exp(logp) * 2**20).round().astype(np.int64).tolist())
        return int((counts * lengths).sum())
    if compressor == "arithmetic":
        p = np.maximum(np.exp(logp), _LEAST_ARITHMETIC)
        logp = np.log(p / p.sum())
    used = counts > 0
    bits = -float((counts[used] * logp[used]).sum()) / math.log(2)
    # Whole numbers of bits stay whole: logarithms of float32 carry errors of 1e-7.
    if abs(bits - round(bits)) <= 1e-6 * min(1.0, bits):
        bits = float(round(bits))
    return bits if compressor == "optimal" else math.ceil(bits) + (2 if compressor == "arithmetic" else 0)


def _log_probabilities(lut: LUTFormat, logp: Any) -> Tensor:
    values = logp.detach().double().cpu().tolist() if isinstance(logp, Tensor) else list(logp)
    # JSON has no infinity, and numbers() takes none: a code that never occurs has a very small probability.
    values = numbers("model_logp", [max(float(value), -1e4) for value in values])
    if len(values) != len(lut.values):
        raise ValueError(f"model_logp: got {len(values)} numbers, expected {len(lut.values)}")
    return torch.tensor(values, dtype=torch.float32, device="cpu")


def _counts(codes: Tensor, count: int) -> np.ndarray:
    return torch.bincount(codes.reshape(-1), minlength=count).cpu().numpy()


def _huffman_lengths(frequencies: list[int]) -> np.ndarray:
    """Lengths of an optimal prefix code, with one more code, of frequency 1, that ends the stream."""
    heap = [(frequency, place, [place]) for place, frequency in enumerate([*frequencies, 1])]
    lengths = np.zeros(len(heap), np.int64)
    heapq.heapify(heap)
    order = len(heap)
    while len(heap) > 1:
        first, second = heapq.heappop(heap), heapq.heappop(heap)
        joined = first[2] + second[2]
        lengths[joined] += 1
        heapq.heappush(heap, (first[0] + second[0], order, joined))
        order += 1
    return lengths[:-1]
