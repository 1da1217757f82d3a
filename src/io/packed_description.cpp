#include "io/packed_description.hpp"

#include <array>
#include <optional>

#define XXH_INLINE_ALL
#include <xxhash.h>

#include "io/json_events.hpp"
#include "io/text.hpp"
#include "quantloom/formats/format.hpp"

namespace quantloom::io {
namespace {

using nlohmann::json;

const std::string kText = "metadata \"quantloom\"";
constexpr int kDeepest = 8;
constexpr int kMostFormatValues = 300;  // a table of 256 entries is the most that a format describes
constexpr int64_t kMostPlanes = 32;

// Reads "version" at the top level and nothing else, so that the file of a later version is refused for its
// version and not for a key that it has.
class VersionEvents final : public JsonEvents {
 public:
  explicit VersionEvents(const std::string& label) : JsonEvents(label, kText) {}

  bool null() override { return value(); }
  bool boolean(bool /*value*/) override { return value(); }
  bool number_integer(number_integer_t number) override {
    return at_version() ? JsonEvents::number_integer(number) : value();
  }
  bool number_unsigned(number_unsigned_t number) override {
    if (at_version()) version = number;
    return value();
  }
  bool number_float(number_float_t number, const string_t& text) override {
    return at_version() ? JsonEvents::number_float(number, text) : value();
  }
  bool string(string_t& text) override { return at_version() ? JsonEvents::string(text) : value(); }
  bool start_object(size_t /*size*/) override { return start(); }
  bool start_array(size_t /*size*/) override {
    if (depth_ == 0) unexpected("an array");
    return start();
  }
  bool end_object() override { return end(); }
  bool end_array() override { return end(); }
  bool key(string_t& name) override {
    if (depth_ == 1) in_version_ = name == "version";
    if (depth_ == 1 && in_version_ && version) fail(kText + ": duplicate key \"version\"");
    return true;
  }

  std::optional<uint64_t> version;

 private:
  bool at_version() const { return depth_ == 1 && in_version_; }
  bool value() { return depth_ > 0 || (unexpected("a value"), false); }
  bool start() {
    if (at_version()) unexpected("an object or array");
    if (depth_ >= kDeepest) fail(text_of(kText, ": nested deeper than ", kDeepest));
    ++depth_;
    return true;
  }
  bool end() {
    --depth_;
    return true;
  }
  std::string where() const override { return kText + (depth_ > 0 ? ": version" : ""); }
  std::string expected() const override { return depth_ > 0 ? "an integer" : "an object"; }

  int depth_ = 0;
  bool in_version_ = false;
};

// Reads a description of version 1.
class DescriptionEvents final : public JsonEvents {
 public:
  DescriptionEvents(const std::string& label, int64_t stored_tensors, PackedDescription& result)
      : JsonEvents(label, kText), stored_tensors_(stored_tensors), result_(result) {}

  bool null() override { return in_format() ? format_value(nullptr) : JsonEvents::null(); }
  bool boolean(bool value) override { return in_format() ? format_value(value) : JsonEvents::boolean(value); }
  bool number_integer(number_integer_t value) override {
    return in_format() ? format_value(value) : JsonEvents::number_integer(value);
  }
  bool number_float(number_float_t value, const string_t& text) override {
    return in_format() ? format_value(value) : JsonEvents::number_float(value, text);
  }

  bool number_unsigned(number_unsigned_t value) override {
    if (in_format()) return format_value(value);
    if (place_ == Place::version) {
      place_ = Place::top;  // compared before
      return true;
    }
    if (place_ != Place::size) unexpected(text_of("the number ", value));
    if (value > static_cast<uint64_t>(kLargestSize)) unexpected(text_of("the number ", value));
    *size_ = static_cast<int64_t>(value);
    place_ = Place::entry;
    return true;
  }

  bool string(string_t& value) override {
    if (in_format()) return format_value(value);
    switch (place_) {
      case Place::digest:
        result_.digest = hexadecimal(value);
        place_ = Place::top;
        return true;
      case Place::checksum:
        checksum_->second = hexadecimal(value);
        place_ = Place::checksums;
        return true;
      case Place::planes:
        add_plane(value);
        return true;
      default:
        unexpected("the string " + quote(value));
    }
  }

  bool start_object(size_t /*size*/) override {
    if (place_ == Place::format) return format_start(json::object());
    switch (place_) {
      case Place::start:
        place_ = Place::top;
        return true;
      case Place::packed_value:
        place_ = Place::packed;
        return true;
      case Place::checksums_value:
        place_ = Place::checksums;
        return true;
      case Place::entry_value:
        place_ = Place::entry;
        return true;
      default:
        unexpected("an object");
    }
  }

  bool start_array(size_t /*size*/) override {
    if (place_ == Place::format && !open_.empty()) return format_start(json::array());
    if (place_ != Place::planes_value) unexpected("an array");
    place_ = Place::planes;
    return true;
  }

  bool end_array() override {
    if (in_format()) return format_end();
    place_ = Place::entry;
    return true;
  }

