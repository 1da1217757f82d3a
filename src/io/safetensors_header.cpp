#include "io/safetensors_header.hpp"

#include <algorithm>
#include <array>
#include <limits>
#include <utility>

#include "io/json_events.hpp"
#include "io/text.hpp"

namespace quantloom::io {
namespace {

constexpr std::string_view kMetadataKey = "__metadata__";
constexpr std::array kDTypes = {DType::f64, DType::f32, DType::f16,    DType::bf16, DType::i64,
                                DType::i32, DType::i16, DType::i8,     DType::u64,  DType::u32,
                                DType::u16, DType::u8,  DType::boolean};
constexpr std::array<std::string_view, 11> kUnsupportedDTypes = {
    "C64",     "F8_E4M3", "F8_E5M2", "F8_E8M0", "F8_E4M3FNUZ", "F8_E5M2FNUZ",
    "F6_E2M3", "F6_E3M2", "F4",      "F4_E2M1", "C128"};

class HeaderEvents final : public JsonEvents {
 public:
  HeaderEvents(const std::string& label, const SafetensorsLimits& limits, SafetensorsHeader& header)
      : JsonEvents(label, "header"), label_(label), limits_(limits), header_(header) {}

  bool start_object(size_t /*size*/) override {
    switch (place_) {
      case Place::start:
        place_ = Place::top;
        return true;
      case Place::metadata_value:
        place_ = Place::metadata;
        return true;
      case Place::entry_value:
        place_ = Place::entry;
        has_dtype_ = has_shape_ = has_offsets_ = false;
        return true;
      default:
        unexpected("an object");
    }
  }

  bool key(string_t& name) override {
    switch (place_) {
      case Place::top:
        top_key(name);
        return true;
      case Place::metadata:
        if (std::ssize(header_.metadata) >= limits_.metadata_entries) {
          fail(text_of("__metadata__: more than ", limits_.metadata_entries, " entries, the limit"));
        }
        add_metadata(name);
        return true;
      case Place::entry:
        entry_key(name);
        return true;
      default:
        unexpected("the key " + quote(name));
    }
  }

  bool string(string_t& value) override {
    if (place_ == Place::metadata_string) {
      metadata_->second = std::move(value);
      place_ = Place::metadata;
      return true;
    }
    if (place_ != Place::dtype) unexpected("the string " + quote(value));
    const auto found = std::find_if(kDTypes.begin(), kDTypes.end(),
                                    [&](DType dtype) { return safetensors_name_of(dtype) == value; });
    if (found == kDTypes.end()) {
      if (std::find(kUnsupportedDTypes.begin(), kUnsupportedDTypes.end(), value) !=
          kUnsupportedDTypes.end()) {
        throw Unsupported(label_ + ": " + where() + ": element type " + value + " is not supported");
      }
      fail(where() + ": got " + quote(value) + ", expected the name of an element type such as \"F16\"");
    }
    entry().dtype = *found;
    place_ = Place::entry;
    return true;
  }

  bool start_array(size_t /*size*/) override {
    if (place_ == Place::shape_value) {
      place_ = Place::shape;
    } else if (place_ == Place::offsets_value) {
      place_ = Place::offsets;
      offset_count_ = 0;
    } else {
      unexpected("an array");
    }
    return true;
  }

  bool number_unsigned(number_unsigned_t value) override {
    if (place_ != Place::shape && place_ != Place::offsets) unexpected(text_of("the number ", value));
    if (value > static_cast<uint64_t>(std::numeric_limits<int64_t>::max())) {
      unexpected(text_of("the number ", value));
    }
    const auto number = static_cast<int64_t>(value);
    if (place_ == Place::shape) {
      if (std::ssize(entry().shape) >= limits_.rank) {
        fail(text_of(where(), ": more than ", limits_.rank, " dimensions, the limit"));
      }
      entry().shape.push_back(number);
    } else {
      if (offset_count_ >= 2) fail(where() + ": more than two offsets");
      (offset_count_ == 0 ? entry().begin : entry().end) = number;
      ++offset_count_;
    }
    return true;
  }

  bool end_array() override {
    if (place_ == Place::offsets && offset_count_ != 2) {
      fail(text_of(where(), ": got ", offset_count_, " offsets, expected two"));
    }
    place_ = Place::entry;
    return true;
  }

