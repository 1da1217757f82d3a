#include "quantloom/fit/kmeans.hpp"

#include <algorithm>
#include <cmath>
#include <numeric>

#include "fit/codebook_checks.hpp"
#include "fit/codebook_start.hpp"
#include "fit/fixed_point.hpp"
#include "fit/nearest_search.hpp"
#include "quantloom/checked_math.hpp"
#include "quantloom/parallel.hpp"

namespace quantloom {
namespace {

using fit::FixedSum;

constexpr int64_t kChunkRows = 4096;

std::vector<float> gather_rows(MatrixView<const float> x, const std::vector<int64_t>& rows) {
  std::vector<float> gathered;
  gathered.reserve(rows.size() * static_cast<size_t>(x.cols()));
  for (const int64_t row : rows) gathered.insert(gathered.end(), x.row(row), x.row(row) + x.cols());
  return gathered;
}

// Everything about the sample and its options was checked.
std::vector<float> make_start(MatrixView<const float> x, int64_t count, const KMeansOptions& options,
                              std::span<const float> weights) {
  if (options.start == CodebookStart::given) {
    std::vector<float> centroids;
    for (int64_t i = 0; i < count; ++i) {
      const float* const row = options.centroids.row(i);
      centroids.insert(centroids.end(), row, row + x.cols());
    }
    return centroids;
  }
  const std::vector<int64_t> rows = fit::start_rows(x.rows(), count, options);
  if (rows.empty()) return fit::start_from(x, weights, count, options);
  const std::vector<float> gathered = gather_rows(x, rows);
  std::vector<float> gathered_weights;
  for (const int64_t row : rows) {
    if (!weights.empty()) gathered_weights.push_back(weights[static_cast<size_t>(row)]);
  }
  return fit::start_from({gathered.data(), static_cast<int64_t>(rows.size()), x.cols()}, gathered_weights,
                         count, options);
}

void require_arguments(MatrixView<const float> x, int64_t count, const KMeansOptions& options) {
  fit::require_options(count, options);
  fit::require_dims(x.cols(), "x");
  if (x.rows() > (int64_t{1} << 31)) {
    throw InvalidArgument("x", text_of(x.rows(), " rows"), "at most 2^31");
  }
  if (options.start == CodebookStart::given) {
    fit::require_codebook(options.centroids, x.cols(), "centroids");
    if (options.centroids.rows() != count) {
      throw InvalidArgument("centroids", text_of(options.centroids.rows(), " vectors"), text_of(count));
    }
  } else if (x.rows() == 0) {
    throw InvalidArgument("x", "no rows", "at least one");
  }
}

// Sums of rows by their code, and the centroids that follow.
class CentroidUpdate {
 public:
  CentroidUpdate(MatrixView<const float> x, std::span<const float> weights, int64_t count, float largest,
                 float most_weight, int threads)
      : x_(x),
        weights_(weights),
        count_(count),
        weight_power_(std::ldexp(1.0, fit::fixed_exponent(most_weight))),
        value_power_(std::ldexp(
            1.0, fit::fixed_exponent(static_cast<double>(largest) * static_cast<double>(most_weight)))),
        threads_(threads) {}

  // Moves each centroid to the mean of its rows. Those without weight stay, and are listed.
  std::vector<int64_t> apply(std::span<const int32_t> codes, std::vector<float>& centroids) {
    add_up(codes);
    const int64_t d = x_.cols();
    std::vector<int64_t> empty;
    for (int64_t entry = 0; entry < count_; ++entry) {
      const FixedSum* const sums = sums_.data() + entry * (d + 1);
      const double weight = sums[d].value() / weight_power_;
      if (!(weight > 0)) {
        empty.push_back(entry);
        continue;
      }
      for (int64_t j = 0; j < d; ++j) {
        centroids[static_cast<size_t>(entry * d + j)] =
            static_cast<float>(sums[j].value() / value_power_ / weight);
      }
    }
    return empty;
  }

 private:
  void add_up(std::span<const int32_t> codes) {
    const int64_t d = x_.cols();
    const int64_t sum_count = count_ * (d + 1);
    // The sums are of integers: any split into parts gives the same.
    const int64_t parts = std::clamp<int64_t>(
        std::min<int64_t>(resolve_threads(threads_), x_.rows() / (8 * count_ + kChunkRows)), 1, 64);
    std::vector<FixedSum> partial(static_cast<size_t>(parts * sum_count));
    const int64_t part_rows = ceil_div(x_.rows(), parts);
    parallel_for(parts, threads_, [&](int64_t part) {
      FixedSum* const all = partial.data() + part * sum_count;
      for (int64_t r = part * part_rows; r < std::min(x_.rows(), (part + 1) * part_rows); ++r) {
        FixedSum* const sums = all + codes[static_cast<size_t>(r)] * (d + 1);
        const double weight = weights_.empty() ? 1.0 : static_cast<double>(weights_[static_cast<size_t>(r)]);
        for (int64_t j = 0; j < d; ++j) {
          sums[j].add(fit::to_fixed(weight * static_cast<double>(x_(r, j)), value_power_));
        }
        sums[d].add(fit::to_fixed(weight, weight_power_));
      }
    });
    for (int64_t part = 1; part < parts; ++part) {
      for (int64_t i = 0; i < sum_count; ++i)
        partial[static_cast<size_t>(i)].add(partial[static_cast<size_t>(part * sum_count + i)]);
    }
    partial.resize(static_cast<size_t>(sum_count));
    sums_ = std::move(partial);
  }

