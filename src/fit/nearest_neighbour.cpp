#include <algorithm>

#include "fit/codebook_checks.hpp"
#include "fit/codebook_finder.hpp"
#include "quantloom/checked_math.hpp"
#include "quantloom/parallel.hpp"

namespace quantloom {

void nearest_neighbour(MatrixView<const float> x, MatrixView<const float> centroids, std::span<int32_t> codes,
                       int threads) {
  constexpr int64_t kChunkRows = 4096;
  fit::require_dims(x.cols(), "x");
  fit::require_codebook(centroids, x.cols(), "centroids");
  if (static_cast<int64_t>(codes.size()) != x.rows()) {
    throw InvalidArgument("codes", text_of(codes.size(), " of them"), text_of(x.rows()));
  }
  const float largest =
      std::max(fit::largest_magnitude(x, "x", threads), fit::largest_magnitude(centroids, "centroids", 1));
  const fit::CodebookFinder finder(centroids, largest);
  parallel_for(ceil_div(x.rows(), kChunkRows), threads, [&](int64_t chunk) {
    finder.find(x, chunk * kChunkRows, std::min(x.rows(), (chunk + 1) * kChunkRows), codes.data());
  });
}

}  // namespace quantloom
