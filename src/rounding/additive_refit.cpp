#include "rounding/additive_refit.hpp"

#include <algorithm>
#include <cmath>
#include <numeric>

#include "formats/additive_levels.hpp"
#include "formats/grouped_encoder.hpp"
#include "quantloom/parallel.hpp"
#include "rounding/additive_adam.hpp"
#include "rounding/refit_sums.hpp"

namespace quantloom {
namespace {

using Numbers = RefitSums::Numbers;

double dot(const Numbers& a, const Numbers& b) {
  return std::inner_product(a.begin(), a.end(), b.begin(), 0.0);
}

// In place, a [size, size] = L L^T; false if a pivot is not positive.
bool factorize(double* a, int64_t size) {
  for (int64_t i = 0; i < size; ++i) {
    for (int64_t j = 0; j <= i; ++j) {
      double sum = a[i * size + j];
      for (int64_t t = 0; t < j; ++t) sum -= a[i * size + t] * a[j * size + t];
      if (i != j) {
        a[i * size + j] = sum / a[j * size + j];
        continue;
      }
      if (!(sum > 0)) return false;
      a[i * size + i] = std::sqrt(sum);
    }
  }
  return true;
}

void solve(const double* l, int64_t size, double* x) {
  for (int64_t i = 0; i < size; ++i) {
    for (int64_t t = 0; t < i; ++t) x[i] -= l[i * size + t] * x[t];
    x[i] /= l[i * size + i];
  }
  for (int64_t i = size - 1; i >= 0; --i) {
    for (int64_t t = i + 1; t < size; ++t) x[i] -= l[t * size + i] * x[t];
    x[i] /= l[i * size + i];
  }
}

float table_number(double value) {
  return float_from_f16(f16_from_float(static_cast<float>(std::clamp(value, -65504.0, 65504.0)))) + 0.0F;
}

// Conjugate gradients from x, whose residual is given; image_of(direction): the normal equations' product.
template <class Image, class Precondition>
void descend(Numbers& x, Numbers residual, int steps, const Image& image_of,
             const Precondition& precondition) {
  Numbers z = precondition(residual);
  Numbers direction = z;
  double size = dot(residual, z);
  const double start = size;
  for (int step = 0; step < steps && size > 1e-24 * start && size > 0; ++step) {
    const Numbers image = image_of(direction);
    const double curvature = dot(direction, image);
    if (!(curvature > 0)) break;
    const double length = size / curvature;
    for (size_t i = 0; i < x.size(); ++i) {
      x[i] += length * direction[i];
      residual[i] -= length * image[i];
    }
    z = precondition(residual);
    const double next = dot(residual, z);
    for (size_t i = 0; i < x.size(); ++i) direction[i] = z[i] + next / size * direction[i];
    size = next;
  }
}

Numbers row_dots(const Numbers& a, const Numbers& b, size_t count) {
  Numbers sums(a.size() / count, 0.0);
  for (size_t i = 0; i < a.size(); ++i) sums[i / count] += a[i] * b[i];
  return sums;
}

// The same for each run of `count` numbers on its own, without a preconditioner.
template <class Image>
void descend_rows(Numbers& x, Numbers residual, int64_t count_given, int steps, const Image& image_of) {
  const auto count = static_cast<size_t>(count_given);
  Numbers direction = residual;
  Numbers sizes = row_dots(residual, residual, count);
  for (int64_t step = 0; step < std::min<int64_t>(steps, count_given); ++step) {
    const Numbers image = image_of(direction);
    const Numbers curvatures = row_dots(direction, image, count);
    std::vector<bool> moves(sizes.size());
    for (size_t i = 0; i < x.size(); ++i) {
      const size_t row = i / count;
      if (!(curvatures[row] > 0)) continue;
      moves[row] = true;
      x[i] += sizes[row] / curvatures[row] * direction[i];
      residual[i] -= sizes[row] / curvatures[row] * image[i];
    }
    const Numbers next = row_dots(residual, residual, count);
    for (size_t i = 0; i < x.size(); ++i) {
      const size_t row = i / count;
      direction[i] = moves[row] && sizes[row] > 0 ? residual[i] + next[row] / sizes[row] * direction[i] : 0;
    }
    sizes = next;
  }
}

// Numbers that follow their levels, and what the levels get of theirs.
struct Ties {
  explicit Ties(LeveledNumbers leveled)
      : levels(leveled.levels.begin(), leveled.levels.end()), places(std::move(leveled.places)) {}

