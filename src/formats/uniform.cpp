#include "quantloom/formats/uniform.hpp"

#include <array>
#include <nlohmann/json.hpp>
#include <optional>

#include "formats/description.hpp"
#include "formats/grouped.hpp"
#include "formats/uniform_encoder.hpp"
#include "quantloom/formats/bit_packing.hpp"

namespace quantloom {
namespace {

constexpr int64_t kVersion = 1;

// The zero-point rule as the description states it.
nlohmann::json zero_point_json(const Uniform& format) {
  if (!format.symmetric) return "stored";
  if (format.bits == 1) return 0.5;
  return 1 << (format.bits - 1);
}

}  // namespace

Uniform::Uniform(int bits_given, int64_t group_size_given, bool symmetric_given, DType scale_dtype_given)
    : GroupedFormat(bits_given, group_size_given, scale_dtype_given), symmetric(symmetric_given) {}

std::string Uniform::spec() const {
  return text_of("uniform:", bits, ":", group_text(group_size), symmetric ? ":sym" : ":asym",
                 scale_dtype_suffix(scale_dtype));
}

std::string Uniform::to_json() const {
  nlohmann::json object;
  object["format"] = "uniform";
  object["version"] = kVersion;
  object["bits"] = bits;
  object["group_size"] = group_size_json(group_size);
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
  const int64_t group_size = group_size_field(object, json);
  if (!object.at("symmetric").is_boolean()) refuse_description(json, "\"symmetric\": true or false");
  const DType scale_dtype = scale_dtype_field(object, json);
  auto format =
      std::make_shared<const Uniform>(bits, group_size, object.at("symmetric").get<bool>(), scale_dtype);
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
  const std::vector<std::string_view> parts = split_spec(spec);
  if (parts.size() < 2 || parts[0] != "uniform") refuse();
  const std::optional<int64_t> bits = parse_integer(parts[1]);
  if (!bits || *bits < 1 || *bits > 8) refuse();
  std::optional<bool> symmetric;
  GroupParts group;
  for (size_t i = 2; i < parts.size(); ++i) {
    if (!symmetric && (parts[i] == "sym" || parts[i] == "asym")) {
      symmetric = parts[i] == "sym";
    } else if (!group.take(parts[i])) {
      refuse();
    }
  }
  return std::make_shared<const Uniform>(static_cast<int>(*bits), group.group_size.value_or(128),
                                         symmetric.value_or(true), group.scale_dtype.value_or(DType::f16));
}

std::vector<PlaneSpec> Uniform::planes(int64_t n, int64_t k) const {
  std::vector<PlaneSpec> specs = grouped_planes(*this, n, k);
  if (!symmetric) {
    const bool per_tensor = group_size == kPerTensor;
    specs.insert(
        specs.begin() + 2,
        {"zeros", DType::i32, {per_tensor ? 1 : group_count(k), packed_words(per_tensor ? 1 : n, bits)}});
  }
  require_countable(specs);
  return specs;
}

void Uniform::validate_values(const PackedTensor& packed) const {
  validate_grouped(*this, packed);
  if (!symmetric) {
    require_zero_padding(packed.plane("zeros"), "zeros", group_size == kPerTensor ? 1 : packed.n, bits);
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
