"""Every public function refuses wrong arguments with an error that names the argument, what was given
and what is expected."""

from __future__ import annotations

import math
import re
import types

import numpy as np
import pytest
import quantloom as ql
import torch
from quantloom.nn import QuantLinear

W = np.random.default_rng(0).standard_normal((32, 64)).astype(np.float32)
T = torch.tensor(W)
Q = ql.quantize(W, "uniform:4:g32")
ASYMMETRIC = ql.quantize(W, "uniform:4:g32:asym")
PREPARED = ql.prepare(Q)
LINEAR = QuantLinear(Q.to("torch"))
HESSIAN = ql.Hessian(64)
HESSIAN.add(W)
GPTQ_ARRAYS = ql.layouts.to_gptq(Q, "gptq")
CT_ARRAYS = ql.layouts.to_compressed_tensors(ASYMMETRIC)
EXL3_ARRAYS = {
    "trellis": np.zeros((8, 8, 32), np.int16),
    "suh": np.ones(128, np.float16),
    "svh": np.ones(128, np.float16),
}
NOT_FINITE = W.copy()
NOT_FINITE[7, 33] = np.inf
FOREIGN = W.astype(W.dtype.newbyteorder())
UNALIGNED = np.frombuffer(b"\0" + W.tobytes(), np.uint8)[1:].view(np.float32).reshape(W.shape)
SYMMETRIC = (HESSIAN.sum() / HESSIAN.tokens).copy()


def with_value(array, index, value):
    array = np.array(array)
    array[index] = value
    return array


def without(mapping, name):
    return {key: value for key, value in mapping.items() if key != name}


def planes(**changes):
    return {**Q.planes, **changes}


def recipe_json(old: str, new: str) -> str:
    text = ql.Recipe("uniform:4").to_json()
    assert old in text
    return text.replace(old, new)


class Unreadable:
    def __dlpack__(self, **_):
        raise BufferError("on a device")

    def __dlpack_device__(self):
        return (2, 0)


