// The checkpoint layout of AQLM, which transformers loads: codes, codebooks, scales per linear layer. Pure
// functions between it and packed tensors of the format additive.
#pragma once

#include <map>
#include <string>

#include "quantloom/packed_tensor.hpp"

namespace quantloom {

class Format;

// Why the layout cannot hold a matrix [n, k] of a format; empty if it can: additive with one scale for each
// group of rows in float16, of whole blocks.
std::string aqlm_refusal(const Format& format, int64_t n, int64_t k);

// codes [n / out_group, k / in_group, codebooks], int8 for codes of up to 8 bits, else int16: unsigned
// values, wrapped; codebooks float16 [codebooks, 2^bits, out_group, in_group]; scales float16 [n / out_group,
// 1, 1, 1]; numbers that are codes into levels are written as themselves. Throws Unsupported for what
// aqlm_refusal() names.
std::map<std::string, Tensor> to_aqlm(const PackedTensor& packed);

// The packed tensor of the three arrays. Throws TypeMismatch or InvalidArgument naming the tensor with a
// wrong dtype or shape, with codes beyond the codebooks or with values that are not finite.
PackedTensor from_aqlm(const std::map<std::string, Tensor>& tensors);

}  // namespace quantloom
