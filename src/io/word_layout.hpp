// One generic packer for all layouts that put unsigned fields of 1 to 8 bits, lowest first, into 32-bit words
// of a matrix: along its rows or columns, as a dense stream or with whole fields per word, with a constant
// added to what is stored. Also the small checks that all layouts of other libraries share.
#pragma once

#include <functional>
#include <map>
#include <optional>
#include <string>
#include <vector>

#include "quantloom/formats/uniform.hpp"
#include "quantloom/packed_tensor.hpp"

namespace quantloom::io {

// A matrix of words holds `lanes` independent sequences of fields, one per row (axis 1) or column (axis 0).
struct WordLayout {
  int bits = 4;
  int axis = 1;         // the axis along which a lane's words lie
  bool padded = false;  // floor(32 / bits) fields per word instead of a dense stream
  int bias = 0;         // stored = value + bias

  int64_t words(int64_t fields) const;
  std::vector<int64_t> shape(int64_t lanes, int64_t fields) const;
};

// The layout of the planes "codes" and "zeros" of the uniform format.
inline WordLayout plane_layout(int bits) {
  return {bits, 1, false, 0};
}

// Fields of one lane as they are stored, without the bias undone.
void read_lane(const Tensor& words, const WordLayout& layout, int64_t lane, std::span<uint8_t> fields);
void write_lane(Tensor& words, const WordLayout& layout, int64_t lane, std::span<const uint8_t> fields);

struct Field {
  int64_t lane;
  int64_t index;
  int stored;
};
// The first stored field that `wanted` accepts, lane by lane.
std::optional<Field> find_field(const Tensor& words, const WordLayout& layout, int64_t lanes, int64_t fields,
                                const std::function<bool(int stored)>& wanted);

// All values, moved from one layout to another. They must be in range in both: callers check with
// find_field() where a bias could leave it.
Tensor repack(const Tensor& words, const WordLayout& from, const WordLayout& to, int64_t lanes,
              int64_t fields);
// `value` in every field.
Tensor constant_fields(int value, const WordLayout& layout, int64_t lanes, int64_t fields);
// True if all bits that the layout does not use are 0.
bool unused_bits_are_zero(const Tensor& words, const WordLayout& layout, int64_t lanes, int64_t fields);

// A matrix [rows, cols] as [cols, rows].
Tensor transposed(const Tensor& matrix);

using TensorMap = std::map<std::string, Tensor>;

// Throws InvalidArgument naming the tensor unless it is there, on the CPU.
const Tensor& require_tensor(const TensorMap& tensors, std::string_view name);
// Throws TypeMismatch or InvalidArgument naming the tensor.
void require_dtype(const std::string& name, const Tensor& tensor, std::initializer_list<DType> allowed);
void require_shape(const std::string& name, const Tensor& tensor, const std::vector<int64_t>& shape);
// Throws InvalidArgument unless both are from 0 to 2^31 - 1: column indices are int32.
void require_sizes(std::string_view name, int64_t n, int64_t k);
// Throws InvalidArgument if a tensor has a name that is not in the list.
void require_names(const TensorMap& tensors, std::initializer_list<std::string_view> allowed);

// The uniform format of a valid packed tensor on the CPU. Throws Unsupported for other formats.
const Uniform& require_uniform(const PackedTensor& packed, std::string_view layout);
// For column i of k its group i / group_size.
std::vector<int32_t> consecutive_groups(int64_t k, int64_t group_size);
Tensor tensor_of(const std::vector<int32_t>& values);

}  // namespace quantloom::io
