// The format spqr once more, one number at a time: what the encoder and decoder are compared with.
#pragma once

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <vector>

#include "quantloom/formats/spqr.hpp"

namespace quantloom::reference {

inline float half(double value) {
  return float_from_f16(f16_from_float(static_cast<float>(value)));
}

struct SpqrGrid {
  float step;
  float zero;
  float at(int code) const { return step * (static_cast<float>(code) - zero); }
  int nearest(float value, int levels) const {
    return static_cast<int>(
        std::clamp(std::nearbyint(value / step + zero), 0.0F, static_cast<float>(levels)));
  }
};

inline SpqrGrid spqr_grid(const std::vector<float>& wanted, int levels) {
  const double low = *std::min_element(wanted.begin(), wanted.end());
  const double high = *std::max_element(wanted.begin(), wanted.end());
  const double finest = std::max(std::max(std::abs(low), std::abs(high)) / 1024, std::ldexp(1.0, -24));
  const float step = half(std::max((high - low) / levels, finest));
  return {step, half(-low / step)};
}

struct SpqrCodes {
  std::vector<int> codes;      // [n, k]
  std::vector<int> scales;     // [groups, n]
  std::vector<int> zeros;      // [groups, n]
  std::vector<float> grids;    // [groups, blocks, 4]: step and zero of scales, of zero points
  std::vector<float> decoded;  // [n, k]
};

// `column_weights` [k]: if not empty, codes of scales and zero points are searched among all there are.
inline SpqrCodes quantize_spqr(const std::vector<float>& w, int64_t n, int64_t k, const Spqr& format,
                               const std::vector<int32_t>& group_of_column, float shrink = 1,
                               const std::vector<float>& column_weights = {}) {
  SpqrCodes result;
  const int levels = (1 << format.bits) - 1;
  const int scale_levels = (1 << format.scale_bits) - 1;
  const int zero_levels = (1 << format.zero_bits) - 1;
  const int64_t groups = format.group_count(k);
  result.scales.resize(static_cast<size_t>(groups * n));
  result.zeros.resize(result.scales.size());
  std::vector<float> scale(result.scales.size());
  std::vector<float> zero(result.scales.size());
  const auto code_of = [&](float value, float s, float z) {
    const float steps = value / s + z;
    return steps > 0 ? static_cast<int>(std::nearbyint(std::min(steps, static_cast<float>(levels)))) : 0;
  };
  for (int64_t g = 0; g < groups; ++g) {
    for (int64_t first = 0; first < n; first += format.block) {
      const int64_t last = std::min(n, first + std::min(n, format.block));
      std::vector<double> middle;
      std::vector<float> wanted;
      for (int64_t r = first; r < last; ++r) {
        double low = INFINITY;
        double high = -INFINITY;
        for (int64_t c = 0; c < k; ++c) {
          if (group_of_column[c] != g) continue;
          low = std::min(low, double{w[r * k + c]});
          high = std::max(high, double{w[r * k + c]});
        }
        middle.push_back((low + high) / 2);
        const double range = shrink * (high - low);
        wanted.push_back(static_cast<float>(std::max(range, std::abs(middle.back()) / 1.5) / levels));
      }
      const SpqrGrid scales = spqr_grid(wanted, scale_levels);
      for (int64_t r = first; r < last; ++r) {
        const int code = scales.nearest(wanted[r - first], scale_levels);
        result.scales[g * n + r] = code;
        scale[g * n + r] = scales.at(code);
      }
      for (int64_t r = first; r < last; ++r) {
        const float s = scale[g * n + r];
        const double shift = s > 0 ? middle[r - first] / s : 0;
        wanted[r - first] = static_cast<float>(levels / 2.0 - std::clamp(shift, -1.5 * levels, 1.5 * levels));
      }
      const SpqrGrid zeros = spqr_grid(wanted, zero_levels);
      for (int64_t r = first; r < last; ++r) {
        const int code = zeros.nearest(wanted[r - first], zero_levels);
        result.zeros[g * n + r] = code;
        zero[g * n + r] = zeros.at(code);
      }
      for (const float number : {scales.step, scales.zero, zeros.step, zeros.zero}) {
        result.grids.push_back(number);
      }
      if (column_weights.empty()) continue;
      for (int64_t r = first; r < last; ++r) {
        float least = INFINITY;
        for (int s = 0; s <= scale_levels; ++s) {
          for (int z = 0; z <= zero_levels; ++z) {
            const float own_scale = scales.at(s);
            const float own_zero = zeros.at(z);
            float error = 0;
            for (int64_t c = 0; c < k; ++c) {
              if (group_of_column[c] != g) continue;
              const float inverse = own_scale > 0 ? 1 / own_scale : 0;
              const float steps =
                  std::clamp(w[r * k + c] * inverse + own_zero, 0.0F, static_cast<float>(levels));
              const float missing = own_scale * (std::nearbyint(steps) - own_zero) - w[r * k + c];
              error += column_weights[c] * (missing * missing);
            }
            if (!(error < least)) continue;
            least = error;
            result.scales[g * n + r] = s;
            result.zeros[g * n + r] = z;
            scale[g * n + r] = own_scale;
            zero[g * n + r] = own_zero;
          }
        }
      }
    }
  }
  for (int64_t r = 0; r < n; ++r) {
    for (int64_t c = 0; c < k; ++c) {
      const int64_t at = group_of_column[c] * n + r;
      const int code = code_of(w[r * k + c], scale[at], zero[at]);
      result.codes.push_back(code);
      result.decoded.push_back(scale[at] * (static_cast<float>(code) - zero[at]));
    }
  }
  return result;
}

}  // namespace quantloom::reference
