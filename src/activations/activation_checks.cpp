#include "activations/activation_checks.hpp"

#include "quantloom/activations/cuda_activations.hpp"
#include "quantloom/activations/quantized_activations.hpp"
#include "quantloom/checked_math.hpp"
#include "quantloom/error.hpp"

namespace quantloom {

void require_calibrated(const ActivationFormat& format, int64_t k) {
  require_valid(format);
  if (format.is_static && !format.grid) {
    throw InvalidArgument("activations", format.spec(),
                          "a static format with its scale, as calibration gives");
  }
  if (format.static_outliers && !format.outlier_columns) {
    throw InvalidArgument("activations", format.spec(),
                          "static outliers with their columns, as calibration gives");
  }
  if (format.outlier_columns && !format.outlier_columns->empty() && format.outlier_columns->back() >= k) {
    throw InvalidArgument("x", text_of(k, " inputs"),
                          text_of("more than ", format.outlier_columns->back(), ", the last outlier column"));
  }
}

int64_t scales_per_token(const ActivationFormat& format, int64_t k) {
  return format.scope == ActivationScope::group ? format.group_count(k) : 1;
}

std::vector<PlaneSpec> activation_planes(const ActivationFormat& format, int64_t m, int64_t k,
                                         int64_t outliers) {
  require_valid(format);
  const std::vector<int64_t> shape = {format.scope == ActivationScope::tensor ? 1 : m,
                                      scales_per_token(format, k)};
  std::vector<PlaneSpec> planes = {{"codes", DType::i8, {m, k}}, {"scales", DType::f32, shape}};
  if (!format.symmetric) planes.push_back({"zeros", DType::i8, shape});
  if (format.has_shifts()) planes.push_back({"shifts", DType::u8, {m, format.group_count(k)}});
  if (format.has_outliers()) {
    planes.push_back({"outlier_columns", DType::i32, {outliers}});
    planes.push_back({"outlier_values", DType::f32, {m, outliers}});
  }
  return planes;
}

int64_t outlier_index_words(int64_t k, int64_t columns) {
  if (k < 0 || columns < 0 || columns > k) {
    throw InvalidArgument("columns", text_of(columns, " of ", k), "at most as many as inputs");
  }
  return checked_add(ceil_div(k, int64_t{32}), columns);
}

std::vector<int32_t> outlier_index(std::span<const int32_t> columns, int64_t k) {
  std::vector<int32_t> index(static_cast<size_t>(outlier_index_words(k, std::ssize(columns))));
  const auto words = static_cast<size_t>(ceil_div(k, int64_t{32}));
  int64_t before = -1;
  for (size_t i = 0; i < columns.size(); ++i) {
    const int32_t column = columns[i];
    if (column <= before || column >= k) {
      throw InvalidArgument("columns", text_of(column, " after ", before),
                            text_of("rising numbers from 0 to ", k - 1));
    }
    before = column;
    auto& word = index[static_cast<size_t>(column / 32)];
    word = static_cast<int32_t>(static_cast<uint32_t>(word) | 1U << column % 32);
    index[words + i] = column;
  }
  return index;
}

}  // namespace quantloom
