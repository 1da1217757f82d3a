// Base of readers that take JSON as events: everything a reader does not expect where it stands is refused,
// so that no value is skipped or built by accident. Handlers throw FileFormatError.
#pragma once

#include <nlohmann/json.hpp>
#include <string>
#include <string_view>

namespace quantloom::io {

class JsonEvents : public nlohmann::json_sax<nlohmann::json> {
 public:
  // Messages begin with `label`, the file; `text` says which of its texts is read.
  JsonEvents(std::string label, std::string text) : label_(std::move(label)), text_(std::move(text)) {}

  // Reads the whole text. Throws FileFormatError unless it is one JSON value, white space around it.
  void read(std::string_view text);

  bool null() override { unexpected("null"); }
  bool boolean(bool value) override { unexpected(value ? "true" : "false"); }
  bool number_integer(number_integer_t value) override;
  bool number_unsigned(number_unsigned_t value) override;
  bool number_float(number_float_t value, const string_t& text) override;
  bool string(string_t& value) override;
  bool binary(binary_t& value) override;
  bool start_object(size_t size) override;
  bool key(string_t& name) override;
  bool end_object() override { unexpected("the end of an object"); }
  bool start_array(size_t size) override;
  bool end_array() override { unexpected("the end of an array"); }
  bool parse_error(size_t position, const std::string& last_token,
                   const nlohmann::json::exception& error) override;

 protected:
  // Throws FileFormatError "<label>: <message>".
  [[noreturn]] void fail(const std::string& message) const;
  // Fails with what was got, where, and what was expected there.
  [[noreturn]] void unexpected(const std::string& got) const;
  // Where the reader stands and what may come next, for messages.
  virtual std::string where() const = 0;
  virtual std::string expected() const = 0;

 private:
  void require_short_numbers(std::string_view text) const;

  std::string label_;
  std::string text_;
};

}  // namespace quantloom::io