# (function, arguments, keywords, error, words of the message in this order)
TABLE = [
    # formats
    (ql.Uniform, (0,), {}, ValueError, "bits 0 1 8"),
    (ql.Uniform, (9,), {}, ValueError, "bits 9 1 8"),
    (ql.Uniform, (10**30,), {}, ValueError, "bits 1000000"),
    (ql.Uniform, (-(10**30),), {}, ValueError, "bits"),
    (ql.Uniform, (4.0,), {}, TypeError, "bits float integer"),
    (ql.Uniform, (True,), {}, TypeError, "bits bool integer"),
    (ql.Uniform, (4, 0), {}, ValueError, "group_size 0 channel tensor"),
    (ql.Uniform, (4, -1), {}, ValueError, "group_size -1 channel"),
    (ql.Uniform, (4, "row"), {}, ValueError, "group_size row channel tensor"),
    (ql.Uniform, (4, None), {}, TypeError, "group_size NoneType integer"),
    (ql.Uniform, (4, 128, 1), {}, TypeError, "symmetric int True or False"),
    (ql.Uniform, (4, 128, True, "float64"), {}, ValueError, "scale_dtype float64 float16 bfloat16 float32"),
    (ql.Uniform, (4, 128, True, 3), {}, ValueError, "scale_dtype 3 float16"),
    (ql.Outliers, ("uniform:4",), {}, ValueError, "percent count none"),
    (ql.Outliers, ("uniform:4", 1.0, 5), {}, ValueError, "percent count both"),
    (ql.Outliers, ("uniform:4", 0.0), {}, ValueError, "percent 0 100"),
    (ql.Outliers, ("uniform:4", "1"), {}, TypeError, "percent str number"),
    (ql.Outliers, ("uniform:4", None, 1.5), {}, TypeError, "count float integer"),
    (ql.Outliers, ("uniform:9", 1.0), {}, ValueError, "uniform:9"),
    (ql.Outliers, (4, 1.0), {}, TypeError, "int short form"),
    (ql.Outliers, (ql.Outliers("uniform:4", 1.0), 1.0), {}, ValueError, "dense without outliers"),
    (ql.Trellis, (0,), {}, ValueError, "bits 0 1 to 8"),
    (ql.Trellis, (2.25,), {}, ValueError, "bits 2.25 1 to 8"),
    (ql.Trellis, ("2",), {}, TypeError, "bits str"),
    (ql.Trellis, (math.nan,), {}, ValueError, "bits nan"),
    (ql.Trellis, (4.5, "hyb"), {}, ValueError, "bits 4.5 1 to 4 two weights"),
    (ql.Trellis, (2, "mul2"), {}, ValueError, "codebook mul2 3inst mul1"),
    (ql.Trellis, (2, "mul1-123"), {}, ValueError, "codebook mul1-123 HEX"),
    (ql.Trellis, (2, 3), {}, TypeError, "codebook int"),
    (ql.Trellis, (2, "mul1", 64), {}, ValueError, "rotation 64 128"),
    (ql.Trellis, (2, "mul1", 0), {}, ValueError, "rotation 0 128"),
    (ql.Trellis, (2, "mul1", None, 7), {}, ValueError, "window 7 8 to 20"),
    (ql.Trellis, (2, "rptc", None, 17), {}, ValueError, "window 17 8 to 16"),
    (ql.Trellis, (2, "mul1", None, 16.0), {}, TypeError, "window float integer"),
    (ql.VectorCodebook, (1, 4), {}, ValueError, "entries 1 2 to 65536"),
    (ql.VectorCodebook, (4, 4, 6), {}, ValueError, "group_size 6 multiple 4"),
    (ql.VectorCodebook, (4, 4, 8, 1, "float16", np.zeros((4, 3))), {}, ValueError, "table (4, 3) (4, 4)"),
    (ql.Codebook, ("nf5",), {}, ValueError, "table nf5 nf4 values"),
    (ql.Codebook, ("",), {}, ValueError, "table nf4"),
    (ql.Codebook, (None,), {}, TypeError, "table NoneType name sequence"),
    (ql.Codebook, (4,), {}, TypeError, "table int name sequence"),
    (ql.Codebook, ([],), {}, ValueError, "table 0 entries 2 to 256"),
    (ql.Codebook, ([1.0],), {}, ValueError, "table 1 entries 2 to 256"),
    (ql.Codebook, (range(257),), {}, ValueError, "table 257 entries 2 to 256"),
    (ql.Codebook, ([0, 0],), {}, ValueError, "table entry 1 rise"),
    (ql.Codebook, ([1, 1.0001],), {}, ValueError, "table entry 1 rise float16"),
    (ql.Codebook, ([0, math.nan],), {}, ValueError, "table nan finite"),
    (ql.Codebook, ([0, 1e6],), {}, ValueError, "table 1e+06 65504"),
    (ql.Codebook, ([0, 1e300],), {}, ValueError, "table 65504"),
    (ql.Codebook, ([0, "1"],), {}, TypeError, "table str finite"),
    (ql.Codebook, ("nf4", 3), {}, ValueError, "bits 3 4 to 8"),
    (ql.Codebook, ("nf4", 9), {}, ValueError, "bits 9 4 to 8"),
    (ql.Codebook, ("nf4", 0), {}, ValueError, "bits 0 1 to 8"),
    (ql.Codebook, ("nf4", 4.0), {}, TypeError, "bits float integer"),
    (ql.Codebook, ("nf4", 4, 0), {}, ValueError, "group_size 0 channel tensor"),
    (ql.Codebook, ("nf4", 4, 64, "float64"), {}, ValueError, "scale_dtype float64 float16"),
    (Q.format.planes, (-1, 4), {}, ValueError, "n -1"),
    (Q.format.planes, (2**62, 2**62), {}, ValueError, "2^63"),
    (ql.parse_format, (7,), {}, TypeError, "format int uniform:4:g128"),
    (ql.parse_format, ("uniform",), {}, ValueError, "uniform BITS"),
    (ql.parse_format, ("uniform:4:g0",), {}, ValueError, "uniform:4:g0"),
    (ql.parse_format, ("uniform:4:g128:g64",), {}, ValueError, "uniform:4:g128:g64"),
    (ql.parse_format, ("uniform:4:sym:asym",), {}, ValueError, "uniform:4:sym:asym"),
    (ql.parse_format, ("unicorn:4",), {}, ValueError, "format unicorn uniform"),
    (ql.parse_format, ("uniform:99999999999999999999",), {}, ValueError, "uniform:9999"),
    (ql.format_from_json, (3,), {}, TypeError, "json int string"),
    (ql.format_from_json, ("{",), {}, ValueError, "JSON"),
    (ql.format_from_json, ('{"format":"unicorn"}',), {}, ValueError, "format unicorn"),
    (ql.format_from_json, (Q.format.to_json().replace('"bits"', '"bit"'),), {}, ValueError, "bit"),
    (ql.format_from_json, (Q.format.to_json().replace(":8", ":7"),), {}, ValueError, "zero_point"),
    (ql.format_from_json, (Q.format.to_json().replace("32", "0"),), {}, ValueError, "group_size"),
    (ql.format_from_json, (Q.format.to_json().replace('n":1', 'n":2'),), {}, ValueError, "version"),
    # transforms
    (ql.code, (3,), {}, TypeError, "q int PackedTensor Encoded"),
    (ql.code, (Q,), {"splits": 17}, ValueError, "splits 17 16"),
    (ql.code, (Q,), {"table_bits": 4}, ValueError, "table_bits 4 8 14"),
    (ql.code, (Q,), {"overhead": "1"}, TypeError, "overhead str"),
    (ql.code, (Q,), {"overhead": -0.5}, ValueError, "overhead -0.5"),
    (ql.code, (Q,), {"device": "tpu"}, ValueError, "device tpu cpu cuda"),
    (ql.CodedTensor, (3,), {}, TypeError, "CodedTensor int code()"),
    (ql.hadamard, (3,), {}, TypeError, "x int NumPy"),
    (ql.hadamard, (W.astype(np.float64),), {}, TypeError, "x float64 float32"),
    (ql.hadamard, (W, 3), {}, ValueError, "block 3 64 columns 64"),
    (ql.hadamard, (W,), {"block": 0}, ValueError, "block 0"),
    (ql.hadamard, (W,), {"signs": np.ones(3)}, ValueError, "signs [3] [64]"),
    (ql.hadamard, (W,), {"seed": 1.5}, TypeError, "seed float"),
    (ql.hadamard, (W,), {"scale": math.inf}, ValueError, "scale inf"),
    (ql.hadamard, (W,), {"inverse": 1}, TypeError, "inverse int True or False"),
    (ql.hadamard, (W,), {"out": W[:1]}, ValueError, "out shape"),
    (ql.hadamard, (W,), {"threads": -1}, ValueError, "threads -1"),
    (ql.hadamard_matrix, (6,), {}, ValueError, "n 6 known Hadamard matrix"),
    (ql.hadamard_matrix, (2**40,), {}, ValueError, "n"),
    (ql.hadamard_signs, (-1, 0), {}, ValueError, "n -1"),
    (ql.hadamard_signs, (8, -1), {}, ValueError, "seed -1"),
    (ql.largest_hadamard_block, (0,), {}, ValueError, "n 0"),
    (ql.Hadamard, ("column",), {}, ValueError, "block column row"),
    (ql.Hadamard, (8, 0, "top"), {}, ValueError, "sides top in out both"),
    (ql.parse_transform, (3,), {}, TypeError, "transform int hadamard"),
    (ql.parse_transform, ("fourier",), {}, ValueError, "transform fourier hadamard"),
    (ql.transform_from_json, ("{}",), {}, ValueError, "transform hadamard keys"),
    (ql.quantize, (W, "uniform:4"), {"transform": 7}, TypeError, "transform int"),
    (ql.quantize, (W[:7], "uniform:4"), {"transform": "hadamard:out"}, ValueError, "side 'out' 7"),
    # roundings and recipes
    (ql.SmoothQuant, (ql.AWQ(),), {}, TypeError, "then AWQ Nearest GPTQ"),
    (ql.SmoothQuant, ("nearest", 1.5), {}, ValueError, "alpha 1.5 above 0"),
    (ql.SmoothQuant, ("nearest", 0.5, 1), {}, ValueError, "steps 1"),
    (ql.quantize, (W, "uniform:8", ql.SmoothQuant()), {}, ValueError, "SmoothQuant inputs"),
    (ql.search_smoothing, ([],), {}, TypeError, "layers list pairs"),
    (ql.search_smoothing, ([(W, ql.Uniform(8))],), {}, ValueError, "inputs None maxima alpha"),
    (ql.search_smoothing, ([(W, ql.Uniform(8))], -W[0]), {"alpha": 0.5}, ValueError, "maxima negative"),
    (ql.search_smoothing, ([(W, ql.Uniform(8))],), {"inputs": W[:, :9]}, ValueError, "inputs [32, 9] 64"),
    (ql.keep_columns, (Q, W, [64]), {}, ValueError, "columns 64 below 64"),
    (ql.keep_columns, (Q, W, 3), {}, TypeError, "columns int numbers"),
    (ql.keep_columns, (Q, W[:3], [1]), {}, ValueError, "w [3, 64] [32, 64]"),
    (ql.keep_columns, (W, W, [1]), {}, TypeError, "q ndarray PackedTensor"),
    (ql.Additive, (9,), {}, ValueError, "codebooks 9 1 to 8"),
    (ql.SDR, (8,), {}, ValueError, "bits 8 2 to 7"),
    (ql.SDR, (4, 0), {}, ValueError, "group_size 0 positive"),
    (ql.SDR, (4, "channel"), {}, TypeError, "group_size str integer"),
    (ql.SDR, (4, 16, "int8"), {}, ValueError, "scale_dtype int8 float16"),
    (ql.SpQR, (9,), {}, ValueError, "bits 9 1 to 8"),
    (ql.SpQR, (3, 0), {}, ValueError, "group_size 0 positive"),
    (ql.SpQR, (3, 16, 3, 3, 2.5), {}, TypeError, "block float integer"),
    (ql.OutlierSearch, (), {}, ValueError, "percent bits none"),
    (ql.OutlierSearch, (1.0, 3.0), {}, ValueError, "percent bits one"),
    (ql.OutlierSearch, ("1",), {}, TypeError, "percent str number"),
    (ql.OutlierSearch, (100.0,), {}, ValueError, "percent 100"),
    (ql.ScaleSearch, (0,), {}, ValueError, "steps 0"),
    (ql.ScaleSearch, (2.5,), {}, TypeError, "steps float integer"),
    (ql.ScaleSearch, (10**9,), {}, ValueError, "steps 1000000000"),
    (ql.ScaleSearch, (4, 1.0), {}, ValueError, "smallest 1.0 (0, 1)"),
    (ql.ScaleSearch, (4, float("nan")), {}, ValueError, "smallest nan"),
    (ql.ScaleSearch, (4, 0.5, 0), {}, ValueError, "norm 0"),
    (ql.Nearest, (3,), {}, TypeError, "scale_search int ScaleSearch"),
    (ql.Nearest, (), {"hessian": "h"}, TypeError, "hessian str NumPy"),
    (ql.Nearest, (), {"held_out": W}, ValueError, "held_out [32, 64] square"),
    (ql.AWQ, ("awq",), {}, TypeError, "then AWQ Nearest GPTQ"),
    (ql.AWQ, (ql.GPTQ(HESSIAN),), {}, ValueError, "then Hessian AWQ"),
    (ql.AWQ, (), {"steps": 0}, ValueError, "steps 0 1"),
    (ql.AWQ, (), {"steps": 1001}, ValueError, "steps 1001 1000"),
    (ql.AWQ, (), {"explicit": 1}, TypeError, "explicit int"),
    (ql.AWQ, (), {"hessian": W[:, 0]}, ValueError, "hessian [32] 2 dimensions"),
    (ql.AWQ, (), {"hessian": HESSIAN, "magnitudes": [1.0]}, ValueError, "magnitudes [1] [64]"),
    (ql.BCQ, (0,), {}, ValueError, "bits 0 1 8"),
    (ql.BCQ, (3.5,), {}, TypeError, "bits float integer 1 8"),
    (ql.BCQ, (3, "tensor"), {}, ValueError, "group_size tensor"),
    (ql.BCQ, (3,), {"offset": 1}, TypeError, "offset int"),
    (ql.BCQ, (3,), {"rounds": 1001}, ValueError, "rounds 1001 0 1000"),
    (ql.BCQ, (3,), {"start": "last"}, ValueError, "start last best greedy"),
    (ql.layouts.to_bcq, (W,), {}, TypeError, "q ndarray PackedTensor"),
    (ql.layouts.to_bcq, (Q, "int8"), {}, ValueError, "scale_dtype int8 float16"),
    (ql.ChannelScales, ([113],), {}, ValueError, "codes 113 -112 112"),
    (ql.ChannelScales, ([0.5],), {}, TypeError, "codes float64 integers [k]"),
    (ql.search_channel_scales, ([], HESSIAN), {}, ValueError, "layers none at least one"),
    (ql.search_channel_scales, ([(W, ql.Uniform(4))], None), {}, TypeError, "hessian NoneType"),
    (ql.search_channel_scales, ([W], HESSIAN), {}, TypeError, "layers ndarray pairs"),
    (ql.search_channel_scales, ([(W, ql.Uniform(4))], HESSIAN), {"steps": 0}, ValueError, "steps 0"),
    (ql.quantize, (W, "uniform:4", ql.AWQ()), {}, ValueError, "rounding AWQ hessian"),
    (ql.BeamSearch, (), {"beam": 9}, ValueError, "beam 9 1 to 8"),
    (ql.layouts.to_aqlm, (W,), {}, TypeError, "q ndarray PackedTensor"),
    (ql.layouts.from_aqlm, ({},), {}, ValueError, "tensor codebooks"),
    (ql.layouts.to_awq, (W,), {}, TypeError, "q ndarray PackedTensor"),
    (ql.layouts.from_awq, ([], 32), {}, TypeError, "tensors list mapping"),
    (ql.layouts.sdr_to_uniform, (Q,), {}, ValueError, "packed another format sdr"),
    (ql.layouts.sdr_to_uniform, (W,), {}, TypeError, "q ndarray PackedTensor"),
    (ql.layouts.from_spqr, ([], (16, 16)), {}, TypeError, "tensors list mapping"),
    (ql.layouts.from_spqr, ({}, (16, 16)), {}, ValueError, "tensor dense_weights int64"),
    (ql.layouts.from_spqr, ({}, (15, 16)), {}, ValueError, "shape 15 multiple of 16"),
    (ql.layouts.to_spqr, (W,), {}, TypeError, "q ndarray PackedTensor"),
    (ql.layouts.from_awq, ({}, 32), {}, ValueError, "tensor qweight"),
    (ql.layouts.from_awq, ({}, 0), {}, ValueError, "group_size 0"),
    (ql.GPTQ, (W[:, 0],), {}, ValueError, "hessian [32] 2 dimensions"),
    (ql.GPTQ, (W[:, :32].astype(np.float16),), {}, TypeError, "hessian float16 float64"),
    (ql.GPTQ, (with_value(SYMMETRIC, (3, 5), np.nan),), {}, ValueError, "hessian"),
    (ql.GPTQ, (with_value(SYMMETRIC, (3, 5), 1e3),), {}, ValueError, "hessian symmetric"),
    (ql.GPTQ, (), {"damp": -0.1}, ValueError, "damp -0.1 0"),
    (ql.GPTQ, (), {"damp": "1"}, TypeError, "damp str number"),
    (ql.GPTQ, (), {"damp": float("inf")}, ValueError, "damp inf finite"),
    (ql.GPTQ, (), {"damp_ladder": 3}, TypeError, "damp_ladder int sequence"),
    (ql.GPTQ, (), {"damp_ladder": (0.3, 0.1)}, ValueError, "damp_ladder rising"),
    (ql.GPTQ, (), {"act_order": 1}, TypeError, "act_order int"),
    (ql.GPTQ, (), {"static_groups": None}, TypeError, "static_groups NoneType"),
    (ql.GPTQ, (), {"block": 0}, ValueError, "block 0 1"),
    (ql.GPTQ, (), {"scale_search": True}, TypeError, "scale_search bool ScaleSearch"),
    (ql.GPTQ, (), {"outliers": 1}, TypeError, "outliers int OutlierSearch"),
    (ql.parse_rounding, (None,), {}, TypeError, "rounding NoneType gptq"),
    (ql.parse_rounding, ("best",), {}, ValueError, "rounding best nearest gptq"),
    (ql.parse_rounding, ("nearest:damp=1",), {}, ValueError, "damp=1 nearest"),
    (ql.parse_rounding, ("gptq:damp=x",), {}, ValueError, "damp=x"),
    (ql.parse_rounding, ("gptq:search:search=3",), {}, ValueError, "search twice"),
    (ql.rounding_from_json, ("[]",), {}, ValueError, "rounding list object"),
    (ql.rounding_from_json, ('{"rounding":"best"}',), {}, ValueError, "best gptq nearest"),
    (ql.rounding_from_json, ('{"rounding":"gptq","speed":1}',), {}, ValueError, "speed"),
    (ql.rounding_from_json, ('{"rounding":"gptq","scale_search":{"x":1}}',), {}, ValueError, "scale_search"),
    (ql.Recipe, (4,), {}, TypeError, "format int"),
    (ql.Recipe, ("uniform:4", 4), {}, TypeError, "rounding int"),
    (ql.Recipe, ("uniform:4", ql.GPTQ(HESSIAN)), {}, ValueError, "rounding hessian calibration"),
    (ql.Recipe, ("uniform:4",), {"ignore": "lm_head"}, TypeError, "ignore str sequence"),
    (ql.Recipe, ("uniform:4",), {"ignore": [3]}, TypeError, "ignore int name"),
    (ql.Recipe, ("uniform:4",), {"ignore": ["re:("]}, ValueError, "ignore re:( regular expression"),
    (ql.Recipe, ("uniform:4",), {"ignore": [""]}, ValueError, "ignore empty"),
    (ql.Recipe, ("uniform:4",), {"overrides": ["a"]}, TypeError, "overrides list mapping"),
    (ql.Recipe, ("uniform:4",), {"overrides": {"a": 3}}, TypeError, "format int"),
    (ql.Recipe.parse, ("uniform:4", "best"), {}, ValueError, "rounding best"),
    (ql.Recipe.from_json, ("nope",), {}, ValueError, "recipe JSON"),
    (ql.Recipe.from_json, ("{}",), {}, ValueError, "recipe keys"),
    (ql.Recipe.from_json, (recipe_json('"version":1}', '"version":9}'),), {}, ValueError, "version 9"),
    # calibration
    (ql.Hessian, (0,), {}, ValueError, "k 0"),
    (ql.Hessian, ("8",), {}, TypeError, "k str"),
    (ql.Hessian, (2**40,), {}, (ValueError, MemoryError), ""),
    (ql.Hessian.from_sum, (W,), {}, ValueError, "sum [32, 64] square"),
    (ql.Hessian.from_sum, (SYMMETRIC, 0), {}, ValueError, "tokens 0"),
    (ql.Hessian.from_sum, (-SYMMETRIC,), {}, ValueError, "sum row column diagonal >= 0"),
    (HESSIAN.add, (W[:, :63],), {}, ValueError, "x [32, 63] 64"),
    (HESSIAN.add, (W.astype(np.float64),), {}, TypeError, "x float64 float32"),
    (HESSIAN.add, (NOT_FINITE,), {}, ValueError, "x 7 33"),
    (HESSIAN.add, (W, -1), {}, ValueError, "threads -1"),
    (HESSIAN.add, (np.float32(1),), {}, TypeError, "x float32 NumPy"),
    (ql.proxy_loss, (W[:3], Q, HESSIAN), {}, ValueError, "decoded [32, 64] [3, 64]"),
    (ql.proxy_loss, (W, W[:3], HESSIAN), {}, ValueError, "decoded [3, 64] [32, 64]"),
    (ql.proxy_loss, (W, W, ql.Hessian(63)), {}, ValueError, "hessian 63 64"),
    (ql.proxy_loss, (W, W, None), {}, TypeError, "hessian None"),
    (ql.proxy_loss, (W, W, ql.Hessian(64)), {}, ValueError, "tokens"),
    (ql.proxy_loss, (NOT_FINITE, W, HESSIAN), {}, ValueError, "w 7 33"),
    # quantize
    (ql.quantize, ([[1.0]], "uniform:4"), {}, TypeError, "w list NumPy torch __dlpack__"),
    (ql.quantize, (None, "uniform:4"), {}, TypeError, "w NoneType"),
    (ql.quantize, (Unreadable(), "uniform:4"), {}, TypeError, "w Unreadable DLPack on a device"),
    (ql.quantize, (W.astype(np.float64), "uniform:4"), {}, TypeError, "w float64 float32 astype"),
    (ql.quantize, (T.double(), "uniform:4"), {}, TypeError, "w float64 float32 w.float()"),
    (ql.quantize, (W.astype(np.int32), "uniform:4"), {}, TypeError, "w int32 float32"),
    (ql.quantize, (W.astype(np.complex64), "uniform:4"), {}, TypeError, "w complex64"),
    (ql.quantize, (W.astype(object), "uniform:4"), {}, TypeError, "w object"),
    (ql.quantize, (np.zeros(3, [("a", "f4")]), "uniform:4"), {}, TypeError, "w void"),
    (ql.quantize, (W[0], "uniform:4"), {}, ValueError, "w [64] 2 dimensions"),
    (ql.quantize, (W[None], "uniform:4"), {}, ValueError, "w [1, 32, 64] 2 dimensions"),
    (ql.quantize, (np.float32(3), "uniform:4"), {}, TypeError, "w float32"),
    (ql.quantize, (np.array(3, np.float32), "uniform:4"), {}, ValueError, "w [] 2 dimensions"),
    (ql.quantize, (W.T, "uniform:4"), {}, ValueError, "w 64 apart last axis contiguous"),
    (ql.quantize, (W[:, ::-1], "uniform:4"), {}, ValueError, "w -1 apart last axis"),
    (ql.quantize, (W[::-1], "uniform:4"), {}, ValueError, "w rows -64 apart"),
    (ql.quantize, (np.broadcast_to(W[0], (3, 64)), "uniform:4"), {}, ValueError, "w rows 0 apart overlap"),
    (ql.quantize, (T.t(), "uniform:4"), {}, ValueError, "w last axis"),
    (ql.quantize, (FOREIGN, "uniform:4"), {}, TypeError, "w float32 byte order native"),
    (ql.quantize, (UNALIGNED, "uniform:4"), {}, ValueError, "w aligned 4"),
    (ql.quantize, (np.ma.masked_array(W, W > 0), "uniform:4"), {}, TypeError, "w masked"),
    (ql.quantize, (T.to_sparse(), "uniform:4"), {}, TypeError, "w sparse"),
    (ql.quantize, (T.to("meta"), "uniform:4"), {}, TypeError, "w meta CPU"),
    (ql.quantize, (T.to(torch.float8_e4m3fn), "uniform:4"), {}, TypeError, "w float8_e4m3fn"),
    (ql.quantize, (NOT_FINITE, "uniform:4"), {}, ValueError, "w row 7 column 33"),
    (ql.quantize, (W, 4), {}, TypeError, "format int"),
    (ql.quantize, (W, "uniform:4", "nearest"), {}, TypeError, "rounding str Nearest GPTQ"),
    (ql.quantize, (W, "uniform:4", ql.Rounding()), {}, TypeError, "rounding Rounding Nearest GPTQ"),
    (ql.quantize, (W, "uniform:4", ql.GPTQ()), {}, ValueError, "rounding hessian GPTQ(hessian)"),
    (ql.quantize, (W, "uniform:4", ql.GPTQ(np.eye(63))), {}, ValueError, "hessian 63 64"),
    (ql.quantize, (W, "uniform:4", ql.Nearest(held_out=np.eye(63))), {}, ValueError, "held_out 63 64"),
    (ql.quantize, (W, "uniform:4", ql.GPTQ(ql.Hessian(64))), {}, ValueError, "hessian tokens"),
    (ql.quantize, (W, "uniform:4", ql.Nearest(hessian=ql.Hessian(64))), {}, ValueError, "hessian tokens"),
    (ql.quantize, (W, "uniform:4"), {"threads": -2}, ValueError, "threads -2"),
    (ql.quantize, (W, "uniform:4"), {"threads": 1.5}, TypeError, "threads float"),
    (ql.quantize, (W, "uniform:4"), {"threads": 10**6}, ValueError, "threads 1000000"),
    (ql.quantize, (W * np.float32(1e30), "uniform:4:g32"), {}, ValueError, "scale row group bfloat16"),
    # packed tensors
    (
        ql.PackedTensor,
        ("uniform:4:g32", (32, 64), without(Q.planes, "scales")),
        {},
        ValueError,
        "plane scales",
    ),
    (ql.PackedTensor, ("uniform:4:g32", (32, 64), planes(zeros=W)), {}, ValueError, "plane zeros"),
    (ql.PackedTensor, ("uniform:4:g32", (32, 65), Q.planes), {}, ValueError, "plane codes [32, 8] [32, 9]"),
    (
        ql.PackedTensor,
        ("uniform:4:g32:bf16", (32, 64), Q.planes),
        {},
        ValueError,
        "plane scales float16 bfloat16",
    ),
    (
        ql.PackedTensor,
        ("uniform:4:g32", (32, 64), planes(scales=with_value(Q.planes["scales"], (3, 1), np.nan))),
        {},
        ValueError,
        "scales",
    ),
    (
        ql.PackedTensor,
        ("uniform:4:g32", (32, 64), planes(group_index=np.full(64, 2, np.int32))),
        {},
        ValueError,
        "group_index",
    ),
    (ql.PackedTensor, ("uniform:4:g32", (32, 64), planes(codes=[1])), {}, TypeError, "plane codes list"),
    (
        ql.PackedTensor,
        ("uniform:4:g32", (32, 64), planes(codes=np.asfortranarray(Q.planes["codes"]))),
        {},
        ValueError,
        "plane codes strides contiguous",
    ),
    (
        ql.PackedTensor,
        ("uniform:4:g32", (32, 64), planes(codes=torch.tensor(np.array(Q.planes["codes"])))),
        {},
        TypeError,
        "planes torch numpy one kind",
    ),
    (ql.PackedTensor, ("uniform:4:g32", (-1, 64), Q.planes), {}, ValueError, "shape -1"),
    (ql.PackedTensor, ("uniform:4:g32", 32, Q.planes), {}, TypeError, "shape 32 pair"),
    (ql.PackedTensor, ("uniform:4:g32", (32, 64), [1]), {}, TypeError, "planes list mapping"),
    (ql.PackedTensor, ("uniform:4:g32", (2**62, 2**62), Q.planes), {}, ValueError, "2^63"),
    (Q.dequantize, ("float64",), {}, TypeError, "dtype float64 float32 float16 bfloat16"),
    (Q.dequantize, (7,), {}, TypeError, "dtype int"),
    (Q.dequantize, (), {"threads": -1}, ValueError, "threads -1"),
    (Q.to, (3,), {}, TypeError, "target int"),
    (Q.to, ("gpu",), {}, ValueError, "target gpu numpy torch"),
    (Q.to, ("meta",), {}, ValueError, "target meta"),
    # files
    (ql.save_tensors, (3, {}), {}, TypeError, "path int"),
    (ql.save_tensors, ("", {}), {}, ValueError, "path name of a file"),
    (ql.save_tensors, ("a\0b", {}), {}, ValueError, "path"),
    (ql.save_tensors, ("unused", [W]), {}, TypeError, "tensors list mapping"),
    (ql.save_tensors, ("unused", {3: W}), {}, TypeError, "tensors int strings"),
    (ql.save_tensors, ("unused", {"": W}), {}, ValueError, "name"),
    (ql.save_tensors, ("unused", {"a": [1]}), {}, TypeError, "tensors['a'] list"),
    (ql.save_tensors, ("unused", {"a": T.to_sparse()}), {}, TypeError, "tensors['a'] sparse"),
    (ql.save_tensors, ("unused", {"a": Q, "a.codes": W}), {}, ValueError, "a.codes"),
    (ql.save_tensors, ("unused", {"\ud800": W}), {}, (ValueError, TypeError), ""),
    (ql.save_tensors, ("unused", {"a": W}, {"a": 1}), {}, TypeError, "metadata['a'] int string"),
    (ql.save_tensors, ("unused", {"a": W}, {1: "a"}), {}, TypeError, "metadata int strings"),
    (ql.save_tensors, ("unused", {"a": W}, ["a"]), {}, TypeError, "metadata list mapping"),
    (ql.save_tensors, ("unused", {"a": W}, {"quantloom": ""}), {}, ValueError, "metadata quantloom"),
    (ql.load_tensors, (3.5,), {}, TypeError, "path float"),
    (ql.load_tensors, ("nothing-here",), {}, FileNotFoundError, "nothing-here"),
    (ql.load_tensors, ("nothing-here", "jax"), {}, ValueError, "kind jax numpy torch"),
    (ql.load_tensors, ("nothing-here", 3), {}, TypeError, "kind int"),
    (ql.load_tensors, (__file__,), {}, ValueError, "test_bad_input.py"),
    (ql.load_metadata, ("nothing-here",), {}, FileNotFoundError, "nothing-here"),
    # products
    (ql.prepare, (W,), {}, TypeError, "q ndarray PackedTensor"),
    (ql.prepare, (Q, -1), {}, ValueError, "threads -1"),
    (ql.PreparedTensor, (Q,), {}, TypeError, "PackedTensor prepare()"),
    (ql.matmul_is_integer, (W, "int8:token"), {}, TypeError, "q ndarray PackedTensor PreparedTensor"),
    (ql.matmul_is_integer, (Q, "int8:tensor:static"), {}, ValueError, "activations static scale"),
    (ql.prepare, (Q,), {"activations": 8}, TypeError, "activations int exact"),
    (ql.LayerDistillation, (), {"rate": 0.0}, ValueError, "rate 0 number > 0"),
    (ql.parse_distillation, ("kd",), {}, ValueError, "distillation kd lkd"),
    (ql.distillation_from_json, ("{}",), {}, ValueError, "distillation"),
    (ql.matmul_is_integer, (Q, "int8:token", "int8"), {}, TypeError, "dtype int8 float16"),
    (ql.matmul, (W, W), {}, TypeError, "q ndarray PackedTensor PreparedTensor"),
    (ql.matmul, (W[:, :63], Q), {}, ValueError, "x [32, 63] [..., 64]"),
    (ql.matmul, (np.float32(1), Q), {}, TypeError, "x float32"),
    (ql.matmul, (np.array(1, np.float32), Q), {}, ValueError, "x [] [..., 64]"),
    (ql.matmul, (W.astype(np.float64), Q), {}, TypeError, "x float64 astype"),
    (ql.matmul, (W.astype(np.int8), PREPARED), {}, TypeError, "x int8"),
    (ql.matmul, ([1.0] * 64, Q), {}, TypeError, "x list"),
    (ql.matmul, (np.asfortranarray(W), Q), {}, ValueError, "x last axis"),
    (ql.matmul, (T.to("meta"), Q), {}, TypeError, "x meta"),
    (ql.matmul, (W, Q, "fast"), {}, ValueError, "activations fast exact int8"),
    (ql.matmul, (W, Q, 8), {}, TypeError, "activations int exact int8"),
    (ql.matmul, (NOT_FINITE, Q, "int8"), {}, ValueError, "x 7 33"),
    (ql.matmul, (W, Q), {"threads": "2"}, TypeError, "threads str"),
    (ql.matmul, (W, Q), {"bias": W[0]}, ValueError, "bias [64]"),
    (ql.matmul, (W, Q), {"bias": [0.0]}, TypeError, "bias list"),
    (ql.matmul, (W, Q, "int9:token"), {}, ValueError, "activations int9:token exact int8 intBITS"),
    (ql.matmul, (NOT_FINITE, Q, "int8:token"), {}, ValueError, "x token 7 input 33"),
    (ql.ActivationFormat, (9,), {}, ValueError, "bits 9 8"),
    (ql.ActivationFormat, (8, "row"), {}, ValueError, "scope row token tensor group"),
    (ql.parse_activations, ("int8",), {}, ValueError, "activations int8 intBITS:token"),
    (ql.parse_activations, (8,), {}, TypeError, "activations int ActivationFormat"),
    (ql.activations_from_json, ("{}",), {}, ValueError, "{} activations"),
    (ql.activations_from_json, (3,), {}, TypeError, "json int string"),
    (ql.quantize_activations, (NOT_FINITE, "int8:token"), {}, ValueError, "x token 7 input 33"),
    (ql.quantize_activations, (W, 8), {}, TypeError, "activations int"),
    (ql.round_activations, (W, "int8:tensor:static"), {}, ValueError, "activations static scale"),
    (ql.round_activations, ([1.0], "int8:token"), {}, TypeError, "x list"),
    (ql.quantize_rms_norm, (W, W, "int8:token"), {}, ValueError, "weight shape"),
    (ql.round_rms_norm, (W, None, "int8:token", -1.0), {}, ValueError, "epsilon -1"),
    (ql.quantize_layer_norm, (W, None, [1.0], "int8:token"), {}, TypeError, "bias list"),
    (ql.round_layer_norm, (NOT_FINITE, None, None, "int8:token"), {}, ValueError, "x token 7"),
    (ql.quantize_silu_mul, (W, W[:1], "int8:token"), {}, ValueError, "up shape gate"),
    (ql.round_silu_mul, (W, W, 8), {}, TypeError, "activations int"),
    (ql.nn.RoundedLinear, (T, "int8:token"), {}, TypeError, "linear Tensor Linear"),
    (ql.can_matmul, (W,), {}, TypeError, "format ndarray"),
    (ql.can_matmul, (Q, -1), {}, ValueError, "tokens -1"),
    (ql.can_matmul, (Q, 1, "float64"), {}, TypeError, "dtype float64 float16"),
    (ql.can_matmul, (Q, 1, None, "moon"), {}, ValueError, "device moon cuda:N"),
    (ql.can_matmul, (Q, 1, None, None, "fast"), {}, ValueError, "activations fast exact int8"),
    # layouts
    (ql.layouts.to_gptq, (W,), {}, TypeError, "q ndarray PackedTensor"),
    (ql.layouts.to_gptq, (Q, 1), {}, TypeError, "version int gptq"),
    (ql.layouts.to_gptq, (Q, "v1"), {}, ValueError, "version v1 gptq gptq_v2"),
    (ql.layouts.to_gptq, (ql.quantize(W, "uniform:5:g32"),), {}, RuntimeError, "5"),
    (ql.layouts.to_gptq, (ql.quantize(W, "uniform:4:tensor"),), {}, RuntimeError, "tensor"),
    (ql.layouts.to_gptq, (ql.quantize(W, "uniform:4:g32:f32"),), {}, RuntimeError, "float32"),
    (ql.layouts.from_gptq, ([1], 4, 32, True), {}, TypeError, "tensors list mapping"),
    (ql.layouts.from_gptq, ({"qweight": 3}, 4, 32, True), {}, TypeError, "qweight int"),
    (ql.layouts.from_gptq, (without(GPTQ_ARRAYS, "qzeros"), 4, 32, True), {}, ValueError, "qzeros"),
    (ql.layouts.from_gptq, (GPTQ_ARRAYS, 8, 32, True), {}, ValueError, "scales [2, 32]"),
    (ql.layouts.from_gptq, (GPTQ_ARRAYS, 4, 64, True), {}, ValueError, "scales"),
    (ql.layouts.from_gptq, (GPTQ_ARRAYS, 4, 32, True, "gptq_v2"), {}, ValueError, "qzeros"),
    (ql.layouts.from_gptq, (GPTQ_ARRAYS, 0, 32, True), {}, ValueError, "bits 0"),
    (ql.layouts.from_gptq, (GPTQ_ARRAYS, 4, "row", True), {}, ValueError, "group_size row"),
    (ql.layouts.from_gptq, (GPTQ_ARRAYS, 4, 32, 1), {}, TypeError, "symmetric int"),
    (
        ql.layouts.from_gptq,
        ({**GPTQ_ARRAYS, "g_idx": np.full(64, 9, np.int32)}, 4, 32, True),
        {},
        ValueError,
        "group_index 9 [0, 2)",
    ),
    (ql.layouts.to_exl3, (W,), {}, TypeError, "q ndarray PackedTensor"),
    (ql.layouts.to_exl3, (Q,), {}, RuntimeError, "EXL3 trellis uniform"),
    (ql.layouts.from_exl3, ([1],), {}, TypeError, "tensors list mapping"),
    (ql.layouts.from_exl3, ({"suh": W},), {}, ValueError, "trellis"),
    (ql.layouts.from_exl3, (EXL3_ARRAYS, (128, 129)), {}, ValueError, "k 129 1 128"),
    (ql.layouts.from_exl3, (EXL3_ARRAYS, 128), {}, TypeError, "shape 128 pair"),
    (ql.layouts.from_exl3, ({**EXL3_ARRAYS, "su": W},), {}, ValueError, "suh su"),
    (ql.layouts.read_exl3, (3,), {}, TypeError, "path int"),
    (ql.layouts.read_exl3, ("no such folder",), {}, OSError, "folder"),
    (ql.layouts.to_compressed_tensors, (None,), {}, TypeError, "q NoneType"),
    (ql.layouts.to_compressed_tensors, (ql.quantize(W, "uniform:1:g32"),), {}, RuntimeError, "zero"),
    (ql.layouts.from_compressed_tensors, (3, 4, 32, True), {}, TypeError, "tensors int"),
    (ql.layouts.from_compressed_tensors, (CT_ARRAYS, 4, 32, True), {}, ValueError, "zero_point"),
    (ql.layouts.from_compressed_tensors, (CT_ARRAYS, 4, 64, False), {}, ValueError, "weight_"),
    (ql.layouts.from_compressed_tensors, (CT_ARRAYS, 8, 32, False), {}, ValueError, "weight_"),
    (
        ql.layouts.from_compressed_tensors,
        (without(CT_ARRAYS, "weight_shape"), 4, 32, False),
        {},
        ValueError,
        "weight_shape",
    ),
    (
        ql.layouts.from_compressed_tensors,
        ({**CT_ARRAYS, "weight_shape": np.array([32, 2**40])}, 4, 32, False),
        {},
        ValueError,
        "weight_",
    ),
    # modules
    (QuantLinear, (W,), {}, TypeError, "packed ndarray PackedTensor"),
    (QuantLinear, (Q, W[0]), {}, TypeError, "bias ndarray torch"),
    (QuantLinear, (Q, torch.zeros(31)), {}, ValueError, "bias [31] [32]"),
    (QuantLinear, (Q, torch.zeros(32, dtype=torch.int32)), {}, TypeError, "bias int32 floating"),
    (QuantLinear, (Q, torch.zeros(32, device="meta")), {}, TypeError, "bias meta cpu"),
    (QuantLinear, (Q, None, "fast"), {}, ValueError, "activations fast"),
    (QuantLinear.from_linear, (torch.nn.Conv1d(1, 1, 1), "uniform:4"), {}, TypeError, "linear Conv1d Linear"),
    (QuantLinear.from_linear, (torch.nn.Linear(64, 3).double(), "uniform:4"), {}, TypeError, "w float64"),
    (LINEAR, (torch.zeros(2, 63),), {}, ValueError, "x [2, 63] 64"),
    (LINEAR, (torch.zeros(2, 64, dtype=torch.float64),), {}, TypeError, "x float64"),
    (LINEAR, (torch.zeros(2, 64, dtype=torch.int64),), {}, TypeError, "x int64"),
    (LINEAR.dequantize, (torch.float64,), {}, TypeError, "dtype float64"),
    (LINEAR.set_extra_state, (torch.zeros(3, dtype=torch.uint8),), {}, ValueError, "state"),
]


