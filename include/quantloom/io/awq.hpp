// The "gemm" checkpoint layout of AutoAWQ: qweight, qzeros, scales per linear layer, 4 bits.
// Pure functions between it and uniform packed tensors.
#pragma once

#include <map>
#include <string>

#include "quantloom/packed_tensor.hpp"

namespace quantloom {

// qweight int32 [k, n/8] and qzeros int32 [G, n/8]: eight fields of consecutive outputs in a word, in the
// order 0, 2, 4, 6, 1, 3, 5, 7 from the lowest bits; scales float16 [G, n]. Zero points are stored as they
// are. Symmetric tensors get the constant zero point 8.
//
// Throws Unsupported for what the layout cannot hold: other widths than 4 bits, scales that are not float16,
// one scale per tensor, n not a multiple of 8, groups that do not divide k, groups of permuted columns.
std::map<std::string, Tensor> to_awq(const PackedTensor& packed);

// The asymmetric uniform tensor of the three arrays; group_size -1: one group. Throws TypeMismatch or
// InvalidArgument naming the tensor with a wrong dtype or shape.
PackedTensor from_awq(const std::map<std::string, Tensor>& tensors, int64_t group_size);

}  // namespace quantloom
