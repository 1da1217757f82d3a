#include "formats/additive_encoder.hpp"

#include <algorithm>
#include <cmath>

#include "formats/additive_levels.hpp"
#include "formats/additive_sample.hpp"
#include "formats/grouped.hpp"
#include "formats/grouped_encoder.hpp"
#include "formats/shared_scales.hpp"
#include "formats/table_search.hpp"
#include "quantloom/formats/bit_packing.hpp"
#include "quantloom/parallel.hpp"

namespace quantloom {
namespace {

// Of a group of rows.
std::span<const float> levels_of(const Additive& format, const std::vector<float>& levels,
                                 int64_t row_group) {
  const int64_t count = int64_t{1} << format.levels.scale_bits;
  return std::span(levels).subspan(static_cast<size_t>(row_group * count), static_cast<size_t>(count));
}

class AdditiveEncoder final : public ColumnEncoder, public SharedScales {
 public:
  AdditiveEncoder(std::shared_ptr<const Format> self, const Additive& format, int64_t n, int64_t k)
      : self_(std::move(self)),
        format_(format),
        n_(n),
        k_(k),
        group_size_(format.scale_columns(k)),
        groups_(k > 0 ? format.scale_count(k) : 0),
        row_codes_(format.code_count(k)),
        leveled_(k > 0 && format.has_scale_levels(k)),
        search_(format.tables, format.codebooks, format.entries(), format.dim()) {
    static_cast<void>(format.planes(n, k));
    parts_.tables = format.tables;
    parts_.scales.assign(static_cast<size_t>(checked_mul(groups_, format.row_groups(n))), 1.0F);
    parts_.codes.resize(static_cast<size_t>(checked_mul(format.row_groups(n), row_codes_)));
  }

  int64_t columns_per_step() const override { return format_.in_group; }
  int64_t group_count() const override { return groups_; }
  int64_t group_size() const override { return group_size_; }
  bool parameters_span_rows() const override { return false; }
  int64_t rows_per_step() const override { return format_.out_group; }
  bool shares_scales() const override { return true; }

  void fit(int64_t group, int64_t first_row, MatrixView<const float> values,
           std::span<const float> shrink) override {
    const int64_t rows = values.cols();
    const auto count = static_cast<size_t>(ceil_div(rows, format_.out_group));
    std::vector<double> squares(count, 0.0);
    std::vector<GroupRange> ranges(count);
    for (int64_t c = 0; c < values.rows(); ++c) {
      const float* const value = values.row(c);
      for (int64_t r = 0; r < rows; ++r) {
        const auto at = static_cast<size_t>(r / format_.out_group);
        const auto number = static_cast<double>(value[r]);
        squares[at] += number * number;
        ranges[at].low = std::min(ranges[at].low, number);
        ranges[at].high = std::max(ranges[at].high, number);
      }
    }
    for (size_t i = 0; i < count; ++i) {
      if (squares[i] == 0) {
        set_scale(first_row, i, group, leveled_ ? 0.0F : 1.0F);
        continue;
      }
      const int64_t first = static_cast<int64_t>(i) * format_.out_group;
      const int64_t own = std::min(format_.out_group, rows - first);
      double factor = shrink.empty() ? 1.0 : 0.0;
      for (int64_t r = 0; !shrink.empty() && r < own; ++r) {
        factor += static_cast<double>(shrink[static_cast<size_t>(first + r)]) / static_cast<double>(own);
      }
      const double wanted = factor * std::sqrt(squares[i] / static_cast<double>(own * values.rows()));
      const float scale = stored_scale(format_.scale_dtype, wanted);
      require_finite_grid(scale, std::max(search_.outermost(), 1.0F), format_.scale_dtype, wanted, ranges[i],
                          first_row + first, group);
      set_scale(first_row, i, group, scale);
    }
  }

  void encode(int64_t column, int64_t first_row, MatrixView<const float> values,
              MatrixView<float> decoded) override {
    const int64_t rows = values.cols();
    const int64_t width = values.rows();
    const int64_t dim = format_.dim();
    const int64_t count = ceil_div(rows, format_.out_group);
    const int64_t group = column / group_size_;
    // Beyond the matrix nothing is wanted.
    std::vector<float> left(static_cast<size_t>(count * dim), 0.0F);
    std::vector<float> sum(left.size(), 0.0F);
    std::vector<uint16_t> found(static_cast<size_t>(count * format_.codebooks));
    const auto at = [&](int64_t r, int64_t c) {
      return static_cast<size_t>(r / format_.out_group * dim + r % format_.out_group * format_.in_group + c);
    };
    for (int64_t r = 0; r < rows; ++r) {
      const float scale = scale_of(first_row + r, group);
      for (int64_t c = 0; c < width; ++c) left[at(r, c)] = values(c, r) / scale;
    }
    search_.encode({left.data(), count, dim}, format_.in_group, width, sum.data(), found.data());
    for (int64_t i = 0; i < count; ++i) {
      const int64_t row_group = first_row / format_.out_group + i;
      std::copy_n(
          found.data() + i * format_.codebooks, format_.codebooks,
          parts_.codes.data() + row_group * row_codes_ + column / format_.in_group * format_.codebooks);
    }
    for (int64_t r = 0; r < rows; ++r) {
      const float scale = scale_of(first_row + r, group);
      for (int64_t c = 0; c < width; ++c) decoded(c, r) = sum[at(r, c)] * scale;
    }
  }

