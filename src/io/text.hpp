// Pieces of error messages: names from files may hold anything, so they are shortened and escaped.
#pragma once

#include <cstdint>
#include <span>
#include <string>
#include <string_view>

namespace quantloom::io {

// `text` in double quotes: at most 120 bytes of it, control characters escaped, bytes that are no ASCII kept
// only in whole UTF-8 sequences.
std::string quote(std::string_view text);
// "[2, 3]"
std::string shape_text(std::span<const int64_t> shape);

}  // namespace quantloom::io
