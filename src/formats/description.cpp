#include "formats/description.hpp"

#include <algorithm>
#include <nlohmann/json.hpp>
#include <set>

#include "quantloom/error.hpp"

namespace quantloom {

std::string printable(std::string_view text) {
  constexpr size_t kLongest = 200;
  std::string shown(text.substr(0, kLongest));
  std::replace_if(
      shown.begin(), shown.end(), [](char c) { return c < ' ' || c > '~'; }, '?');
  return text.size() > kLongest ? shown + "..." : shown;
}

void refuse_description(std::string_view json, std::string_view expected) {
  throw InvalidArgument("format description", printable(json), expected);
}

nlohmann::json parse_description(std::string_view json) {
  std::set<std::string> seen;
  bool repeated = false;
  const auto on_event = [&](int depth, nlohmann::json::parse_event_t event, nlohmann::json& value) {
    if (event == nlohmann::json::parse_event_t::key && depth == 1) {
      repeated = !seen.insert(value.get<std::string>()).second || repeated;
    }
    return true;
  };
  auto object = nlohmann::json::parse(json, on_event, /*allow_exceptions=*/false);
  if (!object.is_object()) refuse_description(json, "a JSON object");
  if (repeated) refuse_description(json, "each key once");
  return object;
}

void require_keys(const nlohmann::json& object, std::span<const std::string_view> keys,
                  std::string_view json) {
  for (const std::string_view key : keys) {
    if (!object.contains(std::string(key))) refuse_description(json, text_of("a key \"", key, "\""));
  }
  for (const auto& [key, value] : object.items()) {
    if (std::find(keys.begin(), keys.end(), key) == keys.end()) {
      refuse_description(json, text_of("no key \"", printable(key), "\""));
    }
  }
}

int64_t integer_field(const nlohmann::json& object, const char* key, int64_t least, int64_t most,
                      std::string_view json) {
  const auto& value = object.at(key);
  // Integers above 2^63 - 1 would wrap in get<int64_t>().
  const bool wraps = value.is_number_unsigned() && value.get<uint64_t>() > uint64_t{INT64_MAX};
  if (!value.is_number_integer() || wraps || value.get<int64_t>() < least || value.get<int64_t>() > most) {
    refuse_description(json, text_of("an integer \"", key, "\" from ", least, " to ", most));
  }
  return value.get<int64_t>();
}

}  // namespace quantloom