  Numbers numbers(const Numbers& of_levels) const {
    Numbers all;
    all.reserve(places.size());
    for (const int64_t place : places) all.push_back(of_levels[static_cast<size_t>(place)]);
    return all;
  }
  Numbers sums(const Numbers& of_numbers) const {
    Numbers sums(levels.size(), 0.0);
    for (size_t i = 0; i < places.size(); ++i) sums[static_cast<size_t>(places[i])] += of_numbers[i];
    return sums;
  }

  Numbers levels;
  std::vector<int64_t> places;
};

class Refit {
 public:
  Refit(const AdditiveProblem& problem, AdditiveParts& parts)
      : problem_(problem),
        format_(problem.format),
        parts_(parts),
        sums_(problem, parts),
        scales_(problem.scales<double>(parts)) {}

  void tables(int steps) {
    const double before = total(sums_.row_losses(tables_now(), scales_));
    // E and E H are there: the right-hand side is what the errors ask of the tables.
    Numbers x = tables_now();
    const Numbers blocks = sums_.entry_blocks(scales_);
    const Numbers factors = factors_of(blocks);
    descend(
        x, sums_.gather(scales_), steps, [&](const Numbers& direction) { return table_image(direction); },
        [&](const Numbers& residual) { return precondition(factors, residual); });
    std::vector<float> found;
    found.reserve(x.size());
    for (const double value : x) found.push_back(table_number(value));
    if (format_.has_table_levels()) found = leveled_tables(found, blocks, steps);
    std::swap(parts_.tables, found);
    if (!(total(sums_.row_losses(tables_now(), scales_)) < before)) std::swap(parts_.tables, found);
  }

  void scales(int steps) {
    const auto count = static_cast<size_t>(problem_.scale_count);
    const Numbers tables = tables_now();
    const Numbers before = sums_.row_losses(tables, scales_);
    Numbers x = scales_;
    descend_rows(x, sums_.project(tables), problem_.scale_count, steps,
                 [&](const Numbers& direction) { return scale_image(tables, direction); });
    const std::vector<float> old_scales = parts_.scales;
    const Numbers old_numbers = scales_;
    for (size_t i = 0; i < x.size(); ++i) parts_.scales[i] = scale_number(x[i], parts_.scales[i]);
    if (format_.has_scale_levels(problem_.k)) level_scales_now(tables, steps);
    scales_ = problem_.scales<double>(parts_);
    const Numbers after = sums_.row_losses(tables, scales_);
    for (size_t i = 0; i < x.size(); ++i) {
      if (after[i / count] < before[i / count]) continue;
      parts_.scales[i] = old_scales[i];
      scales_[i] = old_numbers[i];
    }
  }

 private:
  static double total(const Numbers& losses) { return std::accumulate(losses.begin(), losses.end(), 0.0); }
  Numbers tables_now() const { return {parts_.tables.begin(), parts_.tables.end()}; }
  Numbers table_image(const Numbers& direction) {
    sums_.expand(direction, scales_);
    sums_.multiply();
    return sums_.gather(scales_);
  }
  Numbers scale_image(const Numbers& tables, const Numbers& direction) {
    sums_.expand(tables, direction);
    sums_.multiply();
    return sums_.project(tables);
  }
  // As stored, of a number in units of the weights; `old` where there is none.
  float scale_number(double value, float old) const {
    const float stored = stored_scale(format_.scale_dtype, std::max(value, 0.0) * problem_.weight_unit());
    return std::isfinite(stored) ? stored : old;
  }

