#include "quantloom/io/compressed_tensors.hpp"

#include <algorithm>

#include "io/text.hpp"
#include "io/word_layout.hpp"

namespace quantloom {
namespace {

using io::WordLayout;

// Signed codes q and zero points are stored as q + 2^(bits-1), which is just the unsigned code.
WordLayout weight_layout(int bits, bool padded) {
  return {bits, 1, padded, 0};
}
WordLayout zero_layout(int bits, bool padded) {
  return {bits, 0, padded, 0};
}

void require_integer_zero_point(int bits, bool symmetric) {
  if (bits == 1 && symmetric) {
    throw Unsupported(
        "the compressed-tensors layout cannot hold 1 bit symmetric: its zero point 0.5 is no integer");
  }
}

// The zero point of a whole tensor is stored as it is, signed.
Tensor tensor_zero_to(const Tensor& zeros, int bits) {
  uint8_t zero = 0;
  io::read_lane(zeros, io::plane_layout(bits), 0, {&zero, 1});
  Tensor result(DType::i8, {1});
  result.values<int8_t>()[0] = static_cast<int8_t>(zero - (1 << (bits - 1)));
  return result;
}

Tensor tensor_zero_from(const Tensor& zero_point, int bits) {
  io::require_dtype("weight_zero_point", zero_point, {DType::i8});
  if (zero_point.element_count() != 1) {
    throw InvalidArgument("tensor weight_zero_point", io::shape_text(zero_point.shape()), "one element");
  }
  const int middle = 1 << (bits - 1);
  const int value = zero_point.values<int8_t>()[0];
  if (value < -middle || value >= middle) {
    throw InvalidArgument("tensor weight_zero_point", text_of(value), text_of(-middle, " to ", middle - 1));
  }
  return io::constant_fields(value + middle, io::plane_layout(bits), 1, 1);
}

struct Packed {
  std::string name;
  const Tensor* words;
  WordLayout layout;  // dense
  int64_t lanes;
  int64_t fields;

