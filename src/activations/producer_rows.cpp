#include "activations/producer_rows.hpp"

#include <algorithm>

#include "activations/producer_arithmetic.hpp"
#include "simd_targets.hpp"

#undef HWY_TARGET_INCLUDE
#define HWY_TARGET_INCLUDE "activations/producer_rows.cpp"
#include <hwy/foreach_target.h>
// After foreach_target.h, which sets the target.
#include <hwy/highway.h>

HWY_BEFORE_NAMESPACE();
namespace quantloom::activations::HWY_NAMESPACE {

// Calls visit(values, n) for eight neighbours after the other, zeros after the end.
template <class Visit>
void each_neighbours(const float* x, int64_t count, const Visit& visit) {
  for (int64_t i = 0; i < count; i += producers::kNeighbours) {
    float values[producers::kNeighbours] = {};
    const auto n = static_cast<int>(std::min<int64_t>(producers::kNeighbours, count - i));
    std::copy_n(x + i, n, values);
    visit(values, n);
  }
}

void normalize_row(const float* x, int64_t count, const float* weight, const float* bias, float epsilon,
                   bool centred, float* out) {
  producers::NormTerms terms{0.0F, 0.0F};
  if (centred) {
    double sum = 0;
    each_neighbours(x, count, [&](const float(&values)[producers::kNeighbours], int) {
      sum += static_cast<double>(producers::sum_of_neighbours(values));
    });
    terms.mean = producers::mean_of(sum, count);
  }
  double squares = 0;
  each_neighbours(x, count, [&](const float(&values)[producers::kNeighbours], int n) {
    squares += static_cast<double>(producers::squares_of_neighbours(values, terms.mean, n));
  });
  terms.factor = producers::norm_factor(squares, count, epsilon);
  for (int64_t i = 0; i < count; ++i) {
    out[i] = producers::normalized(x[i], terms, weight[i], bias == nullptr ? 0.0F : bias[i]);
  }
}

void silu_row(const float* x, int64_t count, float* out) {
  for (int64_t i = 0; i < count; ++i) out[i] = producers::silu(x[i]);
}

}  // namespace quantloom::activations::HWY_NAMESPACE
HWY_AFTER_NAMESPACE();

#if HWY_ONCE
namespace quantloom::activations {

HWY_EXPORT(normalize_row);
HWY_EXPORT(silu_row);

void normalize_row(const float* x, int64_t count, const float* weight, const float* bias, float epsilon,
                   bool centred, float* out) {
  HWY_DYNAMIC_DISPATCH(normalize_row)(x, count, weight, bias, epsilon, centred, out);
}

void silu_row(const float* x, int64_t count, float* out) {
  HWY_DYNAMIC_DISPATCH(silu_row)(x, count, out);
}

}  // namespace quantloom::activations
#endif  // HWY_ONCE
