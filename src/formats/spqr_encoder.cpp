#include "formats/spqr_encoder.hpp"

#include <algorithm>
#include <array>
#include <cmath>
#include <limits>

#include "formats/grouped.hpp"
#include "formats/row_packing.hpp"
#include "quantloom/formats/bit_packing.hpp"
#include "quantloom/parallel.hpp"

namespace quantloom {
namespace {

// Adding this and subtracting it again rounds |x| < 2^22 to an integer, ties to even.
constexpr float kRoundingShift = 0x1.8p23F;
// No step is below the largest magnitude over this: zeros of grids then keep their precision in float16.
constexpr double kFinestStep = 1.0 / 1024;
// Numbers of this many bits at most are searched whole; of others, codes so far from the present one.
constexpr int kSearchedBits = 4;
constexpr std::array<int, 15> kSearchedOffsets = {0, -1, 1, -2, 2, -4, 4, -8, 8, -16, 16, -32, 32, -64, 64};

// The numbers step * (code - zero) for codes from 0 to `levels`.
struct Grid {
  float step = 1;
  float zero = 0;
  float at(int code) const { return step * (static_cast<float>(code) - zero); }
};

float nearest_level(float steps, float levels) {
  // In this order a NaN becomes 0.
  steps = steps > 0.0F ? steps : 0.0F;
  steps = steps < levels ? steps : levels;
  return (steps + kRoundingShift) - kRoundingShift;
}

// The parameters of one kind: scales or zero points.
class Parameters {
 public:
  Parameters(int bits, int64_t groups, int64_t n, int64_t block)
      : bits_(bits),
        levels_(static_cast<float>((1 << bits) - 1)),
        n_(n),
        block_(block),
        blocks_(ceil_div(n, block)),
        grids_(static_cast<size_t>(checked_mul(groups, blocks_))),
        codes_(static_cast<size_t>(checked_mul(groups, n))),
        values_(codes_.size()) {}

  const float* values(int64_t group, int64_t row) const { return values_.data() + group * n_ + row; }
  const Grid& grid(int64_t group, int64_t row) const {
    return grids_[static_cast<size_t>(group * blocks_ + row / block_)];
  }

  // Spans a grid over what the rows from `row` on, of one block, want; stores the nearest codes.
  void fit(int64_t group, int64_t row, std::span<const float> wanted, const char* name) {
    const auto [least, most] = std::minmax_element(wanted.begin(), wanted.end());
    const double low = *least;
    const double high = *most;
    const double largest = std::max(std::abs(low), std::abs(high));
    const double step =
        std::max({(high - low) / static_cast<double>(levels_), largest * kFinestStep, 0x1p-24});
    Grid& grid = grids_[static_cast<size_t>(group * blocks_ + row / block_)];
    grid.step = step > 65504 ? std::numeric_limits<float>::infinity()
                             : float_from_f16(f16_from_float(static_cast<float>(step)));
    if (!std::isfinite(grid.step)) {
      throw NumericError(text_of(name, " of rows ", row, " to ", row + std::ssize(wanted) - 1, ", group ",
                                 group, ": got ", low, " to ", high,
                                 ", expected steps of at most 65504; divide the weights first"));
    }
    grid.zero = float_from_f16(f16_from_float(static_cast<float>(-low / static_cast<double>(grid.step))));
    for (size_t r = 0; r < wanted.size(); ++r) {
      store(group, row + static_cast<int64_t>(r),
            static_cast<int>(nearest_level(wanted[r] / grid.step + grid.zero, levels_)));
    }
  }

  void store(int64_t group, int64_t row, int code) {
    const auto at = static_cast<size_t>(group * n_ + row);
    codes_[at] = static_cast<uint8_t>(code);
    values_[at] = grid(group, row).at(code);
  }

