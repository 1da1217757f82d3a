// Random valid uniform packed tensors, made from their planes, so that every code and zero point occurs.
#pragma once

#include "quantloom/formats/bit_packing.hpp"
#include "quantloom/formats/uniform.hpp"
#include "quantloom/random.hpp"

namespace quantloom::test {

// Codes (and zero points, at least `smallest_zero`) are uniform over their range. `permuted`: a group_index
// in which groups of full size are spread over the columns.
inline PackedTensor random_uniform(std::shared_ptr<const Uniform> format, int64_t n, int64_t k, uint64_t seed,
                                   int smallest_zero = 0, bool permuted = false) {
  const CounterRandom random(seed);
  uint64_t counter = 0;
  PackedTensor packed{format, n, k, {}};
  for (const PlaneSpec& spec : format->planes(n, k)) {
    if (spec.optional && !permuted) continue;
    Tensor plane(spec.dtype, spec.shape);
    if (spec.name == "codes" || spec.name == "zeros") {
      const int least = spec.name == "zeros" ? smallest_zero : 0;
      const int64_t fields = spec.name == "codes" ? k : (format->group_size == Uniform::kPerTensor ? 1 : n);
      std::vector<uint8_t> values(static_cast<size_t>(fields));
      for (int64_t row = 0; row < spec.shape[0]; ++row) {
        for (uint8_t& value : values) {
          value = static_cast<uint8_t>(
              least + static_cast<int>(random.below(counter++, (1U << format->bits) - least)));
        }
        pack_bits(values, format->bits,
                  plane.values<uint32_t>().subspan(static_cast<size_t>(row * spec.shape[1]),
                                                   static_cast<size_t>(spec.shape[1])));
      }
    } else if (spec.name == "scales") {
      for (int64_t i = 0; i < plane.element_count(); ++i) {
        const auto scale = static_cast<float>(0.01 + random.uniform(counter++));
        if (spec.dtype == DType::f16) plane.values<uint16_t>()[i] = f16_from_float(scale);
        if (spec.dtype == DType::bf16) plane.values<uint16_t>()[i] = bf16_from_float(scale);
        if (spec.dtype == DType::f32) plane.values<float>()[i] = scale;
      }
    } else {
      const int64_t groups = format->group_count(k);
      for (int64_t i = 0; i < k; ++i)
        plane.values<int32_t>()[i] = static_cast<int32_t>(groups - 1 - i % groups);
    }
    packed.planes.emplace(spec.name, plane);
  }
  validate(packed);
  return packed;
}

}  // namespace quantloom::test