  bool end_object() override {
    if (place_ == Place::top) {
      place_ = Place::end;
      return true;
    }
    if (place_ == Place::entry) {
      const char* missing = !has_dtype_     ? "dtype"
                            : !has_shape_   ? "shape"
                            : !has_offsets_ ? "data_offsets"
                                            : nullptr;
      if (missing != nullptr) fail(text_of(where(), ": key \"", missing, "\" is missing"));
    }
    place_ = Place::top;
    return true;
  }

 private:
  enum class Place {
    start,
    top,
    metadata_value,
    metadata,
    metadata_string,
    entry_value,
    entry,
    dtype,
    shape_value,
    shape,
    offsets_value,
    offsets,
    end
  };

  void top_key(const std::string& name) {
    if (name == kMetadataKey) {
      if (has_metadata_) fail("duplicate key \"__metadata__\"");
      has_metadata_ = true;
      place_ = Place::metadata_value;
      return;
    }
    if (std::ssize(name) > limits_.name_bytes) {
      fail(text_of("tensor ", quote(name), ": a name of ", name.size(), " bytes, the limit is ",
                   limits_.name_bytes));
    }
    if (std::ssize(header_.tensors) >= limits_.tensors) {
      fail(text_of("tensor ", quote(name), ": more than ", limits_.tensors, " tensors, the limit"));
    }
    const auto [added, is_new] = header_.tensors.emplace(name, HeaderEntry{});
    if (!is_new) fail("tensor " + quote(name) + ": duplicate key");
    entry_ = added;
    place_ = Place::entry_value;
  }

  void add_metadata(const std::string& name) {
    const auto [added, is_new] = header_.metadata.emplace(name, "");
    if (!is_new) fail("__metadata__: duplicate key " + quote(name));
    metadata_ = added;
    place_ = Place::metadata_string;
  }

  void entry_key(const std::string& name) {
    const auto once = [&](bool& seen, Place next) {
      if (seen) fail(where() + ": duplicate key " + quote(name));
      seen = true;
      place_ = next;
    };
    if (name == "dtype") {
      once(has_dtype_, Place::dtype);
    } else if (name == "shape") {
      once(has_shape_, Place::shape_value);
    } else if (name == "data_offsets") {
      once(has_offsets_, Place::offsets_value);
    } else {
      fail(where() + ": unknown key " + quote(name));
    }
  }

  HeaderEntry& entry() { return entry_->second; }

  std::string where() const override {
    switch (place_) {
      case Place::metadata_value:
      case Place::metadata:
        return "__metadata__";
      case Place::metadata_string:
        return "__metadata__ " + quote(metadata_->first);
      case Place::entry_value:
      case Place::entry:
        return "tensor " + quote(entry_->first);
      case Place::dtype:
        return "tensor " + quote(entry_->first) + ": dtype";
      case Place::shape_value:
      case Place::shape:
        return "tensor " + quote(entry_->first) + ": shape";
      case Place::offsets_value:
      case Place::offsets:
        return "tensor " + quote(entry_->first) + ": data_offsets";
      default:
        return "header";
    }
  }

  std::string expected() const override {
    switch (place_) {
      case Place::metadata_value:
        return "an object of strings";
      case Place::metadata_string:
      case Place::dtype:
        return "a string";
      case Place::shape_value:
        return "an array of sizes";
      case Place::offsets_value:
        return "an array of two offsets";
      case Place::shape:
      case Place::offsets:
        return "integers from 0 to 2^63 - 1";
      default:
        return "an object";
    }
  }

  const std::string& label_;
  const SafetensorsLimits& limits_;
  SafetensorsHeader& header_;
  Place place_ = Place::start;
  bool has_metadata_ = false;
  bool has_dtype_ = false;
  bool has_shape_ = false;
  bool has_offsets_ = false;
  int offset_count_ = 0;
  std::map<std::string, HeaderEntry>::iterator entry_;
  std::map<std::string, std::string>::iterator metadata_;
};

}  // namespace

SafetensorsHeader read_safetensors_header(std::string_view json, const std::string& label,
                                          const SafetensorsLimits& limits) {
  SafetensorsHeader header;
  HeaderEvents(label, limits, header).read(json);
  return header;
}

}  // namespace quantloom::io