  // The codes that a search tries: `candidate` from 0 to candidate_count() - 1.
  int candidate_count() const {
    return bits_ <= kSearchedBits ? 1 << bits_ : static_cast<int>(kSearchedOffsets.size());
  }
  int candidate(int64_t group, int64_t row, int index) const {
    if (bits_ <= kSearchedBits) return index;
    const int code = codes_[static_cast<size_t>(group * n_ + row)];
    return std::clamp(code + kSearchedOffsets[static_cast<size_t>(index)], 0, static_cast<int>(levels_));
  }

  void pack(Tensor& codes, Tensor& grids) const {
    if (codes.element_count() == 0) return;
    const int64_t words = codes.shape()[1];
    for (int64_t g = 0; g < codes.shape()[0]; ++g) {
      pack_bits(std::span(codes_).subspan(static_cast<size_t>(g * n_), static_cast<size_t>(n_)), bits_,
                codes.values<uint32_t>().subspan(static_cast<size_t>(g * words), static_cast<size_t>(words)));
    }
    const auto numbers = grids.values<uint16_t>();
    for (size_t i = 0; i < grids_.size(); ++i) {
      numbers[2 * i] = f16_from_float(grids_[i].step);
      numbers[2 * i + 1] = f16_from_float(grids_[i].zero);
    }
  }

 private:
  int bits_;
  float levels_;
  int64_t n_;
  int64_t block_;
  int64_t blocks_;
  std::vector<Grid> grids_;     // [groups, blocks]
  std::vector<uint8_t> codes_;  // [groups, n]
  std::vector<float> values_;   // [groups, n]: what the codes stand for
};

// Codes and decoded values of `rows` rows of one column.
void encode_steps(const float* __restrict value, const float* __restrict scale, const float* __restrict zero,
                  float levels, int64_t rows, float* __restrict decoded, uint8_t* __restrict code) {
  for (int64_t r = 0; r < rows; ++r) {
    const float level = nearest_level(value[r] / scale[r] + zero[r], levels);
    decoded[r] = scale[r] * (level - zero[r]);
    code[r] = static_cast<uint8_t>(static_cast<int32_t>(level));
  }
}

// error[r] += weight * (value[r] - nearest code's value)^2; inverse: 1 / scale, 0 where scale is 0.
void add_errors(const float* __restrict value, const float* __restrict scale, const float* __restrict inverse,
                const float* __restrict zero, float levels, float weight, int64_t rows,
                float* __restrict error) {
  for (int64_t r = 0; r < rows; ++r) {
    const float level = nearest_level(value[r] * inverse[r] + zero[r], levels);
    const float missing = scale[r] * (level - zero[r]) - value[r];
    error[r] += weight * (missing * missing);
  }
}

class SpqrEncoder final : public ColumnEncoder {
 public:
  SpqrEncoder(std::shared_ptr<const Format> self, const Spqr& format, int64_t n, int64_t k,
              std::span<const int32_t> group_of_column)
      : self_(std::move(self)),
        format_(format),
        specs_(format.planes(n, k)),
        n_(n),
        k_(k),
        levels_(static_cast<float>((1 << format.bits) - 1)),
        scales_(format.scale_bits, format.group_count(k), n, format.block),
        zeros_(format.zero_bits, format.group_count(k), n, format.block),
        codes_(static_cast<size_t>(checked_mul(checked_pad(n, kRowTile), k))) {
    group_of_column_ = permuted_groups(group_of_column, k, group_count(), group_size());
  }

  int64_t columns_per_step() const override { return 1; }
  int64_t group_count() const override { return format_.group_count(k_); }
  int64_t group_size() const override { return format_.columns_per_group(k_); }
  bool parameters_span_rows() const override { return false; }
  int64_t rows_per_step() const override { return std::min(format_.block, std::max<int64_t>(n_, 1)); }

