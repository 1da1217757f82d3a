#include "io/packed_file.hpp"

#include <algorithm>
#include <array>
#include <nlohmann/json.hpp>

#include "io/packed_description.hpp"
#include "io/safetensors_writer.hpp"
#include "io/text.hpp"
#include "quantloom/formats/format.hpp"

namespace quantloom {
namespace io {
namespace {

const std::string kKey(kDescriptionKey);

std::string stored_name(const std::string& name, const std::string& plane) {
  return name + "." + plane;
}

// The digest covers "format": "pt" too, which the writer would add.
std::map<std::string, std::string> with_format(std::map<std::string, std::string> metadata) {
  metadata.emplace("format", "pt");
  return metadata;
}

void add_tensor(std::map<std::string, Tensor>& tensors, const std::string& name, const Tensor& tensor) {
  if (!tensors.emplace(name, tensor).second) {
    throw InvalidArgument("tensor name", quote(name) + " for two tensors", "a name that is stored once");
  }
}

}  // namespace

void save_packed(const std::string& path, const PackedFile& file, FileSystem& files) {
  if (file.metadata.contains(kKey)) {
    throw InvalidArgument("metadata", "an entry \"quantloom\"", "other keys: this one is reserved");
  }
  std::map<std::string, Tensor> tensors;
  PackedDescription description;
  for (const auto& [name, packed] : file.packed) {
    if (name.empty()) throw InvalidArgument("packed tensor name", "\"\"", "a name");
    try {
      validate(packed);
    } catch (const Error& error) {
      throw InvalidArgument("packed tensor " + quote(name) + ": " + error.what());
    }
    if (packed.n > kLargestSize || packed.k > kLargestSize) {
      throw InvalidArgument("packed tensor " + quote(name), shape_text(std::array{packed.n, packed.k}),
                            "sizes below 2^31");
    }
    PackedDescription::Entry entry;
    entry.tensor = {packed.format, packed.n, packed.k, {}};
    entry.format_json = nlohmann::json::parse(packed.format->to_json()).dump();
    for (const auto& [plane, tensor] : packed.planes) {
      if (tensor.device() != Device::cpu) {
        throw TypeMismatch("packed tensor " + quote(name), "planes on a CUDA device", "planes on the CPU");
      }
      entry.tensor.planes.push_back(plane);
      add_tensor(tensors, stored_name(name, plane), tensor);
    }
    description.packed.emplace(name, std::move(entry));
  }
  for (const auto& [name, tensor] : file.plain) {
    if (name.empty()) throw InvalidArgument("tensor name", "\"\"", "a name");
    add_tensor(tensors, name, tensor);
  }
  std::map<std::string, StoredTensor> stored;
  for (const auto& [name, tensor] : tensors) {
    if (tensor.device() != Device::cpu) {
      throw TypeMismatch("tensor " + quote(name), "memory of a CUDA device", "memory of the CPU");
    }
    stored.emplace(name, StoredTensor{tensor.dtype(), tensor.shape()});
    description.checksums.emplace(name,
                                  checksum_of({tensor.bytes(), static_cast<size_t>(tensor.byte_count())}));
  }
  std::map<std::string, std::string> metadata = with_format(file.metadata);
  try {
    description.digest = digest_of(stored, description, metadata);
    metadata.emplace(kKey, description_json(description));
  } catch (const nlohmann::json::exception&) {
    throw InvalidArgument("tensor names and metadata", "bytes that are no UTF-8", "valid UTF-8");
  }
  write_safetensors(path, tensors, metadata, files);
}

}  // namespace io

using io::quote;

void save_packed(const std::string& path, const PackedFile& file) {
  io::FileSystem files;
  io::save_packed(path, file, files);
}

PackedFileReader PackedFileReader::open(const std::string& path, const SafetensorsLimits& limits) {
  const io::MappedFile file = io::map_file(path);
  return parse(file.bytes, path, file.owner, limits);
}

PackedFileReader PackedFileReader::parse(std::span<const std::byte> bytes, const std::string& label,
                                         std::shared_ptr<const void> owner, const SafetensorsLimits& limits) {
  PackedFileReader reader;
  reader.label_ = label;
  reader.file_ = SafetensorsFile::parse(bytes, label, std::move(owner), limits);
  reader.metadata_ = reader.file_.metadata();
  reader.plain_ = reader.file_.names();
  const auto entry = reader.metadata_.extract(io::kKey);
  if (entry.empty()) return reader;

  const auto fail = [&](const std::string& message) { throw FileFormatError(label + ": " + message); };
  io::PackedDescription description = io::read_description(entry.mapped(), label, std::ssize(reader.plain_));
  std::map<std::string, io::StoredTensor> stored;
  for (const std::string& name : reader.plain_) {
    const SafetensorsEntry& tensor = reader.file_.entry(name);
    stored.emplace_hint(stored.end(), name, io::StoredTensor{tensor.dtype, tensor.shape});
    if (!description.checksums.contains(name)) fail("tensor " + quote(name) + ": has no checksum");
  }
  for (const auto& [name, checksum] : description.checksums) {
    if (!stored.contains(name)) fail("tensor " + quote(name) + ": has a checksum but is not stored");
  }
  std::map<std::string, std::string> plane_owners;
  for (const auto& [name, packed] : description.packed) {
    if (name.empty()) fail("packed tensor \"\": the name is empty");
    for (const std::string& plane : packed.tensor.planes) {
      const std::string plane_name = io::stored_name(name, plane);
      if (!stored.contains(plane_name))
        fail("packed tensor " + quote(name) + ": plane " + plane + " is not stored");
      const auto [owner, is_new] = plane_owners.emplace(plane_name, name);
      if (!is_new)
        fail("tensor " + quote(plane_name) + ": a plane of two packed tensors, " + quote(owner->second));
    }
  }
  const uint64_t digest = io::digest_of(stored, description, reader.metadata_);
  if (digest != description.digest) {
    fail("metadata \"quantloom\": digest: got " + io::checksum_text(description.digest) +
         ", but the header's is " + io::checksum_text(digest) +
         ": names, types, shapes or descriptions were changed");
  }
  std::erase_if(reader.plain_, [&](const std::string& name) { return plane_owners.contains(name); });
  for (auto& [name, packed] : description.packed) reader.packed_.emplace(name, std::move(packed.tensor));
  reader.checksums_ = std::move(description.checksums);
  return reader;
}

void PackedFileReader::require_checksum(const std::string& stored_name, const Tensor& tensor) const {
  const auto expected = checksums_.find(stored_name);
  if (expected == checksums_.end()) return;  // the file of another library
  const uint64_t got = io::checksum_of({tensor.bytes(), static_cast<size_t>(tensor.byte_count())});
  if (got != expected->second) {
    throw FileFormatError(label_ + ": tensor " + quote(stored_name) + ": checksum of the data: got " +
                          io::checksum_text(got) + ", expected " + io::checksum_text(expected->second));
  }
}

PackedTensor PackedFileReader::load_packed(const std::string& name) const {
  const auto found = packed_.find(name);
  if (found == packed_.end()) throw InvalidArgument("name", quote(name), "a packed tensor of " + label_);
  const Description& description = found->second;
  PackedTensor packed{description.format, description.n, description.k, {}};
  for (const std::string& plane : description.planes) {
    const std::string stored = io::stored_name(name, plane);
    Tensor tensor = file_.tensor(stored);
    require_checksum(stored, tensor);
    packed.planes.emplace(plane, std::move(tensor));
  }
  try {
    validate(packed);
  } catch (const Error& error) {
    throw FileFormatError(label_ + ": packed tensor " + quote(name) + ": " + error.what());
  }
  return packed;
}

Tensor PackedFileReader::load_plain(const std::string& name) const {
  if (!std::binary_search(plain_.begin(), plain_.end(), name)) {
    throw InvalidArgument("name", quote(name), "a plain tensor of " + label_);
  }
  Tensor tensor = file_.tensor(name);
  require_checksum(name, tensor);
  return tensor;
}

PackedFile load_packed(const std::string& path) {
  const PackedFileReader reader = PackedFileReader::open(path);
  PackedFile file;
  for (const auto& [name, description] : reader.packed()) file.packed.emplace(name, reader.load_packed(name));
  for (const std::string& name : reader.plain()) file.plain.emplace(name, reader.load_plain(name));
  file.metadata = reader.metadata();
  return file;
}

}  // namespace quantloom
