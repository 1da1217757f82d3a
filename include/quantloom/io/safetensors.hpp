// Safetensors files (https://github.com/huggingface/safetensors): 8 bytes of header length, a JSON
// header, then the data of all tensors without hole or overlap. The reader maps the file and checks every
// rule before it returns; a hostile file ends in FileFormatError, never in a crash, a wild read or a
// large allocation. The writer writes a temporary file, syncs it and renames it.
#pragma once

#include <map>
#include <memory>
#include <span>
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
  int64_t metadata_entries = 1 << 16;
};

// What the header says of one tensor.
struct SafetensorsEntry {
  DType dtype = DType::u8;
  std::vector<int64_t> shape;
  std::span<const std::byte> data;
};

class SafetensorsFile {
 public:
  // Maps the file. Throws IoError if it cannot be read, FileFormatError naming the file, the tensor and the
  // rule that is broken, Unsupported for an element type that DType does not have (8-bit floats, ...).
  // Nobody may shorten the file while it is mapped: reading past its new end kills the process.
  static SafetensorsFile open(const std::string& path, const SafetensorsLimits& limits = {});
  // The same over bytes in memory; `label` stands in error messages. With an `owner`, which keeps the bytes
  // alive, tensors are views; without, they are copies and only this object must not outlive the bytes.
  static SafetensorsFile parse(std::span<const std::byte> bytes, const std::string& label,
                               std::shared_ptr<const void> owner = nullptr,
                               const SafetensorsLimits& limits = {});

  const std::map<std::string, std::string>& metadata() const { return metadata_; }
  std::vector<std::string> names() const;  // sorted
  bool contains(const std::string& name) const { return tensors_.contains(name); }
  // Type, shape and bytes as they lie in the file, perhaps unaligned. Throws InvalidArgument if absent.
  const SafetensorsEntry& entry(const std::string& name) const;
  // A view into the mapping, which lives as long as any tensor of it; what is written to it never reaches
  // the file. A tensor whose data is not aligned to its element size is copied. Throws InvalidArgument
  // if absent, FileFormatError if an element of a boolean tensor is neither 0 nor 1.
  Tensor tensor(const std::string& name) const;

 private:
  std::string label_;
  std::map<std::string, SafetensorsEntry> tensors_;
  std::map<std::string, std::string> metadata_;
  std::shared_ptr<const void> owner_;
};

// Writes tensors (on the CPU) ordered by falling element size, then name, with the data section aligned to
// 64 bytes and so every tensor to its element size; metadata gets "format": "pt" unless it has a
// "format". The same input gives the same bytes. Throws TypeMismatch for a tensor on a GPU,
// InvalidArgument for names and metadata that are not UTF-8 and for what exceeds SafetensorsLimits, and
// IoError naming path and reason; the previous file at `path` is then intact and no temporary file stays.
void write_safetensors(const std::string& path, const std::map<std::string, Tensor>& tensors,
                       const std::map<std::string, std::string>& metadata = {});

// Writes `bytes` to `path` through a temporary file in the same folder, fsync and rename.
void write_file_atomically(const std::string& path, std::span<const std::byte> bytes);

}  // namespace quantloom
