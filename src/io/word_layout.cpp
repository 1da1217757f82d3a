#include "io/word_layout.hpp"

#include <algorithm>
#include <cstring>

#include "io/text.hpp"
#include "quantloom/formats/bit_packing.hpp"

namespace quantloom::io {
namespace {

// Where the words of a lane lie in the matrix.
struct LanePlace {
  int64_t first;
  int64_t stride;
  int64_t count;
};

LanePlace place_of(const Tensor& words, const WordLayout& layout, int64_t lane) {
  const int64_t rows = words.shape()[0];
  const int64_t cols = words.shape()[1];
  return layout.axis == 1 ? LanePlace{lane * cols, 1, cols} : LanePlace{lane, cols, rows};
}

template <class Element>
Tensor transposed_as(const Tensor& matrix) {
  const int64_t rows = matrix.shape()[0];
  const int64_t cols = matrix.shape()[1];
  Tensor result(matrix.dtype(), {cols, rows});
  const std::span<const Element> from = matrix.values<Element>();
  const std::span<Element> to = result.values<Element>();
  for (int64_t r = 0; r < rows; ++r) {
    for (int64_t c = 0; c < cols; ++c) to[c * rows + r] = from[r * cols + c];
  }
  return result;
}

}  // namespace

int64_t WordLayout::words(int64_t fields) const {
  return padded ? ceil_div(fields, 32 / bits) : packed_words(fields, bits);
}

std::vector<int64_t> WordLayout::shape(int64_t lanes, int64_t fields) const {
  if (axis == 1) return {lanes, words(fields)};
  return {words(fields), lanes};
}

void read_lane(const Tensor& words, const WordLayout& layout, int64_t lane, std::span<uint8_t> fields) {
  const std::span<const uint32_t> all = words.values<uint32_t>();
  const LanePlace place = place_of(words, layout, lane);
  std::vector<uint32_t> own(static_cast<size_t>(place.count));
  for (int64_t i = 0; i < place.count; ++i) own[i] = all[place.first + i * place.stride];
  if (!layout.padded) {
    unpack_bits(own, layout.bits, 0, fields);
    return;
  }
  const int64_t per_word = 32 / layout.bits;
  const uint32_t mask = (1U << layout.bits) - 1;
  for (int64_t i = 0; i < std::ssize(fields); ++i) {
    fields[i] = static_cast<uint8_t>(own[i / per_word] >> (i % per_word * layout.bits) & mask);
  }
}

void write_lane(Tensor& words, const WordLayout& layout, int64_t lane, std::span<const uint8_t> fields) {
  const LanePlace place = place_of(words, layout, lane);
  std::vector<uint32_t> own(static_cast<size_t>(place.count));
  if (layout.padded) {
    const int64_t per_word = 32 / layout.bits;
    for (int64_t i = 0; i < std::ssize(fields); ++i) {
      own[i / per_word] |= static_cast<uint32_t>(fields[i]) << (i % per_word * layout.bits);
    }
  } else {
    pack_bits(fields, layout.bits, own);
  }
  const std::span<uint32_t> all = words.values<uint32_t>();
  for (int64_t i = 0; i < place.count; ++i) all[place.first + i * place.stride] = own[i];
}

std::optional<Field> find_field(const Tensor& words, const WordLayout& layout, int64_t lanes, int64_t fields,
                                const std::function<bool(int stored)>& wanted) {
  if (lanes == 0 || fields == 0) return std::nullopt;  // the other one may be huge
  std::vector<uint8_t> values(static_cast<size_t>(fields));
  for (int64_t lane = 0; lane < lanes; ++lane) {
    read_lane(words, layout, lane, values);
    for (int64_t i = 0; i < fields; ++i) {
      if (wanted(values[i])) return Field{lane, i, values[i]};
    }
  }
  return std::nullopt;
}

Tensor repack(const Tensor& words, const WordLayout& from, const WordLayout& to, int64_t lanes,
              int64_t fields) {
  Tensor result(DType::i32, to.shape(lanes, fields));
  if (result.element_count() == 0) return result;
  std::vector<uint8_t> values(static_cast<size_t>(fields));
  const int change = to.bias - from.bias;
  for (int64_t lane = 0; lane < lanes; ++lane) {
    read_lane(words, from, lane, values);
    for (uint8_t& value : values) value = static_cast<uint8_t>(value + change);
    write_lane(result, to, lane, values);
  }
  return result;
}

Tensor constant_fields(int value, const WordLayout& layout, int64_t lanes, int64_t fields) {
  Tensor result(DType::i32, layout.shape(lanes, fields));
  if (result.element_count() == 0) return result;
  const std::vector<uint8_t> values(static_cast<size_t>(fields), static_cast<uint8_t>(value + layout.bias));
  for (int64_t lane = 0; lane < lanes; ++lane) write_lane(result, layout, lane, values);
  return result;
}

bool unused_bits_are_zero(const Tensor& words, const WordLayout& layout, int64_t lanes, int64_t fields) {
  const Tensor again = repack(words, layout, layout, lanes, fields);
  return std::ranges::equal(again.values<uint32_t>(), words.values<uint32_t>());
}

Tensor transposed(const Tensor& matrix) {
  return size_of(matrix.dtype()) == 2 ? transposed_as<uint16_t>(matrix) : transposed_as<uint32_t>(matrix);
}

const Tensor& require_tensor(const TensorMap& tensors, std::string_view name) {
  const auto found = tensors.find(std::string(name));
  if (found == tensors.end()) throw InvalidArgument(text_of("tensor ", name), "no such tensor", "one");
  if (found->second.device() != Device::cpu) {
    throw TypeMismatch(text_of("tensor ", name), "memory of a CUDA device", "memory of the CPU");
  }
  return found->second;
}

void require_dtype(const std::string& name, const Tensor& tensor, std::initializer_list<DType> allowed) {
  if (std::find(allowed.begin(), allowed.end(), tensor.dtype()) != allowed.end()) return;
  std::string expected;
  for (const DType dtype : allowed)
    expected += (expected.empty() ? "" : " or ") + std::string(name_of(dtype));
  throw TypeMismatch("tensor " + name, name_of(tensor.dtype()), expected);
}

void require_shape(const std::string& name, const Tensor& tensor, const std::vector<int64_t>& shape) {
  if (tensor.shape() != shape) {
    throw InvalidArgument("tensor " + name, shape_text(tensor.shape()), shape_text(shape));
  }
}

void require_names(const TensorMap& tensors, std::initializer_list<std::string_view> allowed) {
  for (const auto& [name, tensor] : tensors) {
    if (std::find(allowed.begin(), allowed.end(), name) != allowed.end()) continue;
    std::string expected;
    for (const std::string_view known : allowed)
      expected += (expected.empty() ? "" : ", ") + std::string(known);
    throw InvalidArgument("tensors", "a tensor " + quote(name), "only " + expected);
  }
}

void require_sizes(std::string_view name, int64_t n, int64_t k) {
  constexpr int64_t kLargest = (int64_t{1} << 31) - 1;
  if (n < 0 || k < 0 || n > kLargest || k > kLargest) {
    throw InvalidArgument(text_of("tensor ", name), text_of("a matrix of [", n, ", ", k, "]"),
                          "sizes from 0 to 2^31 - 1");
  }
}

const Uniform& require_uniform(const PackedTensor& packed, std::string_view layout) {
  validate(packed);
  const auto* uniform = dynamic_cast<const Uniform*>(packed.format.get());
  if (uniform == nullptr) {
    throw Unsupported(text_of("the ", layout, " layout cannot hold the format ", packed.format->spec()));
  }
  for (const auto& [name, plane] : packed.planes) {
    if (plane.device() != Device::cpu) {
      throw TypeMismatch("plane " + name, "memory of a CUDA device", "memory of the CPU");
    }
  }
  return *uniform;
}

std::vector<int32_t> consecutive_groups(int64_t k, int64_t group_size) {
  std::vector<int32_t> groups(static_cast<size_t>(k));
  for (int64_t i = 0; i < k; ++i) groups[i] = static_cast<int32_t>(i / group_size);
  return groups;
}

Tensor tensor_of(const std::vector<int32_t>& values) {
  Tensor tensor(DType::i32, {std::ssize(values)});
  std::ranges::copy(values, tensor.values<int32_t>().begin());
  return tensor;
}

}  // namespace quantloom::io
