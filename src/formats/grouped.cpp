#include "formats/grouped.hpp"

#include <charconv>
#include <cmath>
#include <limits>
#include <nlohmann/json.hpp>

#include "formats/description.hpp"
#include "quantloom/formats/bit_packing.hpp"

namespace quantloom {
namespace {

// Bits of a row's last word that no code uses.
uint32_t padding_mask(int64_t count, int bits) {
  const int64_t used = count * bits % 32;
  return used == 0 ? 0U : ~0U << used;
}

}  // namespace

ScaledFormat::ScaledFormat(int64_t group_size_given, DType scale_dtype_given)
    : group_size(group_size_given), scale_dtype(scale_dtype_given) {
  if (group_size <= 0 && group_size != kPerChannel && group_size != kPerTensor) {
    throw InvalidArgument("group_size", text_of(group_size), "a positive number, kPerChannel or kPerTensor");
  }
  if (!is_float16_or_32(scale_dtype)) {
    throw TypeMismatch("scale_dtype", name_of(scale_dtype), "float16, bfloat16 or float32");
  }
}

GroupedFormat::GroupedFormat(int bits_given, int64_t group_size_given, DType scale_dtype_given)
    : ScaledFormat(group_size_given, scale_dtype_given), bits(bits_given) {
  if (bits < 1 || bits > 8) throw InvalidArgument("bits", text_of(bits), "1 to 8");
}

std::string group_text(int64_t group_size) {
  if (group_size == GroupedFormat::kPerChannel) return "channel";
  if (group_size == GroupedFormat::kPerTensor) return "tensor";
  return text_of("g", group_size);
}

std::string_view scale_dtype_suffix(DType scale_dtype) {
  if (scale_dtype == DType::bf16) return ":bf16";
  return scale_dtype == DType::f32 ? ":f32" : "";
}

nlohmann::json group_size_json(int64_t group_size) {
  if (group_size > 0) return group_size;
  return group_text(group_size);
}

int64_t group_size_field(const nlohmann::json& object, std::string_view json) {
  const nlohmann::json& value = object.at("group_size");
  if (value == "channel") return GroupedFormat::kPerChannel;
  if (value == "tensor") return GroupedFormat::kPerTensor;
  return integer_field(object, "group_size", 1, std::numeric_limits<int64_t>::max(), json);
}

DType scale_dtype_field(const nlohmann::json& object, std::string_view json) {
  for (const DType dtype : {DType::f16, DType::bf16, DType::f32}) {
    if (object.at("scale_dtype") == name_of(dtype)) return dtype;
  }
  refuse_description(json, "\"scale_dtype\": float16, bfloat16 or float32");
}

std::vector<std::string_view> split_spec(std::string_view spec) {
  std::vector<std::string_view> parts;
  for (size_t begin = 0;;) {
    const size_t end = spec.find(':', begin);
    parts.push_back(spec.substr(begin, end == std::string_view::npos ? end : end - begin));
    if (end == std::string_view::npos) return parts;
    begin = end + 1;
  }
}

std::optional<int64_t> parse_integer(std::string_view text) {
  int64_t value = 0;
  const auto [end, error] = std::from_chars(text.data(), text.data() + text.size(), value);
  if (error != std::errc{} || end != text.data() + text.size() || text.empty() || text[0] == '-' ||
      (text[0] == '0' && text.size() > 1)) {
    return std::nullopt;
  }
  return value;
}

bool GroupParts::take(std::string_view part) {
  if (!group_size && (part == "channel" || part == "tensor")) {
    group_size = part == "channel" ? GroupedFormat::kPerChannel : GroupedFormat::kPerTensor;
    return true;
  }
  if (!group_size && part.starts_with('g')) {
    group_size = parse_integer(part.substr(1));
    return group_size && *group_size > 0;
  }
  if (!scale_dtype && (part == "f16" || part == "bf16" || part == "f32")) {
    scale_dtype = part == "f16" ? DType::f16 : (part == "bf16" ? DType::bf16 : DType::f32);
    return true;
  }
  return false;
}

PlaneSpec scales_plane(const ScaledFormat& format, int64_t n, int64_t k) {
  const bool per_tensor = format.group_size == ScaledFormat::kPerTensor;
  return {"scales", format.scale_dtype, {per_tensor ? 1 : n, per_tensor ? 1 : format.group_count(k)}};
}

std::vector<PlaneSpec> grouped_planes(const GroupedFormat& format, int64_t n, int64_t k) {
  if (n < 0 || k < 0) throw InvalidArgument("shape", text_of("[", n, ", ", k, "]"), "sizes >= 0");
  std::vector<PlaneSpec> specs;
  specs.push_back({"codes", DType::i32, {n, packed_words(k, format.bits)}});
  specs.push_back(scales_plane(format, n, k));
  if (format.group_size > 0) specs.push_back({"group_index", DType::i32, {k}, true});
  return specs;
}

void require_countable(const std::vector<PlaneSpec>& specs) {
  for (const PlaneSpec& spec : specs) {
    static_cast<void>(checked_mul(checked_product(spec.shape), size_of(spec.dtype)));
  }
}

void require_finite_scales(const Tensor& scales) {
  for (int64_t i = 0; i < scales.element_count(); ++i) {
    if (!std::isfinite(scale_at(scales, i))) {
      const int64_t groups = scales.shape()[1];
      throw InvalidArgument("plane scales",
                            text_of(scale_at(scales, i), " at row ", i / groups, ", group ", i % groups),
                            "finite scales");
    }
  }
}

void validate_grouped(const GroupedFormat& format, const PackedTensor& packed) {
  require_finite_scales(packed.plane("scales"));
  require_zero_padding(packed.plane("codes"), "codes", packed.k, format.bits);
  if (packed.planes.contains("group_index")) {
    require_group_index(packed.plane("group_index").values<int32_t>(), format.group_count(packed.k),
                        format.columns_per_group(packed.k), "plane group_index");
  }
}

void require_zero_padding(const Tensor& plane, const std::string& name, int64_t count, int bits) {
  const uint32_t mask = padding_mask(count, bits);
  if (mask == 0 || plane.element_count() == 0) return;
  for (int64_t row = 0; row < plane.shape()[0]; ++row) {
    if ((packed_row(plane, row).back() & mask) != 0) {
      throw InvalidArgument("plane " + name, text_of("non-zero padding bits in row ", row), "zero bits");
    }
  }
}

void require_group_index(std::span<const int32_t> group_of_column, int64_t groups, int64_t columns_per_group,
                         std::string_view argument) {
  std::vector<int64_t> columns(static_cast<size_t>(groups), 0);
  for (size_t c = 0; c < group_of_column.size(); ++c) {
    const int32_t group = group_of_column[c];
    if (group < 0 || group >= groups) {
      throw InvalidArgument(argument, text_of(group, " at column ", c),
                            text_of("groups in [0, ", groups, ")"));
    }
    if (++columns[static_cast<size_t>(group)] > columns_per_group) {
      throw InvalidArgument(argument, text_of("more than ", columns_per_group, " columns in group ", group),
                            text_of("at most ", columns_per_group, " columns in a group"));
    }
  }
}

std::vector<int32_t> permuted_groups(std::span<const int32_t> group_of_column, int64_t k, int64_t groups,
                                     int64_t columns_per_group) {
  if (group_of_column.empty()) return {};
  if (std::ssize(group_of_column) != k) {
    throw InvalidArgument("group_of_column", text_of(group_of_column.size(), " entries"),
                          text_of(k, ", one for each column"));
  }
  require_group_index(group_of_column, groups, columns_per_group, "group_of_column");
  bool consecutive = true;
  for (int64_t c = 0; c < k; ++c) {
    consecutive = consecutive && group_of_column[static_cast<size_t>(c)] == c / columns_per_group;
  }
  if (consecutive) return {};
  return {group_of_column.begin(), group_of_column.end()};
}

void store_scale(Tensor& scales, int64_t index, float scale) {
  const auto at = static_cast<size_t>(index);
  if (scales.dtype() == DType::f32) {
    scales.values<float>()[at] = scale;
  } else {
    scales.values<uint16_t>()[at] =
        scales.dtype() == DType::f16 ? f16_from_float(scale) : bf16_from_float(scale);
  }
}

float scale_at(const Tensor& scales, int64_t index) {
  const auto i = static_cast<size_t>(index);
  switch (scales.dtype()) {
    case DType::f16:
      return float_from_f16(scales.values<uint16_t>()[i]);
    case DType::bf16:
      return float_from_bf16(scales.values<uint16_t>()[i]);
    default:
      return scales.values<float>()[i];
  }
}

std::span<const uint32_t> packed_row(const Tensor& plane, int64_t row) {
  const int64_t words = plane.shape()[1];
  return plane.values<uint32_t>().subspan(static_cast<size_t>(row * words), static_cast<size_t>(words));
}

}  // namespace quantloom
