#include "io/text.hpp"

#include <array>

namespace quantloom::io {
namespace {

constexpr size_t kLongest = 120;

// The length of the UTF-8 sequence that starts at `text[i]`, 0 if none does.
size_t sequence_length(std::string_view text, size_t i) {
  const auto lead = static_cast<unsigned char>(text[i]);
  const size_t length = lead < 0x80                   ? 1
                        : lead >= 0xf0 && lead < 0xf5 ? 4
                        : lead >= 0xe0                ? 3
                        : lead >= 0xc2                ? 2
                                                      : 0;
  if (length == 0 || lead >= 0xf5 || i + length > text.size()) return 0;
  for (size_t j = 1; j < length; ++j) {
    if ((static_cast<unsigned char>(text[i + j]) & 0xc0U) != 0x80U) return 0;
  }
  return length;
}

}  // namespace

std::string quote(std::string_view text) {
  constexpr std::string_view kDigits = "0123456789abcdef";
  std::string result = "\"";
  size_t i = 0;
  while (i < text.size() && i < kLongest) {
    const auto byte = static_cast<unsigned char>(text[i]);
    const size_t length = sequence_length(text, i);
    if (length == 0 || byte < 0x20 || byte == 0x7f) {
      result += "\\x";
      result += kDigits[byte >> 4];
      result += kDigits[byte & 15U];
      ++i;
    } else {
      result += text.substr(i, length);
      i += length;
    }
  }
  return result + (i < text.size() ? "...\"" : "\"");
}

std::string shape_text(std::span<const int64_t> shape) {
  std::string text = "[";
  for (size_t i = 0; i < shape.size(); ++i) text += (i == 0 ? "" : ", ") + std::to_string(shape[i]);
  return text + "]";
}

}  // namespace quantloom::io
