#include "quantloom/kv_cache/kv_format.hpp"

#include <array>
#include <limits>
#include <nlohmann/json.hpp>

#include "formats/description.hpp"
#include "formats/grouped.hpp"
#include "quantloom/error.hpp"

namespace quantloom {
namespace {

constexpr int64_t kVersion = 1;
// Of counts of tokens and channels, far above anything that fits.
constexpr int64_t kMostTokens = int64_t{1} << 24;
constexpr std::string_view kSpecForm =
    "kivi:BITS, token:BITS or sdr:BITS, BITS of keys and values or KEYS,VALUES, each with [:gGROUP][:rWINDOW]"
    "[:firstTOKENS][:hadamard]";

std::string_view name_of(KVKind kind) {
  return kind == KVKind::kivi ? "kivi" : kind == KVKind::token ? "token" : "sdr";
}

// The format that a short form without further parts stands for.
KVFormat defaults_of(KVKind kind) {
  KVFormat format;
  format.kind = kind;
  format.group_size = kind == KVKind::kivi ? 32 : kind == KVKind::token ? 0 : 16;
  format.window = kind == KVKind::kivi ? 128 : 0;
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
    } else if (bits < 1 || (bits > 4 && bits != 8)) {
      refuse(field, bits, "1, 2, 3, 4 or 8");
    }
  };
  check_bits("key_bits", format.key_bits);
  check_bits("value_bits", format.value_bits);
  const int64_t least = format.kind == KVKind::token ? 0 : 1;
  if (format.group_size < least || format.group_size > kMostTokens) {
    refuse("group_size", format.group_size, text_of(least, " to ", kMostTokens));
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
  if (first != 0) text += text_of(":first", first);
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
  object["hadamard"] = hadamard;
  return object.dump();
}

KVFormat kv_format_from_json(std::string_view json) {
  constexpr std::array<std::string_view, 8> kKeys = {"first",    "group_size", "hadamard", "key_bits",
                                                     "kv_cache", "value_bits", "version",  "window"};
  const nlohmann::json object = parse_description(json);
  require_keys(object, kKeys, json);
  static_cast<void>(integer_field(object, "version", kVersion, kVersion, json));
  KVFormat format;
  const nlohmann::json& kind = object.at("kv_cache");
  if (kind != "kivi" && kind != "token" && kind != "sdr") {
    refuse_description(json, R"("kv_cache": "kivi", "token" or "sdr")");
  }
  format.kind = kind == "kivi" ? KVKind::kivi : kind == "token" ? KVKind::token : KVKind::sdr;
  format.key_bits = static_cast<int>(integer_field(object, "key_bits", 1, 8, json));
  format.value_bits = static_cast<int>(integer_field(object, "value_bits", 1, 8, json));
  format.group_size = integer_field(object, "group_size", 0, kMostTokens, json);
  format.window = integer_field(object, "window", 0, kMostTokens, json);
  format.first = integer_field(object, "first", 0, kMostTokens, json);
  if (!object.at("hadamard").is_boolean()) refuse_description(json, "\"hadamard\": true or false");
  format.hadamard = object.at("hadamard").get<bool>();
  require_valid(format);
  return format;
}

KVFormat kv_format_from_spec(std::string_view spec) {
  const auto refuse = [&]() { throw InvalidArgument("kv_cache", printable(spec), kSpecForm); };
  const std::vector<std::string_view> parts = split_spec(spec);
  if (parts.size() < 2 || (parts[0] != "kivi" && parts[0] != "token" && parts[0] != "sdr")) refuse();
  KVFormat format = defaults_of(parts[0] == "kivi"    ? KVKind::kivi
                                : parts[0] == "token" ? KVKind::token
                                                      : KVKind::sdr);
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
    const char key = part.empty() ? ' ' : part[0];
    if (seen.find(key) != std::string::npos) refuse();
    seen += key;
    if (part == "hadamard") {
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
