#include "quantloom/rounding/trellis_feedback.hpp"

#include <algorithm>
#include <cmath>

#include "algebra/dense.hpp"
#include "calibration/error_statistics.hpp"
#include "formats/trellis_basis.hpp"
#include "formats/trellis_encoder.hpp"
#include "quantloom/checked_math.hpp"
#include "quantloom/dtype.hpp"
#include "quantloom/parallel.hpp"
#include "rounding/feedback_report.hpp"
#include "rounding/inverse_factor.hpp"
#include "rounding/walk.hpp"

namespace quantloom {
namespace {

constexpr int64_t kBlock = trellis::kRotation;

// A trellis without rotation that codes values as they come, without scales.
class UnitTrellis final : public Format {
 public:
  explicit UnitTrellis(const Trellis& rotated)
      : inner_(rotated.half_bits / 2.0, rotated.codebook, /*rotation=*/0) {}
  std::string_view name() const override { return inner_.name(); }
  std::string spec() const override { return inner_.spec(); }
  std::string to_json() const override { return inner_.to_json(); }
  std::vector<PlaneSpec> planes(int64_t n, int64_t k) const override { return inner_.planes(n, k); }
  void validate_values(const PackedTensor& packed) const override { inner_.validate_values(packed); }
  void decode(const PackedTensor& packed, int64_t first_row, MatrixView<float> out) const override {
    inner_.decode(packed, first_row, out);
  }
  std::unique_ptr<ColumnEncoder> column_encoder(std::shared_ptr<const Format> self, int64_t n, int64_t k,
                                                std::span<const int32_t> /*group_of_column*/) const override {
    return make_trellis_encoder(std::move(self), inner_, n, k, /*unit_scales=*/true);
  }

