#include "formats/vector_encoder.hpp"

#include <algorithm>
#include <cmath>

#include "formats/grouped.hpp"
#include "formats/grouped_encoder.hpp"
#include "formats/table_search.hpp"
#include "quantloom/formats/bit_packing.hpp"
#include "quantloom/parallel.hpp"
#include "quantloom/random.hpp"

namespace quantloom {
namespace {

class VectorEncoder final : public ColumnEncoder {
 public:
  VectorEncoder(std::shared_ptr<const Format> self, const VectorCodebook& format, int64_t n, int64_t k)
      : self_(std::move(self)),
        format_(format),
        specs_(format.planes(n, k)),
        n_(n),
        k_(k),
        per_tensor_(format.group_size == ScaledFormat::kPerTensor),
        groups_(per_tensor_ ? 1 : format.group_count(k)),
        // A group that is the whole row is as long as its vectors, so that each step is a whole vector.
        group_size_(std::min(format.columns_per_group(k), std::max<int64_t>(k, 1))),
        row_codes_(format.code_count(k)),
        search_(format.table, format.codebooks, format.entries, format.dim) {
    scales_.assign(static_cast<size_t>(per_tensor_ ? 1 : checked_mul(groups_, n)), 1.0F);
    codes_.resize(static_cast<size_t>(checked_mul(n, row_codes_)));
  }

  int64_t columns_per_step() const override { return format_.dim; }
  int64_t group_count() const override { return groups_; }
  int64_t group_size() const override { return group_size_; }
  bool parameters_span_rows() const override { return per_tensor_; }

  void fit(int64_t group, int64_t first_row, MatrixView<const float> values,
           std::span<const float> shrink) override {
    const auto rows = static_cast<size_t>(values.cols());
    std::vector<GroupRange> ranges(rows);
    for (int64_t c = 0; c < values.rows(); ++c) {
      const float* const value = values.row(c);
      for (size_t r = 0; r < rows; ++r) {
        ranges[r].low = std::min(ranges[r].low, static_cast<double>(value[r]));
        ranges[r].high = std::max(ranges[r].high, static_cast<double>(value[r]));
      }
    }
    if (per_tensor_) {
      GroupRange whole;
      for (const GroupRange& range : ranges) {
        whole.low = std::min(whole.low, range.low);
        whole.high = std::max(whole.high, range.high);
      }
      scales_[0] = scale_of(whole, shrink.empty() ? 1.0 : shrink[0], 0, 0);
      return;
    }
    for (size_t r = 0; r < rows; ++r) {
      const int64_t row = first_row + static_cast<int64_t>(r);
      scales_[static_cast<size_t>(group * n_ + row)] =
          scale_of(ranges[r], shrink.empty() ? 1.0 : shrink[r], row, group);
    }
  }

  void encode(int64_t column, int64_t first_row, MatrixView<const float> values,
              MatrixView<float> decoded) override {
    const int64_t rows = values.cols();
    const int64_t width = values.rows();
    const int64_t dim = format_.dim;
    const int64_t group = column / group_size_;
    std::vector<float> left(static_cast<size_t>(rows * dim), 0.0F);  // beyond a row's end: nothing is wanted
    std::vector<float> sum(left.size(), 0.0F);
    std::vector<uint16_t> found(static_cast<size_t>(rows * format_.codebooks));
    for (int64_t r = 0; r < rows; ++r) {
      const float scale = scale_at(group, first_row + r);
      for (int64_t c = 0; c < width; ++c) left[static_cast<size_t>(r * dim + c)] = values(c, r) / scale;
    }
    search_.encode({left.data(), rows, dim}, dim, width, sum.data(), found.data());
    for (int64_t r = 0; r < rows; ++r) {
      std::copy_n(found.data() + r * format_.codebooks, format_.codebooks,
                  codes_.data() + (first_row + r) * row_codes_ + column / dim * format_.codebooks);
    }
    for (int64_t r = 0; r < rows; ++r) {
      const float scale = scale_at(group, first_row + r);
      for (int64_t c = 0; c < width; ++c) decoded(c, r) = sum[static_cast<size_t>(r * dim + c)] * scale;
    }
  }

  PackedTensor finish(int threads) override {
    PackedTensor packed;
    // The plane holds the tables; a description is small.
    packed.format = std::make_shared<const VectorCodebook>(format_.entries, format_.dim, format_.group_size,
                                                           format_.scale_dtype, format_.codebooks);
    packed.n = n_;
    packed.k = k_;
    for (const PlaneSpec& spec : specs_) packed.planes.emplace(spec.name, Tensor(spec.dtype, spec.shape));
    const auto tables = packed.planes.at("codebook").values<uint16_t>();
    std::ranges::transform(format_.table, tables.begin(), f16_from_float);
    Tensor& scales = packed.planes.at("scales");
    for (int64_t i = 0; i < scales.element_count(); ++i) {
      store_scale(scales, i,
                  per_tensor_ ? scales_[0] : scales_[static_cast<size_t>(i % groups_ * n_ + i / groups_)]);
    }
    Tensor& codes = packed.planes.at("codes");
    const int64_t words = codes.shape()[1];
    uint32_t* const code_words = codes.values<uint32_t>().data();
    parallel_for(k_ > 0 ? n_ : 0, threads, [&](int64_t row) {
      pack_wide_bits({codes_.data() + row * row_codes_, static_cast<size_t>(row_codes_)}, format_.bits,
                     {code_words + row * words, static_cast<size_t>(words)});
    });
    return packed;
  }

