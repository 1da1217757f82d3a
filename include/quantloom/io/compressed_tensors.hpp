// The compressed-tensors "pack-quantized" layout (llm-compressor, vLLM): weight_packed, weight_scale,
// weight_shape, and weight_zero_point if asymmetric. Pure functions between it and uniform packed tensors
// of 1 to 8 bits.
#pragma once

#include <map>
#include <string>

#include "quantloom/packed_tensor.hpp"

namespace quantloom {

// weight_packed int32 [n, ceil(k*bits/32)], weight_scale [n, G] ([1] per tensor), weight_shape int64 [2],
// weight_zero_point int32 [ceil(n*bits/32), G] (int8 [1] per tensor), weight_g_idx int32 [k] if the groups
// are not consecutive. Throws Unsupported for 1 bit symmetric, whose zero point is no integer, and for a
// group size that does not divide k.
std::map<std::string, Tensor> to_compressed_tensors(const PackedTensor& packed);

// How widths that do not divide 32 lie in words: floor(32 / bits) fields per word, as files before June 2026
// have them, or one dense stream. `detect` goes by the number of columns; for a few small sizes both have
// the same, then by bits that only one of them sets.
enum class WordPadding : uint8_t { detect, dense, padded };

struct CompressedTensorsSettings {
  int bits = 4;
  int64_t group_size = 128;  // > 0, Uniform::kPerChannel or Uniform::kPerTensor
  bool symmetric = true;
  WordPadding padding = WordPadding::detect;
};

// Accepts int32 or int64 weight_shape, and zero points in a symmetric file if they are all 0. Throws
// InvalidArgument or TypeMismatch naming the tensor, also if its padding cannot be detected.
PackedTensor from_compressed_tensors(const std::map<std::string, Tensor>& tensors,
                                     const CompressedTensorsSettings& settings);

}  // namespace quantloom
