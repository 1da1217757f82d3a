#include "quantloom/formats/additive.hpp"

#include <algorithm>
#include <array>
#include <cmath>
#include <limits>
#include <nlohmann/json.hpp>

#include "formats/additive_encoder.hpp"
#include "formats/additive_levels.hpp"
#include "formats/description.hpp"
#include "formats/grouped.hpp"
#include "quantloom/formats/bit_packing.hpp"

namespace quantloom {
namespace {

constexpr int64_t kVersion = 1;
constexpr std::string_view kSpecForm =
    "additive:TABLESxBITS[:gIN|:gOUTxIN][:scaleN|:channel][:sBITS][:t[GROUPSx]BITS][:f16|:bf16|:f32] with 1 "
    "to "
    "8 tables, 1 to 16 bits, blocks of up to 16 weights, N a multiple of IN, 1 to 15 bits of scales and "
    "tables, GROUPS that divide the entries of a table";

int64_t checked_range(const char* field, int64_t value, int64_t least, int64_t most) {
  if (value < least || value > most) {
    throw InvalidArgument(field, text_of(value), text_of(least, " to ", most));
  }
  return value;
}

// "2x8": both numbers, or "8" alone with `first` given.
std::optional<std::array<int64_t, 2>> parse_pair(std::string_view text, std::optional<int64_t> first) {
  const size_t cross = text.find('x');
  if (cross == std::string_view::npos) {
    const auto second = parse_integer(text);
    return first && second ? std::optional(std::array{*first, *second}) : std::nullopt;
  }
  const auto given = parse_integer(text.substr(0, cross));
  const auto second = parse_integer(text.substr(cross + 1));
  return given && second ? std::optional(std::array{*given, *second}) : std::nullopt;
}

// `of_entry`: values that count as one.
void require_finite_values(const PackedTensor& packed, const char* name, int64_t of_entry) {
  const Tensor& plane = packed.plane(name);
  for (int64_t i = 0; i < plane.element_count(); ++i) {
    const float value = scale_at(plane, i);
    if (std::isfinite(value)) continue;
    throw InvalidArgument(text_of("plane ", name), text_of(value, " in entry ", i / of_entry),
                          "finite values");
  }
}

bool are_groups(int64_t groups, int bits) {
  return groups >= 1 && groups <= int64_t{1} << bits && (int64_t{1} << bits) % groups == 0;
}

}  // namespace

Additive::Additive(int codebooks_given, int bits_given, int64_t in_group_given, int64_t out_group_given,
                   int64_t scale_group_given, DType scale_dtype_given, std::span<const float> values,
                   const AdditiveLevels& levels_given)
    : codebooks(static_cast<int>(checked_range("codebooks", codebooks_given, 1, kMostCodebooks))),
      bits(static_cast<int>(checked_range("bits", bits_given, 1, kMostBits))),
      in_group(checked_range("in_group", in_group_given, 1, kMostWeights)),
      out_group(checked_range("out_group", out_group_given, 1, kMostWeights)),
      scale_group(scale_group_given),
      scale_dtype(scale_dtype_given),
      levels(levels_given) {
  if (dim() > kMostWeights) {
    throw InvalidArgument("out_group * in_group", text_of(dim()), text_of("at most ", kMostWeights));
  }
  if (scale_group != kPerChannel && (scale_group < 1 || scale_group % in_group != 0)) {
    throw InvalidArgument("scale_group", text_of(scale_group),
                          text_of("a multiple of in_group = ", in_group, ", or one scale per channel"));
  }
  if (!is_float16_or_32(scale_dtype)) {
    throw TypeMismatch("scale_dtype", name_of(scale_dtype), "float16, bfloat16 or float32");
  }
  checked_range("scale_bits", levels.scale_bits, 0, AdditiveLevels::kMostBits);
  checked_range("table_bits", levels.table_bits, 0, AdditiveLevels::kMostBits);
  if (!are_groups(levels.table_groups, bits) || (levels.table_bits == 0 && levels.table_groups != 1)) {
    throw InvalidArgument(
        "table_groups", text_of(levels.table_groups),
        levels.table_bits == 0 ? "1 without table_bits" : text_of("a power of two from 1 to ", entries()));
  }
  if (values.empty()) return;
  const int64_t count = codebooks * entries() * dim();
  if (std::ssize(values) != count) {
    throw InvalidArgument("tables", text_of(values.size(), " values"), text_of(count, ", or none"));
  }
  tables.reserve(values.size());
  for (const float value : values) {
    tables.push_back(float_from_f16(f16_from_float(value)) + 0.0F);  // -0 becomes 0
    if (std::isfinite(tables.back())) continue;
    throw InvalidArgument("tables",
                          text_of(value, " in entry ", (tables.size() - 1) / static_cast<size_t>(dim())),
                          "finite values of at most 65504, as float16 holds");
  }
  if (has_table_levels()) tables = level_tables(*this, tables, DType::f16, {}, 1).numbers();
}

int64_t Additive::scale_columns(int64_t k) const {
  const int64_t whole = std::max<int64_t>(k, 1);
  return scale_group == kPerChannel ? whole : std::min(scale_group, ceil_div(whole, in_group) * in_group);
}

double Additive::average_bits(int64_t n, int64_t k) const {
  if (n <= 0 || k <= 0) return 0;
  const auto rows = static_cast<double>(row_groups(n));
  const double codes = rows * static_cast<double>(code_count(k)) * bits;
  const auto table_count = static_cast<double>(codebooks * entries() * dim());
  const auto level_count =
      static_cast<double>((codebooks * levels.table_groups * dim()) << levels.table_bits);
  const double table =
      has_table_levels() ? levels.table_bits * table_count + 16 * level_count : 16 * table_count;
  const auto scale_width = static_cast<double>(8 * size_of(scale_dtype));
  const double scale_bits = levels.scale_bits > 0 ? levels.scale_bits : scale_width;
  const auto scale_levels_count = static_cast<double>(int64_t{1} << levels.scale_bits);
  const double scales = rows * (scale_bits * static_cast<double>(scale_count(k)) +
                                (has_scale_levels(k) ? scale_levels_count * scale_width : 0));
  return (codes + table + scales) / (static_cast<double>(n) * static_cast<double>(k));
}

std::string Additive::spec() const {
  const std::string group = out_group > 1 ? text_of(out_group, "x", in_group) : text_of(in_group);
  const std::string scale = scale_group == kPerChannel ? std::string() : text_of(":scale", scale_group);
  std::string coded;
  if (levels.scale_bits > 0) coded += text_of(":s", levels.scale_bits);
  if (levels.table_groups > 1) {
    coded += text_of(":t", levels.table_groups, "x", levels.table_bits);
  } else if (levels.table_bits > 0) {
    coded += text_of(":t", levels.table_bits);
  }
  return text_of("additive:", codebooks, "x", bits, ":g", group, scale, coded,
                 scale_dtype_suffix(scale_dtype));
}

std::string Additive::to_json() const {
  nlohmann::json object;
  object["format"] = "additive";
  object["version"] = kVersion;
  object["bits"] = bits;
  object["codebooks"] = codebooks;
  object["in_group"] = in_group;
  object["out_group"] = out_group;
  object["scale_dtype"] = quantloom::name_of(scale_dtype);
  if (scale_group == kPerChannel) {
    object["scale_group"] = "channel";
  } else {
    object["scale_group"] = scale_group;
  }
  if (levels.scale_bits > 0) object["scale_bits"] = levels.scale_bits;
  if (levels.table_bits > 0) {
    object["table_bits"] = levels.table_bits;
    object["table_groups"] = levels.table_groups;
  }
  return object.dump();
}

std::shared_ptr<const Format> Additive::from_json(std::string_view json) {
  std::vector<std::string_view> keys = {"bits",      "codebooks",   "format",      "in_group",
                                        "out_group", "scale_dtype", "scale_group", "version"};
  const nlohmann::json object = parse_description(json);
  if (object.contains("scale_bits")) keys.emplace_back("scale_bits");
  if (object.contains("table_bits")) keys.insert(keys.end(), {"table_bits", "table_groups"});
  require_keys(object, keys, json);
  if (object.at("format") != "additive") refuse_description(json, "\"format\": \"additive\"");
  static_cast<void>(integer_field(object, "version", kVersion, kVersion, json));
  const int64_t in_group = integer_field(object, "in_group", 1, kMostWeights, json);
  const int64_t out_group = integer_field(object, "out_group", 1, kMostWeights / in_group, json);
  int64_t scale_group = kPerChannel;
  if (object.at("scale_group") != "channel") {
    scale_group = integer_field(object, "scale_group", 1, std::numeric_limits<int64_t>::max(), json);
    if (scale_group % in_group != 0) {
      refuse_description(json, text_of("a \"scale_group\" that is a multiple of ", in_group));
    }
  }
  const auto bits = static_cast<int>(integer_field(object, "bits", 1, kMostBits, json));
  AdditiveLevels levels;
  const auto level_bits = [&](const char* key) {
    return static_cast<int>(integer_field(object, key, 1, AdditiveLevels::kMostBits, json));
  };
  if (object.contains("scale_bits")) levels.scale_bits = level_bits("scale_bits");
  if (object.contains("table_bits")) {
    levels.table_bits = level_bits("table_bits");
    levels.table_groups = integer_field(object, "table_groups", 1, int64_t{1} << bits, json);
    if (!are_groups(levels.table_groups, bits)) {
      refuse_description(json, "\"table_groups\" that divide the entries of a table");
    }
  }
  return std::make_shared<const Additive>(
      static_cast<int>(integer_field(object, "codebooks", 1, kMostCodebooks, json)), bits, in_group,
      out_group, scale_group, scale_dtype_field(object, json), std::span<const float>(), levels);
}

std::shared_ptr<const Format> Additive::from_spec(std::string_view spec) {
  const auto refuse = [&] { throw InvalidArgument("format", printable(spec), kSpecForm); };
  const std::vector<std::string_view> parts = split_spec(spec);
  if (parts.size() < 2 || parts[0] != "additive") refuse();
  const auto sizes = parse_pair(parts[1], std::nullopt);
  if (!sizes || (*sizes)[0] < 1 || (*sizes)[0] > kMostCodebooks || (*sizes)[1] < 1 || (*sizes)[1] > kMostBits)
    refuse();
  std::optional<std::array<int64_t, 2>> block;
  std::optional<int64_t> scale_group;
  AdditiveLevels levels;
  GroupParts others;
  const auto level_bits = [&](int64_t number) {
    if (number < 1 || number > AdditiveLevels::kMostBits) refuse();
    return static_cast<int>(number);
  };
  for (size_t i = 2; i < parts.size(); ++i) {
    const std::string_view part = parts[i];
    if (part.starts_with("scale") || part == "channel") {
      if (scale_group) refuse();
      const auto columns =
          part == "channel" ? std::optional<int64_t>(kPerChannel) : parse_integer(part.substr(5));
      if (!columns || (part != "channel" && *columns < 1)) refuse();
      scale_group = columns;
    } else if (part.starts_with('s')) {
      if (levels.scale_bits > 0) refuse();
      levels.scale_bits = level_bits(parse_integer(part.substr(1)).value_or(0));
    } else if (part.starts_with('t')) {
      const auto pair = parse_pair(part.substr(1), 1);
      if (levels.table_bits > 0 || !pair || !are_groups((*pair)[0], static_cast<int>((*sizes)[1]))) refuse();
      levels.table_groups = (*pair)[0];
      levels.table_bits = level_bits((*pair)[1]);
    } else if (part.starts_with('g')) {
      if (block) refuse();
      block = parse_pair(part.substr(1), 1);
      if (!block || (*block)[0] < 1 || (*block)[1] < 1 || (*block)[0] > kMostWeights ||
          (*block)[1] > kMostWeights) {
        refuse();
      }
    } else if (!others.take(part) || others.group_size) {
      refuse();
    }
  }
  const auto [out_group, in_group] = block.value_or(std::array<int64_t, 2>{1, 8});
  if (out_group * in_group > kMostWeights ||
      (scale_group.value_or(kPerChannel) > 0 && *scale_group % in_group != 0))
    refuse();
  return std::make_shared<const Additive>(static_cast<int>((*sizes)[0]), static_cast<int>((*sizes)[1]),
                                          in_group, out_group, scale_group.value_or(kPerChannel),
                                          others.scale_dtype.value_or(DType::f16), std::span<const float>(),
                                          levels);
}

std::vector<PlaneSpec> Additive::planes(int64_t n, int64_t k) const {
  if (n < 0 || k < 0) throw InvalidArgument("shape", text_of("[", n, ", ", k, "]"), "sizes >= 0");
  std::vector<PlaneSpec> specs = {{"codes", DType::i32, {row_groups(n), packed_words(code_count(k), bits)}}};
  if (has_table_levels()) {
    const int64_t words = packed_words(entries() * dim(), levels.table_bits);
    specs.push_back({"codebook_codes", DType::i32, {codebooks, words}});
    specs.push_back({"codebook_levels",
                     DType::f16,
                     {codebooks, levels.table_groups, out_group, in_group, int64_t{1} << levels.table_bits}});
  } else {
    specs.push_back({"codebook", DType::f16, {codebooks, entries(), out_group, in_group}});
  }
  if (k > 0 && has_scale_levels(k)) {
    const int64_t words = packed_words(scale_count(k), levels.scale_bits);
    specs.push_back({"scale_codes", DType::i32, {row_groups(n), words}});
    specs.push_back({"scale_levels", scale_dtype, {row_groups(n), int64_t{1} << levels.scale_bits}});
  } else {
    specs.push_back({"scales", scale_dtype, {row_groups(n), k > 0 ? scale_count(k) : 0}});
  }
  require_countable(specs);
  return specs;
}

void Additive::validate_values(const PackedTensor& packed) const {
  const bool scale_levels_stored = packed.k > 0 && has_scale_levels(packed.k);
  require_finite_values(packed, scale_levels_stored ? "scale_levels" : "scales", 1);
  require_zero_padding(packed.plane("codes"), "codes", code_count(packed.k), bits);
  if (scale_levels_stored) {
    require_zero_padding(packed.plane("scale_codes"), "scale_codes", scale_count(packed.k),
                         levels.scale_bits);
  }
  if (!has_table_levels()) return require_finite_values(packed, "codebook", dim());
  require_finite_values(packed, "codebook_levels", 1);
  require_zero_padding(packed.plane("codebook_codes"), "codebook_codes", entries() * dim(),
                       levels.table_bits);
}

void Additive::decode(const PackedTensor& packed, int64_t first_row, MatrixView<float> out) const {
  const int64_t k = packed.k;
  if (k == 0) return;
  const int64_t width = scale_columns(k);
  const std::vector<float> values = read_tables(*this, packed);
  std::vector<float> scales(static_cast<size_t>(scale_count(k)));
  std::vector<uint16_t> codes(static_cast<size_t>(code_count(k)));
  int64_t unpacked = -1;
  for (int64_t r = 0; r < out.rows(); ++r) {
    const int64_t row_group = (first_row + r) / out_group;
    const int64_t row_in_group = (first_row + r) % out_group;
    if (row_group != unpacked) {
      unpack_wide_bits(packed_row(packed.plane("codes"), row_group), bits, 0, codes);
      read_scales(*this, packed, row_group, scales);
    }
    unpacked = row_group;
    float* const decoded = out.row(r);
    const uint16_t* code = codes.data();
    for (int64_t first = 0; first < k; first += in_group) {
      const int64_t count = std::min(in_group, k - first);
      const float scale = scales[static_cast<size_t>(first / width)];
      for (int64_t book = 0; book < codebooks; ++book) {
        const float* const entry =
            values.data() + (book * entries() + *code++) * dim() + row_in_group * in_group;
        for (int64_t c = 0; c < count; ++c) {
          decoded[first + c] = book == 0 ? entry[c] : decoded[first + c] + entry[c];
        }
      }
      for (int64_t c = 0; c < count; ++c) decoded[first + c] *= scale;
    }
  }
}

std::shared_ptr<const Format> Additive::fitted(std::shared_ptr<const Format> self, const FloatMatrix& w,
                                               int threads) const {
  AdditiveFitOptions options;
  options.threads = threads;
  if (tables.empty()) return fit_additive(*this, w, options);
  if (w.cols() == 0 || !has_scale_levels(w.cols())) return self;
  auto result = std::make_shared<Additive>(*this);
  result->scale_levels = fit_scale_levels(*this, w, threads);
  return result;
}

std::unique_ptr<ColumnEncoder> Additive::column_encoder(std::shared_ptr<const Format> self, int64_t n,
                                                        int64_t k,
                                                        std::span<const int32_t> group_of_column) const {
  if (tables.empty()) {
    throw InvalidArgument("format", spec() + ", without tables", "fitted() or tables of one's own");
  }
  const int64_t level_count = k > 0 && has_scale_levels(k) ? row_groups(n) << levels.scale_bits : 0;
  if (level_count > 0 && std::ssize(scale_levels) != level_count) {
    throw InvalidArgument("format", text_of(spec(), " with ", scale_levels.size(), " levels of scales"),
                          text_of("fitted() to a matrix of ", n, " rows"));
  }
  const int64_t width = scale_columns(k);
  for (size_t c = 0; c < group_of_column.size(); ++c) {
    if (group_of_column[c] != static_cast<int64_t>(c) / width) {
      throw InvalidArgument("group_of_column", text_of(group_of_column[c], " at column ", c),
                            text_of("groups of consecutive columns, as ", spec(), " has them"));
    }
  }
  return make_additive_encoder(std::move(self), *this, n, k);
}

}  // namespace quantloom
