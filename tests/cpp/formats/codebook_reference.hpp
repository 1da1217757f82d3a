// The codebook format once more, one weight at a time, as plainly as its description reads: what the
// encoder and decoder are compared with.
#pragma once

#include <cmath>
#include <cstdint>
#include <vector>

#include "formats/uniform_reference.hpp"
#include "quantloom/formats/codebook.hpp"

namespace quantloom::reference {

struct CodebookCodes {
  std::vector<int> codes;      // [n, k]
  std::vector<float> scales;   // [rows, groups]
  std::vector<float> decoded;  // [n, k]
};

// `group_of_column` [k]; `shrink` for all groups.
inline CodebookCodes quantize(const std::vector<float>& w, int64_t n, int64_t k, const Codebook& format,
                              const std::vector<int32_t>& group_of_column, float shrink = 1) {
  CodebookCodes result;
  const bool per_tensor = format.group_size == Codebook::kPerTensor;
  const int64_t groups = per_tensor ? 1 : format.group_count(k);
  double largest_entry = 0;
  bool has_zero = false;
  for (const float entry : format.table) {
    largest_entry = std::max(largest_entry, std::abs(static_cast<double>(entry)));
    has_zero = has_zero || entry == 0;
  }
  for (int64_t r = 0; r < (per_tensor ? 1 : n); ++r) {
    for (int64_t g = 0; g < groups; ++g) {
      double amax = 0;
      for (int64_t i = per_tensor ? 0 : r; i < (per_tensor ? n : r + 1); ++i) {
        for (int64_t c = 0; c < k; ++c) {
          if (group_of_column[c] == g) amax = std::max(amax, std::abs(static_cast<double>(w[i * k + c])));
        }
      }
      float scale = has_zero ? 1 : stored(format.scale_dtype, 0);
      if (amax > 0) scale = stored(format.scale_dtype, shrink * amax / largest_entry);
      result.scales.push_back(scale);
    }
  }
  for (int64_t r = 0; r < n; ++r) {
    for (int64_t c = 0; c < k; ++c) {
      const float scale = result.scales[per_tensor ? 0 : r * groups + group_of_column[c]];
      const double value = w[r * k + c] / scale;  // in float32, then exact
      int code = 0;
      for (size_t i = 1; i < format.table.size(); ++i) {
        const double below = format.table[i - 1];
        const double above = format.table[i];
        if (value > static_cast<double>(static_cast<float>((below + above) / 2))) code = static_cast<int>(i);
      }
      result.codes.push_back(code);
      result.decoded.push_back(scale * format.table[code]);
    }
  }
  return result;
}

}  // namespace quantloom::reference