def name_of(function) -> str:
    if isinstance(function, QuantLinear):
        return "QuantLinear.forward"
    owner = getattr(function, "__self__", None)
    if isinstance(function, types.MethodType) and owner is not None:
        return f"{(owner if isinstance(owner, type) else type(owner)).__name__}.{function.__name__}"
    return function.__name__


@pytest.mark.parametrize(
    ("function", "arguments", "keywords", "error", "words"),
    TABLE,
    ids=[f"{name_of(row[0])}-{index}" for index, row in enumerate(TABLE)],
)
def test_wrong_arguments_are_refused(tmp_path, monkeypatch, function, arguments, keywords, error, words):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(error) as caught:
        function(*arguments, **keywords)
    message = str(caught.value)
    assert re.search(".*".join(re.escape(word) for word in words.split()), message, re.DOTALL), message
    assert len(message) < 600
    assert list(tmp_path.iterdir()) == []


def test_the_table_covers_every_public_function():
    covered = {name_of(row[0]) for row in TABLE}
    plain = {"build_info", "kernel_table", "format_table"}  # no arguments
    # Nothing to construct.
    classes = {"Format", "Rounding", "QuantizedActivations", "RoundingReport", "ScaleChoice", "Transform"}
    expected = {name for name in ql.__all__ if callable(getattr(ql, name))} - plain - classes
    expected |= set(ql.layouts.__all__)
    expected |= {"QuantLinear", "QuantLinear.from_linear", "QuantLinear.forward", "QuantLinear.dequantize"}
    expected |= {
        "PackedTensor.dequantize",
        "PackedTensor.to",
        "Hessian.add",
        "Hessian.from_sum",
        "Uniform.planes",
    }
    expected |= {"Recipe.parse", "Recipe.from_json"}
    assert expected <= covered, expected - covered