  void fit(int64_t group, int64_t first_row, MatrixView<const float> values,
           std::span<const float> shrink) override {
    const int64_t rows = values.cols();
    require_whole_blocks(first_row, rows);
    std::vector<float> low(static_cast<size_t>(rows), std::numeric_limits<float>::infinity());
    std::vector<float> high(low.size(), -std::numeric_limits<float>::infinity());
    for (int64_t c = 0; c < values.rows(); ++c) {
      const float* value = values.row(c);
      for (size_t r = 0; r < low.size(); ++r) {
        low[r] = value[r] < low[r] ? value[r] : low[r];
        high[r] = value[r] > high[r] ? value[r] : high[r];
      }
    }
    // In float64 until a number is stored: high - low may overflow float32.
    const double levels = levels_;
    std::vector<float> wanted(low.size());
    const auto middle = [&](size_t r) {
      return (static_cast<double>(low[r]) + static_cast<double>(high[r])) / 2;
    };
    for (size_t r = 0; r < low.size(); ++r) {
      const double factor = shrink.empty() ? 1.0 : static_cast<double>(shrink[r]);
      const double range = factor * (static_cast<double>(high[r]) - static_cast<double>(low[r]));
      const double steps = std::max(range, std::abs(middle(r)) / kFarthestMiddle) / levels;
      wanted[r] = static_cast<float>(std::min<double>(steps, std::numeric_limits<float>::max()));
    }
    for_each_block(first_row, rows, [&](int64_t row, int64_t begin, int64_t count) {
      scales_.fit(group, row, part(wanted, begin, count), "scales");
    });
    const float* scale = scales_.values(group, first_row);
    for (size_t r = 0; r < low.size(); ++r) {
      // Of a scale of 0 all codes are 0; elsewhere the middle of the codes is that of the values.
      const double shift = scale[r] > 0 ? middle(r) / static_cast<double>(scale[r]) : 0.0;
      const double farthest = kFarthestMiddle * levels;
      wanted[r] = static_cast<float>(levels / 2 - std::clamp(shift, -farthest, farthest));
    }
    for_each_block(first_row, rows, [&](int64_t row, int64_t begin, int64_t count) {
      zeros_.fit(group, row, part(wanted, begin, count), "zero points");
    });
  }

  void refine(int64_t group, int64_t first_row, MatrixView<const float> values,
              std::span<const float> column_weights) override {
    const int64_t rows = values.cols();
    require_whole_blocks(first_row, rows);
    const auto count = static_cast<size_t>(rows);
    std::vector<int> best_scale(count);
    std::vector<int> best_zero(count);
    std::vector<int> scale_codes(count);
    std::vector<int> zero_codes(count);
    std::vector<float> least(count, std::numeric_limits<float>::infinity());
    std::vector<float> scale(count);
    std::vector<float> inverse(count);
    std::vector<float> zero(count);
    std::vector<float> error(count);
    for (int s = 0; s < scales_.candidate_count(); ++s) {
      for (size_t r = 0; r < count; ++r) {
        const int64_t row = first_row + static_cast<int64_t>(r);
        scale_codes[r] = scales_.candidate(group, row, s);
        scale[r] = scales_.grid(group, row).at(scale_codes[r]);
        inverse[r] = scale[r] > 0 ? 1 / scale[r] : 0.0F;
      }
      for (int z = 0; z < zeros_.candidate_count(); ++z) {
        for (size_t r = 0; r < count; ++r) {
          const int64_t row = first_row + static_cast<int64_t>(r);
          zero_codes[r] = zeros_.candidate(group, row, z);
          zero[r] = zeros_.grid(group, row).at(zero_codes[r]);
        }
        std::fill(error.begin(), error.end(), 0.0F);
        for (int64_t c = 0; c < values.rows(); ++c) {
          add_errors(values.row(c), scale.data(), inverse.data(), zero.data(), levels_,
                     column_weights[static_cast<size_t>(c)], rows, error.data());
        }
        for (size_t r = 0; r < count; ++r) {
          if (!(error[r] < least[r])) continue;
          least[r] = error[r];
          best_scale[r] = scale_codes[r];
          best_zero[r] = zero_codes[r];
        }
      }
    }
    for (size_t r = 0; r < count; ++r) {
      if (!std::isfinite(least[r])) continue;  // errors beyond float32: as fitted
      scales_.store(group, first_row + static_cast<int64_t>(r), best_scale[r]);
      zeros_.store(group, first_row + static_cast<int64_t>(r), best_zero[r]);
    }
  }

