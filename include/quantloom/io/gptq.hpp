// The GPTQ checkpoint layout (AutoGPTQ, GPTQModel): qweight, qzeros, scales, g_idx per linear layer.
// Pure functions between it and uniform packed tensors, for 2, 3, 4 and 8 bits.
#pragma once

#include <map>
#include <string>

#include "quantloom/packed_tensor.hpp"

namespace quantloom {

// How zero points are stored: v1 ("gptq") stores z - 1, v2 ("gptq_v2") stores z.
enum class GptqVersion : uint8_t { v1 = 1, v2 = 2 };

// qweight int32 [k*bits/32, n], qzeros int32 [G, n*bits/32], scales float16|bfloat16 [G, n], g_idx int32 [k].
// Throws Unsupported for formats the layout cannot hold: other widths, n or k not a multiple of 32, per
// tensor, float32 scales, and in v1 any zero point 0, which readers decode differently.
std::map<std::string, Tensor> to_gptq(const PackedTensor& packed, GptqVersion version);

struct GptqSettings {
  int bits = 4;
  int64_t group_size = 128;  // -1: one group
  bool symmetric = true;
  GptqVersion version = GptqVersion::v1;
};

// Throws InvalidArgument naming the tensor whose shape, dtype or values contradict the settings:
// among others zeros of a symmetric file that fit the other version (a mislabelled file), and v1
// zeros that wrap.
PackedTensor from_gptq(const std::map<std::string, Tensor>& tensors, const GptqSettings& settings);

}  // namespace quantloom