def test_refused_calls_leave_their_arguments_alone():
    before = W.copy(), HESSIAN.tokens, HESSIAN.sum()
    for function, arguments, keywords, _, _ in TABLE:
        if not isinstance(function, type) and function is not ql.save_tensors:
            with pytest.raises(Exception):  # noqa: B017
                function(*arguments, **keywords)
    np.testing.assert_array_equal(W, before[0])
    assert HESSIAN.tokens == before[1]
    np.testing.assert_array_equal(HESSIAN.sum(), before[2])


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_devices_that_differ_are_refused():
    on_device = Q.to("cuda")
    with pytest.raises(TypeError, match=r"hessian.*cpu.*cuda"):
        ql.quantize(T.cuda(), "uniform:4", ql.GPTQ(np.eye(T.shape[1])))
    with pytest.raises(TypeError, match=r"x.*cpu.*cuda"):
        ql.matmul(T, on_device)
    with pytest.raises(TypeError, match=r"x.*cuda.*CPU"):
        ql.matmul(T.cuda(), Q)
    with pytest.raises(TypeError, match=r"q.*cuda.*CPU"):
        ql.prepare(on_device)


@pytest.mark.skipif(torch.cuda.is_available(), reason="needs a machine without CUDA")
def test_a_missing_device_is_named():
    with pytest.raises(RuntimeError, match=r"target.*cuda.*no CUDA device"):
        Q.to("cuda")
