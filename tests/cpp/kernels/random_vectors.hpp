// Random packed tensors of vector codebooks: planes drawn directly, so that no rounding is involved.
#pragma once

#include "kernels/random_packed.hpp"
#include "quantloom/formats/vector_codebook.hpp"

namespace quantloom::testing {

// Codes at random, scales in [0.01, 0.02), tables of normal values.
inline PackedTensor random_vectors(int64_t n, int64_t k, const VectorCodebook& format, uint64_t seed) {
  const CounterRandom random(seed);
  uint64_t at = 0;
  PackedTensor packed{std::make_shared<const VectorCodebook>(format), n, k, {}};
  for (const PlaneSpec& spec : format.planes(n, k)) {
    Tensor plane(spec.dtype, spec.shape);
    if (spec.name == "codes") {
      std::vector<uint16_t> codes(static_cast<size_t>(format.code_count(k)));
      const auto words = static_cast<size_t>(spec.shape[1]);
      for (int64_t r = 0; r < n; ++r) {
        for (uint16_t& code : codes) {
          code = static_cast<uint16_t>(random.below(at++, static_cast<uint64_t>(format.entries)));
        }
        pack_wide_bits(codes, format.bits,
                       plane.values<uint32_t>().subspan(static_cast<size_t>(r) * words, words));
      }
    } else if (spec.name == "scales") {
      for (int64_t i = 0; i < plane.element_count(); ++i) {
        store_scale(plane, i, static_cast<float>(0.01 + 0.01 * random.uniform(at++)));
      }
    } else {
      for (uint16_t& value : plane.values<uint16_t>()) {
        value = f16_from_float(static_cast<float>(random.normal(at++)));
      }
    }
    packed.planes.emplace(spec.name, std::move(plane));
  }
  return packed;
}

}  // namespace quantloom::testing
