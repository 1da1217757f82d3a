// Inputs and comparisons that many tests share.
#pragma once

#include <algorithm>
#include <cstring>
#include <vector>

#include "quantloom/packed_tensor.hpp"
#include "quantloom/random.hpp"

namespace quantloom::testing {

inline std::vector<float> normal_values(int64_t count, uint64_t seed) {
  const CounterRandom random(seed);
  std::vector<float> values(static_cast<size_t>(count));
  for (size_t i = 0; i < values.size(); ++i) values[i] = static_cast<float>(random.normal(i));
  return values;
}

// `entries` values that rise strictly in float16, within `spread` of 0.
inline std::vector<float> random_table(size_t entries, uint64_t seed, float spread = 1) {
  const CounterRandom random(seed);
  std::vector<float> table;
  for (uint64_t i = 0; table.size() < entries; ++i) {
    const auto value = static_cast<float>(spread * (2 * random.uniform(i) - 1));
    table.push_back(float_from_f16(f16_from_float(value)) + 0.0F);  // -0 becomes 0
    std::sort(table.begin(), table.end());
    table.erase(std::unique(table.begin(), table.end()), table.end());
  }
  return table;
}

inline std::vector<float> decoded_values(const PackedTensor& packed) {
  std::vector<float> values(static_cast<size_t>(packed.n * packed.k));
  dequantize(packed, MatrixView<float>(values.data(), packed.n, packed.k), 1);
  return values;
}

inline bool same_planes(const PackedTensor& a, const PackedTensor& b) {
  if (a.n != b.n || a.k != b.k || a.planes.size() != b.planes.size()) return false;
  for (const auto& [name, plane] : a.planes) {
    const Tensor& other = b.plane(name);
    if (plane.shape() != other.shape() || plane.dtype() != other.dtype()) return false;
    if (std::memcmp(plane.bytes(), other.bytes(), static_cast<size_t>(plane.byte_count())) != 0) return false;
  }
  return true;
}

}  // namespace quantloom::testing
