#include "kernels/prepared_outliers.hpp"

#include <algorithm>

#include "quantloom/parallel.hpp"

namespace quantloom::kernels {
namespace {

constexpr int64_t kSlabRows = 64;
// Tokens that are multiplied at once, their values for one column next to each other.
constexpr int64_t kTileTokens = 16;

}  // namespace

std::shared_ptr<const PreparedTensor> prepare_outliers(const PackedTensor& packed,
                                                       std::shared_ptr<const PreparedTensor> dense) {
  auto prepared = std::make_shared<PreparedOutliers>();
  prepared->dense = std::move(dense);
  const auto offsets = packed.plane("outlier_offsets").values<int32_t>();
  prepared->offsets.assign(offsets.begin(), offsets.end());
  const Tensor& columns = packed.plane("outlier_columns");
  if (columns.dtype() == DType::u16) {
    const auto narrow = columns.values<uint16_t>();
    prepared->columns.assign(narrow.begin(), narrow.end());
  } else {
    const auto wide = columns.values<int32_t>();
    prepared->columns.assign(wide.begin(), wide.end());
  }
  for (const uint16_t value : packed.plane("outlier_values").values<uint16_t>()) {
    prepared->values.push_back(float_from_f16(value));
  }
  return prepared;
}

void add_outliers(const FloatMatrix& x, const PreparedOutliers& w, MatrixView<float> y, int threads) {
  const int64_t k = w.k();
  if (w.values.empty()) return;
  std::vector<float> row(static_cast<size_t>(k));
  std::vector<float> tokens(static_cast<size_t>(checked_mul(k, std::min(kTileTokens, x.rows()))));
  for (int64_t first = 0; first < x.rows(); first += kTileTokens) {
    const int64_t count = std::min(kTileTokens, x.rows() - first);
    for (int64_t t = 0; t < count; ++t) {
      x.read(first + t, 0, k, row.data());
      for (int64_t c = 0; c < k; ++c) {
        tokens[static_cast<size_t>(c * count + t)] = row[static_cast<size_t>(c)];
      }
    }
    parallel_for(ceil_div(w.n(), kSlabRows), threads, [&](int64_t slab) {
      const int64_t last = std::min(w.n(), (slab + 1) * kSlabRows);
      for (int64_t r = slab * kSlabRows; r < last; ++r) {
        float sums[kTileTokens] = {};
        for (int64_t i = w.offsets[static_cast<size_t>(r)]; i < w.offsets[static_cast<size_t>(r) + 1]; ++i) {
          const float value = w.values[static_cast<size_t>(i)];
          const float* const from = tokens.data() + w.columns[static_cast<size_t>(i)] * count;
          for (int64_t t = 0; t < count; ++t) sums[t] += value * from[t];
        }
        for (int64_t t = 0; t < count; ++t) y(first + t, r) += sums[t];
      }
    });
  }
}

}  // namespace quantloom::kernels
