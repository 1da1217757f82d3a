#include "quantloom/io/awq.hpp"

#include <algorithm>
#include <array>
#include <vector>

#include "io/text.hpp"
#include "io/word_layout.hpp"

namespace quantloom {
namespace {

constexpr int kBits = 4;
constexpr int kPerWord = 8;
constexpr int kMiddle = 8;
// The field that holds output j of a word.
constexpr std::array<int, kPerWord> kFieldOf = {0, 4, 1, 5, 2, 6, 3, 7};

// Words [lanes, n/8] of values [n, lanes], which are read a row at a time.
Tensor interleaved(const Tensor& values, int64_t n, int64_t lanes) {
  Tensor result(DType::i32, {lanes, n / kPerWord});
  if (result.element_count() == 0) return result;
  const std::span<uint32_t> words = result.values<uint32_t>();
  std::vector<uint8_t> row(static_cast<size_t>(lanes));
  for (int64_t r = 0; r < n; ++r) {
    io::read_lane(values, io::plane_layout(kBits), r, row);
    const int shift = kBits * kFieldOf[static_cast<size_t>(r % kPerWord)];
    for (int64_t lane = 0; lane < lanes; ++lane) {
      words[lane * (n / kPerWord) + r / kPerWord] |= static_cast<uint32_t>(row[lane]) << shift;
    }
  }
  return result;
}

// The inverse: a plane of n rows.
Tensor separated(const Tensor& words, int64_t n, int64_t lanes) {
  Tensor result(DType::i32, io::plane_layout(kBits).shape(n, lanes));
  if (result.element_count() == 0) return result;
  const std::span<const uint32_t> from = words.values<uint32_t>();
  std::vector<uint8_t> row(static_cast<size_t>(lanes));
  for (int64_t r = 0; r < n; ++r) {
    const int shift = kBits * kFieldOf[static_cast<size_t>(r % kPerWord)];
    for (int64_t lane = 0; lane < lanes; ++lane) {
      row[lane] = static_cast<uint8_t>(from[lane * (n / kPerWord) + r / kPerWord] >> shift & 0xF);
    }
    io::write_lane(result, io::plane_layout(kBits), r, row);
  }
  return result;
}

// A packed matrix [rows, cols] of 4-bit fields as [cols, rows].
Tensor transposed_fields(const Tensor& words, int64_t rows, int64_t cols) {
  Tensor result(DType::i32, io::plane_layout(kBits).shape(cols, rows));
  if (result.element_count() == 0) return result;
  std::vector<std::vector<uint8_t>> values(static_cast<size_t>(cols),
                                           std::vector<uint8_t>(static_cast<size_t>(rows)));
  std::vector<uint8_t> lane(static_cast<size_t>(cols));
  for (int64_t r = 0; r < rows; ++r) {
    io::read_lane(words, io::plane_layout(kBits), r, lane);
    for (int64_t c = 0; c < cols; ++c) values[c][r] = lane[c];
  }
  for (int64_t c = 0; c < cols; ++c) io::write_lane(result, io::plane_layout(kBits), c, values[c]);
  return result;
}

}  // namespace

std::map<std::string, Tensor> to_awq(const PackedTensor& packed) {
  const Uniform& format = io::require_uniform(packed, "AWQ");
  const int64_t n = packed.n;
  const int64_t k = packed.k;
  if (format.bits != kBits) throw Unsupported(text_of("the AWQ layout has 4 bits, not ", format.bits));
  if (format.scale_dtype != DType::f16) {
    throw Unsupported(
        text_of("the AWQ layout has float16 scales, not ", std::string(name_of(format.scale_dtype))));
  }
  if (format.group_size == Uniform::kPerTensor) throw Unsupported("the AWQ layout has no scale per tensor");
  if (n % kPerWord != 0 || k % std::max<int64_t>(1, format.columns_per_group(k)) != 0) {
    throw Unsupported(text_of("the AWQ layout takes multiples of 8 rows, and of the group size in columns, ",
                              "not [", n, ", ", k, "]"));
  }
  if (packed.planes.contains("group_index")) {
    throw Unsupported("the AWQ layout has groups of consecutive columns, not of permuted ones");
  }
  const int64_t groups = format.group_count(k);
  Tensor zeros = format.symmetric ? io::constant_fields(kMiddle, io::plane_layout(kBits), n, groups)
                                  : transposed_fields(packed.plane("zeros"), groups, n);
  return {{"qweight", interleaved(packed.plane("codes"), n, k)},
          {"qzeros", interleaved(zeros, n, groups)},
          {"scales", io::transposed(packed.plane("scales"))}};
}

PackedTensor from_awq(const std::map<std::string, Tensor>& tensors, int64_t group_size) {
  if (group_size != -1 && group_size <= 0) {
    throw InvalidArgument("group_size", text_of(group_size), "-1 or a positive number");
  }
  io::require_names(tensors, {"qweight", "qzeros", "scales"});
  const Tensor& qweight = io::require_tensor(tensors, "qweight");
  io::require_dtype("qweight", qweight, {DType::i32});
  if (qweight.shape().size() != 2) {
    throw InvalidArgument("tensor qweight", io::shape_text(qweight.shape()), "[k, n / 8]");
  }
  const int64_t k = qweight.shape()[0];
  const int64_t n = checked_mul(qweight.shape()[1], kPerWord);
  io::require_sizes("qweight", n, k);
  const auto format = std::make_shared<const Uniform>(
      kBits, group_size == -1 ? Uniform::kPerChannel : group_size, false, DType::f16);
  const int64_t groups = format->group_count(k);
  const Tensor& scales = io::require_tensor(tensors, "scales");
  io::require_dtype("scales", scales, {DType::f16});
  io::require_shape("scales", scales, {groups, n});
  const Tensor& qzeros = io::require_tensor(tensors, "qzeros");
  io::require_dtype("qzeros", qzeros, {DType::i32});
  io::require_shape("qzeros", qzeros, {groups, n / kPerWord});

  PackedTensor packed{format, n, k, {}};
  packed.planes.emplace("codes", separated(qweight, n, k));
  packed.planes.emplace("scales", io::transposed(scales));
  packed.planes.emplace("zeros", transposed_fields(separated(qzeros, n, groups), n, groups));
  validate(packed);
  return packed;
}

}  // namespace quantloom
