#include "formats/bcq_encoder.hpp"

#include <algorithm>
#include <cmath>
#include <vector>

#include "formats/bcq_fit.hpp"
#include "formats/grouped.hpp"
#include "formats/weighted_fit.hpp"
#include "quantloom/parallel.hpp"

namespace quantloom {
namespace {

constexpr int64_t kRowsPerPiece = 32;

float rounded_to(DType dtype, float value) {
  if (dtype == DType::f16) return float_from_f16(f16_from_float(value));
  return dtype == DType::bf16 ? float_from_bf16(bf16_from_float(value)) : value;
}

void put(Tensor& plane, int64_t at, float value) {
  const auto i = static_cast<size_t>(at);
  switch (plane.dtype()) {
    case DType::f16:
      plane.values<uint16_t>()[i] = f16_from_float(value);
      return;
    case DType::bf16:
      plane.values<uint16_t>()[i] = bf16_from_float(value);
      return;
    default:
      plane.values<float>()[i] = value;
  }
}

class BcqEncoder final : public ColumnEncoder, public WeightedFit {
 public:
  BcqEncoder(std::shared_ptr<const Format> self, const Bcq& format, int64_t n, int64_t k,
             std::span<const int32_t> group_of_column)
      : self_(std::move(self)),
        format_(format),
        specs_(format.planes(n, k)),
        n_(n),
        k_(k),
        groups_(format.group_count(k)),
        group_size_(std::min(format.columns_per_group(k), std::max<int64_t>(k, 1))),
        entries_(int64_t{1} << format.bits) {
    group_of_column_ = permuted_groups(group_of_column, k, groups_, group_size_);
    const int64_t cells = checked_mul(groups_, n);
    grids_.resize(static_cast<size_t>(cells));
    values_.resize(static_cast<size_t>(checked_mul(cells, entries_)));
    order_.resize(values_.size());
    codes_.resize(static_cast<size_t>(checked_mul(n, k)));
  }

  int64_t columns_per_step() const override { return 1; }
  int64_t group_count() const override { return groups_; }
  int64_t group_size() const override { return group_size_; }
  bool parameters_span_rows() const override { return false; }

  void fit(int64_t group, int64_t first_row, MatrixView<const float> values,
           std::span<const float> shrink) override {
    fit_rows(group, first_row, values, shrink, {});
  }
  void fit_weighted(int64_t group, int64_t first_row, MatrixView<const float> values,
                    std::span<const float> weights) override {
    fit_rows(group, first_row, values, {}, weights);
  }

  void encode(int64_t column, int64_t first_row, MatrixView<const float> values,
              MatrixView<float> decoded) override {
    const int64_t group =
        group_of_column_.empty() ? column / group_size_ : group_of_column_[static_cast<size_t>(column)];
    for (int64_t r = 0; r < values.cols(); ++r) {
      const int64_t row = first_row + r;
      const int64_t begin = (group * n_ + row) * entries_;
      const std::span<const float> table(values_.data() + begin, static_cast<size_t>(entries_));
      const int64_t position = bcq::nearest_position(table, format_.bits, values(0, r));
      decoded(0, r) = table[static_cast<size_t>(position)];
      codes_[static_cast<size_t>(column * n_ + row)] = order_[static_cast<size_t>(begin + position)];
    }
  }

