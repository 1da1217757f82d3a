#include "rounding/additive_adam.hpp"

#include <algorithm>
#include <cmath>
#include <numeric>

#include "formats/additive_levels.hpp"
#include "formats/grouped_encoder.hpp"
#include "rounding/refit_sums.hpp"

namespace quantloom {
namespace {

using Numbers = RefitSums::Numbers;

// Moves numbers by their gradients.
class Adam {
 public:
  Adam(const AdamOptions& options, size_t count)
      : options_(options), mean_(count, 0.0), square_(count, 0.0), most_(count, 0.0) {}

  void step(Numbers& x, const Numbers& gradient) {
    ++steps_;
    const double mean_share = 1 - std::pow(options_.beta1, steps_);
    const double square_share = 1 - std::pow(options_.beta2, steps_);
    for (size_t i = 0; i < x.size(); ++i) {
      mean_[i] = options_.beta1 * mean_[i] + (1 - options_.beta1) * gradient[i];
      square_[i] = options_.beta2 * square_[i] + (1 - options_.beta2) * gradient[i] * gradient[i];
      most_[i] = options_.amsgrad ? std::max(most_[i], square_[i]) : square_[i];
      x[i] -= options_.learning_rate * mean_[i] / mean_share /
              (std::sqrt(most_[i] / square_share) + options_.epsilon);
    }
  }

 private:
  const AdamOptions& options_;
  int steps_ = 0;
  Numbers mean_;
  Numbers square_;
  Numbers most_;
};

void multiply(Numbers& numbers, double factor) {
  for (double& number : numbers) number *= factor;
}

std::vector<float> to_floats(const Numbers& numbers) {
  std::vector<float> floats;
  floats.reserve(numbers.size());
  for (const double number : numbers) floats.push_back(static_cast<float>(number));
  return floats;
}

// Numbers as the levels nearest to them, which begin with those of the step before.
template <class Level>
Numbers straight_through(const Numbers& numbers, std::vector<float>& levels, const Level& level) {
  const LeveledNumbers leveled = level(to_floats(numbers), levels);
  levels = leveled.levels;
  const std::vector<float> all = leveled.numbers();
  return {all.begin(), all.end()};
}

}  // namespace

void refit_by_adam(const AdditiveProblem& problem, AdditiveParts& parts, const RefitOptions& options) {
  const Additive& format = problem.format;
  RefitSums sums(problem, parts);
  // A scale in published units is the norm of what it scales, here the root mean square.
  const double norm = std::sqrt(static_cast<double>(format.out_group * format.scale_columns(problem.k)));
  const double scale_unit = norm * problem.weight_unit();
  Numbers tables(parts.tables.begin(), parts.tables.end());
  Numbers scales = problem.scales<double>(parts);
  const auto total = [](const Numbers& losses) { return std::accumulate(losses.begin(), losses.end(), 0.0); };
  const double before = total(sums.row_losses(tables, scales));
  // What the gradient of the loss of a row of W is, of what RefitSums returns.
  const double table_factor = -2 * problem.loss_unit() / static_cast<double>(problem.n) * norm;
  const double scale_factor = -2 * problem.loss_unit() / static_cast<double>(problem.n) / scale_unit;
  Adam of_tables(options.adam, options.tables ? tables.size() : 0);
  Adam of_scales(options.adam, options.scales ? scales.size() : 0);
  const bool table_levels = format.has_table_levels();
  const bool scale_levels = format.has_scale_levels(problem.k);
  std::vector<float> levels_of_tables;
  std::vector<float> levels_of_scales;
  for (int step = 0; step < options.steps; ++step) {
    const Numbers tables_now =
        table_levels
            ? straight_through(tables, levels_of_tables,
                               [&](const std::vector<float>& numbers, std::span<const float> start) {
                                 return level_tables(format, numbers, DType::f32, start, problem.threads);
                               })
            : tables;
    const Numbers scales_now =
        scale_levels ? straight_through(scales, levels_of_scales,
                                        [&](const std::vector<float>& numbers, std::span<const float> start) {
                                          return level_scales(format, numbers, problem.k, DType::f32, start,
                                                              problem.threads);
                                        })
                     : scales;
    static_cast<void>(sums.row_losses(tables_now, scales_now));
    if (options.scales) {
      Numbers gradient = sums.project(tables_now);
      multiply(gradient, scale_factor);
      multiply(scales, scale_unit);
      of_scales.step(scales, gradient);
      multiply(scales, 1 / scale_unit);
    }
    if (options.tables) {
      Numbers gradient = sums.gather(scales_now);
      multiply(gradient, table_factor);
      multiply(tables, 1 / norm);
      of_tables.step(tables, gradient);
      multiply(tables, norm);
    }
  }
  AdditiveParts found = parts;
  for (size_t i = 0; i < tables.size() && options.tables; ++i) {
    const auto value = static_cast<float>(std::clamp(tables[i], -65504.0, 65504.0));
    found.tables[i] = float_from_f16(f16_from_float(value)) + 0.0F;
  }
  for (size_t i = 0; i < scales.size() && options.scales; ++i) {
    const float stored = stored_scale(format.scale_dtype, std::max(scales[i], 0.0) * problem.weight_unit());
    if (std::isfinite(stored)) found.scales[i] = stored;
  }
  if (table_levels)
    found.tables = level_tables(format, found.tables, DType::f16, {}, problem.threads).numbers();
  if (scale_levels) {
    found.scales =
        level_scales(format, found.scales, problem.k, format.scale_dtype, {}, problem.threads).numbers();
  }
  const Numbers found_tables(found.tables.begin(), found.tables.end());
  const double after = total(sums.row_losses(found_tables, problem.scales<double>(found)));
  if (!(after < before)) return;
  parts.tables = std::move(found.tables);
  parts.scales = std::move(found.scales);
}

}  // namespace quantloom
