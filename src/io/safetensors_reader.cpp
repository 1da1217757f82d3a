#include <algorithm>
#include <bit>
#include <cstring>

#include "io/file_system.hpp"
#include "io/safetensors_header.hpp"
#include "io/text.hpp"
#include "quantloom/io/safetensors.hpp"

namespace quantloom {
namespace {

static_assert(std::endian::native == std::endian::little, "safetensors data is little-endian");

constexpr size_t kLengthBytes = 8;

[[noreturn]] void fail(const std::string& label, const std::string& message) {
  throw FileFormatError(label + ": " + message);
}

std::string_view header_text(std::span<const std::byte> bytes, const std::string& label,
                             const SafetensorsLimits& limits) {
  if (bytes.size() < kLengthBytes) {
    fail(label, text_of("header length: the file has ", bytes.size(), " bytes, expected at least 8"));
  }
  uint64_t length = 0;
  std::memcpy(&length, bytes.data(), kLengthBytes);
  if (length > static_cast<uint64_t>(std::max<int64_t>(limits.header_bytes, 0))) {
    fail(label, text_of("header length: got ", length, ", the limit is ", limits.header_bytes));
  }
  if (length > bytes.size() - kLengthBytes) {
    fail(label,
         text_of("header length: got ", length, ", but only ", bytes.size() - kLengthBytes, " bytes follow"));
  }
  const std::string_view text(reinterpret_cast<const char*>(bytes.data()) + kLengthBytes, length);
  if (text.empty() || text.front() != '{') fail(label, "header: does not begin with \"{\"");
  return text;
}

// The bytes that the entry's dtype and shape take; fails if they overflow or contradict its offsets.
int64_t checked_size(const std::string& name, const io::HeaderEntry& entry, const std::string& label) {
  const std::string where = "tensor " + io::quote(name);
  if (entry.begin > entry.end) {
    fail(label, text_of(where, ": data_offsets: begin ", entry.begin, " is above end ", entry.end));
  }
  int64_t size = 0;
  try {
    size = checked_mul(checked_product(entry.shape), size_of(entry.dtype));
  } catch (const InvalidArgument&) {
    fail(label, where + ": shape: the size of " + io::shape_text(entry.shape) + " overflows");
  }
  if (size != entry.end - entry.begin) {
    fail(label, text_of(where, ": data_offsets: span ", entry.end - entry.begin, " bytes, but ",
                        name_of(entry.dtype), " ", io::shape_text(entry.shape), " takes ", size));
  }
  return size;
}

// Fails unless the ranges, in the order of the file, follow each other from 0 to `size`.
void require_contiguous(const std::map<std::string, io::HeaderEntry>& tensors, int64_t size,
                        const std::string& label) {
  std::vector<const std::pair<const std::string, io::HeaderEntry>*> order;
  order.reserve(tensors.size());
  for (const auto& tensor : tensors) order.push_back(&tensor);
  std::sort(order.begin(), order.end(), [](const auto* a, const auto* b) {
    return std::pair(a->second.begin, a->second.end) < std::pair(b->second.begin, b->second.end);
  });
  int64_t position = 0;
  for (const auto* tensor : order) {
    const io::HeaderEntry& entry = tensor->second;
    if (entry.begin != position) {
      fail(label, text_of("tensor ", io::quote(tensor->first), ": data_offsets: begin at ", entry.begin,
                          entry.begin < position ? ", an overlap with" : ", a hole after",
                          " the data that ends at ", position));
    }
    if (entry.end > size) {
      fail(label, text_of("tensor ", io::quote(tensor->first), ": data_offsets: end at ", entry.end,
                          ", but the file has ", size, " bytes of data"));
    }
    position = entry.end;
  }
  if (position != size) {
    fail(label, text_of("file size: ", size - position, " bytes follow the last tensor"));
  }
}

}  // namespace

SafetensorsFile SafetensorsFile::open(const std::string& path, const SafetensorsLimits& limits) {
  const io::MappedFile file = io::map_file(path);
  return parse(file.bytes, path, file.owner, limits);
}

SafetensorsFile SafetensorsFile::parse(std::span<const std::byte> bytes, const std::string& label,
                                       std::shared_ptr<const void> owner, const SafetensorsLimits& limits) {
  const std::string_view text = header_text(bytes, label, limits);
  io::SafetensorsHeader header = io::read_safetensors_header(text, label, limits);
  const std::span<const std::byte> data = bytes.subspan(kLengthBytes + text.size());
  for (const auto& [name, entry] : header.tensors) static_cast<void>(checked_size(name, entry, label));
  require_contiguous(header.tensors, std::ssize(data), label);

  SafetensorsFile file;
  file.label_ = label;
  file.owner_ = std::move(owner);
  file.metadata_ = std::move(header.metadata);
  // Entry by entry, so that both tables are never whole at the same time.
  while (!header.tensors.empty()) {
    auto node = header.tensors.extract(header.tensors.begin());
    io::HeaderEntry& entry = node.mapped();
    file.tensors_.emplace_hint(file.tensors_.end(), std::move(node.key()),
                               SafetensorsEntry{entry.dtype, std::move(entry.shape),
                                                data.subspan(static_cast<size_t>(entry.begin),
                                                             static_cast<size_t>(entry.end - entry.begin))});
  }
  return file;
}

std::vector<std::string> SafetensorsFile::names() const {
  std::vector<std::string> names;
  names.reserve(tensors_.size());
  for (const auto& [name, entry] : tensors_) names.push_back(name);
  return names;
}

const SafetensorsEntry& SafetensorsFile::entry(const std::string& name) const {
  const auto found = tensors_.find(name);
  if (found == tensors_.end()) {
    throw InvalidArgument("name", io::quote(name), "a tensor of " + label_);
  }
  return found->second;
}

Tensor SafetensorsFile::tensor(const std::string& name) const {
  const SafetensorsEntry& found = entry(name);
  const std::span<const std::byte> data = found.data;
  if (found.dtype == DType::boolean) {
    const auto bad = std::find_if(data.begin(), data.end(), [](std::byte b) { return b > std::byte{1}; });
    if (bad != data.end()) {
      fail(label_, text_of("tensor ", io::quote(name), ": boolean element ", bad - data.begin(), " is ",
                           std::to_integer<int>(*bad), ", expected 0 or 1"));
    }
  }
  const bool aligned =
      reinterpret_cast<uintptr_t>(data.data()) % static_cast<uintptr_t>(size_of(found.dtype)) == 0;
  if (aligned && owner_ != nullptr) {
    return {found.dtype, found.shape, const_cast<std::byte*>(data.data()), owner_};
  }
  Tensor copy(found.dtype, found.shape);
  if (!data.empty()) std::memcpy(copy.bytes(), data.data(), data.size());
  return copy;
}

}  // namespace quantloom
