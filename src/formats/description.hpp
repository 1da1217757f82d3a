// Reading a format's JSON description strictly: what is not understood to the last key is refused.
#pragma once

#include <cstdint>
#include <nlohmann/json_fwd.hpp>
#include <span>
#include <string>
#include <string_view>

namespace quantloom {

// Throws InvalidArgument that shows the description's beginning (as printable ASCII).
[[noreturn]] void refuse_description(std::string_view json, std::string_view expected);
// A text from outside for a message: at most 200 characters, printable ASCII.
std::string printable(std::string_view text);

// The object in `json`, with each top-level key once.
nlohmann::json parse_description(std::string_view json);
// Refuses unless the object has just these keys.
void require_keys(const nlohmann::json& object, std::span<const std::string_view> keys,
                  std::string_view json);
// The value of a key that must be an integer (not 4.0) in [least, most].
int64_t integer_field(const nlohmann::json& object, const char* key, int64_t least, int64_t most,
                      std::string_view json);

}  // namespace quantloom
