#include <algorithm>
#include <array>
#include <cmath>

#include "formats/grouped.hpp"
#include "kernels/prepared_bcq.hpp"
#include "quantloom/formats/bcq.hpp"
#include "quantloom/parallel.hpp"

namespace quantloom::kernels {
namespace {

constexpr int64_t kByte = 8;
constexpr int64_t kEntries = 256;
// Rows that one thread takes through a group, whose tables stay in its first-level cache meanwhile.
constexpr int64_t kSlabRows = 64;
constexpr int64_t kBytesPerPiece = 64;  // of tables

// All sums of +-x over 8 columns: bit c of an entry's number is 1 where x[c] is added.
void fill_table(const float* x, float* table) {
  std::array<float, 16> low;
  std::array<float, 16> high;
  const auto fill = [](const float* values, std::array<float, 16>& sums) {
    for (int code = 0; code < 16; ++code) {
      float sum = 0;
      for (int c = 0; c < 4; ++c) sum += (code >> c & 1) != 0 ? values[c] : -values[c];
      sums[static_cast<size_t>(code)] = sum;
    }
  };
  fill(x, low);
  fill(x + 4, high);
  for (int h = 0; h < 16; ++h) {
    for (int l = 0; l < 16; ++l)
      table[h * 16 + l] = low[static_cast<size_t>(l)] + high[static_cast<size_t>(h)];
  }
}

float looked_up(const float* tables, const uint8_t* bytes, int64_t count) {
  // Four sums, so that look-ups do not wait for each other.
  float sums[4] = {};
  int64_t b = 0;
  for (; b + 4 <= count; b += 4) {
    for (int64_t i = 0; i < 4; ++i) sums[i] += tables[(b + i) * kEntries + bytes[b + i]];
  }
  for (; b < count; ++b) sums[0] += tables[b * kEntries + bytes[b]];
  return (sums[0] + sums[1]) + (sums[2] + sums[3]);
}

void multiply_token(const PreparedBcq& w, const float* x, int64_t bytes, std::vector<float>& tables, float* y,
                    int threads) {
  const auto& format = static_cast<const Bcq&>(*w.packed.format);
  const int64_t n = w.n();
  const int64_t k = w.k();
  const int bits = format.bits;
  const int64_t groups = format.group_count(k);
  const int64_t width = format.columns_per_group(k);
  parallel_for(ceil_div(bytes, kBytesPerPiece), threads, [&](int64_t piece) {
    const int64_t last = std::min(bytes, (piece + 1) * kBytesPerPiece);
    for (int64_t b = piece * kBytesPerPiece; b < last; ++b)
      fill_table(x + b * kByte, tables.data() + b * kEntries);
  });
  std::vector<float> sums;  // of x over each group, for the offsets
  for (int64_t g = 0; g < groups && format.offset; ++g) {
    double sum = 0;
    for (int64_t c = g * width; c < std::min(k, (g + 1) * width); ++c) sum += x[c];
    sums.push_back(static_cast<float>(sum));
  }
  const Tensor& signs = w.packed.plane("signs");
  const int64_t row_bytes = signs.shape()[2] * 4;
  const auto* const all = reinterpret_cast<const uint8_t*>(signs.bytes());
  parallel_for(ceil_div(n, kSlabRows), threads, [&](int64_t slab) {
    const int64_t first = slab * kSlabRows;
    const int64_t last = std::min(n, first + kSlabRows);
    std::fill(y + first, y + last, 0.0F);
    for (int64_t g = 0; g < groups; ++g) {
      const int64_t begin = g * (width / kByte);
      const int64_t count = std::min(bytes - begin, groups == 1 ? bytes : width / kByte);
      for (int64_t row = first; row < last; ++row) {
        const float* const parameters = w.parameters.data() + (row * groups + g) * (bits + 1);
        float sum = format.offset ? parameters[bits] * sums[static_cast<size_t>(g)] : 0.0F;
        for (int64_t p = 0; p < bits; ++p) {
          sum += parameters[p] *
                 looked_up(tables.data() + begin * kEntries, all + (p * n + row) * row_bytes + begin, count);
        }
        y[row] += sum;
      }
    }
  });
}

}  // namespace

std::shared_ptr<const PreparedBcq> prepare_bcq(const PackedTensor& packed) {
  const auto& format = static_cast<const Bcq&>(*packed.format);
  const auto prepared = std::make_shared<PreparedBcq>(prepare_rows(packed)->packed);
  const int64_t groups = format.group_count(packed.k);
  if (packed.planes.contains("group_index") || packed.k == 0 ||
      (groups > 1 && format.columns_per_group(packed.k) % kByte != 0)) {
    return prepared;
  }
  const Tensor& scales = packed.plane("scales");
  prepared->parameters.resize(static_cast<size_t>(checked_mul(packed.n * groups, format.bits + 1)));
  float* out = prepared->parameters.data();
  for (int64_t row = 0; row < packed.n; ++row) {
    for (int64_t g = 0; g < groups; ++g) {
      for (int64_t p = 0; p < format.bits; ++p) *out++ = scale_at(scales, (p * packed.n + row) * groups + g);
      *out++ = format.offset ? scale_at(packed.plane("offsets"), row * groups + g) : 0.0F;
    }
  }
  return prepared;
}

void multiply_bcq(const FloatMatrix& x, const PreparedBcq& w, MatrixView<float> y, int threads) {
  if (w.parameters.empty() || x.rows() > kLookedUpTokens) return multiply_rows(x, w, y, threads);
  const int64_t k = w.k();
  const int64_t bytes = ceil_div(k, kByte);
  std::vector<float> tokens(static_cast<size_t>(checked_mul(x.rows(), bytes * kByte)));
  for (int64_t t = 0; t < x.rows(); ++t) x.read(t, 0, k, tokens.data() + t * bytes * kByte);
  // An infinite input would meet itself with both signs.
  if (!std::all_of(tokens.begin(), tokens.end(), [](float value) { return std::isfinite(value); })) {
    return multiply_rows(x, w, y, threads);
  }
  std::vector<float> tables(static_cast<size_t>(checked_mul(bytes, kEntries)));
  for (int64_t t = 0; t < x.rows(); ++t) {
    multiply_token(w, tokens.data() + t * bytes * kByte, bytes, tables, y.row(t), threads);
  }
}

}  // namespace quantloom::kernels
