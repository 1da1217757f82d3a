#include "quantloom/activations/activation_format.hpp"

#include <array>
#include <charconv>
#include <nlohmann/json.hpp>

#include "activations/activation_grid.hpp"
#include "formats/description.hpp"
#include "formats/grouped.hpp"
#include "quantloom/checked_math.hpp"
#include "quantloom/error.hpp"

namespace quantloom {
namespace {

constexpr int64_t kVersion = 1;
constexpr std::string_view kSpecForm =
    "intBITS:token, intBITS:tensor[:static[=SCALE[,ZERO]]] or intBITS:gN, each with :asym if need be "
    "and [:outliers=LIMIT[:static-outliers|:columns=C,C,...]] or [:outliers=PERCENT%[:columns=C,C,...]], or "
    "sdrBITS:gN[:bBASE][:token|:tensor][:static[=SCALE]], with 2 to 8 BITS, N above 0 and BASE up to 16";

std::string_view name_of(ActivationScope scope) {
  return scope == ActivationScope::token ? "token" : scope == ActivationScope::tensor ? "tensor" : "group";
}

std::string text_of_float(float value) {
  std::array<char, 32> text{};
  const auto [end, error] = std::to_chars(text.data(), text.data() + text.size(), value);
  return error == std::errc() ? std::string(text.data(), end) : std::to_string(value);
}

std::optional<float> parse_float(std::string_view text) {
  float value = 0;
  const auto [end, error] = std::from_chars(text.data(), text.data() + text.size(), value);
  if (error != std::errc() || end != text.data() + text.size()) return std::nullopt;
  return value;
}

// Sets the scale and zero of "static=SCALE[,ZERO]"; false if they are no numbers.
bool take_grid(std::string_view text, ActivationFormat& format) {
  const size_t comma = text.find(',');
  const auto scale = parse_float(text.substr(0, comma));
  if (!scale) return false;
  format.grid = FixedGrid{*scale, 0};
  if (comma == std::string_view::npos) return true;
  std::string_view digits = text.substr(comma + 1);
  const bool negative = digits.starts_with('-');
  if (negative) digits.remove_prefix(1);
  const auto zero = parse_integer(digits);
  if (!zero || *zero > 128) return false;
  format.grid->zero = static_cast<int>(negative ? -*zero : *zero);
  return true;
}

}  // namespace

int64_t ActivationFormat::group_count(int64_t k) const {
  return group_size > 0 ? ceil_div(k, group_size) : 1;
}

void require_valid(const ActivationFormat& format) {
  const auto refuse = [](const char* field, const auto& got, std::string_view expected) {
    throw InvalidArgument(field, text_of(got), expected);
  };
  if (format.bits < 2 || format.bits > 8) refuse("bits", format.bits, "2 to 8");
  const bool grouped = format.scope == ActivationScope::group;
  if (format.has_shifts()) {
    if (format.base_bits <= format.bits || format.base_bits > 16) {
      refuse("base_bits", format.base_bits, text_of("more than bits = ", format.bits, ", at most 16"));
    }
    if (grouped) refuse("scope", "group", "token or tensor beside base_bits: runs of inputs share a shift");
    if (!format.symmetric) refuse("symmetric", "false", "true beside base_bits");
  }
  const bool has_groups = grouped || format.has_shifts();
  if (has_groups && format.group_size < 1) refuse("group_size", format.group_size, "a positive number");
  if (!has_groups && format.group_size != 0) {
    refuse("group_size", format.group_size, text_of("0 for scope ", name_of(format.scope)));
  }
  if (format.is_static && format.scope != ActivationScope::tensor) {
    refuse("static", text_of("true for scope ", name_of(format.scope)), "scope tensor");
  }
  if (!(format.outlier_threshold >= 0 && format.outlier_threshold < kLargestActivation)) {
    refuse("outlier_threshold", format.outlier_threshold, "0 or a positive number below 2^127");
  }
  if (!(format.outlier_percent >= 0 && format.outlier_percent < 100)) {
    refuse("outlier_percent", format.outlier_percent, "0 or a positive number below 100");
  }
  if (format.outlier_percent > 0) {
    if (format.outlier_threshold > 0) {
      refuse("outlier_percent", format.outlier_percent, "0 beside an outlier_threshold");
    }
    if (!format.static_outliers) refuse("static_outliers", "false", "true beside an outlier_percent");
  }
  if (format.has_outliers() && format.has_shifts()) {
    const bool by_threshold = format.outlier_threshold > 0;
    refuse(by_threshold ? "outlier_threshold" : "outlier_percent",
           by_threshold ? format.outlier_threshold : format.outlier_percent, "0 beside base_bits");
  }
  if (format.static_outliers && !format.has_outliers()) {
    refuse("static_outliers", "true", "false without an outlier_threshold or outlier_percent");
  }
  if (format.outlier_columns) {
    if (!format.static_outliers) refuse("outlier_columns", "some", "none without static_outliers");
    int64_t last = -1;
    for (const int32_t column : *format.outlier_columns) {
      if (column <= last) refuse("outlier_columns", column, text_of("rising numbers, more than ", last));
      last = column;
    }
  }
  if (!format.grid) return;
  if (!format.is_static) refuse("scale", format.grid->scale, "none for a dynamic format");
  if (!(format.grid->scale >= 0x1p-126F && format.grid->scale < kLargestActivation)) {
    refuse("scale", format.grid->scale, "a number from 2^-126 to 2^127");
  }
  const int half = 1 << (format.bits - 1);
  const int zero = format.grid->zero;
  if (format.symmetric ? zero != 0 : zero < -half || zero >= half) {
    refuse("zero_point", zero, format.symmetric ? "0 for a symmetric grid" : "a code");
  }
}

std::string ActivationFormat::spec() const {
  std::string text =
      has_shifts() ? text_of("sdr", bits, ":g", group_size, ":b", base_bits) : text_of("int", bits);
  if (scope == ActivationScope::group) {
    text += text_of(":g", group_size);
  } else if (!has_shifts() || scope == ActivationScope::tensor) {
    text += text_of(":", name_of(scope));
  }
  if (!symmetric) text += ":asym";
  if (is_static) text += ":static";
  if (grid) {
    text += '=';
    text += text_of_float(grid->scale);
    if (!symmetric) text += text_of(",", grid->zero);
  }
  if (outlier_percent > 0) {
    text += ":outliers=" + text_of_float(outlier_percent) + '%';
  } else if (has_outliers()) {
    text += ":outliers=" + text_of_float(outlier_threshold);
    if (static_outliers && !outlier_columns) text += ":static-outliers";
  }
  if (outlier_columns) {
    text += ":columns=";
    for (size_t i = 0; i < outlier_columns->size(); ++i) {
      if (i > 0) text += ',';
      text += std::to_string((*outlier_columns)[i]);
    }
  }
  return text;
}

std::string ActivationFormat::to_json() const {
  nlohmann::json object;
  object["activations"] = has_shifts() ? "sdr" : "int";
  object["version"] = kVersion;
  object["bits"] = bits;
  object["scope"] = name_of(scope);
  object["group_size"] = group_size;
  object["symmetric"] = symmetric;
  object["base_bits"] = base_bits;
  object["static"] = is_static;
  object["scale"] = nullptr;
  object["zero_point"] = nullptr;
  if (grid) {
    object["scale"] = static_cast<double>(grid->scale);
    object["zero_point"] = grid->zero;
  }
  if (has_outliers()) {
    object[outlier_percent > 0 ? "outlier_percent" : "outlier_threshold"] =
        static_cast<double>(outlier_percent > 0 ? outlier_percent : outlier_threshold);
    object["static_outliers"] = static_outliers;
    object["outlier_columns"] = nullptr;
    if (outlier_columns) object["outlier_columns"] = *outlier_columns;
  }
  return object.dump();
}

namespace {

// Takes the keys of outlier columns out of a description that has them.
void take_outliers(nlohmann::json& object, std::string_view json, ActivationFormat& format) {
  const bool by_percent = object.contains("outlier_percent");
  const char* limit = by_percent ? "outlier_percent" : "outlier_threshold";
  if (!object.contains(limit)) return;
  for (const char* key : {"static_outliers", "outlier_columns"}) {
    if (!object.contains(key)) refuse_description(json, text_of("a key \"", key, "\""));
  }
  const nlohmann::json number = object.at(limit);
  if (!number.is_number() || !(number.get<double>() > 0) || !(number.get<double>() < 1e38)) {
    refuse_description(json, text_of("a positive number \"", limit, "\""));
  }
  (by_percent ? format.outlier_percent : format.outlier_threshold) = static_cast<float>(number.get<double>());
  if (!object.at("static_outliers").is_boolean())
    refuse_description(json, "\"static_outliers\": true or false");
  format.static_outliers = object.at("static_outliers").get<bool>();
  const nlohmann::json columns = object.at("outlier_columns");
  if (!columns.is_null()) {
    if (!columns.is_array()) refuse_description(json, "a list \"outlier_columns\"");
    format.outlier_columns.emplace();
    for (const nlohmann::json& column : columns) {
      if (!column.is_number_unsigned() || column.get<uint64_t>() > uint64_t{INT32_MAX}) {
        refuse_description(json, "\"outlier_columns\" of numbers of columns");
      }
      format.outlier_columns->push_back(column.get<int32_t>());
    }
  }
  for (const char* key : {limit, "static_outliers", "outlier_columns"}) object.erase(key);
}

}  // namespace

ActivationFormat activation_format_from_json(std::string_view json) {
  constexpr std::array<std::string_view, 10> kKeys = {"activations", "base_bits", "bits",   "group_size",
                                                      "scale",       "scope",     "static", "version",
                                                      "symmetric",   "zero_point"};
  nlohmann::json object = parse_description(json);
  ActivationFormat format;
  take_outliers(object, json, format);
  require_keys(object, kKeys, json);
  static_cast<void>(integer_field(object, "version", kVersion, kVersion, json));
  const auto boolean = [&](const char* key) {
    if (!object.at(key).is_boolean()) refuse_description(json, text_of("\"", key, "\": true or false"));
    return object.at(key).get<bool>();
  };
  format.bits = static_cast<int>(integer_field(object, "bits", 2, 8, json));
  format.base_bits = static_cast<int>(integer_field(object, "base_bits", 0, 16, json));
  format.group_size = integer_field(object, "group_size", 0, std::numeric_limits<int64_t>::max(), json);
  format.symmetric = boolean("symmetric");
  format.is_static = boolean("static");
  const nlohmann::json& scope = object.at("scope");
  if (scope != "token" && scope != "tensor" && scope != "group") {
    refuse_description(json, "\"scope\": \"token\", \"tensor\" or \"group\"");
  }
  format.scope = scope == "token"    ? ActivationScope::token
                 : scope == "tensor" ? ActivationScope::tensor
                                     : ActivationScope::group;
  if (object.at("activations") != (format.has_shifts() ? "sdr" : "int")) {
    refuse_description(json, R"("activations": "int" with base_bits 0, or "sdr")");
  }
  if (object.at("scale").is_null() != object.at("zero_point").is_null()) {
    refuse_description(json, "\"scale\" and \"zero_point\", or neither");
  }
  if (!object.at("scale").is_null()) {
    if (!object.at("scale").is_number()) refuse_description(json, "a number \"scale\"");
    const auto scale = object.at("scale").get<double>();
    if (!(std::abs(scale) <= double{std::numeric_limits<float>::max()})) {
      refuse_description(json, "a \"scale\" of float32");
    }
    format.grid = FixedGrid{static_cast<float>(scale),
                            static_cast<int>(integer_field(object, "zero_point", -128, 127, json))};
  }
  require_valid(format);
  return format;
}

ActivationFormat activation_format_from_spec(std::string_view spec) {
  const auto refuse = [&]() { throw InvalidArgument("activations", printable(spec), kSpecForm); };
  const std::vector<std::string_view> parts = split_spec(spec);
  const bool razor = parts[0].starts_with("sdr");
  if (!razor && !parts[0].starts_with("int")) refuse();
  ActivationFormat format;
  const auto number = [&](std::string_view text, int64_t most) {
    const auto value = parse_integer(text);
    if (!value || *value < 1 || *value > most) refuse();
    return *value;
  };
  format.bits = static_cast<int>(number(parts[0].substr(3), 8));
  if (razor) format.base_bits = 8;
  bool has_scope = false;
  bool has_base = false;
  for (size_t i = 1; i < parts.size(); ++i) {
    const std::string_view part = parts[i];
    if ((part == "token" || part == "tensor") && !has_scope) {
      format.scope = part == "token" ? ActivationScope::token : ActivationScope::tensor;
      has_scope = true;
    } else if (part.starts_with('g') && format.group_size == 0 && (razor || !has_scope)) {
      format.group_size = number(part.substr(1), std::numeric_limits<int64_t>::max());
      if (!razor) format.scope = ActivationScope::group;
      has_scope = has_scope || !razor;
    } else if (razor && part.starts_with('b') && !has_base) {
      format.base_bits = static_cast<int>(number(part.substr(1), 16));
      has_base = true;
    } else if (part == "asym" && format.symmetric && !razor) {
      format.symmetric = false;
    } else if ((part == "static" || part.starts_with("static=")) && !format.is_static) {
      format.is_static = true;
      if (part != "static" && !take_grid(part.substr(7), format)) refuse();
    } else if (part.starts_with("outliers=") && !format.has_outliers()) {
      const bool by_percent = part.ends_with('%');
      const auto limit = parse_float(part.substr(9, part.size() - 9 - (by_percent ? 1 : 0)));
      if (!limit || !(*limit > 0)) refuse();
      (by_percent ? format.outlier_percent : format.outlier_threshold) = *limit;
      format.static_outliers = by_percent || format.static_outliers;
    } else if (part == "static-outliers" && !format.static_outliers) {
      format.static_outliers = true;
    } else if (part.starts_with("columns=") && !format.outlier_columns &&
               (!format.static_outliers || format.outlier_percent > 0)) {
      format.static_outliers = true;
      format.outlier_columns.emplace();
      for (std::string_view rest = part.substr(8); !rest.empty();) {
        const size_t comma = rest.find(',');
        const auto column = parse_integer(rest.substr(0, comma));
        if (!column || *column > INT32_MAX || comma + 1 == rest.size()) refuse();
        format.outlier_columns->push_back(static_cast<int32_t>(*column));
        rest = comma == std::string_view::npos ? std::string_view() : rest.substr(comma + 1);
      }
    } else {
      refuse();
    }
  }
  if (!has_scope && !razor) refuse();
  require_valid(format);
  return format;
}

ActivationFormat with_range(const ActivationFormat& format, float low, float high) {
  require_valid(format);
  if (!format.is_static) throw InvalidArgument("format", format.spec(), "a static one");
  if (!(low <= high && low > -kLargestActivation && high < kLargestActivation)) {
    throw InvalidArgument("range", text_of(low, " to ", high), "finite values below 2^127, in order");
  }
  ActivationFormat result = format;
  result.grid = grid_of(format, {std::min(low, 0.0F), std::max(high, 0.0F)});
  return result;
}

ActivationFormat with_columns(const ActivationFormat& format, std::vector<int32_t> columns) {
  if (!format.static_outliers) throw InvalidArgument("format", format.spec(), "one with static outliers");
  ActivationFormat result = format;
  result.outlier_columns = std::move(columns);
  require_valid(result);
  return result;
}

}  // namespace quantloom
