#include "formats/trellis_encoder.hpp"

#include <algorithm>

#include "formats/trellis_basis.hpp"
#include "formats/trellis_codes.hpp"
#include "formats/trellis_search.hpp"
#include "quantloom/error.hpp"

namespace quantloom {
namespace {

using trellis::kRingLength;
using trellis::kTileSide;

class TrellisEncoder final : public ColumnEncoder {
 public:
  TrellisEncoder(std::shared_ptr<const Format> self, const Trellis& format, int64_t n, int64_t k, bool unit)
      : self_(std::move(self)),
        format_(format),
        n_(n),
        k_(k),
        unit_(unit),
        target_(format.codebook.rms() * trellis_best_ratio(format.half_bits, format.codebook.code)),
        specs_(format.planes(n, k)),
        codes_(specs_[0].dtype, specs_[0].shape),
        scales_(trellis::unit_scales(k > 0 ? n : 0, n > 0 ? k : 0)),
        values_(format.codebook.values()),
        rings_(format.codebook, format.shape()) {}

  int64_t columns_per_step() const override { return format_.size_unit(); }
  int64_t group_count() const override { return k_ > 0 ? 1 : 0; }
  int64_t group_size() const override { return std::max<int64_t>(k_, 1); }
  bool parameters_span_rows() const override { return format_.rotation > 0 && !unit_; }

  void fit(int64_t /*group*/, int64_t first_row, MatrixView<const float> values,
           std::span<const float> shrink) override {
    if (unit_) return;
    if (format_.rotation > 0) {
      trellis::fit_both(values, shrink.empty() ? 1.0F : shrink[0], target_, scales_);
    } else {
      trellis::fit_rows(values, first_row, shrink, target_, scales_);
    }
  }

  void encode(int64_t column, int64_t first_row, MatrixView<const float> values,
              MatrixView<float> decoded) override {
    const int64_t side = format_.size_unit();
    const auto whole = [&](int64_t first, int64_t count, int64_t size) {
      return first % side == 0 && (count % side == 0 || first + count == size);
    };
    if (values.rows() > side || !whole(column, values.rows(), k_) || !whole(first_row, values.cols(), n_)) {
      throw InvalidArgument("columns",
                            text_of("[", column, ", ", column + values.rows(), ") of rows [", first_row, ", ",
                                    first_row + values.cols(), ")"),
                            text_of("whole blocks of ", side, " x ", side));
    }
    for (int64_t row = 0; row < values.cols(); row += side) {
      const int64_t rows = std::min(side, values.cols() - row);
      encode_block(column, first_row + row, values.block(0, row, values.rows(), rows),
                   decoded.block(0, row, values.rows(), rows));
    }
  }

  PackedTensor finish(int /*threads*/) override {
    PackedTensor packed;
    packed.format = self_;
    packed.n = n_;
    packed.k = k_;
    packed.planes.emplace("codes", codes_);
    for (const PlaneSpec& spec : specs_) {
      if (spec.name == "codes") continue;
      Tensor plane(spec.dtype, spec.shape);
      const std::vector<uint16_t>& from = spec.name == "input_scales"    ? scales_.input
                                          : spec.name == "output_scales" ? scales_.output
                                                                         : format_.codebook.table;
      std::ranges::copy(from, plane.values<uint16_t>().begin());
      packed.planes.emplace(spec.name, std::move(plane));
    }
    return packed;
  }

 private:
  // One block of at most size_unit() columns and rows; what a ragged one lacks is coded as zeros.
  void encode_block(int64_t column, int64_t row, MatrixView<const float> values, MatrixView<float> decoded) {
    const int64_t side = format_.size_unit();
    std::vector<float> storage(static_cast<size_t>(side * side), 0.0F);
    const MatrixView<float> block(storage.data(), side, side);
    for (int64_t c = 0; c < values.rows(); ++c) {
      const float input = scale(scales_.input, column + c);
      for (int64_t r = 0; r < values.cols(); ++r) {
        const float both = input * scale(scales_.output, row + r);
        block(c, r) = both == 0 ? 0 : values(c, r) / both;
      }
    }
    rotate(block);
    encode_tiles(column, row, block);
    rotate(block);  // inputs first, as Trellis::decode() does: the same rounding
    for (int64_t c = 0; c < values.rows(); ++c) {
      const float input = scale(scales_.input, column + c);
      for (int64_t r = 0; r < values.cols(); ++r) {
        decoded(c, r) = scale(scales_.output, row + r) * (block(c, r) * input);
      }
    }
  }

  // Replaces each tile by what its ring decodes to.
  void encode_tiles(int64_t column, int64_t row, MatrixView<float> block) {
    const TrellisShape& shape = rings_.shape();
    const int64_t across = block.cols() / kTileSide;
    const int64_t tiles = block.rows() / kTileSide * across;
    std::vector<float> targets(static_cast<size_t>(tiles * kRingLength));
    std::vector<uint32_t> states(static_cast<size_t>(tiles * shape.steps()));
    const auto each = [&](const auto& visit) {
      for (int64_t t = 0; t < tiles; ++t) {
        for (int p = 0; p < kRingLength; ++p) {
          float& value = block(t / across * kTileSide + trellis::input_of(p),
                               t % across * kTileSide + trellis::output_of(p));
          visit(t * kRingLength + p, value);
        }
      }
    };
    each([&](int64_t at, float& value) { targets[static_cast<size_t>(at)] = value; });
    rings_.encode({targets.data(), tiles, kRingLength}, {states.data(), tiles, shape.steps()},
                  TrellisSearch::normal, 1);
    const int64_t words = shape.words();
    for (int64_t t = 0; t < tiles; ++t) {
      const int64_t tile =
          (column / kTileSide + t / across) * codes_.shape()[1] + row / kTileSide + t % across;
      trellis::pack_ring(shape, states.data() + t * shape.steps(),
                         codes_.values<uint32_t>().data() + tile * words);
    }
    const int64_t per_step = shape.weights_per_step;
    each([&](int64_t at, float& value) {
      value = values_[static_cast<size_t>(int64_t{states[static_cast<size_t>(at / per_step)]} * per_step +
                                          at % per_step)];
    });
  }

  void rotate(MatrixView<float> block) const {
    if (format_.rotation == 0) return;
    trellis::rotate_rows(block);
    trellis::rotate_columns(block);
  }

  static float scale(const std::vector<uint16_t>& scales, int64_t index) {
    return float_from_f16(scales[static_cast<size_t>(index)]);
  }

  std::shared_ptr<const Format> self_;  // keeps format_ alive
  const Trellis& format_;
  int64_t n_;
  int64_t k_;
  bool unit_;
  double target_;  // RMS of what rings code
  std::vector<PlaneSpec> specs_;
  Tensor codes_;
  trellis::Scales scales_;
  std::vector<float> values_;
  trellis::RingEncoder rings_;
};

}  // namespace

std::unique_ptr<ColumnEncoder> make_trellis_encoder(std::shared_ptr<const Format> self, const Trellis& format,
                                                    int64_t n, int64_t k, bool unit_scales) {
  return std::make_unique<TrellisEncoder>(std::move(self), format, n, k, unit_scales);
}

}  // namespace quantloom
