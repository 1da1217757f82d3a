#include "formats/additive_sample.hpp"

#include <algorithm>
#include <cmath>

#include "formats/grouped_encoder.hpp"
#include "quantloom/random.hpp"

namespace quantloom {

void require_valid(const AdditiveFitOptions& options, int64_t k) {
  if (options.sweeps < 0) throw InvalidArgument("sweeps", text_of(options.sweeps), "0 or more");
  if (options.vectors_per_entry < 0) {
    throw InvalidArgument("vectors_per_entry", text_of(options.vectors_per_entry), "0 or more");
  }
  if (!options.column_weights.empty() && std::ssize(options.column_weights) != k) {
    throw InvalidArgument("column_weights", text_of(options.column_weights.size(), " numbers"),
                          text_of("none, or one for each of ", k, " columns"));
  }
  for (size_t c = 0; c < options.column_weights.size(); ++c) {
    const double weight = options.column_weights[c];
    if (std::isfinite(weight) && weight >= 0) continue;
    throw NumericError(text_of("column_weights: got ", weight, " at column ", c, ", expected a number >= 0"));
  }
}

AdditiveSample draw_blocks(const Additive& format, int64_t n, int64_t k,
                           const std::vector<double>& magnitudes, const AdditiveFitOptions& options) {
  constexpr int64_t kLeast = int64_t{1} << 14;
  constexpr int64_t kUsual = int64_t{1} << 18;
  const int64_t most =
      options.vectors_per_entry > 0
          ? checked_mul(options.vectors_per_entry, format.entries())
          : std::clamp(256 * format.entries(), kLeast, std::max(kUsual, 4 * format.entries()));
  AdditiveSample sample;
  sample.of_row = std::max<int64_t>(k / format.in_group, 1);
  const int64_t row_groups = std::max<int64_t>(n / format.out_group, 1);
  const int64_t all = checked_mul(row_groups, sample.of_row);
  const int64_t part = ceil_div(all, std::min(all, most));
  const int64_t count = ceil_div(all, part);
  const int64_t width = format.scale_columns(k);
  const int64_t scale_count = format.scale_count(k);
  for (const double wanted : magnitudes) {
    sample.scales.push_back(wanted == 0 ? 1.0F : stored_scale(format.scale_dtype, wanted));
  }
  const CounterRandom random(options.seed);
  std::vector<double> weights(static_cast<size_t>(count), 0.0);
  for (int64_t i = 0; i < count; ++i) {
    const int64_t span = std::min(part, all - i * part);
    const auto at =
        i * part + static_cast<int64_t>(random.below(static_cast<uint64_t>(i), static_cast<uint64_t>(span)));
    sample.places.push_back(at);
    const int64_t first = at % sample.of_row * format.in_group;
    const auto scale = static_cast<size_t>(at / sample.of_row * scale_count + first / width);
    if (!std::isfinite(sample.scales[scale])) continue;  // its group is refused when it is fitted
    const int64_t columns = std::min(format.in_group, k - first);
    double weight = options.column_weights.empty() ? 1.0 : 0.0;
    for (int64_t c = 0; c < columns && !options.column_weights.empty(); ++c) {
      weight += options.column_weights[static_cast<size_t>(first + c)] / static_cast<double>(columns);
    }
    weights[static_cast<size_t>(i)] = magnitudes[scale] * magnitudes[scale] * weight;
  }
  const double largest = *std::ranges::max_element(weights);
  for (const double weight : weights) {
    sample.weights.push_back(largest > 0 ? static_cast<float>(weight / largest) : 1.0F);
  }
  return sample;
}

}  // namespace quantloom