  void encode(int64_t column, int64_t first_row, MatrixView<const float> values,
              MatrixView<float> decoded) override {
    const int64_t group =
        group_of_column_.empty() ? column / group_size() : group_of_column_[static_cast<size_t>(column)];
    const int64_t end = first_row + values.cols();
    for (int64_t row = first_row; row < end;) {
      const int64_t lane = row % kRowTile;
      const int64_t rows = std::min(kRowTile - lane, end - row);
      encode_steps(values.row(0) + (row - first_row), scales_.values(group, row), zeros_.values(group, row),
                   levels_, rows, decoded.row(0) + (row - first_row),
                   codes_.data() + (row / kRowTile * k_ + column) * kRowTile + lane);
      row += rows;
    }
  }

  PackedTensor finish(int threads) override {
    PackedTensor packed{self_, n_, k_, {}};
    for (const PlaneSpec& spec : specs_) {
      if (!spec.optional) packed.planes.emplace(spec.name, Tensor(spec.dtype, spec.shape));
    }
    Tensor& codes = packed.planes.at("codes");
    const int64_t words = codes.shape()[1];
    uint32_t* code_words = codes.values<uint32_t>().data();
    parallel_for(k_ > 0 ? ceil_div(n_, kRowTile) : 0, threads, [&](int64_t tile) {
      const int64_t first = tile * kRowTile;
      pack_row_tile(codes_.data() + first * k_, k_, format_.bits, std::min(kRowTile, n_ - first),
                    code_words + first * words, words);
    });
    scales_.pack(packed.planes.at("scales"), packed.planes.at("scale_grids"));
    zeros_.pack(packed.planes.at("zeros"), packed.planes.at("zero_grids"));
    if (!group_of_column_.empty()) {
      Tensor index(DType::i32, {k_});
      std::ranges::copy(group_of_column_, index.values<int32_t>().begin());
      packed.planes.emplace("group_index", std::move(index));
    }
    return packed;
  }

 private:
  // How far the middle of a row's grid may lie from 0, in ranges of the grid. A row whose values lie close
  // together but far from 0 would else coarsen the grid of zero points of its whole block.
  static constexpr double kFarthestMiddle = 1.5;

  static std::span<const float> part(const std::vector<float>& values, int64_t begin, int64_t count) {
    return std::span(values).subspan(static_cast<size_t>(begin), static_cast<size_t>(count));
  }

  void require_whole_blocks(int64_t first_row, int64_t rows) const {
    const int64_t end = first_row + rows;
    if (first_row % format_.block != 0 || (end % format_.block != 0 && end != n_)) {
      throw InvalidArgument("values", text_of("rows ", first_row, " to ", end - 1),
                            text_of("whole blocks of ", format_.block, " rows"));
    }
  }

  // Calls visit(row, row - first_row, rows of the block).
  template <class Visit>
  void for_each_block(int64_t first_row, int64_t rows, const Visit& visit) const {
    const int64_t step = rows_per_step();
    for (int64_t begin = 0; begin < rows; begin += step) {
      visit(first_row + begin, begin, std::min(step, rows - begin));
    }
  }

  std::shared_ptr<const Format> self_;  // keeps format_ alive
  const Spqr& format_;
  std::vector<PlaneSpec> specs_;
  int64_t n_;
  int64_t k_;
  float levels_;  // the largest code
  Parameters scales_;
  Parameters zeros_;
  std::vector<int32_t> group_of_column_;  // empty for consecutive groups
  std::vector<uint8_t> codes_;            // [ceil(n / kRowTile), k, kRowTile]
};

}  // namespace

std::unique_ptr<ColumnEncoder> make_spqr_encoder(std::shared_ptr<const Format> self, const Spqr& format,
                                                 int64_t n, int64_t k,
                                                 std::span<const int32_t> group_of_column) {
  return std::make_unique<SpqrEncoder>(std::move(self), format, n, k, group_of_column);
}

}  // namespace quantloom
