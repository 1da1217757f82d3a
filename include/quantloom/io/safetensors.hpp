// Safetensors files (https://github.com/huggingface/safetensors): 8 bytes of header length, a JSON
// header, then the data of all tensors without hole or overlap. The reader maps the file and checks every
// rule before it returns; a hostile file ends in FileFormatError, never in a crash, a wild read or a
// large allocation. The writer writes a temporary file, syncs it and renames it.
#pragma once

#include <map>
#include <string>
#include <utility>
#include <vector>

#include "quantloom/tensor.hpp"

namespace quantloom {

struct SafetensorsLimits {
  int64_t header_bytes = 32 << 20;
  int64_t tensors = 1 << 17;
  int64_t rank = 8;
  int64_t name_bytes = 512;
};

class SafetensorsFile {
 public:
  // Maps the file read-only. Throws IoError if it cannot be read, FileFormatError naming the file, the
  // tensor and the rule that is broken.
  static SafetensorsFile open(const std::string& path, const SafetensorsLimits& limits = {});
  // The same over bytes in memory, which must outlive the tensors; `label` stands in error messages.
  static SafetensorsFile parse(std::span<const std::byte> bytes, const std::string& label,
                               std::shared_ptr<const void> owner = nullptr,
                               const SafetensorsLimits& limits = {});

  const std::map<std::string, std::string>& metadata() const { return metadata_; }
  std::vector<std::string> names() const;  // sorted
  bool contains(const std::string& name) const { return tensors_.contains(name); }
  // Views into the mapping, which lives as long as any tensor of it. Data may be unaligned in the file;
  // a tensor whose data is not aligned to its element size is copied. Throws InvalidArgument if absent.
  Tensor tensor(const std::string& name) const;

 private:
  struct Entry {
    DType dtype;
    std::vector<int64_t> shape;
    const std::byte* data;
  };
  std::map<std::string, Entry> tensors_;
  std::map<std::string, std::string> metadata_;
  std::shared_ptr<const void> owner_;
};

// Writes tensors (on the CPU) ordered by falling element size, then name, with the data aligned to 64
// bytes; metadata always gets "format": "pt". The same input gives the same bytes. On any failure the
// previous file at `path` is intact and no temporary file stays.
void write_safetensors(const std::string& path, const std::map<std::string, Tensor>& tensors,
                       const std::map<std::string, std::string>& metadata = {});

// Writes `bytes` to `path` through a temporary file in the same folder, fsync and rename.
void write_file_atomically(const std::string& path, std::span<const std::byte> bytes);

}  // namespace quantloom
