#include "rounding/outlier_search.hpp"

#include <algorithm>
#include <cmath>
#include <limits>

#include "quantloom/formats/grouped.hpp"
#include "quantloom/formats/outliers.hpp"
#include "quantloom/formats/sdr.hpp"
#include "quantloom/formats/spqr.hpp"

namespace quantloom {
namespace {

constexpr float kInfinite = std::numeric_limits<float>::infinity();
// Adding this and subtracting it again rounds |x| < 2^22 to an integer, ties to even.
constexpr float kRoundingShift = 0x1.8p23F;

// Columns up to which an outlier's column takes 16 bits.
constexpr int64_t kNarrowColumns = 65536;

// Where the search for a threshold begins, and how far it goes.
constexpr double kFirstThreshold = 0.3;
constexpr double kSmallestThreshold = 1e-9;
constexpr double kLargestThreshold = 1e12;
constexpr double kUnspentShare = 0.01;
constexpr int kMostCounts = 16;

// The two least and the two largest values of each row, and where the outer ones lie.
struct Extremes {
  explicit Extremes(size_t rows)
      : least(rows, kInfinite),
        second_least(rows, kInfinite),
        largest(rows, -kInfinite),
        second_largest(rows, -kInfinite),
        least_at(rows, 0),
        largest_at(rows, 0) {}

  void take(const float* value, int column) {
    for (size_t r = 0; r < least.size(); ++r) {
      const float v = value[r];
      const bool lower = v < least[r];
      second_least[r] = lower ? least[r] : std::min(second_least[r], v);
      least_at[r] = lower ? column : least_at[r];
      least[r] = lower ? v : least[r];
      const bool higher = v > largest[r];
      second_largest[r] = higher ? largest[r] : std::max(second_largest[r], v);
      largest_at[r] = higher ? column : largest_at[r];
      largest[r] = higher ? v : largest[r];
    }
  }

