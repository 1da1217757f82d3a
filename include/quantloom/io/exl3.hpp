// The EXL3 checkpoint layout (exllamav3): trellis, suh, svh and a codebook's marker per linear layer.
// Pure functions between it and packed tensors of the trellis format; no bit of a code or scale changes.
#pragma once

#include <map>
#include <string>

#include "quantloom/packed_tensor.hpp"

namespace quantloom {

class Format;

// Why the layout cannot hold a format; empty if it can. It holds rotated trellises with a window of 16 and
// the codebooks 3inst, mcg and mul1, the latter two with exllamav3's own multipliers, which its kernels know
// by heart; rates of half bits with mul1 only.
std::string exl3_refusal(const Format& format);

// With N and K, n and k padded to multiples of 128: trellis int16 [K/16, N/16, 16 * bits], suh float16 [K],
// svh float16 [N], both 0 in the padding, and for mcg and mul1 a tensor of that name, int32 [], with the
// multiplier. Throws Unsupported with exl3_refusal(), or for a matrix without elements.
std::map<std::string, Tensor> to_exl3(const PackedTensor& packed);

struct Exl3Settings {
  // The matrix's own size, where that of the tensors is padded to multiples of 128; -1: that of the tensors.
  int64_t n = -1;
  int64_t k = -1;
};

// Reads those tensors, and in the place of suh and svh also the signs of the oldest files, su and sv: int16
// [K/16] and [N/16], bit i of element j set where the scale of 16 j + i is -1. Throws InvalidArgument or
// TypeMismatch naming the tensor with a wrong shape or dtype, with scales that are not finite, or with a
// multiplier that exllamav3 would not use: it decodes by its own one, whatever the file holds.
PackedTensor from_exl3(const std::map<std::string, Tensor>& tensors, const Exl3Settings& settings = {});

}  // namespace quantloom
