// The JSON header of a safetensors file, read event by event so that memory stays proportional to what a
// legal header of that size can hold.
#pragma once

#include <map>
#include <string>
#include <string_view>

#include "quantloom/io/safetensors.hpp"

namespace quantloom::io {

struct HeaderEntry {
  DType dtype = DType::u8;
  std::vector<int64_t> shape;
  int64_t begin = 0;  // data_offsets
  int64_t end = 0;
};

struct SafetensorsHeader {
  std::map<std::string, HeaderEntry> tensors;
  std::map<std::string, std::string> metadata;
};

// Checks all that can be checked without the data: JSON, keys, types, limits. Throws FileFormatError or
// Unsupported, both beginning with `label`.
SafetensorsHeader read_safetensors_header(std::string_view json, const std::string& label,
                                          const SafetensorsLimits& limits);

}  // namespace quantloom::io