  WordLayout with(bool padded) const {
    WordLayout result = layout;
    result.padded = padded;
    return result;
  }
  bool has_shape_of(bool padded) const { return words->shape() == with(padded).shape(lanes, fields); }
  bool fits(bool padded) const { return io::unused_bits_are_zero(*words, with(padded), lanes, fields); }
  // Up to one word the two layouts are the same.
  bool is_same_in_both() const { return 32 % layout.bits == 0 || fields <= 32 / layout.bits || lanes == 0; }
};

// Which of the two layouts the tensors have: by their shapes, else by the bits that one of them never sets.
bool is_padded(const std::vector<Packed>& tensors, WordPadding padding) {
  bool may_be_dense = padding != WordPadding::padded;
  bool may_be_padded = padding != WordPadding::dense;
  for (const Packed& tensor : tensors) {
    may_be_dense = may_be_dense && tensor.has_shape_of(false);
    may_be_padded = may_be_padded && tensor.has_shape_of(true);
    if (!may_be_dense && !may_be_padded) {
      throw InvalidArgument(
          "tensor " + tensor.name, io::shape_text(tensor.words->shape()),
          io::shape_text(tensor.with(false).shape(tensor.lanes, tensor.fields)) + " (dense) or " +
              io::shape_text(tensor.with(true).shape(tensor.lanes, tensor.fields)) + " (padded)");
    }
  }
  if (may_be_dense != may_be_padded) return may_be_padded;
  const bool same = std::ranges::all_of(tensors, &Packed::is_same_in_both);
  if (same) return false;
  for (const Packed& tensor : tensors) {
    may_be_dense = may_be_dense && tensor.fits(false);
    may_be_padded = may_be_padded && tensor.fits(true);
  }
  if (may_be_dense == may_be_padded) {
    throw InvalidArgument("tensor weight_packed",
                          io::shape_text(tensors[0].words->shape()) +
                              (may_be_dense ? ", which fits dense and padded words"
                                            : ", with bits set that both layouts leave 0"),
                          "content of one layout; set `padding`");
  }
  return may_be_padded;
}

std::pair<int64_t, int64_t> read_shape(const Tensor& tensor) {
  io::require_dtype("weight_shape", tensor, {DType::i64, DType::i32});
  io::require_shape("weight_shape", tensor, {2});
  const auto value = [&](size_t i) -> int64_t {
    return tensor.dtype() == DType::i64 ? tensor.values<int64_t>()[i] : tensor.values<int32_t>()[i];
  };
  io::require_sizes("weight_shape", value(0), value(1));
  return {value(0), value(1)};
}

}  // namespace

std::map<std::string, Tensor> to_compressed_tensors(const PackedTensor& packed) {
  const Uniform& format = io::require_uniform(packed, "compressed-tensors");
  const int bits = format.bits;
  const int64_t k = packed.k;
  require_integer_zero_point(bits, format.symmetric);
  if (format.group_size > 0 && k % format.group_size != 0) {
    throw Unsupported(text_of("the compressed-tensors layout takes groups that divide the columns: ",
                              format.group_size, " does not divide ", k));
  }
  const bool per_tensor = format.group_size == Uniform::kPerTensor;
  std::map<std::string, Tensor> result;
  result.emplace("weight_packed", packed.plane("codes"));
  Tensor shape(DType::i64, {2});
  shape.values<int64_t>()[0] = packed.n;
  shape.values<int64_t>()[1] = k;
  result.emplace("weight_shape", shape);
  Tensor scales = packed.plane("scales");
  if (per_tensor) {
    Tensor one(scales.dtype(), {1});
    std::copy_n(scales.bytes(), scales.byte_count(), one.bytes());
    scales = one;
  }
  result.emplace("weight_scale", scales);
  if (!format.symmetric) {
    const Tensor& zeros = packed.plane("zeros");
    result.emplace("weight_zero_point",
                   per_tensor ? tensor_zero_to(zeros, bits)
                              : io::repack(zeros, io::plane_layout(bits), zero_layout(bits, false),
                                           format.group_count(k), packed.n));
  }
  if (packed.planes.contains("group_index")) result.emplace("weight_g_idx", packed.plane("group_index"));
  return result;
}

PackedTensor from_compressed_tensors(const std::map<std::string, Tensor>& tensors,
                                     const CompressedTensorsSettings& settings) {
  const int bits = settings.bits;
  io::require_names(tensors,
                    {"weight_packed", "weight_scale", "weight_shape", "weight_zero_point", "weight_g_idx"});
  const auto [n, k] = read_shape(io::require_tensor(tensors, "weight_shape"));
  const Tensor& scale = io::require_tensor(tensors, "weight_scale");
  io::require_dtype("weight_scale", scale, {DType::f16, DType::bf16, DType::f32});
  const auto format =
      std::make_shared<const Uniform>(bits, settings.group_size, settings.symmetric, scale.dtype());
  require_integer_zero_point(bits, settings.symmetric);
  const bool per_tensor = settings.group_size == Uniform::kPerTensor;
  const int64_t groups = per_tensor ? 1 : format->group_count(k);
  static_cast<void>(format->planes(n, k));  // refuses sizes that overflow

  const Tensor& weight = io::require_tensor(tensors, "weight_packed");
  io::require_dtype("weight_packed", weight, {DType::i32});
  std::vector<Packed> words = {{"weight_packed", &weight, weight_layout(bits, false), n, k}};
  const bool has_zeros = tensors.contains("weight_zero_point");
  if (!has_zeros && !settings.symmetric) static_cast<void>(io::require_tensor(tensors, "weight_zero_point"));
  if (has_zeros && !per_tensor) {
    const Tensor& zeros = io::require_tensor(tensors, "weight_zero_point");
    io::require_dtype("weight_zero_point", zeros, {DType::i32});
    words.push_back({"weight_zero_point", &zeros, zero_layout(bits, false), groups, n});
  }
  const bool padded = is_padded(words, settings.padding);

  PackedTensor packed{format, n, k, {}};
  packed.planes.emplace("codes",
                        io::repack(weight, weight_layout(bits, padded), io::plane_layout(bits), n, k));
  Tensor scales = scale;
  if (per_tensor) {
    if (scale.element_count() != 1) {
      throw InvalidArgument("tensor weight_scale", io::shape_text(scale.shape()), "one element");
    }
    scales = Tensor(scale.dtype(), {1, 1});
    std::copy_n(scale.bytes(), scale.byte_count(), scales.bytes());
  } else {
    io::require_shape("weight_scale", scale, {n, groups});
  }
  packed.planes.emplace("scales", scales);
  if (has_zeros) {
    const Tensor& stored = io::require_tensor(tensors, "weight_zero_point");
    Tensor zeros = per_tensor
                       ? tensor_zero_from(stored, bits)
                       : io::repack(stored, zero_layout(bits, padded), io::plane_layout(bits), groups, n);
    if (settings.symmetric) {
      const int middle = 1 << (bits - 1);
      const auto wrong = io::find_field(zeros, io::plane_layout(bits), groups, per_tensor ? 1 : n,
                                        [&](int value) { return value != middle; });
      if (wrong) {
        throw InvalidArgument(
            "tensor weight_zero_point",
            text_of(wrong->stored - middle, " at row ", wrong->index, ", group ", wrong->lane),
            "no zero points but 0 in a symmetric file");
      }
    } else {
      packed.planes.emplace("zeros", std::move(zeros));
    }
  }
  if (tensors.contains("weight_g_idx")) {
    const Tensor& g_idx = io::require_tensor(tensors, "weight_g_idx");
    io::require_dtype("weight_g_idx", g_idx, {DType::i32});
    io::require_shape("weight_g_idx", g_idx, {k});
    const auto values = g_idx.values<int32_t>();
    // -1 everywhere: allocated by the writer but never set.
    const bool unset = std::ranges::all_of(values, [](int32_t group) { return group == -1; });
    const bool consecutive =
        unset || std::ranges::equal(values, io::consecutive_groups(k, format->columns_per_group(k)));
    if (!consecutive && settings.group_size < 0) {
      throw InvalidArgument("tensor weight_g_idx", "several groups", "one group per row");
    }
    if (!consecutive) packed.planes.emplace("group_index", g_idx);
  }
  validate(packed);
  return packed;
}

}  // namespace quantloom
