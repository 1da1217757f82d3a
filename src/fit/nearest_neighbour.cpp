#include <algorithm>
#include <bit>
#include <cmath>

#include "fit/codebook_checks.hpp"
#include "fit/nearest_search.hpp"
#include "quantloom/checked_math.hpp"
#include "quantloom/parallel.hpp"

namespace quantloom {
namespace {

constexpr int64_t kChunkRows = 4096;

// The power of two that brings `largest` to [1, 4), or as close as a normal float32 can.
float scale_factor(float largest) {
  int exponent = 0;
  static_cast<void>(std::frexp(largest, &exponent));
  return std::ldexp(1.0F, std::clamp(1 - exponent, -126, 120));
}

}  // namespace

void nearest_neighbour(MatrixView<const float> x, MatrixView<const float> centroids, std::span<int32_t> codes,
                       int threads) {
  using fit::kBlockEntries;
  fit::require_dims(x.cols(), "x");
  fit::require_codebook(centroids, x.cols(), "centroids");
  if (static_cast<int64_t>(codes.size()) != x.rows()) {
    throw InvalidArgument("codes", text_of(codes.size(), " of them"), text_of(x.rows()));
  }
  const float largest =
      std::max(fit::largest_magnitude(x, "x", threads), fit::largest_magnitude(centroids, "centroids", 1));
  fit::SearchJob job;
  job.x = x;
  job.centroids = centroids;
  job.codes = codes.data();
  job.dims = static_cast<int>(std::bit_ceil(static_cast<uint64_t>(x.cols())));
  job.blocks = ceil_div(centroids.rows(), kBlockEntries);
  job.factor = scale_factor(largest);
  const int64_t block_values = (job.dims + 1) * kBlockEntries;
  std::vector<float> table(static_cast<size_t>(checked_mul(job.blocks, block_values)));
  for (int64_t entry = 0; entry < job.blocks * kBlockEntries; ++entry) {
    float* const at = table.data() + entry / kBlockEntries * block_values + entry % kBlockEntries;
    if (entry >= centroids.rows()) {
      at[0] = 1e38F;
      continue;
    }
    double norm = 0;
    for (int64_t j = 0; j < x.cols(); ++j) {
      const float value = centroids(entry, j) * job.factor;
      norm += static_cast<double>(value) * static_cast<double>(value);
      at[(j + 1) * kBlockEntries] = -2 * value;
    }
    at[0] = static_cast<float>(norm);
  }
  job.table = table.data();
  parallel_for(ceil_div(x.rows(), kChunkRows), threads, [&](int64_t chunk) {
    fit::search_rows(job, chunk * kChunkRows, std::min(x.rows(), (chunk + 1) * kChunkRows));
  });
}

}  // namespace quantloom
