#include "rounding/trellis_refit.hpp"

#include <algorithm>
#include <span>
#include <vector>

#include "algebra/dense.hpp"
#include "formats/trellis_basis.hpp"
#include "quantloom/checked_math.hpp"
#include "quantloom/formats/format.hpp"
#include "quantloom/parallel.hpp"

namespace quantloom {
namespace {

constexpr int64_t kBlock = trellis::kRotation;

double largest_entry(const Hessian& hessian) {
  double largest = 0;
  for (int64_t c = 0; c < hessian.k(); ++c) largest = std::max(largest, hessian.sum()(c, c));
  return largest;
}

// The sum over `largest`, in float32.
std::vector<float> narrowed(const Hessian& hessian, double largest) {
  const int64_t k = hessian.k();
  std::vector<float> narrow(static_cast<size_t>(checked_mul(k, k)));
  for (int64_t r = 0; r < k; ++r) {
    for (int64_t c = 0; c < k; ++c) {
      narrow[static_cast<size_t>(r * k + c)] = static_cast<float>(hessian.sum()(r, c) / largest);
    }
  }
  return narrow;
}

// The lower triangle of the matrix is its Cholesky factor: solves for `values` in place.
void solve_cholesky(MatrixView<const double> factor, std::vector<double>& values) {
  const int64_t size = factor.rows();
  for (int64_t r = 0; r < size; ++r) {
    double left = values[static_cast<size_t>(r)];
    for (int64_t c = 0; c < r; ++c) left -= factor(r, c) * values[static_cast<size_t>(c)];
    values[static_cast<size_t>(r)] = left / factor(r, r);
  }
  for (int64_t r = size - 1; r >= 0; --r) {
    const double value = values[static_cast<size_t>(r)] /= factor(r, r);
    for (int64_t c = 0; c < r; ++c) values[static_cast<size_t>(c)] -= factor(r, c) * value;
  }
}

// Multiplies scales by 1 + x, with x the minimum of x^T form x - 2 gradient^T x, unless what is stored of x
// is no gain. Overwrites the form.
void refit(MatrixView<double> form, const std::vector<double>& gradient, std::span<uint16_t> scales,
           int threads) {
  const int64_t size = form.rows();
  // The upper triangle stays for the check below, and the diagonal apart.
  std::vector<double> diagonal(static_cast<size_t>(size));
  for (int64_t r = 0; r < size; ++r) {
    diagonal[static_cast<size_t>(r)] = form(r, r);
    form(r, r) = form(r, r) > 0 ? form(r, r) * (1 + trellis::kRefitDamping) : 1;
  }
  if (algebra::cholesky_lower(form, threads) >= 0) return;
  std::vector<double> change = gradient;
  solve_cholesky(form, change);
  std::vector<uint16_t> refitted(scales.begin(), scales.end());
  for (size_t i = 0; i < refitted.size(); ++i) {
    refitted[i] = trellis::multiplied_scale(scales[i], 1 + change[i]);
    change[i] = trellis::factor_between(scales[i], refitted[i]) - 1;
  }
  double gain = 0;
  for (int64_t r = 0; r < size; ++r) {
    const auto i = static_cast<size_t>(r);
    double row = 0.5 * diagonal[i] * change[i];
    for (int64_t c = r + 1; c < size; ++c) row += form(r, c) * change[static_cast<size_t>(c)];
    gain += 2 * change[i] * (gradient[i] - row);
  }
  if (gain > 0) std::ranges::copy(refitted, scales.begin());
}

// The decoded matrix D [n, k], its errors W - D, and products with both Hessians over their largest entries.
struct TwoSided {
  TwoSided(const FloatMatrix& w, const PackedTensor& packed, int threads)
      : n(packed.n), k(packed.k), decoded(static_cast<size_t>(checked_mul(n, k))), errors(decoded.size()) {
    dequantize(packed, {decoded.data(), n, k}, threads);
    for (int64_t r = 0; r < n; ++r) {
      float* const error = errors.data() + r * k;
      w.read(r, 0, k, error);
      for (int64_t c = 0; c < k; ++c) error[c] -= decoded[static_cast<size_t>(r * k + c)];
    }
  }
  std::vector<float> times(const std::vector<float>& matrix, const Hessian& hessian, int threads) const {
    const std::vector<float> narrow = narrowed(hessian, largest_entry(hessian));
    std::vector<float> product(matrix.size(), 0.0F);
    algebra::gemm_nt(1, {matrix.data(), n, k}, {narrow.data(), k, k}, 0, {product.data(), n, k}, threads);
    return product;
  }
  std::vector<float> of_outputs_times(const Hessian& output_hessian, const std::vector<float>& matrix,
                                      int threads) const {
    const std::vector<float> narrow = narrowed(output_hessian, largest_entry(output_hessian));
    std::vector<float> product(matrix.size(), 0.0F);
    algebra::gemm_tn(1, {narrow.data(), n, n}, {matrix.data(), n, k}, {product.data(), n, k}, threads);
    return product;
  }
  int64_t n;
  int64_t k;
  std::vector<float> decoded;
  std::vector<float> errors;
};

// gram o sum / its largest entry.
std::vector<double> weighed(const std::vector<float>& gram, const Hessian& hessian) {
  const double largest = largest_entry(hessian);
  const int64_t size = hessian.k();
  std::vector<double> form(gram.size());
  for (int64_t r = 0; r < size; ++r) {
    for (int64_t c = 0; c < size; ++c) {
      const auto i = static_cast<size_t>(r * size + c);
      form[i] = double{gram[i]} * (hessian.sum()(r, c) / largest);
    }
  }
  return form;
}

}  // namespace

void refit_output_scales(const FloatMatrix& w, const Hessian& hessian, PackedTensor& packed, int threads) {
  const int64_t n = packed.n;
  const int64_t k = packed.k;
  const double largest = largest_entry(hessian);
  if (largest == 0) return;
  const std::vector<float> narrow = narrowed(hessian, largest);
  const auto outputs = packed.planes.at("output_scales").values<uint16_t>();
  std::vector<uint16_t> refitted(outputs.begin(), outputs.end());
  parallel_for(ceil_div(n, kBlock), threads, [&](int64_t band) {
    const int64_t first = band * kBlock;
    const int64_t rows = std::min(kBlock, n - first);
    std::vector<float> decoded(static_cast<size_t>(rows * k));
    std::vector<float> product(decoded.size(), 0.0F);
    std::vector<float> original(static_cast<size_t>(k));
    packed.format->decode(packed, first, {decoded.data(), rows, k});
    algebra::gemm_nt(1, {decoded.data(), rows, k}, {narrow.data(), k, k}, 0, {product.data(), rows, k}, 1);
    for (int64_t r = 0; r < rows; ++r) {
      w.read(first + r, 0, k, original.data());
      double with_original = 0;
      double with_decoded = 0;
      for (int64_t c = 0; c < k; ++c) {
        const auto i = static_cast<size_t>(r * k + c);
        with_original += double{product[i]} * double{original[static_cast<size_t>(c)]};
        with_decoded += double{product[i]} * double{decoded[i]};
      }
      uint16_t& scale = refitted[static_cast<size_t>(first + r)];
      scale = trellis::refitted_scale(scale, with_original, with_decoded);
    }
  });
  std::ranges::copy(refitted, outputs.begin());
}

void refit_input_scales(const FloatMatrix& w, const Hessian& hessian, PackedTensor& packed, int threads) {
  const int64_t n = packed.n;
  const int64_t k = packed.k;
  const double largest = largest_entry(hessian);
  if (largest == 0) return;
  std::vector<double> storage(static_cast<size_t>(checked_mul(k, k)), 0.0);
  const MatrixView<double> form(storage.data(), k, k);
  std::vector<double> gradient(static_cast<size_t>(k), 0.0);
  {
    const std::vector<float> narrow = narrowed(hessian, largest);
    std::vector<float> decoded(static_cast<size_t>(checked_mul(kBlock, k)));
    std::vector<float> errors(decoded.size());
    std::vector<float> product(decoded.size());
    for (int64_t first = 0; first < n; first += kBlock) {
      const int64_t rows = std::min(kBlock, n - first);
      packed.format->decode(packed, first, {decoded.data(), rows, k});
      for (int64_t r = 0; r < rows; ++r) {
        float* const error = errors.data() + r * k;
        w.read(first + r, 0, k, error);
        for (int64_t c = 0; c < k; ++c) error[c] -= decoded[static_cast<size_t>(r * k + c)];
      }
      algebra::accumulate_gram({decoded.data(), rows, k}, form, threads);
      algebra::gemm_nt(1, {errors.data(), rows, k}, {narrow.data(), k, k}, 0, {product.data(), rows, k},
                       threads);
      for (int64_t r = 0; r < rows; ++r) {
        for (int64_t c = 0; c < k; ++c) {
          const auto i = static_cast<size_t>(r * k + c);
          gradient[static_cast<size_t>(c)] += double{product[i]} * double{decoded[i]};
        }
      }
    }
  }
  for (int64_t r = 0; r < k; ++r) {
    for (int64_t c = 0; c < k; ++c) form(r, c) *= hessian.sum()(r, c) / largest;
  }
  refit(form, gradient, packed.planes.at("input_scales").values<uint16_t>(), threads);
}

void refit_output_scales(const FloatMatrix& w, const Hessian& hessian, const Hessian& output_hessian,
                         PackedTensor& packed, int threads) {
  if (largest_entry(hessian) == 0 || largest_entry(output_hessian) == 0) return;
  const TwoSided matrices(w, packed, threads);
  const int64_t n = matrices.n;
  const int64_t k = matrices.k;
  const std::vector<float> product = matrices.times(matrices.decoded, hessian, threads);
  std::vector<double> gradient(static_cast<size_t>(n), 0.0);
  {
    const std::vector<float> weighed_errors =
        matrices.of_outputs_times(output_hessian, matrices.errors, threads);
    for (int64_t r = 0; r < n; ++r) {
      for (auto i = static_cast<size_t>(r * k); i < static_cast<size_t>((r + 1) * k); ++i) {
        gradient[static_cast<size_t>(r)] += double{weighed_errors[i]} * double{product[i]};
      }
    }
  }
  std::vector<float> gram(static_cast<size_t>(checked_mul(n, n)), 0.0F);
  algebra::gemm_nt(1, {product.data(), n, k}, {matrices.decoded.data(), n, k}, 0, {gram.data(), n, n},
                   threads);
  std::vector<double> form = weighed(gram, output_hessian);
  refit({form.data(), n, n}, gradient, packed.planes.at("output_scales").values<uint16_t>(), threads);
}

void refit_input_scales(const FloatMatrix& w, const Hessian& hessian, const Hessian& output_hessian,
                        PackedTensor& packed, int threads) {
  if (largest_entry(hessian) == 0 || largest_entry(output_hessian) == 0) return;
  const TwoSided matrices(w, packed, threads);
  const int64_t n = matrices.n;
  const int64_t k = matrices.k;
  const std::vector<float> product = matrices.of_outputs_times(output_hessian, matrices.decoded, threads);
  std::vector<double> gradient(static_cast<size_t>(k), 0.0);
  {
    const std::vector<float> weighed_errors = matrices.times(matrices.errors, hessian, threads);
    for (int64_t r = 0; r < n; ++r) {
      for (int64_t c = 0; c < k; ++c) {
        const auto i = static_cast<size_t>(r * k + c);
        gradient[static_cast<size_t>(c)] += double{weighed_errors[i]} * double{product[i]};
      }
    }
  }
  std::vector<float> gram(static_cast<size_t>(checked_mul(k, k)), 0.0F);
  algebra::gemm_tn(1, {matrices.decoded.data(), n, k}, {product.data(), n, k}, {gram.data(), k, k}, threads);
  std::vector<double> form = weighed(gram, hessian);
  refit({form.data(), k, k}, gradient, packed.planes.at("input_scales").values<uint16_t>(), threads);
}

}  // namespace quantloom