  bool end_object() override {
    if (in_format()) return format_end();
    switch (place_) {
      case Place::entry:
        for (const char* name : {"format", "k", "n", "planes"}) require(entry_keys_, name);
        place_ = Place::packed;
        return true;
      case Place::top:
        for (const char* name : {"checksums", "digest", "packed", "version"}) require(top_keys_, name);
        place_ = Place::end;
        return true;
      default:
        place_ = Place::top;
        return true;
    }
  }

  bool key(string_t& name) override {
    if (in_format()) {
      if (!open_.back()->is_object() || open_.back()->contains(name))
        fail(where() + ": duplicate key " + quote(name));
      format_key_ = name;
      return true;
    }
    switch (place_) {
      case Place::top:
        add_key(top_keys_, name);
        place_ = name == "checksums" ? Place::checksums_value
                 : name == "digest"  ? Place::digest
                 : name == "packed"  ? Place::packed_value
                 : name == "version" ? Place::version
                                     : unknown_key(name);
        return true;
      case Place::checksums: {
        if (std::ssize(result_.checksums) >= stored_tensors_)
          fail(where() + ": more checksums than stored tensors");
        const auto [added, is_new] = result_.checksums.emplace(name, 0);
        if (!is_new) fail(where() + ": duplicate key " + quote(name));
        checksum_ = added;
        place_ = Place::checksum;
        return true;
      }
      case Place::packed: {
        if (std::ssize(result_.packed) >= stored_tensors_)
          fail(where() + ": more packed than stored tensors");
        const auto [added, is_new] = result_.packed.emplace(name, PackedDescription::Entry{});
        if (!is_new) fail(where() + ": duplicate key " + quote(name));
        entry_ = added;
        entry_keys_.clear();
        place_ = Place::entry_value;
        return true;
      }
      case Place::entry:
        add_key(entry_keys_, name);
        if (name == "n" || name == "k")
          size_ = name == "n" ? &entry_->second.tensor.n : &entry_->second.tensor.k;
        place_ = name == "n" || name == "k" ? Place::size
                 : name == "format"         ? Place::format
                 : name == "planes"         ? Place::planes_value
                                            : unknown_key(name);
        return true;
      default:
        unexpected("the key " + quote(name));
    }
  }

 private:
  enum class Place {
    start,
    top,
    version,
    digest,
    checksums_value,
    checksums,
    checksum,
    packed_value,
    packed,
    entry_value,
    entry,
    size,
    planes_value,
    planes,
    format,
    end
  };

  bool in_format() const { return place_ == Place::format && !open_.empty(); }

  void add_key(std::vector<std::string>& keys, const std::string& name) {
    for (const std::string& key : keys) {
      if (key == name) fail(where() + ": duplicate key " + quote(name));
    }
    keys.push_back(name);
  }
  void require(const std::vector<std::string>& keys, const char* name) {
    for (const std::string& key : keys) {
      if (key == name) return;
    }
    fail(where() + ": key " + quote(name) + " is missing");
  }
  [[noreturn]] Place unknown_key(const std::string& name) { fail(where() + ": unknown key " + quote(name)); }

  uint64_t hexadecimal(const std::string& text) {
    uint64_t value = 0;
    bool valid = text.size() == 16;
    for (const char c : text) {
      const int digit = c >= '0' && c <= '9' ? c - '0' : c >= 'a' && c <= 'f' ? c - 'a' + 10 : -1;
      valid = valid && digit >= 0;
      value = value << 4 | static_cast<uint64_t>(digit & 15);
    }
    if (!valid) unexpected("the string " + quote(text));
    return value;
  }

  void add_plane(const std::string& name) {
    std::vector<std::string>& planes = entry_->second.tensor.planes;
    const bool valid = !name.empty() && name.size() <= 32 &&
                       name.find_first_not_of("abcdefghijklmnopqrstuvwxyz0123456789_") == std::string::npos;
    if (!valid) unexpected("the string " + quote(name));
    if (!planes.empty() && !(planes.back() < name))
      fail(where() + ": " + quote(name) + " is out of order or twice");
    if (std::ssize(planes) >= kMostPlanes) fail(text_of(where(), ": more than ", kMostPlanes, " planes"));
    planes.push_back(name);
  }

  // The format's own JSON is small; it is built as a document of at most kMostFormatValues values.
  json* format_add(json value) {
    if (++format_values_ > kMostFormatValues)
      fail(text_of(where(), ": more than ", kMostFormatValues, " values"));
    if (open_.empty()) return &(format_ = std::move(value));
    json& parent = *open_.back();
    if (parent.is_object()) return &(parent[format_key_] = std::move(value));
    parent.push_back(std::move(value));
    return &parent.back();
  }
  bool format_value(json value) {
    format_add(std::move(value));
    return true;
  }
  bool format_start(json container) {
    if (open_.empty()) format_values_ = 0;
    open_.push_back(format_add(std::move(container)));
    return true;
  }
  bool format_end() {
    open_.pop_back();
    if (!open_.empty()) return true;
    const std::string text = format_.dump();
    auto known = formats_.find(text);
    if (known == formats_.end()) {
      try {
        known = formats_.emplace(text, format_from_json(text)).first;
      } catch (const Error& error) {
        fail(where() + ": " + error.what());
      }
    }
    entry_->second.tensor.format = known->second;
    entry_->second.format_json = text;
    place_ = Place::entry;
    return true;
  }

