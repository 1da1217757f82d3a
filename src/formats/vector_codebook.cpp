#include "quantloom/formats/vector_codebook.hpp"

#include <algorithm>
#include <array>
#include <bit>
#include <cmath>
#include <cstdio>
#include <nlohmann/json.hpp>

#define XXH_INLINE_ALL
#include <xxhash.h>

#include "formats/description.hpp"
#include "formats/grouped.hpp"
#include "formats/vector_encoder.hpp"
#include "quantloom/formats/bit_packing.hpp"

namespace quantloom {
namespace {

constexpr int64_t kVersion = 1;
constexpr std::string_view kSpecForm =
    "vector_codebook:[TABLESx]ENTRIESxDIM[:gN|:channel|:tensor][:f16|:bf16|:f32] with N a multiple of DIM, "
    "up "
    "to 8 tables of 2 to 65536 entries of 1 to 16 weights";

int64_t checked_range(const char* field, int64_t value, int64_t least, int64_t most) {
  if (value < least || value > most) {
    throw InvalidArgument(field, text_of(value), text_of(least, " to ", most));
  }
  return value;
}

float rounded(float value) {
  return float_from_f16(f16_from_float(value)) + 0.0F;  // -0 becomes 0
}

// Eight hexadecimal digits of the tables' bytes in float16, little-endian.
std::string hash_text(const std::vector<float>& table) {
  std::vector<uint8_t> bytes;
  bytes.reserve(2 * table.size());
  for (const float value : table) {
    const uint16_t bits = f16_from_float(value);
    bytes.push_back(static_cast<uint8_t>(bits & 0xffU));
    bytes.push_back(static_cast<uint8_t>(bits >> 8));
  }
  std::array<char, 9> text{};
  static_cast<void>(std::snprintf(text.data(), text.size(), "%08x", XXH32(bytes.data(), bytes.size(), 0)));
  return text.data();
}

// "256x4" or "2x256x8": tables, entries, dim.
std::optional<std::array<int64_t, 3>> parse_sizes(std::string_view text) {
  std::vector<int64_t> sizes;
  while (true) {
    const size_t end = text.find('x');
    const auto size = parse_integer(text.substr(0, end));
    if (!size || sizes.size() == 3) return std::nullopt;
    sizes.push_back(*size);
    if (end == std::string_view::npos) break;
    text.remove_prefix(end + 1);
  }
  if (sizes.size() == 2) return std::array{int64_t{1}, sizes[0], sizes[1]};
  return sizes.size() == 3 ? std::optional(std::array{sizes[0], sizes[1], sizes[2]}) : std::nullopt;
}

// Throws unless each code names an entry.
void require_codes_below(const VectorCodebook& format, const PackedTensor& packed) {
  if (format.entries == int64_t{1} << format.bits) return;
  const Tensor& codes = packed.plane("codes");
  if (codes.element_count() == 0) return;
  std::vector<uint16_t> row_codes(static_cast<size_t>(format.code_count(packed.k)));
  for (int64_t row = 0; row < packed.n; ++row) {
    unpack_wide_bits(packed_row(codes, row), format.bits, 0, row_codes);
    const auto bad = std::ranges::find_if(row_codes, [&](uint16_t code) { return code >= format.entries; });
    if (bad != row_codes.end()) {
      throw InvalidArgument(
          "plane codes",
          text_of(*bad, " at row ", row, ", vector ", (bad - row_codes.begin()) / format.codebooks),
          text_of("codes below ", format.entries, ", the entries of a table"));
    }
  }
}

}  // namespace

VectorCodebook::VectorCodebook(int64_t entries_given, int64_t dim_given, int64_t group_size_given,
                               DType scale_dtype_given, int64_t codebooks_given,
                               std::span<const float> values)
    : ScaledFormat(group_size_given, scale_dtype_given),
      dim(checked_range("dim", dim_given, 1, kMostDim)),
      entries(checked_range("entries", entries_given, 2, kMostEntries)),
      codebooks(checked_range("codebooks", codebooks_given, 1, kMostCodebooks)),
      bits(static_cast<int>(std::bit_width(static_cast<uint64_t>(entries - 1)))) {
  if (group_size > 0 && group_size % dim != 0) {
    throw InvalidArgument("group_size", text_of(group_size), text_of("a multiple of dim = ", dim));
  }
  if (values.empty()) return;
  const int64_t count = codebooks * entries * dim;
  if (std::ssize(values) != count) {
    throw InvalidArgument("table", text_of(values.size(), " values"),
                          text_of(codebooks, " x ", entries, " x ", dim, " = ", count, ", or none"));
  }
  table.reserve(values.size());
  for (const float value : values) {
    table.push_back(rounded(value));
    if (std::isfinite(table.back())) continue;
    throw InvalidArgument("table",
                          text_of(value, " in entry ", (table.size() - 1) / static_cast<size_t>(dim)),
                          "finite values of at most 65504, as float16 holds");
  }
}

std::string VectorCodebook::spec() const {
  const std::string sizes =
      (codebooks > 1 ? text_of(codebooks, "x") : std::string()) + text_of(entries, "x", dim);
  const std::string shown = table.empty() ? sizes : text_of("custom", sizes, "-", hash_text(table));
  return text_of("vector_codebook:", shown, ":", group_text(group_size), scale_dtype_suffix(scale_dtype));
}

std::string VectorCodebook::to_json() const {
  nlohmann::json object;
  object["format"] = "vector_codebook";
  object["version"] = kVersion;
  object["codebooks"] = codebooks;
  object["dim"] = dim;
  object["entries"] = entries;
  object["group_size"] = group_size_json(group_size);
  object["scale_dtype"] = name_of(scale_dtype);
  // As double: a float16 then has its exact decimal digits.
  if (!table.empty()) object["table"] = std::vector<double>(table.begin(), table.end());
  return object.dump();
}

std::shared_ptr<const Format> VectorCodebook::from_json(std::string_view json) {
  std::vector<std::string_view> keys = {"codebooks",  "dim",         "entries", "format",
                                        "group_size", "scale_dtype", "version"};
  const nlohmann::json object = parse_description(json);
  if (object.contains("table")) keys.emplace_back("table");
  require_keys(object, keys, json);
  if (object.at("format") != "vector_codebook") refuse_description(json, "\"format\": \"vector_codebook\"");
  static_cast<void>(integer_field(object, "version", kVersion, kVersion, json));
  const int64_t codebooks = integer_field(object, "codebooks", 1, kMostCodebooks, json);
  const int64_t dim = integer_field(object, "dim", 1, kMostDim, json);
  const int64_t entries = integer_field(object, "entries", 2, kMostEntries, json);
  std::vector<float> values;
  if (object.contains("table")) {
    const nlohmann::json& table = object.at("table");
    const int64_t count = codebooks * entries * dim;
    if (!table.is_array() || std::ssize(table) != count) {
      refuse_description(json, text_of("\"table\": a list of ", count, " numbers"));
    }
    for (const nlohmann::json& value : table) {
      const double number = value.is_number() ? value.get<double>() : NAN;
      const float held = std::abs(number) <= 65504 ? rounded(static_cast<float>(number)) : 0.0F;
      if (!(static_cast<double>(held) == number)) {
        refuse_description(json, "numbers in \"table\" that float16 holds exactly");
      }
      values.push_back(held);
    }
  }
  const int64_t group_size = group_size_field(object, json);
  if (group_size > 0 && group_size % dim != 0) {
    refuse_description(json, text_of("a \"group_size\" that is a multiple of ", dim));
  }
  return std::make_shared<const VectorCodebook>(entries, dim, group_size, scale_dtype_field(object, json),
                                                codebooks, values);
}

std::shared_ptr<const Format> VectorCodebook::from_spec(std::string_view spec) {
  const auto refuse = [&] { throw InvalidArgument("format", printable(spec), kSpecForm); };
  const std::vector<std::string_view> parts = split_spec(spec);
  if (parts.size() < 2 || parts[0] != "vector_codebook") refuse();
  if (parts[1].starts_with("custom")) {
    throw InvalidArgument("format", printable(spec),
                          "tables of one's own as values: a short form cannot hold them");
  }
  const auto sizes = parse_sizes(parts[1]);
  if (!sizes) refuse();
  GroupParts group;
  for (size_t i = 2; i < parts.size(); ++i) {
    if (!group.take(parts[i])) refuse();
  }
  const auto [codebooks, entries, dim] = *sizes;
  // 64 columns, or as many as whole vectors have.
  const int64_t usual = dim > 0 ? ceil_div(int64_t{64}, dim) * dim : 64;
  return std::make_shared<const VectorCodebook>(entries, dim, group.group_size.value_or(usual),
                                                group.scale_dtype.value_or(DType::f16), codebooks);
}

std::vector<PlaneSpec> VectorCodebook::planes(int64_t n, int64_t k) const {
  if (n < 0 || k < 0) throw InvalidArgument("shape", text_of("[", n, ", ", k, "]"), "sizes >= 0");
  std::vector<PlaneSpec> specs = {{"codes", DType::i32, {n, packed_words(code_count(k), bits)}},
                                  {"codebook", DType::f16, {codebooks, entries, dim}},
                                  scales_plane(*this, n, k)};
  require_countable(specs);
  return specs;
}

void VectorCodebook::validate_values(const PackedTensor& packed) const {
  require_finite_scales(packed.plane("scales"));
  require_zero_padding(packed.plane("codes"), "codes", code_count(packed.k), bits);
  const auto stored = packed.plane("codebook").values<uint16_t>();
  for (size_t i = 0; i < stored.size(); ++i) {
    const float value = float_from_f16(stored[i]);
    if (!std::isfinite(value)) {
      throw InvalidArgument("plane codebook", text_of(value, " in entry ", i / static_cast<size_t>(dim)),
                            "finite values");
    }
    if (!table.empty() && stored[i] != f16_from_float(table[i])) {
      throw InvalidArgument("plane codebook", text_of(value, " in entry ", i / static_cast<size_t>(dim)),
                            text_of(table[i], ", as in the format's description"));
    }
  }
  require_codes_below(*this, packed);
}

void VectorCodebook::decode(const PackedTensor& packed, int64_t first_row, MatrixView<float> out) const {
  const bool per_tensor = group_size == kPerTensor;
  const int64_t k = packed.k;
  const int64_t groups = per_tensor ? 1 : group_count(k);
  const int64_t width = columns_per_group(k);
  const Tensor& scales = packed.plane("scales");
  const auto stored = packed.plane("codebook").values<uint16_t>();
  std::vector<float> values(stored.size());
  std::ranges::transform(stored, values.begin(), float_from_f16);
  std::vector<uint16_t> codes(static_cast<size_t>(code_count(k)));
  for (int64_t r = 0; r < out.rows(); ++r) {
    const int64_t row = first_row + r;
    unpack_wide_bits(packed_row(packed.plane("codes"), row), bits, 0, codes);
    float* const decoded = out.row(r);
    const uint16_t* code = codes.data();
    for (int64_t first = 0; first < k; first += dim) {
      const int64_t count = std::min(dim, k - first);
      for (int64_t book = 0; book < codebooks; ++book) {
        const float* const entry = values.data() + (book * entries + *code++) * dim;
        for (int64_t c = 0; c < count; ++c) {
          decoded[first + c] = book == 0 ? entry[c] : decoded[first + c] + entry[c];
        }
      }
    }
    for (int64_t g = 0, begin = 0; begin < k; ++g) {
      const float scale = scale_at(scales, per_tensor ? 0 : row * groups + g);
      const int64_t end = k - begin > width ? begin + width : k;
      for (int64_t c = begin; c < end; ++c) decoded[c] *= scale;
      begin = end;
    }
  }
}

std::shared_ptr<const Format> VectorCodebook::fitted(std::shared_ptr<const Format> self, const FloatMatrix& w,
                                                     int threads) const {
  if (!table.empty()) return self;
  return std::make_shared<const VectorCodebook>(entries, dim, group_size, scale_dtype, codebooks,
                                                fit_tables(*this, w, threads));
}

std::unique_ptr<ColumnEncoder> VectorCodebook::column_encoder(
    std::shared_ptr<const Format> self, int64_t n, int64_t k,
    std::span<const int32_t> group_of_column) const {
  if (table.empty()) {
    throw InvalidArgument("format", spec() + ", without tables", "fitted() or tables of one's own");
  }
  const int64_t width = columns_per_group(k);
  for (size_t c = 0; c < group_of_column.size(); ++c) {
    if (group_of_column[c] != static_cast<int64_t>(c) / width) {
      throw InvalidArgument("group_of_column", text_of(group_of_column[c], " at column ", c),
                            text_of("groups of consecutive columns, as ", spec(), " has them"));
    }
  }
  return make_vector_encoder(std::move(self), *this, n, k);
}

}  // namespace quantloom
