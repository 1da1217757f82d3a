// Packed tensors in safetensors files. The planes of packed tensor NAME are stored as tensors
// "NAME.codes", "NAME.scales", ...; the metadata entry "quantloom" holds a JSON object that describes
// every packed tensor (format, n, k, planes) and the XXH3-64 checksum of every stored tensor, and a digest
// of all that the header says. FORMATS.md has the layout to the byte.
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

// Throws InvalidArgument if a name is empty, two stored names collide, or the metadata has an entry
// "quantloom"; else as write_safetensors().
void save_packed(const std::string& path, const PackedFile& file);
// Verifies the safetensors rules, the description, every plane against its format, and every checksum.
// Throws FileFormatError naming file and tensor. A file of another library loads as plain tensors only.
PackedFile load_packed(const std::string& path);

// The same, one tensor at a time: what is not asked for is not read. Tensors are views into the file's
// mapping and keep it alive.
class PackedFileReader {
 public:
  // What the file says of a packed tensor.
  struct Description {
    std::shared_ptr<const Format> format;
    int64_t n = 0;
    int64_t k = 0;
    std::vector<std::string> planes;  // "codes", "scales", ...
  };

  // Verifies all but the tensors' data: the planes' shapes and types and what they hold are checked when
  // they are loaded. Throws IoError, FileFormatError or Unsupported, as
  // SafetensorsFile::open() does.
  static PackedFileReader open(const std::string& path, const SafetensorsLimits& limits = {});
  // The same over bytes in memory, as SafetensorsFile::parse().
  static PackedFileReader parse(std::span<const std::byte> bytes, const std::string& label,
                                std::shared_ptr<const void> owner = nullptr,
                                const SafetensorsLimits& limits = {});

  // Packed tensors by name.
  const std::map<std::string, Description>& packed() const { return packed_; }
  // Names of the tensors that belong to no packed tensor, sorted.
  const std::vector<std::string>& plain() const { return plain_; }
  // Free-form entries, without "quantloom".
  const std::map<std::string, std::string>& metadata() const { return metadata_; }
  // The stored tensors, planes included.
  const SafetensorsFile& file() const { return file_; }

  // Both verify the checksums of what they load; throw FileFormatError naming the tensor, InvalidArgument
  // if there is no such tensor.
  PackedTensor load_packed(const std::string& name) const;
  Tensor load_plain(const std::string& name) const;

 private:
  void require_checksum(const std::string& stored_name, const Tensor& tensor) const;

  std::string label_;
  SafetensorsFile file_;
  std::map<std::string, Description> packed_;
  std::vector<std::string> plain_;
  std::map<std::string, std::string> metadata_;
  std::map<std::string, uint64_t> checksums_;  // empty for a file of another library
};

}  // namespace quantloom
