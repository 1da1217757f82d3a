// Packed tensors in safetensors files. The planes of packed tensor NAME are stored as tensors
// "NAME.codes", "NAME.scales", ...; the metadata entry "quantloom" holds a JSON object that describes
// every packed tensor (format, n, k) and the XXH3-64 checksum of every stored tensor. FORMATS.md has the
// layout to the byte.
#pragma once

#include <map>
#include <string>

#include "quantloom/io/safetensors.hpp"
#include "quantloom/packed_tensor.hpp"

namespace quantloom {

inline constexpr int kPackedFileVersion = 1;

struct PackedFile {
  std::map<std::string, PackedTensor> packed;
  std::map<std::string, Tensor> plain;          // tensors that belong to no packed tensor
  std::map<std::string, std::string> metadata;  // free-form entries, without "quantloom"
};

// Throws InvalidArgument if a name is empty or two stored names collide.
void save_packed(const std::string& path, const PackedFile& file);
// Verifies the safetensors rules, the description, every plane against its format, and every checksum.
// Throws FileFormatError naming file and tensor. A file of another library loads as plain tensors only.
PackedFile load_packed(const std::string& path);

}  // namespace quantloom
