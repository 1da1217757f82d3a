#include "quantloom/formats/codebook.hpp"

#include <algorithm>
#include <array>
#include <bit>
#include <cmath>
#include <cstdio>
#include <nlohmann/json.hpp>

#define XXH_INLINE_ALL
#include <xxhash.h>

#include "formats/codebook_encoder.hpp"
#include "formats/description.hpp"
#include "formats/grouped.hpp"
#include "quantloom/formats/bit_packing.hpp"

namespace quantloom {
namespace {

constexpr int64_t kVersion = 1;
constexpr size_t kMostEntries = 256;

// The fewest bits that number `entries` >= 2 entries.
int bits_for(size_t entries) {
  return static_cast<int>(std::bit_width(entries - 1));
}

float rounded(float value) {
  return float_from_f16(f16_from_float(value)) + 0.0F;  // -0 becomes 0
}

std::vector<float> checked_table(std::span<const float> values) {
  if (values.size() < 2 || values.size() > kMostEntries) {
    throw InvalidArgument("table", text_of(values.size(), " entries"), "2 to 256 entries");
  }
  std::vector<float> table;
  for (size_t i = 0; i < values.size(); ++i) {
    table.push_back(rounded(values[i]));
    if (!std::isfinite(table[i])) {
      throw InvalidArgument("table", text_of(values[i], " as entry ", i),
                            "finite values of at most 65504, as float16 holds");
    }
    if (i > 0 && table[i] <= table[i - 1]) {
      throw InvalidArgument("table", text_of(values[i], " as entry ", i, " after ", values[i - 1]),
                            "values that rise strictly, also once rounded to float16");
    }
  }
  return table;
}

int checked_bits(const std::vector<float>& table, std::optional<int> bits) {
  const int least = bits_for(table.size());
  if (bits && (*bits < least || *bits > 8)) {
    throw InvalidArgument("bits", text_of(*bits),
                          text_of(least, " to 8 for a table of ", table.size(), " entries"));
  }
  return bits.value_or(least);
}

std::string table_names() {
  std::string names;
  for (const CodebookTable& known : codebook_tables()) {
    names += text_of(names.empty() ? "" : ", ", known.name);
  }
  return names;
}

const std::vector<float>& known_values(std::string_view name) {
  for (const CodebookTable& known : codebook_tables()) {
    if (known.name == name) return known.values;
  }
  throw InvalidArgument("table", printable(name), text_of("one of ", table_names(), ", or values"));
}

std::string name_of_table(const std::vector<float>& table, int bits) {
  for (const CodebookTable& known : codebook_tables()) {
    if (bits == bits_for(known.values.size()) && std::ranges::equal(table, known.values, {}, {}, &rounded)) {
      return std::string(known.name);
    }
  }
  return {};
}

// Eight hexadecimal digits of the table's bytes in float16, little-endian.
std::string hash_text(const std::vector<float>& table) {
  std::vector<uint8_t> bytes;
  for (const float value : table) {
    const uint16_t bits = f16_from_float(value);
    bytes.push_back(static_cast<uint8_t>(bits & 0xffU));
    bytes.push_back(static_cast<uint8_t>(bits >> 8));
  }
  std::array<char, 9> text{};
  static_cast<void>(std::snprintf(text.data(), text.size(), "%08x", XXH32(bytes.data(), bytes.size(), 0)));
  return text.data();
}

// The entries of a description, which are what float16 holds to the last bit.
std::vector<float> entries_field(const nlohmann::json& value, std::string_view json) {
  if (!value.is_array() || value.size() < 2 || value.size() > kMostEntries) {
    refuse_description(json, text_of("\"table\": one of ", table_names(), ", or a list of 2 to 256 numbers"));
  }
  std::vector<float> entries;
  for (const nlohmann::json& entry : value) {
    const double number = entry.is_number() ? entry.get<double>() : NAN;
    const bool fits = std::abs(number) <= 65504;
    const float held = fits ? rounded(static_cast<float>(number)) : 0.0F;
    if (!fits || static_cast<double>(held) != number) {
      refuse_description(json, text_of("numbers in \"table\" that float16 holds exactly"));
    }
    if (!entries.empty() && held <= entries.back()) {
      refuse_description(json, "numbers in \"table\" that rise strictly");
    }
    entries.push_back(held);
  }
  return entries;
}

// Throws unless each code names an entry of the table.
void require_codes_below(const Tensor& codes, int64_t k, int bits, size_t entries) {
  if (entries == size_t{1} << bits || codes.element_count() == 0) return;
  std::vector<uint8_t> row_codes(static_cast<size_t>(k));
  for (int64_t row = 0; row < codes.shape()[0]; ++row) {
    unpack_bits(packed_row(codes, row), bits, 0, row_codes);
    const auto bad = std::ranges::find_if(row_codes, [&](uint8_t code) { return code >= entries; });
    if (bad != row_codes.end()) {
      throw InvalidArgument("plane codes",
                            text_of(int{*bad}, " at row ", row, ", column ", bad - row_codes.begin()),
                            text_of("codes below ", entries, ", the entries of the table"));
    }
  }
}

}  // namespace

const std::vector<CodebookTable>& codebook_tables() {
  static const std::vector<CodebookTable> tables = {
      {"nf4",
       "4-bit NormalFloat (Dettmers et al. 2023, QLoRA)",
       {-1.0F, -0.6961928F, -0.52507305F, -0.39491749F, -0.28444138F, -0.18477343F, -0.091050036F, 0.0F,
        0.0795803F, 0.1609302F, 0.2461123F, 0.33791524F, 0.44070983F, 0.562617F, 0.72295684F, 1.0F}},
      {"nf3",
       "3-bit NormalFloat: the quantiles of nf4 for 8 entries",
       {-1.0F, -0.53502274F, -0.24693143F, 0.0F, 0.18333748F, 0.38199395F, 0.6229857F, 1.0F}},
      {"sf4",
       "4-bit Student float, 5 degrees of freedom (Dotzel et al. 2024)",
       {-1.0F, -0.6277806F, -0.454736F, -0.3343307F, -0.2374344F, -0.1528987F, -0.0749825F, 0.0F, 0.0655131F,
        0.1329647F, 0.204661F, 0.2838347F, 0.3758048F, 0.4910756F, 0.6567811F, 1.0F}},
      {"fp4",
       "4-bit float E2M1 (OCP Microscaling Formats 1.0): 15 values, in rising order",
       {-6.0F, -4.0F, -3.0F, -2.0F, -1.5F, -1.0F, -0.5F, 0.0F, 0.5F, 1.0F, 1.5F, 2.0F, 3.0F, 4.0F, 6.0F}},
  };
  return tables;
}

Codebook::Codebook(std::span<const float> values, int64_t group_size_given, DType scale_dtype_given,
                   std::optional<int> bits_given)
    : GroupedFormat(checked_bits(checked_table(values), bits_given), group_size_given, scale_dtype_given),
      table(checked_table(values)),
      table_name(name_of_table(table, bits)) {}

Codebook::Codebook(std::string_view name, int64_t group_size_given, DType scale_dtype_given,
                   std::optional<int> bits_given)
    : Codebook(std::span(known_values(name)), group_size_given, scale_dtype_given, bits_given) {}

std::string Codebook::spec() const {
  const std::string shown = table_name.empty() ? text_of("custom", bits, "-", hash_text(table)) : table_name;
  return text_of("codebook:", shown, ":", group_text(group_size), scale_dtype_suffix(scale_dtype));
}

std::string Codebook::to_json() const {
  nlohmann::json object;
  object["format"] = "codebook";
  object["version"] = kVersion;
  object["bits"] = bits;
  object["group_size"] = group_size_json(group_size);
  object["scale_dtype"] = name_of(scale_dtype);
  if (table_name.empty()) {
    // As double: a float16 then has its exact decimal digits.
    object["table"] = std::vector<double>(table.begin(), table.end());
  } else {
    object["table"] = table_name;
  }
  return object.dump();
}

std::shared_ptr<const Format> Codebook::from_json(std::string_view json) {
  constexpr std::array<std::string_view, 6> kKeys = {"bits",        "format", "group_size",
                                                     "scale_dtype", "table",  "version"};
  const nlohmann::json object = parse_description(json);
  require_keys(object, kKeys, json);
  if (object.at("format") != "codebook") refuse_description(json, "\"format\": \"codebook\"");
  static_cast<void>(integer_field(object, "version", kVersion, kVersion, json));
  const int64_t group_size = group_size_field(object, json);
  const DType scale_dtype = scale_dtype_field(object, json);
  const nlohmann::json& table = object.at("table");
  const std::vector<float> values =
      table.is_string() ? known_values(table.get<std::string>()) : entries_field(table, json);
  // A name stands for a table at its own width.
  const int least = bits_for(values.size());
  const int most = table.is_string() ? least : 8;
  const auto bits = static_cast<int>(integer_field(object, "bits", least, most, json));
  return std::make_shared<const Codebook>(values, group_size, scale_dtype, bits);
}

std::shared_ptr<const Format> Codebook::from_spec(std::string_view spec) {
  const auto refuse = [&](std::string_view table_expected) {
    throw InvalidArgument(
        "format", printable(spec),
        text_of("codebook:TABLE[:gN|:channel|:tensor][:f16|:bf16|:f32] with N above 0 and ", table_expected));
  };
  const std::string one_of = text_of("TABLE one of ", table_names());
  const std::vector<std::string_view> parts = split_spec(spec);
  if (parts.size() < 2 || parts[0] != "codebook") refuse(one_of);
  if (parts[1].starts_with("custom")) {
    refuse(one_of + "; a table of one's own is given by its values, not by a short form");
  }
  const auto is_named = [&](const CodebookTable& known) { return known.name == parts[1]; };
  if (std::ranges::none_of(codebook_tables(), is_named)) refuse(one_of);
  GroupParts group;
  for (size_t i = 2; i < parts.size(); ++i) {
    if (!group.take(parts[i])) refuse(one_of);
  }
  return std::make_shared<const Codebook>(parts[1], group.group_size.value_or(64),
                                          group.scale_dtype.value_or(DType::f16));
}

std::vector<PlaneSpec> Codebook::planes(int64_t n, int64_t k) const {
  std::vector<PlaneSpec> specs = grouped_planes(*this, n, k);
  specs.insert(specs.begin() + 1, {"codebook", DType::f16, {std::ssize(table)}});
  require_countable(specs);
  return specs;
}

void Codebook::validate_values(const PackedTensor& packed) const {
  validate_grouped(*this, packed);
  const auto stored = packed.plane("codebook").values<uint16_t>();
  for (size_t i = 0; i < table.size(); ++i) {
    if (stored[i] != f16_from_float(table[i])) {
      throw InvalidArgument("plane codebook", text_of(float_from_f16(stored[i]), " as entry ", i),
                            text_of(table[i], ", as in the format's description"));
    }
  }
  require_codes_below(packed.plane("codes"), packed.k, bits, table.size());
}

void Codebook::decode(const PackedTensor& packed, int64_t first_row, MatrixView<float> out) const {
  const bool per_tensor = group_size == kPerTensor;
  const int64_t k = packed.k;
  const int64_t groups = per_tensor ? 1 : group_count(k);
  const int64_t width = columns_per_group(k);
  const Tensor& scales = packed.plane("scales");
  std::span<const int32_t> group_index;
  if (packed.planes.contains("group_index")) {
    group_index = packed.plane("group_index").values<int32_t>();
  }
  std::array<float, kMostEntries> values{};
  std::ranges::copy(table, values.begin());
  std::vector<uint8_t> row_codes(static_cast<size_t>(k));
  std::vector<float> row_scales(static_cast<size_t>(groups));
  for (int64_t r = 0; r < out.rows(); ++r) {
    const int64_t row = first_row + r;
    unpack_bits(packed_row(packed.plane("codes"), row), bits, 0, row_codes);
    for (int64_t g = 0; g < groups; ++g) {
      row_scales[g] = scale_at(scales, per_tensor ? 0 : row * groups + g);
    }
    float* decoded = out.row(r);
    if (!group_index.empty()) {
      for (int64_t c = 0; c < k; ++c) decoded[c] = row_scales[group_index[c]] * values[row_codes[c]];
      continue;
    }
    for (int64_t g = 0, begin = 0; begin < k; ++g) {
      const int64_t end = k - begin > width ? begin + width : k;
      for (int64_t c = begin; c < end; ++c) decoded[c] = row_scales[g] * values[row_codes[c]];
      begin = end;
    }
  }
}

std::unique_ptr<ColumnEncoder> Codebook::column_encoder(std::shared_ptr<const Format> self, int64_t n,
                                                        int64_t k,
                                                        std::span<const int32_t> group_of_column) const {
  return make_codebook_encoder(std::move(self), *this, n, k, group_of_column);
}

}  // namespace quantloom
