#include "quantloom/fit/scale_search.hpp"

#include <algorithm>
#include <cmath>

#include "quantloom/checked_math.hpp"
#include "quantloom/error.hpp"
#include "quantloom/parallel.hpp"

namespace quantloom {
namespace {

void require_table(std::span<const float> table, const std::string& argument) {
  if (table.empty()) throw InvalidArgument(argument, "no values", "at least one");
  for (size_t i = 0; i < table.size(); ++i) {
    if (!std::isfinite(table[i])) {
      throw InvalidArgument(argument, text_of(table[i], " at index ", i), "finite values");
    }
    if (i > 0 && table[i] < table[i - 1]) {
      throw InvalidArgument(argument, text_of(table[i], " after ", table[i - 1]), "ascending values");
    }
  }
}

void require_scale(float scale) {
  if (!(std::isfinite(scale) && scale > 0)) {
    throw InvalidArgument("scale", text_of(scale), "a finite number > 0");
  }
}

std::vector<int64_t> ends_of(const SortedValues& sample, std::span<const float> table, float scale) {
  const std::span<const float> values = sample.values();
  std::vector<int64_t> ends(table.size());
  auto from = values.begin();
  for (size_t i = 0; i + 1 < table.size(); ++i) {
    // In float64 the sum is exact; rounding it is rounding the midpoint.
    const auto midpoint =
        static_cast<float>((static_cast<double>(table[i]) + static_cast<double>(table[i + 1])) / 2);
    // Quotients rise with the values, rounded or not.
    from = std::partition_point(from, values.end(), [&](float x) { return x / scale <= midpoint; });
    ends[i] = from - values.begin();
  }
  ends.back() = sample.count();
  return ends;
}

}  // namespace

std::vector<int64_t> cell_ends(const SortedValues& sample, std::span<const float> table, float scale) {
  require_table(table, "table");
  require_scale(scale);
  return ends_of(sample, table, scale);
}

std::vector<int64_t> table_counts(const SortedValues& sample, std::span<const float> table, float scale) {
  std::vector<int64_t> counts = cell_ends(sample, table, scale);
  for (size_t i = counts.size(); i-- > 1;) counts[i] -= counts[i - 1];
  return counts;
}

std::vector<double> table_errors(const SortedValues& sample, std::span<const std::vector<float>> tables,
                                 std::span<const float> scales, int threads) {
  for (size_t t = 0; t < tables.size(); ++t) require_table(tables[t], text_of("tables[", t, "]"));
  for (const float scale : scales) require_scale(scale);
  const auto scale_count = static_cast<int64_t>(scales.size());
  const int64_t cases = checked_mul(static_cast<int64_t>(tables.size()), scale_count);
  std::vector<double> errors(static_cast<size_t>(cases));
  parallel_for(cases, threads, [&](int64_t at) {
    const std::vector<float>& table = tables[static_cast<size_t>(at / scale_count)];
    const float scale = scales[static_cast<size_t>(at % scale_count)];
    const std::vector<int64_t> ends = ends_of(sample, table, scale);
    double error = 0;
    int64_t begin = 0;
    for (size_t i = 0; i < table.size(); ++i) {
      if (ends[i] > begin) {
        const double decoded = static_cast<double>(table[i]) * static_cast<double>(scale);
        error += sample.sums(begin, ends[i]).squared_error(decoded);
      }
      begin = ends[i];
    }
    errors[static_cast<size_t>(at)] = error;
  });
  return errors;
}

}  // namespace quantloom