  // Levels for tables that are free of them, and the least squares of these levels.
  std::vector<float> leveled_tables(const std::vector<float>& free, const Numbers& blocks, int steps) {
    const Ties ties(level_tables(format_, free, DType::f16, {}, problem_.threads));
    const int64_t g = format_.in_group;
    Numbers diagonal(free.size());
    for (size_t i = 0; i < free.size(); ++i) {
      const auto entry = static_cast<int64_t>(i) / format_.dim();
      diagonal[i] = blocks[static_cast<size_t>(entry * g * g + static_cast<int64_t>(i) % g * (g + 1))];
    }
    const Numbers weights = ties.sums(diagonal);
    Numbers x = ties.levels;
    static_cast<void>(sums_.row_losses(ties.numbers(x), scales_));
    descend(
        x, ties.sums(sums_.gather(scales_)), steps,
        [&](const Numbers& direction) { return ties.sums(table_image(ties.numbers(direction))); },
        [&](const Numbers& residual) {
          Numbers z(residual.size(), 0.0);
          for (size_t i = 0; i < z.size(); ++i) z[i] = weights[i] > 0 ? residual[i] / weights[i] : 0.0;
          return z;
        });
    std::vector<float> found;
    found.reserve(free.size());
    for (const double value : ties.numbers(x)) found.push_back(table_number(value));
    return found;
  }

  // The same for scales, which are free of levels as they are.
  void level_scales_now(const Numbers& tables, int steps) {
    const Ties ties(
        level_scales(format_, parts_.scales, problem_.k, format_.scale_dtype, {}, problem_.threads));
    Numbers x = ties.levels;
    for (double& level : x) level /= problem_.weight_unit();
    static_cast<void>(sums_.row_losses(tables, ties.numbers(x)));
    descend_rows(
        x, ties.sums(sums_.project(tables)), int64_t{1} << format_.levels.scale_bits, steps,
        [&](const Numbers& direction) { return ties.sums(scale_image(tables, ties.numbers(direction))); });
    for (size_t i = 0; i < parts_.scales.size(); ++i) {
      const auto place = static_cast<size_t>(ties.places[i]);
      parts_.scales[i] = scale_number(x[place], static_cast<float>(ties.levels[place]));
    }
  }

  // For each entry, the factor of its block.
  Numbers factors_of(Numbers blocks) const {
    const int64_t g = format_.in_group;
    parallel_for(format_.codebooks * format_.entries(), problem_.threads, [&](int64_t e) {
      double* const own = blocks.data() + e * g * g;
      double trace = 0;
      for (int64_t i = 0; i < g; ++i) trace += own[i * g + i];
      for (int64_t i = 0; i < g; ++i) own[i * g + i] += 1e-6 * trace;
      if (!factorize(own, g)) own[0] = 0;  // an entry without weight stays as it is
    });
    return blocks;
  }

  Numbers precondition(const Numbers& factors, const Numbers& residual) const {
    const int64_t g = format_.in_group;
    Numbers z = residual;
    parallel_for(format_.codebooks * format_.entries(), problem_.threads, [&](int64_t e) {
      const double* const factor = factors.data() + e * g * g;
      for (int64_t a = 0; a < format_.out_group; ++a) {
        double* const own = z.data() + e * format_.dim() + a * g;
        if (factor[0] > 0) {
          solve(factor, g, own);
        } else {
          std::fill_n(own, g, 0.0);
        }
      }
    });
    return z;
  }

  const AdditiveProblem& problem_;
  const Additive& format_;
  AdditiveParts& parts_;
  RefitSums sums_;
  Numbers scales_;  // in units of the weights
};

}  // namespace

void refit_parts(const AdditiveProblem& problem, AdditiveParts& parts, const RefitOptions& options) {
  if (problem.row_groups == 0 || problem.blocks == 0 || options.steps == 0) return;
  if (options.solver == RefitSolver::adam) return refit_by_adam(problem, parts, options);
  Refit refit(problem, parts);
  if (options.tables) refit.tables(options.steps);
  if (options.scales) refit.scales(options.steps);
}

}  // namespace quantloom
