#include "quantloom/formats/outliers.hpp"

#include <algorithm>
#include <array>
#include <charconv>
#include <cmath>
#include <nlohmann/json.hpp>

#include "formats/description.hpp"
#include "formats/grouped.hpp"
#include "formats/outlier_encoder.hpp"
#include "quantloom/parallel.hpp"

namespace quantloom {
namespace {

constexpr int64_t kVersion = 1;
constexpr int64_t kNarrowColumns = 65536;

std::shared_ptr<const Format> checked_dense(std::shared_ptr<const Format> dense) {
  if (dense == nullptr) throw InvalidArgument("dense", "null", "a format");
  if (dense->name() == "outliers") throw InvalidArgument("dense", dense->spec(), "a format without outliers");
  return dense;
}

double checked_percent(double percent) {
  if (!(percent > 0 && percent < 100)) {
    throw InvalidArgument("percent", text_of(percent), "a number above 0 and below 100");
  }
  return percent;
}

// The shortest decimal digits that read back as the same number.
std::string decimal(double value) {
  std::array<char, 64> text{};
  const auto end = std::to_chars(text.data(), text.data() + text.size(), value, std::chars_format::fixed).ptr;
  return {text.data(), end};
}

int64_t column_at(const Tensor& columns, int64_t i) {
  const auto at = static_cast<size_t>(i);
  return columns.dtype() == DType::u16 ? int64_t{columns.values<uint16_t>()[at]}
                                       : int64_t{columns.values<int32_t>()[at]};
}

}  // namespace

Outliers::Outliers(std::shared_ptr<const Format> dense_given, double percent_given)
    : dense(checked_dense(std::move(dense_given))), percent(checked_percent(percent_given)) {}

Outliers::Outliers(std::shared_ptr<const Format> dense_given, int64_t count_given)
    : dense(checked_dense(std::move(dense_given))), count(count_given) {
  if (count < 0) throw InvalidArgument("count", text_of(count), "0 or more");
}

int64_t Outliers::entry_count(int64_t n, int64_t k) const {
  if (!percent) return count;
  return static_cast<int64_t>(std::floor(*percent * static_cast<double>(checked_mul(n, k)) / 100));
}

std::string Outliers::spec() const {
  const std::string share = percent ? decimal(*percent) + "%" : text_of("n", count);
  return text_of("outliers:", share, ":", dense->spec());
}

std::string Outliers::to_json() const {
  nlohmann::json object;
  object["format"] = "outliers";
  object["version"] = kVersion;
  object["dense"] = nlohmann::json::parse(dense->to_json());
  if (percent) {
    object["percent"] = *percent;
  } else {
    object["count"] = count;
  }
  return object.dump();
}

std::shared_ptr<const Format> Outliers::from_json(std::string_view json) {
  const nlohmann::json object = parse_description(json);
  const bool shared = object.contains("percent");
  const std::array<std::string_view, 4> keys = {"dense", "format", shared ? "percent" : "count", "version"};
  require_keys(object, keys, json);
  if (object.at("format") != "outliers") refuse_description(json, "\"format\": \"outliers\"");
  static_cast<void>(integer_field(object, "version", kVersion, kVersion, json));
  const nlohmann::json& dense = object.at("dense");
  if (!dense.is_object() || !dense.contains("format") || dense.at("format") == "outliers") {
    refuse_description(json, "the description of a format without outliers as \"dense\"");
  }
  auto format = format_from_json(dense.dump());
  if (!shared) {
    return std::make_shared<const Outliers>(std::move(format),
                                            integer_field(object, "count", 0, INT32_MAX, json));
  }
  const nlohmann::json& percent = object.at("percent");
  const double value = percent.is_number() ? percent.get<double>() : NAN;
  if (!(value > 0 && value < 100)) refuse_description(json, "a \"percent\" above 0 and below 100");
  return std::make_shared<const Outliers>(std::move(format), value);
}

std::shared_ptr<const Format> Outliers::from_spec(std::string_view spec) {
  const auto refuse = [&] {
    throw InvalidArgument(
        "format", printable(spec),
        "outliers:PERCENT%:DENSE or outliers:nCOUNT:DENSE, with the short form of another format");
  };
  const std::vector<std::string_view> parts = split_spec(spec);
  if (parts.size() < 3 || parts[0] != "outliers" || parts[2] == "outliers") refuse();
  std::string_view share = parts[1];
  auto dense = format_from_spec(spec.substr(parts[0].size() + share.size() + 2));
  if (share.starts_with('n')) {
    const auto count = parse_integer(share.substr(1));
    if (!count || *count < 0 || *count > INT32_MAX) refuse();
    return std::make_shared<const Outliers>(std::move(dense), *count);
  }
  double percent = 0;
  if (!share.ends_with('%')) refuse();
  share.remove_suffix(1);
  const auto [end, error] =
      std::from_chars(share.data(), share.data() + share.size(), percent, std::chars_format::fixed);
  if (error != std::errc() || end != share.data() + share.size() || !(percent > 0 && percent < 100)) refuse();
  return std::make_shared<const Outliers>(std::move(dense), percent);
}

std::vector<PlaneSpec> Outliers::planes(int64_t n, int64_t k) const {
  std::vector<PlaneSpec> specs = dense->planes(n, k);
  const int64_t entries = entry_count(n, k);
  if (entries > checked_mul(n, k) || entries > INT32_MAX) {
    throw InvalidArgument("count", text_of(entries, " outliers"),
                          text_of("at most 2^31 - 1, and no more than the weights of [", n, ", ", k, "]"));
  }
  // Without columns, rows are as good as none.
  specs.push_back({"outlier_offsets", DType::i32, {k > 0 ? checked_add(n, 1) : 1}});
  specs.push_back({"outlier_columns", k > kNarrowColumns ? DType::i32 : DType::u16, {entries}});
  specs.push_back({"outlier_values", DType::f16, {entries}});
  require_countable(specs);
  return specs;
}

void Outliers::validate_values(const PackedTensor& packed) const {
  dense->validate_values(packed);
  const auto offsets = packed.plane("outlier_offsets").values<int32_t>();
  const Tensor& columns = packed.plane("outlier_columns");
  const auto values = packed.plane("outlier_values").values<uint16_t>();
  const int64_t entries = columns.element_count();
  if (offsets.front() != 0 || offsets.back() != entries) {
    throw InvalidArgument("plane outlier_offsets", text_of("from ", offsets.front(), " to ", offsets.back()),
                          text_of("from 0 to ", entries, ", the number of outliers"));
  }
  for (size_t row = 0; row + 1 < offsets.size(); ++row) {
    if (offsets[row] > offsets[row + 1]) {
      throw InvalidArgument("plane outlier_offsets",
                            text_of(offsets[row + 1], " after ", offsets[row], " at row ", row),
                            "offsets that do not fall");
    }
  }
  for (size_t row = 0; row + 1 < offsets.size(); ++row) {
    int64_t previous = -1;
    for (int64_t i = offsets[row]; i < offsets[row + 1]; ++i) {
      const int64_t column = column_at(columns, i);
      if (column <= previous || column >= packed.k) {
        throw InvalidArgument("plane outlier_columns", text_of(column, " in row ", row),
                              text_of("rising columns in [0, ", packed.k, ")"));
      }
      previous = column;
      const float value = float_from_f16(values[static_cast<size_t>(i)]);
      if (!std::isfinite(value)) {
        throw InvalidArgument("plane outlier_values", text_of(value, " in row ", row), "finite values");
      }
    }
  }
}

void Outliers::decode(const PackedTensor& packed, int64_t first_row, MatrixView<float> out) const {
  dense->decode(packed, first_row, out);
  const auto offsets = packed.plane("outlier_offsets").values<int32_t>();
  const Tensor& columns = packed.plane("outlier_columns");
  const auto values = packed.plane("outlier_values").values<uint16_t>();
  for (int64_t r = 0; r < out.rows(); ++r) {
    const auto row = static_cast<size_t>(first_row + r);
    for (int64_t i = offsets[row]; i < offsets[row + 1]; ++i) {
      out(r, column_at(columns, i)) += float_from_f16(values[static_cast<size_t>(i)]);
    }
  }
}

std::shared_ptr<const Format> Outliers::fitted(std::shared_ptr<const Format> self, const FloatMatrix& w,
                                               int threads) const {
  if (!percent) return self;  // refused by the encoder
  const int64_t k = w.cols();
  const int64_t entries = entry_count(w.rows(), k);
  std::vector<float> values(static_cast<size_t>(checked_mul(w.rows(), k)));
  parallel_for(k > 0 ? w.rows() : 0, threads,
               [&](int64_t row) { w.read(row, 0, k, values.data() + row * k); });
  auto result = std::make_shared<Outliers>(dense, *percent);
  if (entries > 0) {
    // Above the threshold all, at it the first.
    std::vector<float> magnitudes(values);
    for (float& value : magnitudes) value = std::abs(value);
    const auto last = magnitudes.begin() + (entries - 1);
    std::nth_element(magnitudes.begin(), last, magnitudes.end(), std::greater<>());
    const float threshold = *last;
    int64_t at_threshold =
        entries - std::count_if(magnitudes.begin(), last, [&](float value) { return value > threshold; });
    for (size_t i = 0; i < values.size(); ++i) {
      const float magnitude = std::abs(values[i]);
      if (magnitude < threshold || (magnitude == threshold && at_threshold-- <= 0)) continue;
      result->positions.push_back(static_cast<int64_t>(i));
      values[i] = 0;
    }
  }
  result->dense = dense->fitted(dense, MatrixView<const float>(values.data(), w.rows(), k), threads);
  return result;
}

std::unique_ptr<ColumnEncoder> Outliers::column_encoder(std::shared_ptr<const Format> self, int64_t n,
                                                        int64_t k,
                                                        std::span<const int32_t> group_of_column) const {
  if (std::ssize(positions) != entry_count(n, k)) {
    throw InvalidArgument("format", spec() + (percent ? ", not fitted to the matrix" : ", with a count"),
                          "a percentage of outliers, fitted to the matrix");
  }
  if (!group_of_column.empty()) {
    throw InvalidArgument("group_of_column", text_of(group_of_column.size(), " entries"),
                          text_of("none: groups of consecutive columns, as ", spec(), " has them"));
  }
  return make_outlier_encoder(std::move(self), *this, n, k);
}

PackedTensor dense_part(const PackedTensor& packed) {
  const auto* outliers = dynamic_cast<const Outliers*>(packed.format.get());
  if (outliers == nullptr) throw InvalidArgument("packed", "a format without outliers", "outliers");
  PackedTensor part{outliers->dense, packed.n, packed.k, {}};
  for (const auto& [name, plane] : packed.planes) {
    if (!name.starts_with("outlier_")) part.planes.emplace(name, plane);
  }
  return part;
}

PackedTensor with_outliers(PackedTensor dense, std::span<const int64_t> positions,
                           std::span<const uint16_t> values) {
  PackedTensor packed = std::move(dense);
  packed.format = std::make_shared<const Outliers>(packed.format, std::ssize(positions));
  for (const PlaneSpec& spec : packed.format->planes(packed.n, packed.k)) {
    if (spec.name.starts_with("outlier_")) packed.planes.emplace(spec.name, Tensor(spec.dtype, spec.shape));
  }
  const auto offsets = packed.planes.at("outlier_offsets").values<int32_t>();
  Tensor& columns = packed.planes.at("outlier_columns");
  size_t row = 0;
  for (size_t i = 0; i < positions.size(); ++i) {
    for (; static_cast<int64_t>(row) <= positions[i] / packed.k; ++row)
      offsets[row] = static_cast<int32_t>(i);
    const int64_t column = positions[i] % packed.k;
    if (columns.dtype() == DType::u16) {
      columns.values<uint16_t>()[i] = static_cast<uint16_t>(column);
    } else {
      columns.values<int32_t>()[i] = static_cast<int32_t>(column);
    }
  }
  for (; row < offsets.size(); ++row) offsets[row] = static_cast<int32_t>(positions.size());
  std::ranges::copy(values, packed.planes.at("outlier_values").values<uint16_t>().begin());
  return packed;
}

}  // namespace quantloom