  std::string where() const override {
    switch (place_) {
      case Place::start:
      case Place::top:
      case Place::end:
        return kText;
      case Place::version:
        return kText + ": version";
      case Place::digest:
        return kText + ": digest";
      case Place::checksums_value:
      case Place::checksums:
        return kText + ": checksums";
      case Place::checksum:
        return kText + ": checksums: tensor " + quote(checksum_->first);
      case Place::packed_value:
      case Place::packed:
        return kText + ": packed";
      default:
        break;
    }
    std::string entry = kText + ": packed tensor " + quote(entry_->first);
    switch (place_) {
      case Place::size:
        return entry + (size_ == &entry_->second.tensor.n ? ": n" : ": k");
      case Place::planes_value:
      case Place::planes:
        return entry + ": planes";
      case Place::format:
        return entry + ": format";
      default:
        return entry;
    }
  }

  std::string expected() const override {
    switch (place_) {
      case Place::version:
        return "an integer";
      case Place::digest:
      case Place::checksum:
        return "a string of 16 lower-case hexadecimal digits";
      case Place::size:
        return "an integer from 0 to 2^31 - 1";
      case Place::planes_value:
      case Place::planes:
        return "an array of plane names (a-z, 0-9, _; at most 32)";
      default:
        return "an object";
    }
  }

  int64_t stored_tensors_;
  PackedDescription& result_;
  Place place_ = Place::start;
  std::vector<std::string> top_keys_;
  std::vector<std::string> entry_keys_;
  std::map<std::string, PackedDescription::Entry>::iterator entry_;
  std::map<std::string, uint64_t>::iterator checksum_;
  int64_t* size_ = nullptr;
  json format_;
  std::string format_key_;
  std::vector<json*> open_;  // containers of format_ that are not closed yet
  int format_values_ = 0;
  std::map<std::string, std::shared_ptr<const Format>> formats_;
};

}  // namespace

PackedDescription read_description(std::string_view text, const std::string& label, int64_t stored_tensors) {
  VersionEvents versions(label);
  versions.read(text);
  if (versions.version != static_cast<uint64_t>(kPackedFileVersion)) {
    throw FileFormatError(
        text_of(label, ": ", kText, ": got ",
                versions.version ? "version " + std::to_string(*versions.version) : "no version",
                ", expected version ", kPackedFileVersion));
  }
  PackedDescription result;
  DescriptionEvents(label, stored_tensors, result).read(text);
  return result;
}

std::string description_json(const PackedDescription& description) {
  json packed = json::object();
  for (const auto& [name, entry] : description.packed) {
    packed[name] = {{"format", json::parse(entry.format_json)},
                    {"k", entry.tensor.k},
                    {"n", entry.tensor.n},
                    {"planes", entry.tensor.planes}};
  }
  json checksums = json::object();
  for (const auto& [name, checksum] : description.checksums) checksums[name] = checksum_text(checksum);
  return json{{"checksums", checksums},
              {"digest", checksum_text(description.digest)},
              {"packed", packed},
              {"version", kPackedFileVersion}}
      .dump();
}

uint64_t checksum_of(std::span<const std::byte> bytes) {
  return XXH3_64bits(bytes.data(), bytes.size());
}

std::string checksum_text(uint64_t checksum) {
  constexpr std::string_view kDigits = "0123456789abcdef";
  std::string text;
  for (int shift = 60; shift >= 0; shift -= 4) text += kDigits[checksum >> shift & 15U];
  return text;
}

uint64_t digest_of(const std::map<std::string, StoredTensor>& stored, const PackedDescription& description,
                   const std::map<std::string, std::string>& metadata) {
  XXH3_state_t state;
  XXH3_64bits_reset(&state);
  const auto add_line = [&](const std::string& text) {
    XXH3_64bits_update(&state, text.data(), text.size());
    XXH3_64bits_update(&state, "\n", 1);
  };
  for (const auto& [name, tensor] : stored) {
    add_line(json{"tensor", name, safetensors_name_of(tensor.dtype),
                  json(std::vector<int64_t>(tensor.shape.begin(), tensor.shape.end())),
                  checksum_text(description.checksums.at(name))}
                 .dump());
  }
  for (const auto& [name, entry] : description.packed) {
    add_line(json{"packed", name, json::parse(entry.format_json), entry.tensor.n, entry.tensor.k,
                  entry.tensor.planes}
                 .dump());
  }
  for (const auto& [key, value] : metadata) add_line(json{"metadata", key, value}.dump());
  return XXH3_64bits_digest(&state);
}

}  // namespace quantloom::io
