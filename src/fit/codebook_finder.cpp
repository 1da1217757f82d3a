#include "fit/codebook_finder.hpp"

#include <algorithm>
#include <bit>
#include <cmath>

#include "quantloom/checked_math.hpp"

namespace quantloom::fit {
namespace {

// The power of two that brings `largest` to [1, 4), or as close as a normal float32 can.
float scale_factor(float largest) {
  int exponent = 0;
  static_cast<void>(std::frexp(largest, &exponent));
  return std::ldexp(1.0F, std::clamp(1 - exponent, -126, 120));
}

}  // namespace

CodebookFinder::CodebookFinder(MatrixView<const float> centroids, float largest) {
  job_.centroids = centroids;
  job_.dims = static_cast<int>(std::bit_ceil(static_cast<uint64_t>(centroids.cols())));
  job_.blocks = ceil_div(centroids.rows(), kBlockEntries);
  job_.factor = scale_factor(largest);
  const int64_t block_values = (job_.dims + 1) * kBlockEntries;
  table_.resize(static_cast<size_t>(checked_mul(job_.blocks, block_values)));
  for (int64_t entry = 0; entry < job_.blocks * kBlockEntries; ++entry) {
    float* const at = table_.data() + entry / kBlockEntries * block_values + entry % kBlockEntries;
    if (entry >= centroids.rows()) {
      at[0] = 1e38F;
      continue;
    }
    double norm = 0;
    for (int64_t j = 0; j < centroids.cols(); ++j) {
      const float value = centroids(entry, j) * job_.factor;
      norm += static_cast<double>(value) * static_cast<double>(value);
      at[(j + 1) * kBlockEntries] = -2 * value;
    }
    at[0] = static_cast<float>(norm);
  }
}

void CodebookFinder::find(MatrixView<const float> x, int64_t first, int64_t last, int32_t* codes) const {
  SearchJob job = job_;
  job.table = table_.data();
  job.x = x;
  job.codes = codes;
  search_rows(job, first, last);
}

}  // namespace quantloom::fit
