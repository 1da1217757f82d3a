// The column encoder of the format "additive".
#pragma once

#include "quantloom/formats/additive.hpp"

namespace quantloom {

// `self` owns `format`, which has tables.
std::unique_ptr<ColumnEncoder> make_additive_encoder(std::shared_ptr<const Format> self,
                                                     const Additive& format, int64_t n, int64_t k);

// Levels for the scales of a matrix whose scales are stored as codes into them: [N, 2^scale_bits].
std::vector<float> fit_scale_levels(const Additive& format, const FloatMatrix& w, int threads);

// What a matrix is stored as, in memory. Numbers that are stored as codes into levels are those levels.
struct AdditiveParts {
  std::vector<float> tables;    // [codebooks, entries, out_group, in_group], float16 values
  std::vector<float> scales;    // [N, S], values of the scale dtype
  std::vector<uint16_t> codes;  // [N, V, codebooks]
};

// `packed` is valid, on the CPU, and of this format.
AdditiveParts unpack_additive(const Additive& format, const PackedTensor& packed);
PackedTensor pack_additive(const Additive& format, const AdditiveParts& parts, int64_t n, int64_t k,
                           int threads);

}  // namespace quantloom