 private:
  float scale_at(int64_t group, int64_t row) const {
    return scales_[static_cast<size_t>(per_tensor_ ? 0 : group * n_ + row)];
  }

  float scale_of(const GroupRange& range, double shrink, int64_t row, int64_t group) const {
    const double largest = std::max(-range.low, range.high);
    if (largest == 0) return 1.0F;
    const float scale = stored_scale(format_.scale_dtype, shrink * largest);
    require_finite_grid(scale, std::max(search_.outermost(), 1.0F), format_.scale_dtype, shrink * largest,
                        range, row, group);
    return scale;
  }

  std::shared_ptr<const Format> self_;  // keeps format_ alive
  const VectorCodebook& format_;
  std::vector<PlaneSpec> specs_;
  int64_t n_;
  int64_t k_;
  bool per_tensor_;
  int64_t groups_;
  int64_t group_size_;
  int64_t row_codes_;
  TableSearch search_;
  std::vector<float> scales_;    // [group][row]
  std::vector<uint16_t> codes_;  // [row][vector][codebook]
};

// Vectors w / scale, and the squares of their scales over the largest one's.
struct Sample {
  std::vector<float> vectors;
  std::vector<float> weights;
};

// One vector of each of `count` even parts of all.
Sample sample_vectors(const VectorCodebook& format, const FloatMatrix& w, int64_t most, int threads) {
  const int64_t n = w.rows();
  const int64_t k = w.cols();
  const int64_t dim = format.dim;
  const bool per_tensor = format.group_size == ScaledFormat::kPerTensor;
  // Where there are whole vectors, those that reach beyond a row's end do not count.
  const int64_t of_row = std::max<int64_t>(k / dim, 1);
  const int64_t all = n * of_row;
  const int64_t part = ceil_div(all, std::min(all, most));
  const int64_t count = ceil_div(all, part);
  const CounterRandom random(0);
  Sample sample;
  sample.vectors.assign(static_cast<size_t>(count * dim), 0.0F);
  sample.weights.assign(static_cast<size_t>(count), 0.0F);
  std::vector<float> row_scales(static_cast<size_t>(n));
  const int64_t width = std::min(format.columns_per_group(k), k);
  const auto largest_in = [](const float* values, int64_t size) {
    return largest_magnitude({values, static_cast<size_t>(size)});
  };
  float whole = 0;
  if (per_tensor) {
    parallel_for(n, threads, [&](int64_t row) {
      std::vector<float> values(static_cast<size_t>(k));
      w.read(row, 0, k, values.data());
      row_scales[static_cast<size_t>(row)] = largest_in(values.data(), k);
    });
    whole = largest_magnitude(row_scales);
  }
  parallel_for(n, threads, [&](int64_t row) {
    std::vector<float> values(static_cast<size_t>(k));
    w.read(row, 0, k, values.data());
    for (int64_t i = row * of_row / part; i < count && i * part < (row + 1) * of_row; ++i) {
      const int64_t span = std::min(part, all - i * part);
      const auto at = i * part + static_cast<int64_t>(
                                     random.below(static_cast<uint64_t>(i), static_cast<uint64_t>(span)));
      if (at / of_row != row) continue;
      const int64_t first = at % of_row * dim;
      const int64_t group = first / width * width;
      const float largest =
          per_tensor ? whole : largest_in(values.data() + group, std::min(width, k - group));
      const float scale = largest == 0 ? 1.0F : stored_scale(format.scale_dtype, largest);
      if (!std::isfinite(scale)) continue;  // its group is refused when it is fitted
      for (int64_t c = 0; c < std::min(dim, k - first); ++c) {
        sample.vectors[static_cast<size_t>(i * dim + c)] = values[static_cast<size_t>(first + c)] / scale;
      }
      sample.weights[static_cast<size_t>(i)] = largest;
    }
  });
  const float most_weight = largest_magnitude(sample.weights);
  for (float& weight : sample.weights) {
    const float relative = most_weight > 0 ? weight / most_weight : 1.0F;
    weight = relative * relative;
  }
  return sample;
}

}  // namespace

std::unique_ptr<ColumnEncoder> make_vector_encoder(std::shared_ptr<const Format> self,
                                                   const VectorCodebook& format, int64_t n, int64_t k) {
  return std::make_unique<VectorEncoder>(std::move(self), format, n, k);
}

std::vector<float> fit_tables(const VectorCodebook& format, const FloatMatrix& w, int threads) {
  constexpr int64_t kSweeps = 20;
  constexpr int64_t kVectorsPerEntry = 32;
  constexpr int64_t kLeastVectors = int64_t{1} << 14;
  constexpr int64_t kMostVectors = int64_t{1} << 17;
  if (w.rows() == 0 || w.cols() == 0) {
    return std::vector<float>(static_cast<size_t>(format.codebooks * format.entries * format.dim), 0.0F);
  }
  Sample sample = sample_vectors(
      format, w, std::clamp(kVectorsPerEntry * format.entries, kLeastVectors, kMostVectors), threads);
  return fit_residual_tables({sample.vectors.data(), std::ssize(sample.weights), format.dim}, sample.weights,
                             format.codebooks, format.entries, kSweeps, 0, threads);
}

}  // namespace quantloom