  MatrixView<const float> x_;
  std::span<const float> weights_;
  int64_t count_;
  double weight_power_;
  double value_power_;
  int threads_;
  std::vector<FixedSum> sums_;  // [count][d + 1]: of weight * x, and of weight
};

std::vector<double> row_errors(MatrixView<const float> x, std::span<const float> weights,
                               const std::vector<float>& centroids, std::span<const int32_t> codes,
                               int threads) {
  std::vector<double> errors(static_cast<size_t>(x.rows()));
  parallel_for(ceil_div(x.rows(), kChunkRows), threads, [&](int64_t chunk) {
    for (int64_t r = chunk * kChunkRows; r < std::min(x.rows(), (chunk + 1) * kChunkRows); ++r) {
      const auto at = static_cast<size_t>(r);
      const double weight = weights.empty() ? 1.0 : static_cast<double>(weights[at]);
      errors[at] =
          weight * fit::squared_distance(x.row(r), centroids.data() + codes[at] * x.cols(), x.cols());
    }
  });
  return errors;
}

}  // namespace

std::vector<float> start_codebook(MatrixView<const float> x, int64_t count, const KMeansOptions& options,
                                  std::span<const float> weights) {
  require_arguments(x, count, options);
  fit::largest_weight(weights, x.rows(), options.threads);
  fit::largest_magnitude(x, "x", options.threads);
  return make_start(x, count, options, weights);
}

KMeansResult kmeans(MatrixView<const float> x, int64_t count, const KMeansOptions& options,
                    std::span<const float> weights) {
  require_arguments(x, count, options);
  const float most_weight = fit::largest_weight(weights, x.rows(), options.threads);
  const float largest = fit::largest_magnitude(x, "x", options.threads);
  KMeansResult result;
  result.centroids = make_start(x, count, options, weights);
  const MatrixView<const float> centroids(result.centroids.data(), count, x.cols());
  result.codes.resize(static_cast<size_t>(x.rows()));
  nearest_neighbour(x, centroids, result.codes, options.threads);
  CentroidUpdate update(x, weights, count, largest, most_weight, options.threads);
  std::vector<int32_t> before;
  while (result.sweeps < options.max_sweeps && !result.converged) {
    const std::vector<float> centroids_before =
        options.reseed_empty ? result.centroids : std::vector<float>();
    const std::vector<int64_t> empty = update.apply(result.codes, result.centroids);
    if (options.reseed_empty && !empty.empty()) {
      const std::vector<double> errors =
          row_errors(x, weights, centroids_before, result.codes, options.threads);
      std::vector<int64_t> rows(errors.size());
      std::iota(rows.begin(), rows.end(), int64_t{0});
      const size_t moved = std::min(empty.size(), rows.size());
      std::partial_sort(rows.begin(), rows.begin() + static_cast<int64_t>(moved), rows.end(),
                        [&](int64_t a, int64_t b) {
                          const double error_a = errors[static_cast<size_t>(a)];
                          const double error_b = errors[static_cast<size_t>(b)];
                          return error_a > error_b || (error_a == error_b && a < b);
                        });
      for (size_t i = 0; i < moved && errors[static_cast<size_t>(rows[i])] > 0; ++i) {
        std::copy_n(x.row(rows[i]), x.cols(), result.centroids.begin() + empty[i] * x.cols());
      }
    }
    before = result.codes;
    nearest_neighbour(x, centroids, result.codes, options.threads);
    int64_t changes = 0;
    for (size_t i = 0; i < before.size(); ++i) changes += before[i] != result.codes[i] ? 1 : 0;
    result.changed = static_cast<double>(changes) / static_cast<double>(std::max<int64_t>(x.rows(), 1));
    result.converged = result.changed <= options.threshold;
    ++result.sweeps;
  }
  const std::vector<double> errors = row_errors(x, weights, result.centroids, result.codes, options.threads);
  for (const double error : errors) result.squared_error += error;
  return result;
}

}  // namespace quantloom
