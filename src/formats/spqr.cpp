#include "quantloom/formats/spqr.hpp"

#include <algorithm>
#include <array>
#include <cmath>
#include <limits>
#include <nlohmann/json.hpp>
#include <optional>

#include "formats/description.hpp"
#include "formats/grouped.hpp"
#include "formats/spqr_encoder.hpp"
#include "quantloom/formats/bit_packing.hpp"

namespace quantloom {
namespace {

constexpr int64_t kVersion = 1;

int checked_bits(const char* field, int bits) {
  if (bits < 1 || bits > 8) throw InvalidArgument(field, text_of(bits), "1 to 8");
  return bits;
}

int64_t checked_count(const char* field, int64_t count) {
  if (count < 1) throw InvalidArgument(field, text_of(count), "a positive number");
  return count;
}

// The numbers that the codes of rows [first_row, first_row + out.size()) of one group stand for.
void decode_parameters(const Tensor& codes, const Tensor& grids, int bits, int64_t block, int64_t group,
                       int64_t first_row, std::span<float> out) {
  std::vector<uint8_t> fields(out.size());
  unpack_bits(packed_row(codes, group), bits, first_row, fields);
  const auto numbers = grids.values<uint16_t>().subspan(static_cast<size_t>(group * grids.shape()[1] * 2));
  for (size_t r = 0; r < out.size(); ++r) {
    const auto at = static_cast<size_t>((first_row + static_cast<int64_t>(r)) / block * 2);
    const float step = float_from_f16(numbers[at]);
    const float zero = float_from_f16(numbers[at + 1]);
    out[r] = step * (static_cast<float>(fields[r]) - zero);
  }
}

void require_finite_grids(const PackedTensor& packed, const char* name) {
  for (const uint16_t bits : packed.plane(name).values<uint16_t>()) {
    if (!std::isfinite(float_from_f16(bits))) {
      throw InvalidArgument(text_of("plane ", name), text_of(float_from_f16(bits)), "finite numbers");
    }
  }
}

}  // namespace

Spqr::Spqr(int bits_given, int64_t group_size_given, int scale_bits_given, int zero_bits_given,
           int64_t block_given)
    : bits(checked_bits("bits", bits_given)),
      group_size(checked_count("group_size", group_size_given)),
      scale_bits(checked_bits("scale_bits", scale_bits_given)),
      zero_bits(checked_bits("zero_bits", zero_bits_given)),
      block(checked_count("block", block_given)) {}

int64_t Spqr::columns_per_group(int64_t k) const {
  return std::min(group_size, std::max<int64_t>(k, 1));
}

std::string Spqr::spec() const {
  return text_of("spqr:", bits, ":g", group_size, ":s", scale_bits, ":z", zero_bits, ":b", block);
}

std::string Spqr::to_json() const {
  nlohmann::json object;
  object["format"] = "spqr";
  object["version"] = kVersion;
  object["bits"] = bits;
  object["group_size"] = group_size;
  object["scale_bits"] = scale_bits;
  object["zero_bits"] = zero_bits;
  object["block"] = block;
  return object.dump();
}

std::shared_ptr<const Format> Spqr::from_json(std::string_view json) {
  constexpr std::array<std::string_view, 7> kKeys = {"bits",       "block",   "format",   "group_size",
                                                     "scale_bits", "version", "zero_bits"};
  constexpr int64_t kMost = std::numeric_limits<int64_t>::max();
  const nlohmann::json object = parse_description(json);
  require_keys(object, kKeys, json);
  if (object.at("format") != "spqr") refuse_description(json, "\"format\": \"spqr\"");
  static_cast<void>(integer_field(object, "version", kVersion, kVersion, json));
  return std::make_shared<const Spqr>(static_cast<int>(integer_field(object, "bits", 1, 8, json)),
                                      integer_field(object, "group_size", 1, kMost, json),
                                      static_cast<int>(integer_field(object, "scale_bits", 1, 8, json)),
                                      static_cast<int>(integer_field(object, "zero_bits", 1, 8, json)),
                                      integer_field(object, "block", 1, kMost, json));
}

std::shared_ptr<const Format> Spqr::from_spec(std::string_view spec) {
  const auto refuse = [&]() {
    throw InvalidArgument("format", printable(spec),
                          "spqr:BITS[:gN][:sBITS][:zBITS][:bROWS] with 1 to 8 BITS, N and ROWS above 0");
  };
  const std::vector<std::string_view> parts = split_spec(spec);
  if (parts.size() < 2 || parts[0] != "spqr") refuse();
  const auto number = [&](std::string_view text, int64_t most) {
    const std::optional<int64_t> value = parse_integer(text);
    if (!value || *value < 1 || *value > most) refuse();
    return *value;
  };
  constexpr int64_t kMost = std::numeric_limits<int64_t>::max();
  constexpr std::string_view kLetters = "gszb";
  std::array<std::optional<int64_t>, kLetters.size()> fields;
  for (size_t i = 2; i < parts.size(); ++i) {
    const size_t letter = parts[i].empty() ? std::string_view::npos : kLetters.find(parts[i][0]);
    if (letter == std::string_view::npos || fields[letter]) refuse();
    const bool counts = parts[i][0] == 'g' || parts[i][0] == 'b';
    fields[letter] = number(parts[i].substr(1), counts ? kMost : 8);
  }
  return std::make_shared<const Spqr>(static_cast<int>(number(parts[1], 8)), fields[0].value_or(16),
                                      static_cast<int>(fields[1].value_or(3)),
                                      static_cast<int>(fields[2].value_or(3)), fields[3].value_or(16));
}

std::vector<PlaneSpec> Spqr::planes(int64_t n, int64_t k) const {
  if (n < 0 || k < 0) throw InvalidArgument("shape", text_of("[", n, ", ", k, "]"), "sizes >= 0");
  const int64_t groups = group_count(k);
  const int64_t blocks = block_count(n);
  std::vector<PlaneSpec> specs = {
      {"codes", DType::i32, {n, packed_words(k, bits)}},
      {"scales", DType::i32, {groups, packed_words(n, scale_bits)}},
      {"zeros", DType::i32, {groups, packed_words(n, zero_bits)}},
      {"scale_grids", DType::f16, {groups, blocks, 2}},
      {"zero_grids", DType::f16, {groups, blocks, 2}},
      {"group_index", DType::i32, {k}, true},
  };
  require_countable(specs);
  return specs;
}

void Spqr::validate_values(const PackedTensor& packed) const {
  require_zero_padding(packed.plane("codes"), "codes", packed.k, bits);
  require_zero_padding(packed.plane("scales"), "scales", packed.n, scale_bits);
  require_zero_padding(packed.plane("zeros"), "zeros", packed.n, zero_bits);
  require_finite_grids(packed, "scale_grids");
  require_finite_grids(packed, "zero_grids");
  if (packed.planes.contains("group_index")) {
    require_group_index(packed.plane("group_index").values<int32_t>(), group_count(packed.k),
                        columns_per_group(packed.k), "plane group_index");
  }
}

void Spqr::decode(const PackedTensor& packed, int64_t first_row, MatrixView<float> out) const {
  const int64_t k = packed.k;
  const int64_t groups = group_count(k);
  const int64_t width = columns_per_group(k);
  const Tensor& codes = packed.plane("codes");
  std::span<const int32_t> group_index;
  if (packed.planes.contains("group_index")) group_index = packed.plane("group_index").values<int32_t>();
  const auto rows = static_cast<size_t>(out.rows());
  std::vector<float> scales(static_cast<size_t>(groups) * rows);
  std::vector<float> zeros(scales.size());
  for (int64_t g = 0; g < groups; ++g) {
    const size_t at = static_cast<size_t>(g) * rows;
    decode_parameters(packed.plane("scales"), packed.plane("scale_grids"), scale_bits, block, g, first_row,
                      std::span(scales).subspan(at, rows));
    decode_parameters(packed.plane("zeros"), packed.plane("zero_grids"), zero_bits, block, g, first_row,
                      std::span(zeros).subspan(at, rows));
  }
  std::vector<uint8_t> row_codes(static_cast<size_t>(k));
  for (size_t r = 0; r < rows; ++r) {
    const auto row = static_cast<int64_t>(r);
    unpack_bits(packed_row(codes, first_row + row), bits, 0, row_codes);
    float* values = out.row(row);
    for (int64_t c = 0; c < k; ++c) {
      const auto g =
          static_cast<size_t>(group_index.empty() ? c / width : group_index[static_cast<size_t>(c)]);
      values[c] = scales[g * rows + r] *
                  (static_cast<float>(row_codes[static_cast<size_t>(c)]) - zeros[g * rows + r]);
    }
  }
}

std::unique_ptr<ColumnEncoder> Spqr::column_encoder(std::shared_ptr<const Format> self, int64_t n, int64_t k,
                                                    std::span<const int32_t> group_of_column) const {
  return make_spqr_encoder(std::move(self), *this, n, k, group_of_column);
}

SpqrParameters spqr_parameters(const PackedTensor& packed) {
  const auto* format = dynamic_cast<const Spqr*>(packed.format.get());
  if (format == nullptr) throw InvalidArgument("packed", "another format", "spqr");
  const int64_t groups = format->group_count(packed.k);
  SpqrParameters parameters;
  parameters.scales.resize(static_cast<size_t>(checked_mul(packed.n, groups)));
  parameters.zeros.resize(parameters.scales.size());
  std::vector<float> column(static_cast<size_t>(packed.n));
  for (int64_t g = 0; g < groups; ++g) {
    const auto spread = [&](const char* codes, const char* grids, int bits, std::vector<float>& out) {
      decode_parameters(packed.plane(codes), packed.plane(grids), bits, format->block, g, 0, column);
      for (int64_t r = 0; r < packed.n; ++r) {
        out[static_cast<size_t>(r * groups + g)] = column[static_cast<size_t>(r)];
      }
    };
    spread("scales", "scale_grids", format->scale_bits, parameters.scales);
    spread("zeros", "zero_grids", format->zero_bits, parameters.zeros);
  }
  return parameters;
}

double spqr_average_bits(const Spqr& format, double outlier_rate) {
  if (!(outlier_rate >= 0 && outlier_rate <= 1)) {
    throw InvalidArgument("outlier_rate", text_of(outlier_rate), "a number from 0 to 1");
  }
  const auto columns = static_cast<double>(format.group_size);
  const auto rows = static_cast<double>(format.block);
  return format.bits + (format.scale_bits + format.zero_bits) / columns + 64 / (columns * rows) +
         32 * outlier_rate;
}

}  // namespace quantloom
