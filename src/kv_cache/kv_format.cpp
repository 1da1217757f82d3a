#include "quantloom/kv_cache/kv_format.hpp"

#include <algorithm>
#include <array>
#include <limits>
#include <nlohmann/json.hpp>
#include <optional>

#include "formats/description.hpp"
#include "formats/grouped.hpp"
#include "quantloom/error.hpp"

namespace quantloom {
namespace {

constexpr int64_t kVersion = 1;
// Of counts of tokens and channels, far above anything that fits.
constexpr int64_t kMostTokens = int64_t{1} << 24;
constexpr std::string_view kSpecForm =
    "kivi:BITS, token:BITS, sdr:BITS or kvquant:BITS[:PERCENT%], BITS of keys and values or KEYS,VALUES, "
    "each with [:gGROUP][:rWINDOW][:firstTOKENS][:hadamard] (kvquant without groups and hadamard)";
constexpr std::array<std::string_view, 4> kNames = {"kivi", "token", "sdr", "kvquant"};
// More corrections than this cost more bits than another bit of all codes.
constexpr int64_t kMostOutliers = 1000;

std::string_view name_of(KVKind kind) {
  return kNames[static_cast<size_t>(kind)];
}

std::optional<KVKind> kind_of(std::string_view name) {
  const auto found = std::find(kNames.begin(), kNames.end(), name);
  if (found == kNames.end()) return std::nullopt;
  return static_cast<KVKind>(found - kNames.begin());
}

// "1%", "0.25%": 1/10000 of the whole; nothing for what is no number or has more than two decimals.
std::optional<int64_t> parse_percent(std::string_view text) {
  if (!text.ends_with('%')) return std::nullopt;
  text.remove_suffix(1);
  const size_t point = text.find('.');
  const auto whole = parse_integer(text.substr(0, point));
  if (!whole || *whole > 100) return std::nullopt;
  if (point == std::string_view::npos) return *whole * 100;
  const std::string_view digits = text.substr(point + 1);
  if (digits.empty() || digits.size() > 2) return std::nullopt;
  int64_t hundredths = 0;
  for (const char digit : digits) {
    if (digit < '0' || digit > '9') return std::nullopt;
    hundredths = hundredths * 10 + (digit - '0');
  }
  return *whole * 100 + (digits.size() == 1 ? hundredths * 10 : hundredths);
}

std::string percent_text(int64_t share) {
  std::string text = std::to_string(share / 100);
  if (share % 100 != 0) text += text_of(".", share % 100 / 10);
  if (share % 10 != 0) text += std::to_string(share % 10);
  return text + "%";
}

// The format that a short form without further parts stands for.
KVFormat defaults_of(KVKind kind) {
  KVFormat format;
  format.kind = kind;
  format.group_size = kind == KVKind::kivi ? 32 : kind == KVKind::token ? 0 : 16;
  format.window = kind == KVKind::kivi ? 128 : 0;
  if (kind == KVKind::kvquant) {
    format.group_size = 0;
    format.outliers = 100;
    format.first = 1;
  }
  return format;
}

}  // namespace

void require_valid(const KVFormat& format) {
  const auto refuse = [](const char* field, int64_t got, std::string_view expected) {
    throw InvalidArgument(field, text_of(got), expected);
  };
  const auto check_bits = [&](const char* field, int bits) {
    if (format.kind == KVKind::sdr) {
      if (bits < 2 || bits > 7) refuse(field, bits, "2 to 7");
    } else if (format.kind == KVKind::kvquant) {
      if (bits < 1 || bits > 4) refuse(field, bits, "1 to 4");
    } else if (bits < 1 || (bits > 4 && bits != 8)) {
      refuse(field, bits, "1, 2, 3, 4 or 8");
    }
  };
  check_bits("key_bits", format.key_bits);
  check_bits("value_bits", format.value_bits);
  const bool kvquant = format.kind == KVKind::kvquant;
  const int64_t least = format.kind == KVKind::token || kvquant ? 0 : 1;
  if (kvquant && format.group_size != 0) {
    refuse("group_size", format.group_size, "0 for kvquant, which has no groups");
  }
  if (format.group_size < least || format.group_size > kMostTokens) {
    refuse("group_size", format.group_size, text_of(least, " to ", kMostTokens));
  }
  if (format.outliers < 0 || format.outliers > (kvquant ? kMostOutliers : 0)) {
    throw InvalidArgument(
        "outliers", text_of(format.outliers, " of 10000 elements"),
        kvquant ? text_of("0 to ", kMostOutliers, " of them") : text_of("none for ", name_of(format.kind)));
  }
  if (kvquant && format.hadamard) {
    throw InvalidArgument("hadamard", "true", "false for kvquant, whose ranges belong to channels");
  }
  if (format.window < 0 || format.window > kMostTokens) {
    refuse("window", format.window, text_of("0 to ", kMostTokens));
  }
  if (format.kind == KVKind::kivi && (format.window == 0 || format.window % format.group_size != 0)) {
    refuse("window", format.window, text_of("a positive multiple of group_size = ", format.group_size));
  }
  if (format.first < 0 || format.first > kMostTokens) {
    refuse("first", format.first, text_of("0 to ", kMostTokens));
  }
}

std::string KVFormat::spec() const {
  const KVFormat defaults = defaults_of(kind);
  std::string text = text_of(name_of(kind), ":", key_bits);
  if (value_bits != key_bits) text += text_of(",", value_bits);
  if (group_size != 0) text += text_of(":g", group_size);
  if (window != 0 || defaults.window != 0) text += text_of(":r", window);
  if (kind == KVKind::kvquant) text += text_of(":", percent_text(outliers));
  if (first != 0 || defaults.first != 0) text += text_of(":first", first);
  if (hadamard) text += ":hadamard";
  return text;
}

std::string KVFormat::to_json() const {
  nlohmann::json object;
  object["kv_cache"] = name_of(kind);
  object["version"] = kVersion;
  object["key_bits"] = key_bits;
  object["value_bits"] = value_bits;
  object["group_size"] = group_size;
  object["window"] = window;
  object["first"] = first;
  object["outliers"] = outliers;
  object["hadamard"] = hadamard;
  return object.dump();
}

KVFormat kv_format_from_json(std::string_view json) {
  constexpr std::array<std::string_view, 9> kKeys = {"first",      "group_size", "hadamard",
                                                     "key_bits",   "kv_cache",   "outliers",
                                                     "value_bits", "version",    "window"};
  const nlohmann::json object = parse_description(json);
  require_keys(object, kKeys, json);
  static_cast<void>(integer_field(object, "version", kVersion, kVersion, json));
  KVFormat format;
  const nlohmann::json& kind = object.at("kv_cache");
  const auto known = kind.is_string() ? kind_of(kind.get<std::string>()) : std::nullopt;
  if (!known) refuse_description(json, R"("kv_cache": "kivi", "token", "sdr" or "kvquant")");
  format.kind = *known;
  format.key_bits = static_cast<int>(integer_field(object, "key_bits", 0, kMostTokens, json));
  format.value_bits = static_cast<int>(integer_field(object, "value_bits", 0, kMostTokens, json));
  format.group_size = integer_field(object, "group_size", 0, INT64_MAX, json);
  format.window = integer_field(object, "window", 0, INT64_MAX, json);
  format.first = integer_field(object, "first", 0, INT64_MAX, json);
  format.outliers = integer_field(object, "outliers", 0, INT64_MAX, json);
  if (!object.at("hadamard").is_boolean()) refuse_description(json, "\"hadamard\": true or false");
  format.hadamard = object.at("hadamard").get<bool>();
  require_valid(format);
  return format;
}

KVFormat kv_format_from_spec(std::string_view spec) {
  const auto refuse = [&]() { throw InvalidArgument("kv_cache", printable(spec), kSpecForm); };
  const std::vector<std::string_view> parts = split_spec(spec);
  const auto kind = kind_of(parts[0]);
  if (parts.size() < 2 || !kind) refuse();
  KVFormat format = defaults_of(*kind);
  const auto number = [&](std::string_view text) {
    const auto value = parse_integer(text);
    if (!value || *value < 0 || *value > kMostTokens) refuse();
    return *value;
  };
  const size_t comma = parts[1].find(',');
  format.key_bits = static_cast<int>(number(parts[1].substr(0, comma)));
  format.value_bits = comma == std::string_view::npos ? format.key_bits
                                                      : static_cast<int>(number(parts[1].substr(comma + 1)));
  std::string seen;
  for (size_t i = 2; i < parts.size(); ++i) {
    const std::string_view part = parts[i];
    const char key = part.empty() ? ' ' : part.ends_with('%') ? '%' : part[0];
    if (seen.find(key) != std::string::npos) refuse();
    seen += key;
    if (key == '%' && *kind == KVKind::kvquant) {
      const auto share = parse_percent(part);
      if (!share) refuse();
      format.outliers = *share;
    } else if (part == "hadamard") {
      format.hadamard = true;
    } else if (part.starts_with("first")) {
      format.first = number(part.substr(5));
    } else if (key == 'g') {
      format.group_size = number(part.substr(1));
      if (format.group_size == 0) refuse();
    } else if (key == 'r') {
      format.window = number(part.substr(1));
    } else {
      refuse();
    }
  }
  require_valid(format);
  return format;
}

}  // namespace quantloom
