#include "quantloom/formats/uniform.hpp"

#include <algorithm>
#include <array>
#include <charconv>
#include <cmath>
#include <limits>
#include <nlohmann/json.hpp>
#include <optional>

#include "formats/description.hpp"
#include "formats/uniform_encoder.hpp"
#include "quantloom/formats/bit_packing.hpp"

namespace quantloom {
namespace {

constexpr int64_t kVersion = 1;

// The stored scale at `index` as float32.
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

// Bits of a row's last word that no code uses.
uint32_t padding_mask(int64_t count, int bits) {
  const int64_t used = count * bits % 32;
  return used == 0 ? 0U : ~0U << used;
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

std::string group_text(int64_t group_size) {
  if (group_size == Uniform::kPerChannel) return "channel";
  if (group_size == Uniform::kPerTensor) return "tensor";
  return text_of("g", group_size);
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

// The zero-point rule as the description states it.
nlohmann::json zero_point_json(const Uniform& format) {
  if (!format.symmetric) return "stored";
  if (format.bits == 1) return 0.5;
  return 1 << (format.bits - 1);
}

}  // namespace

Uniform::Uniform(int bits_given, int64_t group_size_given, bool symmetric_given, DType scale_dtype_given)
    : bits(bits_given),
      group_size(group_size_given),
      symmetric(symmetric_given),
      scale_dtype(scale_dtype_given) {
  if (bits < 1 || bits > 8) throw InvalidArgument("bits", text_of(bits), "1 to 8");
  if (group_size <= 0 && group_size != kPerChannel && group_size != kPerTensor) {
    throw InvalidArgument("group_size", text_of(group_size), "a positive number, kPerChannel or kPerTensor");
  }
  if (!is_float16_or_32(scale_dtype)) {
    throw TypeMismatch("scale_dtype", name_of(scale_dtype), "float16, bfloat16 or float32");
  }
}

std::string Uniform::spec() const {
  std::string text = text_of("uniform:", bits, ":", group_text(group_size), symmetric ? ":sym" : ":asym");
  if (scale_dtype == DType::bf16) text += ":bf16";
  if (scale_dtype == DType::f32) text += ":f32";
  return text;
}

std::string Uniform::to_json() const {
  nlohmann::json object;
  object["format"] = "uniform";
  object["version"] = kVersion;
  object["bits"] = bits;
  if (group_size > 0) {
    object["group_size"] = group_size;
  } else {
    object["group_size"] = group_text(group_size);
  }
  object["symmetric"] = symmetric;
  object["scale_dtype"] = name_of(scale_dtype);
  object["zero_point"] = zero_point_json(*this);
  return object.dump();
}

std::shared_ptr<const Format> Uniform::from_json(std::string_view json) {
  constexpr std::array<std::string_view, 7> kKeys = {"bits",      "format",  "group_size", "scale_dtype",
                                                     "symmetric", "version", "zero_point"};
  const nlohmann::json object = parse_description(json);
  require_keys(object, kKeys, json);
  if (object.at("format") != "uniform") refuse_description(json, "\"format\": \"uniform\"");
  static_cast<void>(integer_field(object, "version", kVersion, kVersion, json));
  const auto bits = static_cast<int>(integer_field(object, "bits", 1, 8, json));
  int64_t group_size = kPerTensor;
  if (object.at("group_size") == "channel") {
    group_size = kPerChannel;
  } else if (object.at("group_size") != "tensor") {
    group_size = integer_field(object, "group_size", 1, std::numeric_limits<int64_t>::max(), json);
  }
  if (!object.at("symmetric").is_boolean()) refuse_description(json, "\"symmetric\": true or false");
  std::optional<DType> scale_dtype;
  for (const DType dtype : {DType::f16, DType::bf16, DType::f32}) {
    if (object.at("scale_dtype") == name_of(dtype)) scale_dtype = dtype;
  }
  if (!scale_dtype) refuse_description(json, "\"scale_dtype\": float16, bfloat16 or float32");
  auto format =
      std::make_shared<const Uniform>(bits, group_size, object.at("symmetric").get<bool>(), *scale_dtype);
  const nlohmann::json expected = zero_point_json(*format);
  const nlohmann::json& zero_point = object.at("zero_point");
  // Compared as text, so that 8.0 is not 8.
  if (zero_point.is_structured() ||
      zero_point.dump(-1, ' ', true, nlohmann::json::error_handler_t::replace) != expected.dump()) {
    refuse_description(json, text_of("\"zero_point\": ", expected.dump()));
  }
  return format;
}

std::shared_ptr<const Format> Uniform::from_spec(std::string_view spec) {
  constexpr std::string_view kExpected =
      "uniform:BITS[:gN|:channel|:tensor][:sym|:asym][:f16|:bf16|:f32] with BITS from 1 to 8 and N above 0";
  const auto refuse = [&]() { throw InvalidArgument("format", printable(spec), kExpected); };
  std::vector<std::string_view> parts;
  for (size_t begin = 0;;) {
    const size_t end = spec.find(':', begin);
    parts.push_back(spec.substr(begin, end == std::string_view::npos ? end : end - begin));
    if (end == std::string_view::npos) break;
    begin = end + 1;
  }
  if (parts.size() < 2 || parts[0] != "uniform") refuse();
  const std::optional<int64_t> bits = parse_integer(parts[1]);
  if (!bits || *bits < 1 || *bits > 8) refuse();
  std::optional<int64_t> group_size;
  std::optional<bool> symmetric;
  std::optional<DType> dtype;
  for (size_t i = 2; i < parts.size(); ++i) {
    const std::string_view part = parts[i];
    const bool is_group = part == "channel" || part == "tensor" || part.starts_with('g');
    const bool is_symmetry = part == "sym" || part == "asym";
    const bool is_dtype = part == "f16" || part == "bf16" || part == "f32";
    if (is_group && !group_size) {
      group_size = part == "channel" ? kPerChannel : kPerTensor;
      if (part.starts_with('g')) {
        group_size = parse_integer(part.substr(1));
        if (!group_size || *group_size <= 0) refuse();
      }
    } else if (is_symmetry && !symmetric) {
      symmetric = part == "sym";
    } else if (is_dtype && !dtype) {
      dtype = part == "f16" ? DType::f16 : (part == "bf16" ? DType::bf16 : DType::f32);
    } else {
      refuse();
    }
  }
  return std::make_shared<const Uniform>(static_cast<int>(*bits), group_size.value_or(128),
                                         symmetric.value_or(true), dtype.value_or(DType::f16));
}

std::vector<PlaneSpec> Uniform::planes(int64_t n, int64_t k) const {
  if (n < 0 || k < 0) throw InvalidArgument("shape", text_of("[", n, ", ", k, "]"), "sizes >= 0");
  const bool per_tensor = group_size == kPerTensor;
  const int64_t groups = per_tensor ? 1 : group_count(k);
  std::vector<PlaneSpec> specs;
  specs.push_back({"codes", DType::i32, {n, packed_words(k, bits)}});
  specs.push_back({"scales", scale_dtype, {per_tensor ? 1 : n, groups}});
  if (!symmetric) {
    specs.push_back({"zeros", DType::i32, {groups, packed_words(per_tensor ? 1 : n, bits)}});
  }
  if (group_size > 0) specs.push_back({"group_index", DType::i32, {k}, true});
  for (const PlaneSpec& spec : specs) {
    static_cast<void>(checked_mul(checked_product(spec.shape), size_of(spec.dtype)));
  }
  return specs;
}

void Uniform::validate_values(const PackedTensor& packed) const {
  const Tensor& scales = packed.plane("scales");
  for (int64_t i = 0; i < scales.element_count(); ++i) {
    if (!std::isfinite(scale_at(scales, i))) {
      const int64_t groups = scales.shape()[1];
      throw InvalidArgument("plane scales",
                            text_of(scale_at(scales, i), " at row ", i / groups, ", group ", i % groups),
                            "finite scales");
    }
  }
  require_zero_padding(packed.plane("codes"), "codes", packed.k, bits);
  if (!symmetric) {
    require_zero_padding(packed.plane("zeros"), "zeros", group_size == kPerTensor ? 1 : packed.n, bits);
  }
  if (packed.planes.contains("group_index")) {
    require_group_index(packed.plane("group_index").values<int32_t>(), group_count(packed.k),
                        columns_per_group(packed.k), "plane group_index");
  }
}

void Uniform::decode(const PackedTensor& packed, int64_t first_row, MatrixView<float> out) const {
  const bool per_tensor = group_size == kPerTensor;
  const int64_t k = packed.k;
  const int64_t groups = per_tensor ? 1 : group_count(k);
  const int64_t width = columns_per_group(k);
  const Tensor& codes = packed.plane("codes");
  const Tensor& scales = packed.plane("scales");
  const Tensor* zeros = symmetric ? nullptr : &packed.plane("zeros");
  std::span<const int32_t> group_index;
  if (packed.planes.contains("group_index")) {
    group_index = packed.plane("group_index").values<int32_t>();
  }
  std::vector<uint8_t> row_codes(static_cast<size_t>(k));
  std::vector<float> row_scales(static_cast<size_t>(groups));
  std::vector<float> row_zeros(static_cast<size_t>(groups), symmetric_zero_point());
  for (int64_t r = 0; r < out.rows(); ++r) {
    const int64_t row = first_row + r;
    unpack_bits(packed_row(codes, row), bits, 0, row_codes);
    for (int64_t g = 0; g < groups; ++g) {
      row_scales[g] = scale_at(scales, per_tensor ? 0 : row * groups + g);
      if (zeros != nullptr) {
        uint8_t zero = 0;
        unpack_bits(packed_row(*zeros, g), bits, per_tensor ? 0 : row, {&zero, 1});
        row_zeros[g] = static_cast<float>(zero);
      }
    }
    float* values = out.row(r);
    if (!group_index.empty()) {
      for (int64_t c = 0; c < k; ++c) {
        const int32_t g = group_index[c];
        values[c] = row_scales[g] * (static_cast<float>(row_codes[c]) - row_zeros[g]);
      }
      continue;
    }
    for (int64_t g = 0, begin = 0; begin < k; ++g) {
      const int64_t end = k - begin > width ? begin + width : k;
      const float scale = row_scales[g];
      const float zero = row_zeros[g];
      for (int64_t c = begin; c < end; ++c) values[c] = scale * (static_cast<float>(row_codes[c]) - zero);
      begin = end;
    }
  }
}

std::unique_ptr<ColumnEncoder> Uniform::column_encoder(std::shared_ptr<const Format> self, int64_t n,
                                                       int64_t k,
                                                       std::span<const int32_t> group_of_column) const {
  return make_uniform_encoder(std::move(self), *this, n, k, group_of_column);
}

}  // namespace quantloom