  std::vector<float> least, second_least, largest, second_largest;
  std::vector<int> least_at, largest_at;
};

// error[r] = weight * (rounding error of value[r] on the grid of levels + 1 numbers from low to high)^2.
void grid_errors(const float* __restrict value, const float* __restrict low, const float* __restrict high,
                 float levels, float weight, size_t rows, float* __restrict error) {
  for (size_t r = 0; r < rows; ++r) {
    const float step = (high[r] - low[r]) / levels;
    // 0 / 0 of equal values: the comparison makes it 0.
    float steps = (value[r] - low[r]) / step;
    steps = steps > 0.0F ? steps : 0.0F;
    steps = steps < levels ? steps : levels;
    const float missing = ((steps + kRoundingShift) - kRoundingShift) * step + low[r] - value[r];
    error[r] = weight * (missing * missing);
  }
}

int64_t stored_bits(const std::vector<PlaneSpec>& specs) {
  int64_t bytes = 0;
  for (const PlaneSpec& spec : specs) {
    if (spec.optional) continue;
    bytes = checked_add(bytes, checked_mul(checked_product(spec.shape), size_of(spec.dtype)));
  }
  return checked_mul(bytes, 8);
}

}  // namespace

void require_valid(const OutlierSearch& search) {
  const int given =
      int{search.percent.has_value()} + int{search.bits.has_value()} + int{search.threshold.has_value()};
  if (given != 1) {
    throw InvalidArgument("outliers", text_of(given, " of percent, bits and threshold"), "one of them");
  }
  if (search.percent && !(*search.percent >= 0 && *search.percent < 100)) {
    throw InvalidArgument("outliers.percent", text_of(*search.percent), "a number from 0 to below 100");
  }
  if (search.bits && !(*search.bits > 0 && *search.bits <= 64)) {
    throw InvalidArgument("outliers.bits", text_of(*search.bits), "bits per weight above 0, at most 64");
  }
  if (search.threshold && !(*search.threshold > 0 && std::isfinite(*search.threshold))) {
    throw InvalidArgument("outliers.threshold", text_of(*search.threshold), "a positive number");
  }
}

int scalar_bits(const Format& dense) {
  if (const auto* spqr = dynamic_cast<const Spqr*>(&dense)) return spqr->bits;
  if (const auto* grouped = dynamic_cast<const GroupedFormat*>(&dense)) return grouped->bits;
  if (const auto* sdr = dynamic_cast<const Sdr*>(&dense)) return sdr->bits;
  throw InvalidArgument("format", dense.spec(),
                        "a uniform, codebook, spqr or sdr format, which a search for outliers takes");
}

int64_t outlier_budget(const OutlierSearch& search, const Format& dense, int64_t n, int64_t k,
                       bool with_group_index) {
  const int64_t weights = checked_mul(n, k);
  if (weights == 0) return 0;
  if (search.threshold) return weights;
  const int64_t most = std::min(weights, int64_t{INT32_MAX});
  if (search.percent) {
    return std::min(most, static_cast<int64_t>(*search.percent * static_cast<double>(weights) / 100));
  }
  const std::shared_ptr<const Format> shared(&dense, [](const Format*) {});
  const int64_t none =
      stored_bits(Outliers(shared, int64_t{0}).planes(n, k)) + (with_group_index ? checked_mul(k, 32) : 0);
  const int64_t each = k > kNarrowColumns ? 48 : 32;
  const double wanted = std::floor(*search.bits * static_cast<double>(weights));
  if (wanted < static_cast<double>(none)) {
    throw InvalidArgument(
        "outliers.bits", text_of(*search.bits),
        text_of("at least ", static_cast<double>(none) / static_cast<double>(weights),
                ", what the planes of ", dense.spec(), " take for [", n, ", ", k, "] with no outlier"));
  }
  const double count = std::floor((wanted - static_cast<double>(none)) / static_cast<double>(each));
  return count < static_cast<double>(most) ? static_cast<int64_t>(count) : most;
}

MatrixView<const float> without_outliers(MatrixView<const float> columns, std::span<const float> weights,
                                         int bits, double threshold, std::vector<float>& copy) {
  const int64_t count = columns.rows();
  const auto rows = static_cast<size_t>(columns.cols());
  if (count < 2) return columns;  // a value alone has no others to gain
  const auto levels = static_cast<float>((1 << bits) - 1);
  Extremes extremes(rows);
  for (int64_t c = 0; c < count; ++c) extremes.take(columns.row(c), static_cast<int>(c));

  // Without a value between the others the grid stays: only the outer ones need a grid of the rest.
  std::vector<float> errors(static_cast<size_t>(count) * rows);
  std::vector<double> total(rows, 0.0);
  std::vector<double> without_least(rows, 0.0);
  std::vector<double> without_largest(rows, 0.0);
  std::vector<float> error(rows);
  for (int64_t c = 0; c < count; ++c) {
    const float* value = columns.row(c);
    const float weight = weights[static_cast<size_t>(c)];
    float* own = errors.data() + static_cast<size_t>(c) * rows;
    grid_errors(value, extremes.least.data(), extremes.largest.data(), levels, weight, rows, own);
    for (size_t r = 0; r < rows; ++r) total[r] += static_cast<double>(own[r]);
    grid_errors(value, extremes.second_least.data(), extremes.largest.data(), levels, weight, rows,
                error.data());
    for (size_t r = 0; r < rows; ++r) {
      without_least[r] += extremes.least_at[r] == c ? 0.0 : static_cast<double>(error[r]);
    }
    grid_errors(value, extremes.least.data(), extremes.second_largest.data(), levels, weight, rows,
                error.data());
    for (size_t r = 0; r < rows; ++r) {
      without_largest[r] += extremes.largest_at[r] == c ? 0.0 : static_cast<double>(error[r]);
    }
  }
  std::vector<int64_t> found;
  for (size_t r = 0; r < rows; ++r) {
    // An error alone is at most the total.
    if (!(total[r] > threshold)) continue;
    found.clear();
    double sum = 0;
    for (int64_t c = 0; c < count; ++c) {
      double gain = static_cast<double>(errors[static_cast<size_t>(c) * rows + r]);
      if (c == extremes.least_at[r]) gain = total[r] - without_least[r];
      if (c == extremes.largest_at[r]) gain = total[r] - without_largest[r];
      if (gain > threshold) {
        found.push_back(c);
      } else {
        sum += static_cast<double>(columns(c, static_cast<int64_t>(r)));
      }
    }
    if (found.empty()) continue;
    if (copy.empty()) {
      copy.reserve(static_cast<size_t>(count) * rows);
      for (int64_t c = 0; c < count; ++c) copy.insert(copy.end(), columns.row(c), columns.row(c) + rows);
    }
    const int64_t others = count - std::ssize(found);
    const auto mean = static_cast<float>(others > 0 ? sum / static_cast<double>(others) : 0.0);
    for (const int64_t c : found) copy[static_cast<size_t>(c) * rows + r] = mean;
  }
  if (copy.empty()) return columns;
  return {copy.data(), count, columns.cols()};
}

namespace {

// Of thresholds that keep to a budget, the one that spends most of it.
class ThresholdSearch {
 public:
  ThresholdSearch(int64_t budget, bool sample, const std::function<int64_t(double, bool)>& count)
      : budget_(budget), sample_(sample), count_(count) {}

