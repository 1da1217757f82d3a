// The uniform format once more, one weight at a time, as plainly as its description reads: what the
// encoder and decoder are compared with.
#pragma once

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <vector>

#include "quantloom/formats/uniform.hpp"

namespace quantloom::reference {

struct UniformCodes {
  std::vector<int> codes;      // [n, k]
  std::vector<float> scales;   // [rows, groups]
  std::vector<int> zeros;      // [rows, groups], asymmetric only
  std::vector<float> decoded;  // [n, k]
};

inline float stored(DType dtype, double scale) {
  const auto value = static_cast<float>(scale);
  if (dtype == DType::f16) return std::max(float_from_f16(f16_from_float(value)), std::ldexp(1.0F, -24));
  if (dtype == DType::bf16) return std::max(float_from_bf16(bf16_from_float(value)), std::ldexp(1.0F, -126));
  return std::max(value, std::ldexp(1.0F, -126));
}

// `group_of_column` [k]; `shrink` for all groups.
inline UniformCodes quantize(const std::vector<float>& w, int64_t n, int64_t k, const Uniform& format,
                             const std::vector<int32_t>& group_of_column, float shrink = 1) {
  UniformCodes result;
  const bool per_tensor = format.group_size == Uniform::kPerTensor;
  const int64_t rows = per_tensor ? 1 : n;
  const int64_t groups = per_tensor ? 1 : format.group_count(k);
  const int largest_code = (1 << format.bits) - 1;
  for (int64_t r = 0; r < rows; ++r) {
    for (int64_t g = 0; g < groups; ++g) {
      double low = 0;
      double high = 0;
      double sum = 0;
      int64_t count = 0;
      for (int64_t i = per_tensor ? 0 : r; i < (per_tensor ? n : r + 1); ++i) {
        for (int64_t c = 0; c < k; ++c) {
          if (group_of_column[c] != g) continue;
          const double value = w[i * k + c];
          low = std::min(low, value);
          high = std::max(high, value);
          sum += std::abs(value);
          ++count;
        }
      }
      float scale = format.symmetric && format.bits == 1 ? stored(format.scale_dtype, 0) : 1;
      int zero = 0;
      if (low != 0 || high != 0) {
        const double amax = std::max(-low, high);
        if (!format.symmetric) {
          scale = stored(format.scale_dtype, shrink * (high - low) / largest_code);
          zero = static_cast<int>(std::clamp(std::nearbyint(-shrink * low / scale), 0.0, 1.0 * largest_code));
        } else if (format.bits == 1) {
          scale = stored(format.scale_dtype, shrink * 2 * (sum / static_cast<double>(count)));
        } else {
          scale = stored(format.scale_dtype, shrink * 2 * amax / largest_code);
        }
      }
      result.scales.push_back(scale);
      if (!format.symmetric) result.zeros.push_back(zero);
    }
  }
  for (int64_t r = 0; r < n; ++r) {
    for (int64_t c = 0; c < k; ++c) {
      const int64_t at = per_tensor ? 0 : r * groups + group_of_column[c];
      const float scale = result.scales[at];
      const float value = w[r * k + c];
      int code = 0;
      if (format.symmetric && format.bits == 1) {
        code = value >= 0 ? 1 : 0;
        result.decoded.push_back(scale * (static_cast<float>(code) - 0.5F));
      } else {
        const int zero = format.symmetric ? 1 << (format.bits - 1) : result.zeros[at];
        const float steps = std::nearbyint(value / scale) + static_cast<float>(zero);
        code = static_cast<int>(std::clamp(steps, 0.0F, static_cast<float>(largest_code)));
        result.decoded.push_back(scale * static_cast<float>(code - zero));
      }
      result.codes.push_back(code);
    }
  }
  return result;
}

}  // namespace quantloom::reference