  PackedTensor finish(int threads) override {
    PackedTensor packed;
    packed.format = self_;
    packed.n = n_;
    packed.k = k_;
    for (const PlaneSpec& spec : specs_) {
      if (!spec.optional) packed.planes.emplace(spec.name, Tensor(spec.dtype, spec.shape));
    }
    Tensor& signs = packed.planes.at("signs");
    const int64_t words = signs.shape()[2];
    uint32_t* const all = signs.values<uint32_t>().data();
    parallel_for(k_ > 0 ? ceil_div(n_, kRowsPerPiece) : 0, threads, [&](int64_t piece) {
      const int64_t first = piece * kRowsPerPiece;
      const int64_t last = std::min(n_, first + kRowsPerPiece);
      for (int64_t column = 0; column < k_; ++column) {
        const uint8_t* code = codes_.data() + column * n_;
        for (int64_t row = first; row < last; ++row) {
          for (int p = 0; p < format_.bits; ++p) {
            all[(p * n_ + row) * words + column / 32] |= static_cast<uint32_t>(code[row] >> p & 1)
                                                         << (column % 32);
          }
        }
      }
    });
    Tensor& scales = packed.planes.at("scales");
    Tensor* const offsets = format_.offset ? &packed.planes.at("offsets") : nullptr;
    for (int64_t row = 0; row < n_; ++row) {
      for (int64_t g = 0; g < groups_; ++g) {
        const bcq::Grid& grid = grids_[static_cast<size_t>(g * n_ + row)];
        for (int p = 0; p < format_.bits; ++p) put(scales, (p * n_ + row) * groups_ + g, grid.scale[p]);
        if (offsets != nullptr) put(*offsets, row * groups_ + g, grid.offset);
      }
    }
    if (!group_of_column_.empty()) {
      Tensor index(DType::i32, {k_});
      std::copy(group_of_column_.begin(), group_of_column_.end(), index.values<int32_t>().begin());
      packed.planes.emplace("group_index", std::move(index));
    }
    return packed;
  }

 private:
  void fit_rows(int64_t group, int64_t first_row, MatrixView<const float> values,
                std::span<const float> shrink, std::span<const float> weights) {
    std::vector<float> x(static_cast<size_t>(values.rows()));
    for (int64_t r = 0; r < values.cols(); ++r) {
      for (int64_t c = 0; c < values.rows(); ++c) x[static_cast<size_t>(c)] = values(c, r);
      bcq::Grid grid;
      grid.bits = format_.bits;
      grid.has_offset = format_.offset;
      bcq::fit(grid, x, weights, {format_.rounds, format_.greedy});
      const float factor = shrink.empty() ? 1.0F : shrink[static_cast<size_t>(r)];
      float outermost = std::abs(grid.offset);
      for (int p = 0; p < format_.bits; ++p) {
        grid.scale[p] = rounded_to(format_.scale_dtype, grid.scale[p] * factor);
        outermost += grid.scale[p];
      }
      grid.offset = rounded_to(format_.scale_dtype, grid.offset * factor);
      const int64_t row = first_row + r;
      if (!std::isfinite(outermost) || !std::isfinite(grid.offset)) {
        throw NumericError(text_of("scale of row ", row, ", group ", group, ": got one beyond ",
                                   std::string(name_of(format_.scale_dtype)),
                                   ", expected a grid that stays finite; store the scales as bfloat16 or "
                                   "float32, or divide the weights first"));
      }
      const int64_t cell = group * n_ + row;
      grids_[static_cast<size_t>(cell)] = grid;
      bcq::sorted_values(grid, std::span(values_).subspan(static_cast<size_t>(cell * entries_)),
                         std::span(order_).subspan(static_cast<size_t>(cell * entries_)));
    }
  }

  std::shared_ptr<const Format> self_;  // keeps format_ alive
  const Bcq& format_;
  std::vector<PlaneSpec> specs_;
  int64_t n_;
  int64_t k_;
  int64_t groups_;
  int64_t group_size_;
  int64_t entries_;                       // values of a group's grid
  std::vector<int32_t> group_of_column_;  // empty for consecutive groups
  std::vector<bcq::Grid> grids_;          // [groups, n]
  std::vector<float> values_;             // [groups, n, entries], rising
  std::vector<uint8_t> order_;            // the codes of these values
  std::vector<uint8_t> codes_;            // [k, n]
};

}  // namespace

std::unique_ptr<ColumnEncoder> make_bcq_encoder(std::shared_ptr<const Format> self, const Bcq& format,
                                                int64_t n, int64_t k,
                                                std::span<const int32_t> group_of_column) {
  return std::make_unique<BcqEncoder>(std::move(self), format, n, k, group_of_column);
}

}  // namespace quantloom
