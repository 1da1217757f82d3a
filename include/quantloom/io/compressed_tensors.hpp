// The compressed-tensors "pack-quantized" layout (llm-compressor, vLLM): weight_packed, weight_scale,
// weight_shape, and weight_zero_point if asymmetric. Pure functions between it and uniform packed tensors
// of 1 to 8 bits.
#pragma once

#include <map>
#include <string>

#include "quantloom/packed_tensor.hpp"

namespace quantloom {

// weight_packed int32 [n, ceil(k*bits/32)], weight_scale [n, G] ([1] per tensor), weight_shape int64 [2],
// weight_zero_point int32 [ceil(n*bits/32), G], weight_g_idx int32 [k] if the groups are not consecutive.
// Throws Unsupported for 1 bit symmetric, whose zero point is no integer.
std::map<std::string, Tensor> to_compressed_tensors(const PackedTensor& packed);

struct CompressedTensorsSettings {
  int bits = 4;
  int64_t group_size = 128;  // > 0, Uniform::kPerChannel or Uniform::kPerTensor
  bool symmetric = true;
};

// Accepts both layouts of widths that do not divide 32 (padded words and the dense stream), told apart by
// the number of columns, and int32 or int64 weight_shape. Throws InvalidArgument naming the tensor.
PackedTensor from_compressed_tensors(const std::map<std::string, Tensor>& tensors,
                                     const CompressedTensorsSettings& settings);

}  // namespace quantloom
