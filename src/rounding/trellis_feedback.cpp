#include "quantloom/rounding/trellis_feedback.hpp"

#include <algorithm>
#include <cmath>
#include <limits>
#include <span>

#include "calibration/error_statistics.hpp"
#include "formats/trellis_basis.hpp"
#include "formats/trellis_codes.hpp"
#include "formats/trellis_encoder.hpp"
#include "quantloom/checked_math.hpp"
#include "quantloom/dtype.hpp"
#include "quantloom/parallel.hpp"
#include "rounding/feedback_report.hpp"
#include "rounding/inverse_factor.hpp"
#include "rounding/trellis_refit.hpp"
#include "rounding/trellis_two_sided.hpp"
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

// P diag(factor) H diag(factor) P of the padded size.
Hessian rotated_hessian(const Hessian& hessian, std::span<const double> factor, int threads) {
  const int64_t k = hessian.k();
  const int64_t size = checked_pad(k, kBlock);
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

// The factor by which weights [rows, k] in the basis have the least error under H when they are that much
// larger to the codebook: several are tried, with feedback on some of the rows, all in one walk.
double tried_factor(MatrixView<const float> weights, const std::shared_ptr<const Format>& format,
                    const Hessian& hessian, const ErrorFeedbackOptions& options,
                    std::span<const double> factors) {
  constexpr int64_t kSide = trellis::kTileSide;
  const std::vector<int64_t> tile_rows = trellis::trial_tile_rows(weights.rows() / kSide);
  const int64_t k = weights.cols();
  const int64_t rows = std::ssize(tile_rows) * kSide;
  const int64_t all = checked_mul(rows, std::ssize(factors));
  std::vector<float> widened(static_cast<size_t>(checked_mul(all, k)));
  for (int64_t r = 0; r < all; ++r) {
    const int64_t row = r % rows;
    const float* from = weights.row(tile_rows[static_cast<size_t>(row / kSide)] * kSide + row % kSide);
    const auto factor = static_cast<float>(factors[static_cast<size_t>(r / rows)]);
    for (int64_t c = 0; c < k; ++c) widened[static_cast<size_t>(r * k + c)] = factor * from[c];
  }
  const PackedTensor packed =
      round_error_feedback(MatrixView<const float>(widened.data(), all, k), format, hessian, options).tensor;
  std::vector<float> decoded(widened.size());
  dequantize(packed, {decoded.data(), all, k}, options.threads);
  std::vector<double> losses;
  const Hessian* const hessians[] = {&hessian};
  for (int64_t f = 0; f < std::ssize(factors); ++f) {
    const MatrixView<const float> wanted(widened.data() + f * rows * k, rows, k);
    const MatrixView<const float> found(decoded.data() + f * rows * k, rows, k);
    const double factor = factors[static_cast<size_t>(f)];
    losses.push_back(error_statistics(wanted, found, hessians, options.threads).proxy_losses.front() /
                     (factor * factor));
  }
  return trellis::best_factor(factors, losses);
}

// Both Hessians are those of the basis. The report's damping is that of the inputs.
Rounded round_two_sided(MatrixView<const float> weights, const std::shared_ptr<const Format>& format,
                        const Hessian& hessian, const Hessian& output_hessian,
                        const ErrorFeedbackOptions& options) {
  const auto order_of = [&](const Hessian& of) {
    return walk_order(of.diagonal(), trellis::kTileSide, options.act_order);
  };
  const std::vector<int64_t> order = order_of(hessian);
  const std::vector<int64_t> output_order = order_of(output_hessian);
  const InverseFactor factor(hessian, order, options.damping, options.damping_ladder, options.threads);
  const InverseFactor output_factor(output_hessian, output_order, options.damping, options.damping_ladder,
                                    options.threads, "output_hessian");
  const std::unique_ptr<ColumnEncoder> encoder =
      format->column_encoder(format, weights.rows(), weights.cols(), {});
  walk_two_sided(weights, {order, factor.upper()}, {output_order, output_factor.upper()}, *encoder,
                 options.threads);
  Rounded rounded;
  rounded.tensor = encoder->finish(options.threads);
  rounded.report.method = "gptq";
  rounded.report.act_order = options.act_order;
  rounded.report.damping_tried = factor.damping_tried();
  rounded.report.damping = rounded.report.damping_tried.back();
  rounded.report.tokens = hessian.tokens();
  return rounded;
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
  require_valid(trellis_options);
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
  if (options.output_hessian != nullptr) require_usable(*options.output_hessian, n, "output_hessian");
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
  const double ratio = trellis_best_ratio(format->half_bits, format->codebook.code);
  std::vector<float> columns = columns_of(w, diagonal, options.threads);
  trellis::fit_both({columns.data(), k, n}, 1, format->codebook.rms() * ratio, scales);
  std::vector<float> weights = rotated_weights(columns, n, k, scales, options.threads);
  const int64_t rows = checked_pad(n, kBlock);
  const int64_t cols = checked_pad(k, kBlock);
  ErrorFeedbackOptions walk = options;
  walk.held_out = nullptr;
  walk.output_hessian = nullptr;
  walk.measure_losses = false;
  const auto unit_format = std::make_shared<const UnitTrellis>(*format);
  const Hessian in_basis = rotated_hessian(
      hessian, trellis::hessian_factors(scales.input, trellis_options.consistent_hessian), options.threads);
  const std::vector<double> factors = ratio_factors(trellis_options, *format);
  const double factor = factors.size() == 1
                            ? factors.front()
                            : tried_factor(MatrixView<const float>(weights.data(), rows, cols), unit_format,
                                           in_basis, walk, factors);
  if (factor != 1) {
    trellis::widen(factor, scales);
    weights = rotated_weights(columns, n, k, scales, options.threads);
  }
  columns = {};
  const MatrixView<const float> rotated(weights.data(), rows, cols);
  if (options.output_hessian == nullptr) {
    rounded = round_error_feedback(rotated, unit_format, in_basis, walk);
  } else {
    rounded = round_two_sided(rotated, unit_format, in_basis,
                              rotated_hessian(*options.output_hessian,
                                              trellis::hessian_factors(scales.output, true), options.threads),
                              walk);
  }
  const PackedTensor inner = std::move(rounded.tensor);
  rounded.tensor = {};
  rounded.tensor.format = format;
  rounded.tensor.n = n;
  rounded.tensor.k = k;
  for (const PlaneSpec& spec : format->planes(n, k)) {
    if (spec.name == "codes" || spec.name == "table") {
      rounded.tensor.planes.emplace(spec.name, inner.planes.at(spec.name));
    } else {
      Tensor plane(spec.dtype, spec.shape);
      std::ranges::copy(spec.name == "input_scales" ? scales.input : scales.output,
                        plane.values<uint16_t>().begin());
      rounded.tensor.planes.emplace(spec.name, std::move(plane));
    }
  }
  const auto refit = [&](bool wanted, const auto& one_sided, const auto& two_sided) {
    if (!wanted) return;
    if (options.output_hessian == nullptr) {
      one_sided(rounded.tensor);
    } else {
      two_sided(*options.output_hessian, rounded.tensor);
    }
  };
  const auto refit_outputs = [&](bool wanted) {
    refit(
        wanted, [&](PackedTensor& packed) { refit_output_scales(w, hessian, packed, options.threads); },
        [&](const Hessian& outputs, PackedTensor& packed) {
          refit_output_scales(w, hessian, outputs, packed, options.threads);
        });
  };
  refit_outputs(trellis_options.refit_output_scales);
  refit(
      trellis_options.refit_input_scales,
      [&](PackedTensor& packed) { refit_input_scales(w, hessian, packed, options.threads); },
      [&](const Hessian& outputs, PackedTensor& packed) {
        refit_input_scales(w, hessian, outputs, packed, options.threads);
      });
  refit_outputs(trellis_options.refit_output_scales && trellis_options.refit_input_scales);
  rounded.report.static_groups = true;
  rounded.report.trellis_ratio = ratio * factor;
  rounded.report.dead_columns = std::count(diagonal.begin(), diagonal.end(), 0.0);
  measure_feedback(w, format, hessian, options, rounded);
  return rounded;
}

}  // namespace quantloom
