#include "fit/codebook_checks.hpp"

#include <algorithm>
#include <cmath>
#include <vector>

#include "quantloom/checked_math.hpp"
#include "quantloom/parallel.hpp"

namespace quantloom::fit {

void require_dims(int64_t d, const std::string& argument) {
  if (d < 1 || d > kMaxCodebookDims) {
    throw InvalidArgument(argument, text_of("vectors of ", d, " dimensions"),
                          text_of("1 to ", kMaxCodebookDims));
  }
}

void require_codebook(MatrixView<const float> centroids, int64_t d, const std::string& argument) {
  if (centroids.cols() != d) {
    throw InvalidArgument(argument, text_of("vectors of ", centroids.cols(), " dimensions"),
                          text_of(d, ", as x has"));
  }
  if (centroids.rows() < 1 || centroids.rows() > kMaxCodebookEntries) {
    throw InvalidArgument(argument, text_of(centroids.rows(), " vectors"),
                          text_of("1 to ", kMaxCodebookEntries));
  }
}

void require_options(int64_t count, const KMeansOptions& options) {
  if (count < 1 || count > kMaxCodebookEntries) {
    throw InvalidArgument("count", text_of(count), text_of("1 to ", kMaxCodebookEntries, " centroids"));
  }
  if (!(options.threshold >= 0 && options.threshold <= 1)) {
    throw InvalidArgument("threshold", text_of(options.threshold), "a fraction in [0, 1]");
  }
  if (options.max_sweeps < 0) throw InvalidArgument("max_sweeps", text_of(options.max_sweeps), "0 or more");
}

float largest_magnitude(MatrixView<const float> values, const std::string& argument, int threads) {
  constexpr int64_t kRows = 4096;
  std::vector<float> largest(static_cast<size_t>(ceil_div(values.rows(), kRows)));
  parallel_for(static_cast<int64_t>(largest.size()), threads, [&](int64_t chunk) {
    float most = 0;
    for (int64_t r = chunk * kRows; r < std::min(values.rows(), (chunk + 1) * kRows); ++r) {
      for (int64_t j = 0; j < values.cols(); ++j) {
        const float magnitude = std::abs(values(r, j));
        if (!std::isfinite(magnitude)) {
          throw NumericError(text_of(argument, ": got ", values(r, j), " at row ", r, ", column ", j,
                                     ", expected finite numbers"));
        }
        most = std::max(most, magnitude);
      }
    }
    largest[static_cast<size_t>(chunk)] = most;
  });
  return largest.empty() ? 0 : *std::max_element(largest.begin(), largest.end());
}

float largest_weight(std::span<const float> weights, int64_t rows, int threads) {
  if (weights.empty()) return 1;
  if (static_cast<int64_t>(weights.size()) != rows) {
    throw InvalidArgument("weights", text_of(weights.size(), " of them"),
                          text_of("one for each of the ", rows, " rows"));
  }
  const float largest = largest_magnitude({weights.data(), rows, 1}, "weights", threads);
  for (size_t i = 0; i < weights.size(); ++i) {
    if (weights[i] < 0) {
      throw InvalidArgument("weights", text_of(weights[i], " at index ", i), "numbers >= 0");
    }
  }
  return largest;
}

}  // namespace quantloom::fit
