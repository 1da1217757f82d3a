#include "formats/outlier_encoder.hpp"

#include <algorithm>
#include <cmath>

#include "formats/shared_scales.hpp"
#include "formats/weighted_fit.hpp"

namespace quantloom {
namespace {

class OutlierEncoder final : public ColumnEncoder, public WeightedFit, public SharedScales {
 public:
  OutlierEncoder(std::shared_ptr<const Format> self, const Outliers& format, int64_t n, int64_t k)
      : self_(std::move(self)),
        format_(format),
        k_(k),
        dense_(format.dense->column_encoder(format.dense, n, k, {})),
        values_(format.positions.size()) {
    offsets_.reserve(static_cast<size_t>(k > 0 ? n + 1 : 0));
    for (int64_t row = 0; k > 0 && row <= n; ++row) {
      offsets_.push_back(std::ranges::lower_bound(format.positions, row * k) - format.positions.begin());
    }
  }

  int64_t columns_per_step() const override { return dense_->columns_per_step(); }
  int64_t group_count() const override { return dense_->group_count(); }
  int64_t group_size() const override { return dense_->group_size(); }
  bool parameters_span_rows() const override { return dense_->parameters_span_rows(); }
  int64_t rows_per_step() const override { return dense_->rows_per_step(); }
  bool shares_scales() const override { return quantloom::shares_scales(*dense_); }

  void fit(int64_t group, int64_t first_row, MatrixView<const float> values,
           std::span<const float> shrink) override {
    std::vector<float> without;
    dense_->fit(group, first_row, without_outliers(group * group_size(), first_row, values, without), shrink);
  }

  void fit_weighted(int64_t group, int64_t first_row, MatrixView<const float> values,
                    std::span<const float> weights) override {
    auto* const weighted = dynamic_cast<WeightedFit*>(dense_.get());
    if (weighted == nullptr) return fit(group, first_row, values, {});
    std::vector<float> without;
    weighted->fit_weighted(group, first_row,
                           without_outliers(group * group_size(), first_row, values, without), weights);
  }

  void refine(int64_t group, int64_t first_row, MatrixView<const float> values,
              std::span<const float> column_weights) override {
    std::vector<float> without;
    dense_->refine(group, first_row, without_outliers(group * group_size(), first_row, values, without),
                   column_weights);
  }

  void encode(int64_t column, int64_t first_row, MatrixView<const float> values,
              MatrixView<float> decoded) override {
    std::vector<float> without;
    dense_->encode(column, first_row, without_outliers(column, first_row, values, without), decoded);
    for_each_outlier(column, first_row, values.rows(), values.cols(), [&](int64_t c, int64_t r, int64_t at) {
      const uint16_t missing = f16_from_float(values(c, r) - decoded(c, r));
      if (!std::isfinite(float_from_f16(missing))) {
        throw NumericError(text_of("outlier of row ", first_row + r, ", column ", column + c, ": got ",
                                   values(c, r), ", expected at most 65504 beyond the dense value"));
      }
      values_[static_cast<size_t>(at)] = missing;
      decoded(c, r) += float_from_f16(missing);
    });
  }

  PackedTensor finish(int threads) override {
    return with_outliers(dense_->finish(threads), format_.positions, values_);
  }

 private:
  // Calls visit(column - first_column, row - first_row, index) for the outliers among columns x rows.
  template <class Visit>
  void for_each_outlier(int64_t first_column, int64_t first_row, int64_t columns, int64_t rows,
                        const Visit& visit) const {
    if (values_.empty()) return;
    for (int64_t r = 0; r < rows; ++r) {
      const int64_t row = first_row + r;
      const auto begin = format_.positions.begin() + offsets_[static_cast<size_t>(row)];
      const auto end = format_.positions.begin() + offsets_[static_cast<size_t>(row) + 1];
      const int64_t last = row * k_ + first_column + columns;
      for (auto at = std::lower_bound(begin, end, row * k_ + first_column); at != end && *at < last; ++at) {
        visit(*at - row * k_ - first_column, r, at - format_.positions.begin());
      }
    }
  }

  // The values, or a copy of them with 0 for outliers in `copy`.
  MatrixView<const float> without_outliers(int64_t first_column, int64_t first_row,
                                           MatrixView<const float> values, std::vector<float>& copy) const {
    for_each_outlier(first_column, first_row, values.rows(), values.cols(),
                     [&](int64_t c, int64_t r, int64_t) {
                       if (copy.empty()) {
                         copy.reserve(static_cast<size_t>(values.rows() * values.cols()));
                         for (int64_t i = 0; i < values.rows(); ++i) {
                           copy.insert(copy.end(), values.row(i), values.row(i) + values.cols());
                         }
                       }
                       copy[static_cast<size_t>(c * values.cols() + r)] = 0;
                     });
    if (copy.empty()) return values;
    return {copy.data(), values.rows(), values.cols()};
  }

  std::shared_ptr<const Format> self_;  // keeps format_ alive
  const Outliers& format_;
  int64_t k_;
  std::unique_ptr<ColumnEncoder> dense_;
  std::vector<int64_t> offsets_;  // [n + 1], none without columns
  std::vector<uint16_t> values_;  // of each position
};

}  // namespace

std::unique_ptr<ColumnEncoder> make_outlier_encoder(std::shared_ptr<const Format> self,
                                                    const Outliers& format, int64_t n, int64_t k) {
  return std::make_unique<OutlierEncoder>(std::move(self), format, n, k);
}

}  // namespace quantloom
