// Drives column encoders as a rounding does, and looks into the planes that they give.
#pragma once

#include <algorithm>
#include <vector>

#include "quantloom/formats/bit_packing.hpp"
#include "quantloom/formats/grouped.hpp"
#include "test_matrices.hpp"

namespace quantloom::testing {

inline std::vector<int32_t> consecutive_groups(const GroupedFormat& format, int64_t k) {
  std::vector<int32_t> groups(static_cast<size_t>(k));
  for (int64_t c = 0; c < k; ++c) groups[c] = static_cast<int32_t>(c / format.columns_per_group(k));
  return groups;
}

// Columns in a random order, cut into groups.
inline std::vector<int32_t> shuffled_groups(const GroupedFormat& format, int64_t k, uint64_t seed) {
  auto groups = consecutive_groups(format, k);
  const CounterRandom random(seed);
  for (int64_t c = k - 1; c > 0; --c) std::swap(groups[c], groups[random.below(c, c + 1)]);
  return groups;
}

struct Encoded {
  PackedTensor packed;
  std::vector<float> decoded;  // [n, k]
};

// Drives the encoder: fits each group and encodes each column for rows cut at multiples of `slab`.
inline Encoded encode(const std::shared_ptr<const Format>& format, const std::vector<float>& w, int64_t n,
                      int64_t k, const std::vector<int32_t>& groups, bool pass_groups, int64_t slab,
                      float shrink) {
  std::vector<float> columns(w.size());
  for (int64_t r = 0; r < n; ++r) {
    for (int64_t c = 0; c < k; ++c) columns[c * n + r] = w[r * k + c];
  }
  std::vector<float> decoded_columns(w.size());
  const auto encoder = format->column_encoder(format, n, k, pass_groups ? groups : std::vector<int32_t>{});
  if (encoder->parameters_span_rows()) slab = std::max<int64_t>(n, 1);
  for (int64_t first = 0; first < n; first += slab) {
    const int64_t rows = std::min(slab, n - first);
    const std::vector<float> factors(static_cast<size_t>(rows), shrink);
    for (int64_t g = 0; g < encoder->group_count(); ++g) {
      std::vector<float> members;
      for (int64_t c = 0; c < k; ++c) {
        if (groups[c] != g) continue;
        const float* column = columns.data() + c * n + first;
        members.insert(members.end(), column, column + rows);
      }
      const auto count = static_cast<int64_t>(members.size()) / rows;
      encoder->fit(g, first, MatrixView<const float>(members.data(), count, rows),
                   shrink == 1 ? std::span<const float>{} : factors);
    }
    for (int64_t c = k - 1; c >= 0; --c) {  // any order will do
      encoder->encode(c, first, MatrixView<const float>(columns.data() + c * n + first, 1, rows, n),
                      MatrixView<float>(decoded_columns.data() + c * n + first, 1, rows, n));
    }
  }
  Encoded result{encoder->finish(1), std::vector<float>(w.size())};
  for (int64_t r = 0; r < n; ++r) {
    for (int64_t c = 0; c < k; ++c) result.decoded[r * k + c] = decoded_columns[c * n + r];
  }
  return result;
}

inline int code_at(const Tensor& plane, int bits, int64_t row, int64_t index) {
  uint8_t code = 0;
  const int64_t words = plane.shape()[1];
  unpack_bits(plane.values<uint32_t>().subspan(static_cast<size_t>(row * words), static_cast<size_t>(words)),
              bits, index, {&code, 1});
  return code;
}

inline float scale_at(const Tensor& plane, int64_t index) {
  if (plane.dtype() == DType::f32) return plane.values<float>()[index];
  const uint16_t bits = plane.values<uint16_t>()[index];
  return plane.dtype() == DType::f16 ? float_from_f16(bits) : float_from_bf16(bits);
}

}  // namespace quantloom::testing
