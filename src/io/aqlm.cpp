#include "quantloom/io/aqlm.hpp"

#include <algorithm>
#include <bit>

#include "formats/additive_encoder.hpp"
#include "formats/grouped.hpp"
#include "io/text.hpp"
#include "io/word_layout.hpp"

namespace quantloom {

std::string aqlm_refusal(const Format& format, int64_t n, int64_t k) {
  const auto* additive = dynamic_cast<const Additive*>(&format);
  if (additive == nullptr) return text_of("aqlm holds the format additive, not ", format.spec());
  if (additive->scale_dtype != DType::f16) {
    return text_of("aqlm holds float16 scales, not ", name_of(additive->scale_dtype));
  }
  if (k > 0 && additive->scale_count(k) != 1) {
    return text_of("aqlm holds one scale for each group of rows, not one for ", additive->scale_group,
                   " columns");
  }
  if (n % additive->out_group != 0 || k % additive->in_group != 0 || n == 0 || k == 0) {
    return text_of("aqlm holds whole blocks of ", additive->out_group, " x ", additive->in_group,
                   " weights, not [", n, ", ", k, "]");
  }
  return "";
}

std::map<std::string, Tensor> to_aqlm(const PackedTensor& packed) {
  if (packed.format == nullptr) throw InvalidArgument("packed", "no format", "a packed tensor with a format");
  const std::string refusal = aqlm_refusal(*packed.format, packed.n, packed.k);
  if (!refusal.empty()) throw Unsupported(refusal);
  validate(packed);
  const auto& format = dynamic_cast<const Additive&>(*packed.format);
  const AdditiveParts parts = unpack_additive(format, packed);
  const int64_t rows = format.row_groups(packed.n);
  Tensor codes(format.bits <= 8 ? DType::i8 : DType::i16, {rows, format.blocks(packed.k), format.codebooks});
  if (format.bits <= 8) {
    std::ranges::transform(parts.codes, codes.values<uint8_t>().begin(),
                           [](uint16_t code) { return static_cast<uint8_t>(code); });
  } else {
    std::ranges::copy(parts.codes, codes.values<uint16_t>().begin());
  }
  Tensor tables(DType::f16, {format.codebooks, format.entries(), format.out_group, format.in_group});
  std::ranges::transform(parts.tables, tables.values<uint16_t>().begin(), f16_from_float);
  Tensor scales(DType::f16, {rows, 1, 1, 1});
  std::ranges::transform(parts.scales, scales.values<uint16_t>().begin(), f16_from_float);
  return {{"codes", std::move(codes)}, {"codebooks", std::move(tables)}, {"scales", std::move(scales)}};
}

PackedTensor from_aqlm(const std::map<std::string, Tensor>& tensors) {
  io::require_names(tensors, {"codes", "codebooks", "scales"});
  const Tensor& tables = io::require_tensor(tensors, "codebooks");
  io::require_dtype("codebooks", tables, {DType::f16});
  const std::vector<int64_t>& shape = tables.shape();
  constexpr const char* kTables = "[codebooks, 2^bits, out_group, in_group], blocks of up to 16 weights";
  const auto refuse = [&] { throw InvalidArgument("tensor codebooks", io::shape_text(shape), kTables); };
  if (shape.size() != 4 || shape[0] < 1 || shape[0] > Additive::kMostCodebooks || shape[1] < 2 ||
      shape[1] > int64_t{1} << Additive::kMostBits || !std::has_single_bit(static_cast<uint64_t>(shape[1])) ||
      shape[2] < 1 || shape[3] < 1 || shape[2] > Additive::kMostWeights ||
      shape[3] > Additive::kMostWeights || shape[2] * shape[3] > Additive::kMostWeights) {
    refuse();
  }
  const int bits = std::countr_zero(static_cast<uint64_t>(shape[1]));
  const Tensor& codes = io::require_tensor(tensors, "codes");
  io::require_dtype("codes", codes, {bits <= 8 ? DType::i8 : DType::i16});
  if (codes.shape().size() != 3 || codes.shape()[2] != shape[0]) {
    throw InvalidArgument("tensor codes", io::shape_text(codes.shape()),
                          text_of("[n / ", shape[2], ", k / ", shape[3], ", ", shape[0], "]"));
  }
  const int64_t rows = codes.shape()[0];
  const int64_t n = checked_mul(rows, shape[2]);
  const int64_t k = checked_mul(codes.shape()[1], shape[3]);
  io::require_sizes("codes", n, k);
  const Tensor& scales = io::require_tensor(tensors, "scales");
  io::require_dtype("scales", scales, {DType::f16});
  io::require_shape("scales", scales, {rows, 1, 1, 1});

  const Additive format(static_cast<int>(shape[0]), bits, shape[3], shape[2]);
  AdditiveParts parts;
  parts.codes.reserve(static_cast<size_t>(codes.element_count()));
  if (bits <= 8) {
    for (const uint8_t code : codes.values<uint8_t>()) parts.codes.push_back(code);
  } else {
    for (const uint16_t code : codes.values<uint16_t>()) parts.codes.push_back(code);
  }
  // A code is taken modulo its container, not modulo the entries.
  const auto bad = std::ranges::find_if(parts.codes, [&](uint16_t code) { return code >= shape[1]; });
  if (bad != parts.codes.end()) {
    throw InvalidArgument("tensor codes", text_of(*bad, " at element ", bad - parts.codes.begin()),
                          text_of("codes below ", shape[1], ", the entries of a codebook"));
  }
  for (const uint16_t value : tables.values<uint16_t>()) parts.tables.push_back(float_from_f16(value));
  for (const uint16_t value : scales.values<uint16_t>()) parts.scales.push_back(float_from_f16(value));
  PackedTensor packed = pack_additive(format, parts, n, k, 1);
  validate(packed);
  return packed;
}

}  // namespace quantloom
