#include "io/safetensors_writer.hpp"

#include <algorithm>
#include <array>
#include <nlohmann/json.hpp>

#include "io/text.hpp"

namespace quantloom {
namespace io {
namespace {

constexpr int64_t kDataAlignment = 64;

std::string json_string(const std::string& text, const std::string& what) {
  try {
    return nlohmann::json(text).dump();
  } catch (const nlohmann::json::exception&) {
    throw InvalidArgument(what, quote(text), "valid UTF-8");
  }
}

std::string json_array(std::span<const int64_t> numbers) {
  return nlohmann::json(std::vector<int64_t>(numbers.begin(), numbers.end())).dump();
}

void require_writable(const std::string& name, const Tensor& tensor, const SafetensorsLimits& limits) {
  if (name == "__metadata__")
    throw InvalidArgument("tensor name", name, "another name: this one is reserved");
  if (std::ssize(name) > limits.name_bytes) {
    throw InvalidArgument("tensor name " + quote(name), text_of(name.size(), " bytes"),
                          text_of("at most ", limits.name_bytes));
  }
  if (std::ssize(tensor.shape()) > limits.rank) {
    throw InvalidArgument("tensor " + quote(name), text_of(tensor.shape().size(), " dimensions"),
                          text_of("at most ", limits.rank));
  }
  if (tensor.device() != Device::cpu) {
    throw TypeMismatch("tensor " + quote(name), "memory of a CUDA device", "memory of the CPU");
  }
}

std::string header_of(const std::vector<const std::pair<const std::string, Tensor>*>& order,
                      std::map<std::string, std::string> metadata, const SafetensorsLimits& limits) {
  metadata.emplace("format", "pt");
  if (std::ssize(metadata) > limits.metadata_entries) {
    throw InvalidArgument("metadata", text_of(metadata.size(), " entries"),
                          text_of("at most ", limits.metadata_entries));
  }
  std::string text = "{\"__metadata__\":{";
  for (const auto& [key, value] : metadata) {
    if (text.back() != '{') text += ',';
    text += json_string(key, "metadata key") + ':' + json_string(value, "metadata " + quote(key));
  }
  text += '}';
  int64_t position = 0;
  for (const auto* item : order) {
    const auto& [name, tensor] = *item;
    const int64_t end = checked_add(position, tensor.byte_count());
    const std::array offsets{position, end};
    text += ',' + json_string(name, "tensor name") + ":{\"dtype\":\"";
    text += safetensors_name_of(tensor.dtype());
    text += "\",\"shape\":" + json_array(tensor.shape()) + ",\"data_offsets\":" + json_array(offsets) + '}';
    position = end;
  }
  text += '}';
  const int64_t length = checked_pad(checked_add(std::ssize(text), 8), kDataAlignment) - 8;
  text.resize(static_cast<size_t>(length), ' ');
  if (length > limits.header_bytes) {
    throw InvalidArgument("tensors and metadata", text_of("a header of ", length, " bytes"),
                          text_of("at most ", limits.header_bytes));
  }
  return text;
}

}  // namespace

void write_safetensors(const std::string& path, const std::map<std::string, Tensor>& tensors,
                       const std::map<std::string, std::string>& metadata, FileSystem& files) {
  const SafetensorsLimits limits;
  if (std::ssize(tensors) > limits.tensors) {
    throw InvalidArgument("tensors", text_of(tensors.size(), " of them"),
                          text_of("at most ", limits.tensors));
  }
  std::vector<const std::pair<const std::string, Tensor>*> order;
  order.reserve(tensors.size());
  for (const auto& item : tensors) {
    require_writable(item.first, item.second, limits);
    order.push_back(&item);
  }
  // Stable: names rise within one element size.
  std::stable_sort(order.begin(), order.end(), [](const auto* a, const auto* b) {
    return size_of(a->second.dtype()) > size_of(b->second.dtype());
  });
  const std::string header = header_of(order, metadata, limits);
  const auto length = static_cast<uint64_t>(header.size());

  std::vector<std::span<const std::byte>> chunks;
  chunks.reserve(order.size() + 2);
  chunks.push_back(std::as_bytes(std::span(&length, 1)));
  chunks.push_back(std::as_bytes(std::span(header)));
  for (const auto* item : order) {
    chunks.emplace_back(item->second.bytes(), static_cast<size_t>(item->second.byte_count()));
  }
  replace_file(path, chunks, files);
}

}  // namespace io

void write_safetensors(const std::string& path, const std::map<std::string, Tensor>& tensors,
                       const std::map<std::string, std::string>& metadata) {
  io::FileSystem files;
  io::write_safetensors(path, tensors, metadata, files);
}

void write_file_atomically(const std::string& path, std::span<const std::byte> bytes) {
  io::FileSystem files;
  const std::array chunks{bytes};
  io::replace_file(path, chunks, files);
}

}  // namespace quantloom
