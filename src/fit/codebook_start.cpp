#include "fit/codebook_start.hpp"

#include <algorithm>
#include <array>
#include <cmath>
#include <limits>
#include <string>
#include <unordered_set>
#include <utility>

#include "fit/codebook_checks.hpp"
#include "fit/fixed_point.hpp"
#include "fit/nearest_search.hpp"
#include "quantloom/checked_math.hpp"
#include "quantloom/parallel.hpp"
#include "quantloom/random.hpp"

namespace quantloom {
namespace {

constexpr std::array<std::pair<CodebookStart, std::string_view>, 3> kStarts = {{
    {CodebookStart::given, "given"},
    {CodebookStart::kmeans_plus_plus, "kmeans++"},
    {CodebookStart::random, "random"},
}};

}  // namespace

std::string_view name_of(CodebookStart start) {
  for (const auto& [value, name] : kStarts) {
    if (value == start) return name;
  }
  throw InvalidArgument("start", text_of(static_cast<int>(start)), "a CodebookStart");
}

CodebookStart codebook_start_from_name(std::string_view name) {
  std::string names;
  for (const auto& [value, known] : kStarts) {
    if (known == name) return value;
    names += (names.empty() ? "" : ", ") + std::string(known);
  }
  throw InvalidArgument("start", name, "one of " + names);
}

namespace fit {
namespace {

constexpr int64_t kChunkRows = 4096;

// Integer masses of rows, with their sums by chunks, to draw rows in proportion.
class Masses {
 public:
  explicit Masses(int64_t rows)
      : masses_(static_cast<size_t>(rows)), chunks_(static_cast<size_t>(ceil_div(rows, kChunkRows))) {}

  // measure(row) >= 0; the sum of all stays below 2^63.
  template <class Measure>
  void set(int threads, const Measure& measure) {
    const auto rows = static_cast<int64_t>(masses_.size());
    parallel_for(static_cast<int64_t>(chunks_.size()), threads, [&](int64_t chunk) {
      int64_t sum = 0;
      for (int64_t r = chunk * kChunkRows; r < std::min(rows, (chunk + 1) * kChunkRows); ++r) {
        const int64_t mass = measure(r);
        masses_[static_cast<size_t>(r)] = mass;
        sum += mass;
      }
      chunks_[static_cast<size_t>(chunk)] = sum;
    });
    total_ = 0;
    for (const int64_t sum : chunks_) total_ += sum;
  }
  int64_t total() const { return total_; }
  // The row in whose mass `target`, below the total, falls.
  int64_t row_at(int64_t target) const {
    size_t chunk = 0;
    while (target >= chunks_[chunk]) target -= chunks_[chunk++];
    size_t row = chunk * kChunkRows;
    while (target >= masses_[row]) target -= masses_[row++];
    return static_cast<int64_t>(row);
  }

