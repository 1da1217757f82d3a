#include "io/json_events.hpp"

#include "io/text.hpp"
#include "quantloom/error.hpp"

namespace quantloom::io {

void JsonEvents::read(std::string_view text) {
  // The parser takes a NUL byte for the end of its input.
  const size_t nul = text.find('\0');
  if (nul != std::string_view::npos) fail(text_of(text_, ": a NUL byte at byte ", nul, " of the JSON text"));
  require_short_numbers(text);
  nlohmann::json::sax_parse(text.data(), text.data() + text.size(), this);
}

// The parser keeps several copies of a token that is wrong; no legal number is long.
void JsonEvents::require_short_numbers(std::string_view text) const {
  constexpr size_t kLongest = 64;
  bool in_string = false;
  size_t run = 0;
  for (size_t i = 0; i < text.size(); ++i) {
    if (in_string) {
      if (text[i] == '\\') {
        ++i;  // what is escaped cannot end the string
      } else {
        in_string = text[i] != '"';
      }
      continue;
    }
    in_string = text[i] == '"';
    run = std::string_view("0123456789+-.eE").find(text[i]) != std::string_view::npos ? run + 1 : 0;
    if (run > kLongest) fail(text_of(text_, ": a number of more than ", kLongest, " characters at byte ", i));
  }
}

bool JsonEvents::number_integer(number_integer_t value) {
  unexpected(text_of("the negative number ", value));
}
bool JsonEvents::number_unsigned(number_unsigned_t value) {
  unexpected(text_of("the number ", value));
}
bool JsonEvents::number_float(number_float_t /*value*/, const string_t& text) {
  unexpected("the number " + quote(text) + ", which is no integer below 2^64");
}
bool JsonEvents::string(string_t& value) {
  unexpected("the string " + quote(value));
}
bool JsonEvents::binary(binary_t& /*value*/) {
  unexpected("binary data");
}
bool JsonEvents::start_object(size_t /*size*/) {
  unexpected("an object");
}
bool JsonEvents::key(string_t& name) {
  unexpected("the key " + quote(name));
}
bool JsonEvents::start_array(size_t /*size*/) {
  unexpected("an array");
}

bool JsonEvents::parse_error(size_t position, const std::string& last_token,
                             const nlohmann::json::exception& /*error*/) {
  fail(text_of(text_, ": not valid JSON in UTF-8 at byte ", position, " of the JSON text, near ",
               quote(last_token)));
}

void JsonEvents::fail(const std::string& message) const {
  throw FileFormatError(label_ + ": " + message);
}

void JsonEvents::unexpected(const std::string& got) const {
  fail(where() + ": got " + got + ", expected " + expected());
}

}  // namespace quantloom::io