 private:
  Trellis inner_;
};

// The matrix as columns [k, n]; dead ones are zero.
std::vector<float> columns_of(const FloatMatrix& w, const std::vector<double>& diagonal, int threads) {
  const int64_t n = w.rows();
  const int64_t k = w.cols();
  std::vector<float> columns(static_cast<size_t>(checked_mul(n, k)));
  parallel_for(ceil_div(n, kBlock), threads, [&](int64_t band) {
    std::vector<float> row(static_cast<size_t>(k));
    for (int64_t r = band * kBlock; r < std::min(n, (band + 1) * kBlock); ++r) {
      w.read(r, 0, k, row.data());
      for (int64_t c = 0; c < k; ++c) {
        columns[static_cast<size_t>(c * n + r)] =
            diagonal[static_cast<size_t>(c)] == 0 ? 0.0F : row[static_cast<size_t>(c)];
      }
    }
  });
  return columns;
}

float scale_of(const std::vector<uint16_t>& scales, int64_t index) {
  return float_from_f16(scales[static_cast<size_t>(index)]);
}

// The matrix over its scales in the rotated basis, [padded n, padded k].
std::vector<float> rotated_weights(const std::vector<float>& columns, int64_t n, int64_t k,
                                   const trellis::Scales& scales, int threads) {
  const int64_t rows = checked_pad(n, kBlock);
  const int64_t cols = checked_pad(k, kBlock);
  std::vector<float> rotated(static_cast<size_t>(checked_mul(rows, cols)), 0.0F);
  parallel_for(rows / kBlock, threads, [&](int64_t band) {
    for (int64_t r = band * kBlock; r < std::min(n, (band + 1) * kBlock); ++r) {
      for (int64_t c = 0; c < k; ++c) {
        const float both = scale_of(scales.input, c) * scale_of(scales.output, r);
        const float value = columns[static_cast<size_t>(c * n + r)];
        rotated[static_cast<size_t>(r * cols + c)] = both == 0 ? 0 : value / both;
      }
    }
    const MatrixView<float> block(rotated.data() + band * kBlock * cols, kBlock, cols);
    trellis::rotate_columns(block);
    trellis::rotate_rows(block);
  });
  return rotated;
}

// P diag(s) H diag(s) P of the padded size.
Hessian rotated_hessian(const Hessian& hessian, const trellis::Scales& scales, bool consistent, int threads) {
  const int64_t k = hessian.k();
  const int64_t size = checked_pad(k, kBlock);
  const std::vector<double> factor = trellis::hessian_factors(scales, consistent);
  std::vector<double> storage(static_cast<size_t>(checked_mul(size, size)), 0.0);
  const MatrixView<double> sum(storage.data(), size, size);
  parallel_for(size / kBlock, threads, [&](int64_t band) {
    for (int64_t r = band * kBlock; r < std::min(k, (band + 1) * kBlock); ++r) {
      for (int64_t c = 0; c < k; ++c) {
        sum(r, c) = factor[static_cast<size_t>(r)] * hessian.sum()(r, c) * factor[static_cast<size_t>(c)];
      }
    }
    trellis::rotate_columns(sum.block(band * kBlock, 0, kBlock, size));
    trellis::rotate_rows(sum.block(band * kBlock, 0, kBlock, size));
  });
  for (int64_t r = 0; r < size; ++r) {  // the two sides are rounded in different orders
    for (int64_t c = 0; c < r; ++c) sum(r, c) = sum(c, r) = 0.5 * (sum(r, c) + sum(c, r));
  }
  return {sum, hessian.tokens()};
}

// Multiplies output scales by w H d^T / (d H d^T), with d the decoded row.
void refit_output_scales(const FloatMatrix& w, const Hessian& hessian, PackedTensor& packed, int threads) {
  const int64_t n = packed.n;
  const int64_t k = packed.k;
  double largest = 0;
  for (int64_t c = 0; c < k; ++c) largest = std::max(largest, hessian.sum()(c, c));
  if (largest == 0) return;
  std::vector<float> narrow(static_cast<size_t>(checked_mul(k, k)));
  for (int64_t r = 0; r < k; ++r) {
    for (int64_t c = 0; c < k; ++c) {
      narrow[static_cast<size_t>(r * k + c)] = static_cast<float>(hessian.sum()(r, c) / largest);
    }
  }
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

// Multiplies input scales by 1 + d, with d the minimum of the error's quadratic form: for the decoded matrix
// D, (D^T D o H) d = diag(D^T (W - D) H). Left as they are if what is stored of d would not lower the error.
void refit_input_scales(const FloatMatrix& w, const Hessian& hessian, PackedTensor& packed, int threads) {
  const int64_t n = packed.n;
  const int64_t k = packed.k;
  double largest = 0;
  for (int64_t c = 0; c < k; ++c) largest = std::max(largest, hessian.sum()(c, c));
  if (largest == 0) return;
  std::vector<double> storage(static_cast<size_t>(checked_mul(k, k)), 0.0);
  const MatrixView<double> form(storage.data(), k, k);
  std::vector<double> gradient(static_cast<size_t>(k), 0.0);
  {
    std::vector<float> narrow(storage.size());
    for (int64_t r = 0; r < k; ++r) {
      for (int64_t c = 0; c < k; ++c) {
        narrow[static_cast<size_t>(r * k + c)] = static_cast<float>(hessian.sum()(r, c) / largest);
      }
    }
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
  // The upper triangle stays for the check below, and its diagonal apart.
  std::vector<double> diagonal(static_cast<size_t>(k));
  for (int64_t r = 0; r < k; ++r) {
    for (int64_t c = 0; c < k; ++c) form(r, c) *= hessian.sum()(r, c) / largest;
    diagonal[static_cast<size_t>(r)] = form(r, r);
    form(r, r) = form(r, r) > 0 ? form(r, r) * (1 + trellis::kRefitDamping) : 1;
  }
  if (algebra::cholesky_lower(form, threads) >= 0) return;
  std::vector<double> change = gradient;
  solve_cholesky({storage.data(), k, k}, change);
  const auto inputs = packed.planes.at("input_scales").values<uint16_t>();
  std::vector<uint16_t> refitted(inputs.begin(), inputs.end());
  for (size_t c = 0; c < refitted.size(); ++c) {
    refitted[c] = trellis::multiplied_scale(inputs[c], 1 + change[c]);
    change[c] = trellis::factor_between(inputs[c], refitted[c]) - 1;
  }
  double gain = 0;
  for (int64_t r = 0; r < k; ++r) {
    const auto i = static_cast<size_t>(r);
    double row = 0.5 * diagonal[i] * change[i];
    for (int64_t c = r + 1; c < k; ++c) row += form(r, c) * change[static_cast<size_t>(c)];
    gain += 2 * change[i] * (gradient[i] - row);
  }
  if (gain > 0) std::ranges::copy(refitted, inputs.begin());
}

}  // namespace

Rounded round_trellis_feedback(const FloatMatrix& w, std::shared_ptr<const Trellis> format,
                               const Hessian& hessian, const ErrorFeedbackOptions& options,
                               const TrellisFeedbackOptions& trellis_options) {
  if (format == nullptr) throw InvalidArgument("format", "null", "a trellis");
  if (format->rotation == 0) {
    throw InvalidArgument("format", format->spec(), "a trellis in a rotated basis");
  }
  require_valid(options);
  if (options.scale_search) {
    throw InvalidArgument("scale_search", "one",
                          "none: a rotated trellis fits its scales to root mean squares");
  }
  if (options.outliers) {
    throw InvalidArgument("outliers", "a search", "none: a trellis has no outliers beside it");
  }
  const int64_t n = w.rows();
  const int64_t k = w.cols();
  require_usable(hessian, k);
  if (options.held_out != nullptr) require_hessian(*options.held_out, k, "held_out");
  require_finite(w, "w", options.threads);

  const std::vector<double> diagonal = hessian.diagonal();
  Rounded rounded;
  rounded.report.method = "gptq";
  if (n == 0 || k == 0) {
    rounded.tensor = format->column_encoder(format, n, k, {})->finish(options.threads);
    rounded.report.act_order = options.act_order;
    rounded.report.tokens = hessian.tokens();
    rounded.report.dead_columns = std::count(diagonal.begin(), diagonal.end(), 0.0);
    measure_feedback(w, format, hessian, options, rounded);
    return rounded;
  }
  trellis::Scales scales = trellis::unit_scales(n, k);
  const double target = format->codebook.rms() * trellis_best_ratio(format->half_bits, format->codebook.code);
  std::vector<float> columns = columns_of(w, diagonal, options.threads);
  trellis::fit_both({columns.data(), k, n}, 1, target, scales);
  const std::vector<float> weights = rotated_weights(columns, n, k, scales, options.threads);
  columns = {};
  const int64_t rows = checked_pad(n, kBlock);
  ErrorFeedbackOptions walk = options;
  walk.held_out = nullptr;
  walk.measure_losses = false;
  const Rounded inner = round_error_feedback(
      MatrixView<const float>(weights.data(), rows, std::ssize(weights) / rows),
      std::make_shared<const UnitTrellis>(*format),
      rotated_hessian(hessian, scales, trellis_options.consistent_hessian, options.threads), walk);
  rounded.tensor.format = format;
  rounded.tensor.n = n;
  rounded.tensor.k = k;
  for (const PlaneSpec& spec : format->planes(n, k)) {
    if (spec.name == "codes" || spec.name == "table") {
      rounded.tensor.planes.emplace(spec.name, inner.tensor.planes.at(spec.name));
    } else {
      Tensor plane(spec.dtype, spec.shape);
      std::ranges::copy(spec.name == "input_scales" ? scales.input : scales.output,
                        plane.values<uint16_t>().begin());
      rounded.tensor.planes.emplace(spec.name, std::move(plane));
    }
  }
  if (trellis_options.refit_output_scales) {
    refit_output_scales(w, hessian, rounded.tensor, options.threads);
  }
  if (trellis_options.refit_input_scales) {
    refit_input_scales(w, hessian, rounded.tensor, options.threads);
    if (trellis_options.refit_output_scales) {
      refit_output_scales(w, hessian, rounded.tensor, options.threads);
    }
  }
  rounded.report = inner.report;
  rounded.report.static_groups = true;
  rounded.report.dead_columns = std::count(diagonal.begin(), diagonal.end(), 0.0);
  measure_feedback(w, format, hessian, options, rounded);
  return rounded;
}

}  // namespace quantloom
