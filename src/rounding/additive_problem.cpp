#include "rounding/additive_problem.hpp"

#include <algorithm>
#include <cmath>
#include <numeric>

#include "quantloom/parallel.hpp"
#include "quantloom/random.hpp"
#include "rounding/additive_checks.hpp"
#include "rounding/inverse_factor.hpp"

namespace quantloom {

AdditiveProblem::AdditiveProblem(const FloatMatrix& w, const Additive& format_given, const Hessian& hessian,
                                 double damping, int threads_given)
    : format(format_given),
      n(w.rows()),
      k(w.cols()),
      row_groups(format.row_groups(n)),
      blocks(format.blocks(k)),
      columns(blocks * format.in_group),
      scale_count(k > 0 ? format.scale_count(k) : 0),
      threads(threads_given),
      hessian_(hessian),
      scale_columns_(format.scale_columns(k)) {
  static_cast<void>(resolve_threads(threads));
  require_damping(damping);
  require_whole_row_groups(format, n);
  require_usable(hessian, k);
  require_finite(w, "w", threads);
  weights_.assign(static_cast<size_t>(checked_mul(n, columns)), 0.0F);
  std::vector<float> largest(static_cast<size_t>(n), 0.0F);
  parallel_for(k > 0 ? n : 0, threads, [&](int64_t row) {
    float* const values = weights_.data() + row * columns;
    w.read(row, 0, k, values);
    for (int64_t c = 0; c < k; ++c)
      largest[static_cast<size_t>(row)] = std::max(largest[row], std::abs(values[c]));
  });
  const float most = largest.empty() ? 0.0F : *std::ranges::max_element(largest);
  int exponent = 0;
  static_cast<void>(std::frexp(most, &exponent));
  weight_unit_ = most > 0 ? std::ldexp(1.0, exponent) : 1.0;
  const auto factor = 1 / weight_unit_;
  parallel_for(n, threads, [&](int64_t row) {
    for (int64_t c = 0; c < columns; ++c) {
      float& value = weights_[static_cast<size_t>(row * columns + c)];
      value = static_cast<float>(value * factor);
    }
  });
  const std::vector<double> diagonal = hessian.diagonal();
  const double sum = std::accumulate(diagonal.begin(), diagonal.end(), 0.0);
  if (k > 0) hessian_unit_ = sum / static_cast<double>(k);
  if (!(hessian_unit_ > 0)) hessian_unit_ = 1;
  shift_ = damping;
}

template <class Real>
std::vector<Real> AdditiveProblem::hessian(std::span<const int32_t> order) const {
  std::vector<Real> h(static_cast<size_t>(checked_mul(columns, columns)), Real{0});
  const int64_t g = format.in_group;
  const MatrixView<const double> sum = hessian_.sum();
  const double factor = 1 / (static_cast<double>(hessian_.tokens()) * hessian_unit_);
  parallel_for(columns, threads, [&](int64_t row) {
    const int64_t from = order[static_cast<size_t>(row / g)] * g + row % g;
    if (from >= k) return;
    Real* const to = h.data() + row * columns;
    for (int64_t block = 0; block < blocks; ++block) {
      const int64_t first = order[static_cast<size_t>(block)] * g;
      for (int64_t c = 0; c < std::min(g, k - first); ++c) {
        to[block * g + c] = static_cast<Real>(sum(from, first + c) * factor);
      }
    }
    to[row] = static_cast<Real>(sum(from, from) * factor + shift_);
  });
  return h;
}

template <class Real>
std::vector<Real> AdditiveProblem::scales(const AdditiveParts& parts) const {
  std::vector<Real> scales;
  scales.reserve(parts.scales.size());
  for (const float scale : parts.scales) {
    scales.push_back(static_cast<Real>(static_cast<double>(scale) / weight_unit_));
  }
  return scales;
}

template std::vector<float> AdditiveProblem::hessian(std::span<const int32_t>) const;
template std::vector<double> AdditiveProblem::hessian(std::span<const int32_t>) const;
template std::vector<float> AdditiveProblem::scales(const AdditiveParts&) const;
template std::vector<double> AdditiveProblem::scales(const AdditiveParts&) const;

VisitOrder visit_order(int64_t blocks, int codebooks, bool shuffled, uint64_t seed) {
  VisitOrder order;
  order.blocks.resize(static_cast<size_t>(blocks));
  std::iota(order.blocks.begin(), order.blocks.end(), 0);
  order.tables.resize(static_cast<size_t>(blocks * codebooks));
  for (size_t i = 0; i < order.tables.size(); ++i) order.tables[i] = static_cast<int32_t>(i) % codebooks;
  if (!shuffled) return order;
  const CounterRandom random(seed);
  uint64_t counter = 0;
  const auto shuffle = [&](std::span<int32_t> values) {
    for (size_t i = values.size(); i > 1; --i) std::swap(values[i - 1], values[random.below(counter++, i)]);
  };
  shuffle(order.blocks);
  const auto tables = std::span(order.tables);
  for (int64_t block = 0; block < blocks; ++block) {
    shuffle(tables.subspan(static_cast<size_t>(block * codebooks), static_cast<size_t>(codebooks)));
  }
  return order;
}

}  // namespace quantloom