  PackedTensor finish(int threads) override { return pack_additive(format_, parts_, n_, k_, threads); }

 private:
  float scale_of(int64_t row, int64_t group) const {
    return parts_.scales[static_cast<size_t>(row / format_.out_group * groups_ + group)];
  }
  void set_scale(int64_t first_row, size_t i, int64_t group, float scale) {
    const int64_t row_group = first_row / format_.out_group + static_cast<int64_t>(i);
    if (leveled_) scale = nearest_level(levels_of(format_, format_.scale_levels, row_group), scale);
    parts_.scales[static_cast<size_t>(row_group * groups_ + group)] = scale;
  }

  std::shared_ptr<const Format> self_;  // keeps format_ alive
  const Additive& format_;
  int64_t n_;
  int64_t k_;
  int64_t group_size_;
  int64_t groups_;
  int64_t row_codes_;
  bool leveled_;  // scales are levels of their group of rows
  TableSearch search_;
  AdditiveParts parts_;
};

// The root mean square of what each scale scales, [N, S].
std::vector<double> mean_magnitudes(const Additive& format, const FloatMatrix& w, int threads) {
  const int64_t n = w.rows();
  const int64_t k = w.cols();
  const int64_t count = format.scale_count(k);
  const int64_t width = format.scale_columns(k);
  std::vector<double> magnitudes(static_cast<size_t>(checked_mul(format.row_groups(n), count)));
  parallel_for(format.row_groups(n), threads, [&](int64_t row_group) {
    const int64_t rows = std::min(format.out_group, n - row_group * format.out_group);
    std::vector<float> values(static_cast<size_t>(rows * k));
    for (int64_t r = 0; r < rows; ++r) w.read(row_group * format.out_group + r, 0, k, values.data() + r * k);
    for (int64_t i = 0; i < count; ++i) {
      const int64_t columns = std::min(width, k - i * width);
      double squares = 0;
      for (int64_t r = 0; r < rows; ++r) {
        for (int64_t c = i * width; c < i * width + columns; ++c) {
          squares += static_cast<double>(values[static_cast<size_t>(r * k + c)]) *
                     static_cast<double>(values[static_cast<size_t>(r * k + c)]);
        }
      }
      magnitudes[static_cast<size_t>(row_group * count + i)] =
          std::sqrt(squares / static_cast<double>(rows * columns));
    }
  });
  return magnitudes;
}

// From the root mean squares of what scales scale; zeros have no say.
std::vector<float> fit_scale_levels(const Additive& format, const std::vector<double>& magnitudes, int64_t k,
                                    int threads) {
  const int64_t count = format.scale_count(k);
  std::vector<float> scales;
  scales.reserve(magnitudes.size());
  for (const double magnitude : magnitudes) scales.push_back(stored_scale(format.scale_dtype, magnitude));
  for (int64_t first = 0; first < std::ssize(scales); first += count) {
    const auto own = std::span(scales).subspan(static_cast<size_t>(first), static_cast<size_t>(count));
    const auto counts = [&](size_t i) {
      // What float32 cannot hold is refused when it is fitted.
      return magnitudes[static_cast<size_t>(first) + i] > 0 && std::isfinite(own[i]);
    };
    float any = 1;
    for (size_t i = 0; i < own.size(); ++i) any = counts(i) ? own[i] : any;
    for (size_t i = 0; i < own.size(); ++i) own[i] = counts(i) ? own[i] : any;
  }
  return level_scales(format, scales, k, format.scale_dtype, {}, threads).levels;
}

}  // namespace

std::unique_ptr<ColumnEncoder> make_additive_encoder(std::shared_ptr<const Format> self,
                                                     const Additive& format, int64_t n, int64_t k) {
  return std::make_unique<AdditiveEncoder>(std::move(self), format, n, k);
}

std::vector<float> fit_scale_levels(const Additive& format, const FloatMatrix& w, int threads) {
  return fit_scale_levels(format, mean_magnitudes(format, w, threads), w.cols(), threads);
}

AdditiveParts unpack_additive(const Additive& format, const PackedTensor& packed) {
  AdditiveParts parts;
  parts.tables = read_tables(format, packed);
  const int64_t count = packed.k > 0 ? format.scale_count(packed.k) : 0;
  parts.scales.resize(static_cast<size_t>(format.row_groups(packed.n) * count));
  for (int64_t row = 0; row < format.row_groups(packed.n); ++row) {
    read_scales(format, packed, row, {parts.scales.data() + row * count, static_cast<size_t>(count)});
  }
  const int64_t row_codes = format.code_count(packed.k);
  const int64_t rows = packed.k > 0 ? format.row_groups(packed.n) : 0;
  parts.codes.resize(static_cast<size_t>(rows * row_codes));
  for (int64_t row = 0; row < rows; ++row) {
    unpack_wide_bits(packed_row(packed.plane("codes"), row), format.bits, 0,
                     {parts.codes.data() + row * row_codes, static_cast<size_t>(row_codes)});
  }
  return parts;
}

PackedTensor pack_additive(const Additive& format, const AdditiveParts& parts, int64_t n, int64_t k,
                           int threads) {
  PackedTensor packed;
  // The plane holds the tables; a description is small.
  packed.format = std::make_shared<const Additive>(format.codebooks, format.bits, format.in_group,
                                                   format.out_group, format.scale_group, format.scale_dtype,
                                                   std::span<const float>(), format.levels);
  packed.n = n;
  packed.k = k;
  for (const PlaneSpec& spec : format.planes(n, k))
    packed.planes.emplace(spec.name, Tensor(spec.dtype, spec.shape));
  write_tables(format, parts.tables, packed, threads);
  write_scales(format, parts.scales, packed, threads);
  Tensor& codes = packed.planes.at("codes");
  const int64_t words = codes.shape()[1];
  uint32_t* const code_words = codes.values<uint32_t>().data();
  const int64_t row_codes = format.code_count(k);
  parallel_for(k > 0 ? format.row_groups(n) : 0, threads, [&](int64_t row) {
    pack_wide_bits({parts.codes.data() + row * row_codes, static_cast<size_t>(row_codes)}, format.bits,
                   {code_words + row * words, static_cast<size_t>(words)});
  });
  return packed;
}

std::shared_ptr<const Additive> fit_additive(const Additive& format, const FloatMatrix& w,
                                             const AdditiveFitOptions& options) {
  require_valid(options, w.cols());
  std::vector<float> tables(static_cast<size_t>(format.codebooks * format.entries() * format.dim()), 0.0F);
  std::vector<float> scale_levels;
  if (w.rows() > 0 && w.cols() > 0) {
    const std::vector<double> magnitudes = mean_magnitudes(format, w, options.threads);
    AdditiveSample sample = draw_blocks(format, w.rows(), w.cols(), magnitudes, options);
    if (format.has_scale_levels(w.cols())) {
      scale_levels = fit_scale_levels(format, magnitudes, w.cols(), options.threads);
      for (size_t i = 0; i < magnitudes.size(); ++i) {
        if (!std::isfinite(sample.scales[i])) continue;
        const int64_t row_group = static_cast<int64_t>(i) / format.scale_count(w.cols());
        sample.scales[i] = nearest_level(levels_of(format, scale_levels, row_group), sample.scales[i]);
      }
    }
    const auto count = std::ssize(sample.places);
    const int64_t width = format.scale_columns(w.cols());
    std::vector<float> blocks(static_cast<size_t>(checked_mul(count, format.dim())), 0.0F);
    parallel_for(count, options.threads, [&](int64_t i) {
      const int64_t row_group = sample.places[static_cast<size_t>(i)] / sample.of_row;
      const int64_t first = sample.places[static_cast<size_t>(i)] % sample.of_row * format.in_group;
      const int64_t columns = std::min(format.in_group, w.cols() - first);
      const float scale =
          sample.scales[static_cast<size_t>(row_group * format.scale_count(w.cols()) + first / width)];
      for (int64_t r = 0; r < std::min(format.out_group, w.rows() - row_group * format.out_group); ++r) {
        float* const block = blocks.data() + i * format.dim() + r * format.in_group;
        w.read(row_group * format.out_group + r, first, columns, block);
        for (int64_t c = 0; c < columns; ++c) block[c] /= scale;
      }
    });
    tables = fit_residual_tables({blocks.data(), count, format.dim()}, sample.weights, format.codebooks,
                                 format.entries(), options.sweeps, options.seed, options.threads);
  }
  auto fitted = std::make_shared<Additive>(format.codebooks, format.bits, format.in_group, format.out_group,
                                           format.scale_group, format.scale_dtype, tables, format.levels);
  fitted->scale_levels = std::move(scale_levels);
  return fitted;
}

}  // namespace quantloom