 private:
  std::vector<int64_t> masses_;
  std::vector<int64_t> chunks_;
  int64_t total_ = 0;
};

std::vector<int64_t> distinct_rows(int64_t n, int64_t count, uint64_t seed) {
  const CounterRandom random(seed);
  std::unordered_set<int64_t> taken;
  std::vector<int64_t> rows;
  // Floyd's way to draw a subset: the last of the first j + 1 rows stands in for one drawn twice.
  for (int64_t j = std::max<int64_t>(n - count, 0); j < n; ++j) {
    auto row = static_cast<int64_t>(random.below(static_cast<uint64_t>(j), static_cast<uint64_t>(j) + 1));
    if (!taken.insert(row).second) {
      row = j;
      taken.insert(j);
    }
    rows.push_back(row);
  }
  std::sort(rows.begin(), rows.end());
  return rows;
}

void append_row(MatrixView<const float> x, int64_t row, std::vector<float>& centroids) {
  centroids.insert(centroids.end(), x.row(row), x.row(row) + x.cols());
}

std::vector<float> kmeans_plus_plus(MatrixView<const float> x, std::span<const float> weights, int64_t count,
                                    const KMeansOptions& options) {
  constexpr uint64_t kAttempts = 16;
  const int64_t rows = x.rows();
  const int64_t d = x.cols();
  const auto weight_of = [&](int64_t r) {
    return weights.empty() ? 1.0 : static_cast<double>(weights[static_cast<size_t>(r)]);
  };
  const double largest = largest_magnitude(x, "x", options.threads);
  const double most_weight = largest_weight(weights, rows, options.threads);
  // Masses whose sum over all rows stays below 2^62.
  const auto row_count = static_cast<double>(rows);
  const double weight_power = std::ldexp(1.0, fixed_exponent(most_weight * row_count));
  const double distance_power = std::ldexp(
      1.0, fixed_exponent(4 * static_cast<double>(d) * largest * largest * most_weight * row_count));
  const CounterRandom random(options.seed);
  uint64_t draw = 0;
  const auto drawn_row = [&](const Masses& masses) {
    return masses.row_at(static_cast<int64_t>(random.below(draw++, static_cast<uint64_t>(masses.total()))));
  };

  Masses masses(rows);
  masses.set(options.threads, [&](int64_t r) { return to_fixed(weight_of(r), weight_power); });
  std::vector<float> centroids;
  append_row(x, masses.total() > 0 ? drawn_row(masses) : 0, centroids);
  std::vector<double> distances(static_cast<size_t>(rows), std::numeric_limits<double>::infinity());
  std::vector<int32_t> codes(static_cast<size_t>(rows));
  int64_t batch = 1;  // the last entries of `centroids`, which `distances` does not know of
  while (static_cast<int64_t>(centroids.size()) < count * d) {
    const auto known = static_cast<int64_t>(centroids.size()) / d;
    const MatrixView<const float> added(centroids.data() + (known - batch) * d, batch, d);
    if (batch > 1) nearest_neighbour(x, added, codes, options.threads);
    masses.set(options.threads, [&](int64_t r) {
      const int64_t nearest = batch > 1 ? codes[static_cast<size_t>(r)] : 0;
      double& distance = distances[static_cast<size_t>(r)];
      distance = std::min(distance, squared_distance(x.row(r), added.row(nearest), d));
      return to_fixed(distance * weight_of(r), distance_power);
    });
    const int64_t wanted = std::min({count - known, known, std::max<int64_t>(1, count / 64)});
    std::unordered_set<int64_t> taken;
    for (int64_t i = 0; i < wanted; ++i) {
      for (uint64_t attempt = 0; attempt < kAttempts && masses.total() > 0; ++attempt) {
        const int64_t row = drawn_row(masses);
        if (!taken.insert(row).second) continue;
        append_row(x, row, centroids);
        break;
      }
    }
    batch = static_cast<int64_t>(taken.size());
    if (batch == 0) break;  // every row is a centroid already
  }
  while (static_cast<int64_t>(centroids.size()) < count * d) {
    append_row(x, static_cast<int64_t>(random.below(draw++, static_cast<uint64_t>(rows))), centroids);
  }
  return centroids;
}

}  // namespace

std::vector<int64_t> start_rows(int64_t n, int64_t count, const KMeansOptions& options) {
  if (options.start == CodebookStart::random) return distinct_rows(n, count, options.seed);
  const int64_t limit = std::max<int64_t>(int64_t{1} << 17, 16 * count);
  if (n <= limit) return {};
  const CounterRandom random(options.seed);
  std::vector<int64_t> rows;
  for (int64_t i = 0; i < limit; ++i) {
    // One row out of each of `limit` even ranges.
    const auto begin = static_cast<int64_t>(static_cast<__int128>(i) * n / limit);
    const auto end = static_cast<int64_t>(static_cast<__int128>(i + 1) * n / limit);
    // Draws of the rows themselves come after those of k-means++.
    const uint64_t index = (uint64_t{1} << 40) + static_cast<uint64_t>(i);
    rows.push_back(begin + static_cast<int64_t>(random.below(index, static_cast<uint64_t>(end - begin))));
  }
  return rows;
}

std::vector<float> start_from(MatrixView<const float> x, std::span<const float> weights, int64_t count,
                              const KMeansOptions& options) {
  if (options.start == CodebookStart::kmeans_plus_plus) {
    return kmeans_plus_plus(x, weights, count, options);
  }
  std::vector<float> centroids;
  // The rows are the start already; fewer of them than centroids come round again.
  for (int64_t i = 0; i < count; ++i) append_row(x, i % x.rows(), centroids);
  return centroids;
}

}  // namespace fit
}  // namespace quantloom