  // Steps from `first` by `factor` until counts on both sides of the budget are known, then closes in.
  double run(double first, double factor) {
    double threshold = first;
    while (try_one(threshold) && counts_ < kMostCounts) {
      if (low_ > 0 && high_ < kInfinite) {
        const double share =
            (log_count(low_count_) - log_count(budget_)) / (log_count(low_count_) - log_count(high_count_));
        threshold = low_ * std::pow(high_ / low_, std::clamp(share, 0.05, 0.95));
        if (high_ / low_ < 1 + 1e-6) break;
      } else {
        threshold = low_ > 0 ? low_ * factor : high_ / factor;
        factor *= factor;
        if (threshold < kSmallestThreshold || threshold > kLargestThreshold) break;
      }
    }
    return high_;
  }

  bool ended_with_result() const { return last_ == high_; }

 private:
  static double log_count(int64_t count) { return std::log(static_cast<double>(count) + 0.5); }

  // False if the budget is spent well enough.
  bool try_one(double threshold) {
    const int64_t found = count_(threshold, sample_);
    ++counts_;
    last_ = threshold;
    if (found > budget_) {
      low_ = threshold;
      low_count_ = found;
      return true;
    }
    high_ = threshold;
    high_count_ = found;
    return static_cast<double>(budget_ - found) > kUnspentShare * static_cast<double>(budget_);
  }

  int64_t budget_;
  bool sample_;
  const std::function<int64_t(double, bool)>& count_;
  double low_ = 0;                                         // the largest threshold known to find too many
  double high_ = std::numeric_limits<double>::infinity();  // the smallest known not to
  int64_t low_count_ = 0;
  int64_t high_count_ = 0;
  double last_ = 0;
  int counts_ = 0;
};

}  // namespace

double find_threshold(int64_t budget, double sample_share,
                      const std::function<int64_t(double threshold, bool sample)>& count) {
  constexpr double kNone = std::numeric_limits<double>::infinity();
  if (budget == 0) {
    static_cast<void>(count(kNone, false));
    return kNone;
  }
  double first = kFirstThreshold;
  double factor = 4;
  if (sample_share < 1) {
    const auto sampled = static_cast<int64_t>(sample_share * static_cast<double>(budget));
    first = sampled > 0 ? ThresholdSearch(sampled, true, count).run(first, factor) : first;
    if (first == kNone) first = kLargestThreshold;
    if (sampled > 0) factor = 1.05;
  }
  ThresholdSearch search(budget, false, count);
  const double threshold = search.run(first, factor);
  if (!search.ended_with_result()) static_cast<void>(count(threshold, false));
  return threshold;
}

}  // namespace quantloom
