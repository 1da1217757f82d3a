// The metadata entry "quantloom" of a packed file: its text, its reader, and the checksums in it.
#pragma once

#include <map>
#include <string>
#include <string_view>
#include <vector>

#include "quantloom/io/packed_file.hpp"

namespace quantloom::io {

inline constexpr std::string_view kDescriptionKey = "quantloom";
// Sizes above this are refused: column indices are int32.
inline constexpr int64_t kLargestSize = (int64_t{1} << 31) - 1;

struct PackedDescription {
  struct Entry {
    PackedFileReader::Description tensor;
    std::string format_json;  // compact, keys sorted
  };
  std::map<std::string, Entry> packed;
  std::map<std::string, uint64_t> checksums;
  uint64_t digest = 0;
};

// Throws FileFormatError naming `label` and what is wrong, but does not compare with the file's tensors,
// beyond their number, which bounds what the description may hold.
PackedDescription read_description(std::string_view json, const std::string& label, int64_t stored_tensors);
// Compact JSON with sorted keys.
std::string description_json(const PackedDescription& description);

// XXH3-64, seed 0.
uint64_t checksum_of(std::span<const std::byte> bytes);
// 16 lower-case hexadecimal digits, the highest first.
std::string checksum_text(uint64_t checksum);

// What the digest covers of a stored tensor.
struct StoredTensor {
  DType dtype;
  std::span<const int64_t> shape;
};

// The checksum over all that a header says: types, shapes and checksums of stored tensors, descriptions of
// packed ones, other metadata. FORMATS.md has the bytes it is taken of. `metadata` has no entry "quantloom".
uint64_t digest_of(const std::map<std::string, StoredTensor>& stored, const PackedDescription& description,
                   const std::map<std::string, std::string>& metadata);

}  // namespace quantloom::io
