#include "quantloom/kernels/coded_product.hpp"

#include <algorithm>
#include <array>
#include <cmath>
#include <cstring>

#include "quantloom/checked_math.hpp"
#include "quantloom/error.hpp"
#include "quantloom/formats/bit_packing.hpp"
#include "quantloom/formats/codebook.hpp"
#include "quantloom/formats/uniform.hpp"
#include "quantloom/parallel.hpp"

namespace quantloom {
namespace {

// Partial sums of a product: as many as vectors of the processors at hand hold, whatever they are, so that
// results do not depend on them.
constexpr size_t kSums = 16;

float dot(const float* a, const float* b, int64_t count) {
  std::array<float, kSums> sums{};
  int64_t i = 0;
  for (; i + static_cast<int64_t>(kSums) <= count; i += kSums) {
    for (size_t j = 0; j < kSums; ++j) {
      const auto at = static_cast<size_t>(i) + j;
      sums[j] += a[at] * b[at];
    }
  }
  for (size_t j = 0; i < count; ++i, ++j) sums[j] += a[i] * b[i];
  for (size_t half = kSums / 2; half > 0; half /= 2) {
    for (size_t j = 0; j < half; ++j) sums[j] += sums[j + half];
  }
  return sums[0];
}

// Values of rows [first_row, ...) from their codes.
void values_of(const CodedTensor& w, std::span<const uint8_t> codes, int64_t first_row,
               MatrixView<float> out) {
  const std::span<const float> table = w.values();
  const FloatMatrix scales = w.scales();
  std::vector<float> row_scales(static_cast<size_t>(scales.cols()));
  int64_t read = -1;
  for (int64_t row = 0; row < out.rows(); ++row) {
    const int64_t scale_row = (first_row + row) / w.rows_per_scale();
    if (scale_row != read) scales.read(scale_row, 0, scales.cols(), row_scales.data());
    read = scale_row;
    const uint8_t* from = codes.data() + row * w.k();
    float* to = out.row(row);
    for (int64_t column = 0; column < w.k();) {
      const int64_t group = column / w.columns_per_scale();
      const int64_t width = std::min(w.k() - column, w.columns_per_scale() - column % w.columns_per_scale());
      const float scale = row_scales[static_cast<size_t>(group)];
      for (const int64_t end = column + width; column < end; ++column)
        to[column] = table[from[column]] * scale;
    }
  }
}

}  // namespace

CodedTensor::CodedTensor(CodedMatrix codes, std::span<const float> values, const FloatMatrix& scales,
                         int64_t rows_per_scale, int64_t columns_per_scale)
    : codes_(std::move(codes)),
      values_(values.begin(), values.end()),
      scale_dtype_(scales.dtype()),
      scale_rows_(scales.rows()),
      scale_columns_(scales.cols()),
      rows_per_scale_(rows_per_scale),
      columns_per_scale_(columns_per_scale) {
  if (values.empty() || std::ssize(values) > kCodedAlphabet) {
    throw InvalidArgument("values", text_of(values.size(), " values"), text_of("1 to ", kCodedAlphabet));
  }
  for (const float v : values) {
    if (!std::isfinite(v)) throw InvalidArgument("values", text_of(v), "finite numbers");
  }
  if (rows_per_scale < 1) throw InvalidArgument("rows_per_scale", text_of(rows_per_scale), "at least 1");
  if (columns_per_scale < 1) {
    throw InvalidArgument("columns_per_scale", text_of(columns_per_scale), "at least 1");
  }
  if (scale_rows_ != ceil_div(n(), rows_per_scale) || scale_columns_ != ceil_div(k(), columns_per_scale)) {
    throw InvalidArgument("scales", text_of("shape [", scale_rows_, ", ", scale_columns_, "]"),
                          text_of("one for each block of ", rows_per_scale, " x ", columns_per_scale, " in [",
                                  n(), ", ", k(), "]"));
  }
  // Blocks beyond the matrix are as good as blocks of its size.
  rows_per_scale_ = std::min(rows_per_scale, std::max<int64_t>(1, n()));
  columns_per_scale_ = std::min(columns_per_scale, std::max<int64_t>(1, k()));
  // The escape spells out any code: what a product looks up is checked here.
  uint32_t largest = 0;
  std::vector<uint8_t> rows;
  constexpr int64_t kPiece = 64 * kCodedRows;
  bool escapes = false;
  for (const uint32_t s : codes_.symbols()) {
    escapes = escapes || s > 0xffff;
    largest = std::max({largest, s & 0xffU, s >> 8 & 0xffU});
  }
  if (escapes && std::ssize(values) < kCodedAlphabet) {
    for (int64_t row = 0; row < n(); row += kPiece) {
      rows.resize(static_cast<size_t>(std::min(kPiece, n() - row) * k()));
      codes_.decode(row, std::min(kPiece, n() - row), rows);
      for (const uint8_t code : rows) largest = std::max(largest, uint32_t{code});
    }
  }
  if (largest >= values.size() && n() > 0 && k() > 0) {
    throw InvalidArgument("values", text_of(values.size(), " values"),
                          text_of("one for each code up to ", largest));
  }
  values_.resize(static_cast<size_t>(kCodedAlphabet), 0.0F);

  const int64_t row_bytes = scale_columns_ * size_of(scale_dtype_);
  scales_.resize(static_cast<size_t>(checked_mul(scale_rows_, row_bytes)));
  for (int64_t row = 0; row < scale_rows_ && row_bytes > 0; ++row) {
    std::memcpy(scales_.data() + row * row_bytes,
                static_cast<const std::byte*>(scales.data()) + row * scales.stride() * size_of(scale_dtype_),
                static_cast<size_t>(row_bytes));
  }
}

FloatMatrix CodedTensor::scales() const {
  return {scales_.data(), scale_dtype_, scale_rows_, scale_columns_, scale_columns_};
}

int64_t CodedTensor::byte_count() const {
  return codes_.byte_count() + 4 * std::ssize(values_) + std::ssize(scales_);
}

void CodedTensor::dequantize(int64_t first_row, MatrixView<float> out, int threads) const {
  if (out.cols() != k() || first_row < 0 || first_row > n() || out.rows() > n() - first_row) {
    throw InvalidArgument("out", text_of("[", out.rows(), ", ", out.cols(), "] from row ", first_row),
                          text_of("rows of a matrix [", n(), ", ", k(), "]"));
  }
  const int64_t last = first_row + out.rows();
  if (out.rows() == 0 || k() == 0) return;
  const int64_t first_block = first_row / kCodedRows;
  parallel_for(ceil_div(last, kCodedRows) - first_block, threads, [&](int64_t b) {
    const int64_t begin = std::max(first_row, (first_block + b) * kCodedRows);
    const int64_t rows = std::min(last, (first_block + b + 1) * kCodedRows) - begin;
    std::vector<uint8_t> codes(static_cast<size_t>(rows * k()));
    codes_.decode(begin, rows, codes, 1);
    values_of(*this, codes, begin, out.block(begin - first_row, 0, rows, k()));
  });
}

CodedTensor code_packed(const PackedTensor& packed, const CodedOptions& options) {
  validate(packed);
  const auto* uniform = dynamic_cast<const Uniform*>(packed.format.get());
  const auto* codebook = dynamic_cast<const Codebook*>(packed.format.get());
  if (uniform == nullptr && codebook == nullptr) {
    throw Unsupported("code_packed: no entropy coding for " + packed.format->spec());
  }
  if (uniform != nullptr && !uniform->symmetric) {
    throw Unsupported(
        "code_packed: no entropy coding for zero points that are stored; quantize symmetrically");
  }
  if (packed.planes.contains("group_index")) {
    throw Unsupported("code_packed: no entropy coding where columns of a group are not consecutive");
  }
  const GroupedFormat& format = uniform != nullptr ? static_cast<const GroupedFormat&>(*uniform) : *codebook;
  std::vector<float> values;
  if (uniform != nullptr) {
    for (int code = 0; code < 1 << uniform->bits; ++code) {
      values.push_back(static_cast<float>(code) - uniform->symmetric_zero_point());
    }
  } else {
    values = codebook->table;
  }
  const Tensor& plane = packed.plane("codes");
  std::vector<uint8_t> codes(static_cast<size_t>(checked_mul(packed.n, packed.k)));
  if (!codes.empty()) {
    const int64_t words = plane.shape()[1];
    parallel_for(packed.n, options.threads, [&](int64_t row) {
      unpack_bits(
          plane.values<uint32_t>().subspan(static_cast<size_t>(row * words), static_cast<size_t>(words)),
          format.bits, 0,
          std::span(codes).subspan(static_cast<size_t>(row * packed.k), static_cast<size_t>(packed.k)));
    });
  }
  const Tensor& scales = packed.plane("scales");
  const FloatMatrix matrix(scales.bytes(), scales.dtype(), scales.shape()[0], scales.shape()[1],
                           scales.shape()[1]);
  const bool whole = format.group_size == GroupedFormat::kPerTensor;
  return {CodedMatrix(codes, packed.n, packed.k, options), values, matrix,
          whole ? std::max<int64_t>(1, packed.n) : 1, format.columns_per_group(packed.k)};
}

void matmul(const FloatMatrix& x, const CodedTensor& w, MatrixView<float> y, int threads) {
  const int64_t m = x.rows();
  if (x.cols() != w.k()) {
    throw InvalidArgument("x", text_of("[", m, ", ", x.cols(), "]"), text_of("[m, ", w.k(), "]"));
  }
  if (y.rows() != m || y.cols() != w.n()) {
    throw InvalidArgument("y", text_of("[", y.rows(), ", ", y.cols(), "]"),
                          text_of("[", m, ", ", w.n(), "]"));
  }
  if (m == 0 || w.n() == 0) return;
  std::vector<float> tokens(static_cast<size_t>(checked_mul(m, w.k())));
  for (int64_t t = 0; t < m; ++t) x.read(t, 0, w.k(), tokens.data() + t * w.k());
  parallel_for(ceil_div(w.n(), kCodedRows), threads, [&](int64_t b) {
    const int64_t first = b * kCodedRows;
    const int64_t rows = std::min(kCodedRows, w.n() - first);
    std::vector<float> weights(static_cast<size_t>(rows * w.k()));
    w.dequantize(first, {weights.data(), rows, w.k()}, 1);
    for (int64_t row = 0; row < rows; ++row) {
      for (int64_t t = 0; t < m; ++t) {
        y(t, first + row) = dot(tokens.data() + t * w.k(), weights.data() + row * w.k(), w.k());
      }
    }
  });
}

}  // namespace quantloom
