#include "quantloom/io/gptq.hpp"

#include <algorithm>

#include "io/text.hpp"
#include "io/word_layout.hpp"

namespace quantloom {
namespace {

using io::WordLayout;

constexpr int64_t kMultiple = 32;

// qweight packs along in_features, qzeros along out_features; v1 stores z - 1.
WordLayout weight_layout(int bits) {
  return {bits, 0, false, 0};
}
WordLayout zero_layout(int bits, GptqVersion version) {
  return {bits, 1, false, version == GptqVersion::v1 ? -1 : 0};
}

void require_bits(int bits) {
  if (bits != 2 && bits != 3 && bits != 4 && bits != 8) {
    throw Unsupported(text_of("the GPTQ layout has 2, 3, 4 and 8 bits, not ", bits));
  }
}

void require_version(GptqVersion version) {
  if (version != GptqVersion::v1 && version != GptqVersion::v2) {
    throw InvalidArgument("version", text_of(static_cast<int>(version)), "1 or 2");
  }
}

std::string_view name_of(GptqVersion version) {
  return version == GptqVersion::v1 ? "v1 (gptq)" : "v2 (gptq_v2)";
}

// Throws unless the zero points of a symmetric file are the middle of the range in its version.
void require_symmetric_zeros(const Tensor& qzeros, const GptqSettings& settings, int64_t groups, int64_t n) {
  const WordLayout layout = zero_layout(settings.bits, settings.version);
  const int middle = 1 << (settings.bits - 1);
  const auto wrong =
      io::find_field(qzeros, layout, groups, n, [&](int stored) { return stored != middle + layout.bias; });
  if (!wrong) return;
  const GptqVersion other = settings.version == GptqVersion::v1 ? GptqVersion::v2 : GptqVersion::v1;
  const int other_stored = middle + zero_layout(settings.bits, other).bias;
  if (!io::find_field(qzeros, layout, groups, n, [&](int stored) { return stored != other_stored; })) {
    throw InvalidArgument("tensor qzeros",
                          text_of("symmetric zero points as ", name_of(other), " stores them"),
                          text_of("those of ", name_of(settings.version), ": the file is mislabelled"));
  }
  throw InvalidArgument(
      "tensor qzeros",
      text_of("stored value ", wrong->stored, " at group ", wrong->lane, ", column ", wrong->index),
      text_of(middle + layout.bias, " everywhere in a symmetric ", name_of(settings.version), " file"));
}

}  // namespace

std::map<std::string, Tensor> to_gptq(const PackedTensor& packed, GptqVersion version) {
  require_version(version);
  const Uniform& format = io::require_uniform(packed, "GPTQ");
  const int bits = format.bits;
  require_bits(bits);
  if (format.group_size == Uniform::kPerTensor) throw Unsupported("the GPTQ layout has no scale per tensor");
  if (format.scale_dtype == DType::f32)
    throw Unsupported("the GPTQ layout has float16 or bfloat16 scales, not float32");
  const int64_t n = packed.n;
  const int64_t k = packed.k;
  if (n % kMultiple != 0 || k % kMultiple != 0) {
    throw Unsupported(
        text_of("the GPTQ layout takes multiples of 32 rows and columns, not [", n, ", ", k, "]"));
  }
  const int64_t groups = format.group_count(k);
  const WordLayout zeros_to = zero_layout(bits, version);
  Tensor qzeros;
  if (format.symmetric) {
    qzeros = io::constant_fields(1 << (bits - 1), zeros_to, groups, n);
  } else {
    const Tensor& zeros = packed.plane("zeros");
    const WordLayout zeros_from = io::plane_layout(bits);
    if (version == GptqVersion::v1) {
      const auto zero = io::find_field(zeros, zeros_from, groups, n, [](int stored) { return stored == 0; });
      if (zero) {
        throw Unsupported(text_of("GPTQ v1 cannot hold the zero point 0 of row ", zero->index, ", group ",
                                  zero->lane, ": readers decode it differently; use v2"));
      }
    }
    qzeros = io::repack(zeros, zeros_from, zeros_to, groups, n);
  }
  const auto index = packed.planes.find("group_index");
  return {{"qweight", io::repack(packed.plane("codes"), io::plane_layout(bits), weight_layout(bits), n, k)},
          {"qzeros", std::move(qzeros)},
          {"scales", io::transposed(packed.plane("scales"))},
          {"g_idx", index != packed.planes.end()
                        ? index->second
                        : io::tensor_of(io::consecutive_groups(k, format.columns_per_group(k)))}};
}

PackedTensor from_gptq(const std::map<std::string, Tensor>& tensors, const GptqSettings& settings) {
  require_bits(settings.bits);
  require_version(settings.version);
  if (settings.group_size != -1 && settings.group_size <= 0) {
    throw InvalidArgument("group_size", text_of(settings.group_size), "-1 or a positive number");
  }
  io::require_names(tensors, {"qweight", "qzeros", "scales", "g_idx"});
  const int bits = settings.bits;

  const Tensor& qweight = io::require_tensor(tensors, "qweight");
  io::require_dtype("qweight", qweight, {DType::i32});
  if (qweight.shape().size() != 2 || qweight.shape()[0] % bits != 0 || qweight.shape()[1] % kMultiple != 0) {
    throw InvalidArgument("tensor qweight", io::shape_text(qweight.shape()),
                          text_of("[k * ", bits, " / 32, n] with k and n multiples of 32"));
  }
  const int64_t k = checked_mul(qweight.shape()[0] / bits, kMultiple);
  const int64_t n = qweight.shape()[1];
  io::require_sizes("qweight", n, k);

  const Tensor& scales = io::require_tensor(tensors, "scales");
  io::require_dtype("scales", scales, {DType::f16, DType::bf16});
  const auto format = std::make_shared<const Uniform>(
      bits, settings.group_size == -1 ? Uniform::kPerChannel : settings.group_size, settings.symmetric,
      scales.dtype());
  const int64_t groups = format->group_count(k);
  io::require_shape("scales", scales, {groups, n});

  const Tensor& qzeros = io::require_tensor(tensors, "qzeros");
  io::require_dtype("qzeros", qzeros, {DType::i32});
  const WordLayout zeros_from = zero_layout(bits, settings.version);
  io::require_shape("qzeros", qzeros, zeros_from.shape(groups, n));

  PackedTensor packed{format, n, k, {}};
  packed.planes.emplace("codes", io::repack(qweight, weight_layout(bits), io::plane_layout(bits), n, k));
  packed.planes.emplace("scales", io::transposed(scales));
  if (settings.symmetric) {
    require_symmetric_zeros(qzeros, settings, groups, n);
  } else {
    const int largest = (1 << bits) - 1;
    const auto wraps = io::find_field(qzeros, zeros_from, groups, n,
                                      [&](int stored) { return stored - zeros_from.bias > largest; });
    if (wraps) {
      throw InvalidArgument(
          "tensor qzeros",
          text_of("stored value ", wraps->stored, " at group ", wraps->lane, ", column ", wraps->index),
          text_of("below ", largest, ": zero points wrap in v1, and readers disagree on them"));
    }
    packed.planes.emplace("zeros", io::repack(qzeros, zeros_from, io::plane_layout(bits), groups, n));
  }
  if (tensors.contains("g_idx")) {
    const Tensor& g_idx = io::require_tensor(tensors, "g_idx");
    io::require_dtype("g_idx", g_idx, {DType::i32});
    io::require_shape("g_idx", g_idx, {k});
    const bool consecutive =
        std::ranges::equal(g_idx.values<int32_t>(), io::consecutive_groups(k, format->columns_per_group(k)));
    if (!consecutive && format->group_size == Uniform::kPerChannel) {
      throw InvalidArgument("tensor g_idx", "several groups", "zeros: group_size -1 has one group");
    }
    if (!consecutive) packed.planes.emplace("group_index", g_idx);
  }
  validate(packed);
  return packed;
}

}  // namespace quantloom
