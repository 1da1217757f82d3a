#include "quantloom/packed_tensor.hpp"

#include <algorithm>

#include "quantloom/formats/format.hpp"
#include "quantloom/parallel.hpp"

namespace quantloom {
namespace {

constexpr int64_t kDecodeRows = 128;

std::string shape_text(const std::vector<int64_t>& shape) {
  std::string text = "[";
  for (size_t i = 0; i < shape.size(); ++i) text += (i == 0 ? "" : ", ") + std::to_string(shape[i]);
  return text + "]";
}

}  // namespace

const Tensor& PackedTensor::plane(std::string_view name) const {
  const auto found = planes.find(std::string(name));
  if (found == planes.end())
    throw InvalidArgument(text_of("plane ", name), "no such plane", "a plane of the format");
  return found->second;
}

int64_t PackedTensor::size_in_bits() const {
  int64_t bytes = 0;
  for (const auto& [name, plane] : planes) bytes = checked_add(bytes, plane.byte_count());
  return checked_mul(bytes, 8);
}

double PackedTensor::bits_per_weight() const {
  if (n == 0 || k == 0) return 0;
  return static_cast<double>(size_in_bits()) / (static_cast<double>(n) * static_cast<double>(k));
}

void validate(const PackedTensor& packed) {
  if (packed.format == nullptr) throw InvalidArgument("packed tensor", "no format", "a format");
  if (packed.n < 0 || packed.k < 0) {
    throw InvalidArgument("packed tensor shape", shape_text({packed.n, packed.k}), "sizes >= 0");
  }
  const std::vector<PlaneSpec> specs = packed.format->planes(packed.n, packed.k);
  for (const PlaneSpec& spec : specs) {
    const auto found = packed.planes.find(spec.name);
    if (found == packed.planes.end()) {
      if (spec.optional) continue;
      throw InvalidArgument("plane " + spec.name, "no such plane",
                            text_of(name_of(spec.dtype), " ", shape_text(spec.shape)));
    }
    const Tensor& plane = found->second;
    if (plane.dtype() != spec.dtype || plane.shape() != spec.shape) {
      throw InvalidArgument("plane " + spec.name,
                            text_of(name_of(plane.dtype()), " ", shape_text(plane.shape())),
                            text_of(name_of(spec.dtype), " ", shape_text(spec.shape)));
    }
    if (plane.device() != packed.planes.begin()->second.device()) {
      throw InvalidArgument("plane " + spec.name, "another device", "all planes on one device");
    }
  }
  for (const auto& [name, plane] : packed.planes) {
    const bool known = std::any_of(specs.begin(), specs.end(),
                                   [&name = name](const PlaneSpec& s) { return s.name == name; });
    if (!known) {
      throw InvalidArgument("plane " + name, "a plane", "no such plane in " + packed.format->spec());
    }
  }
  if (!packed.planes.empty() && packed.planes.begin()->second.device() == Device::cpu) {
    packed.format->validate_values(packed);
  }
}

void dequantize(const PackedTensor& packed, MatrixView<float> out, int threads) {
  validate(packed);
  if (out.rows() != packed.n || out.cols() != packed.k || out.stride() < out.cols()) {
    throw InvalidArgument("out", shape_text({out.rows(), out.cols()}), shape_text({packed.n, packed.k}));
  }
  if (!packed.planes.empty() && packed.planes.begin()->second.device() != Device::cpu) {
    throw TypeMismatch("packed tensor", "planes on a CUDA device", "planes on the CPU");
  }
  if (packed.k == 0) return;  // of however many rows
  parallel_for(ceil_div(packed.n, kDecodeRows), threads, [&](int64_t slab) {
    const int64_t first = slab * kDecodeRows;
    const int64_t rows = std::min(kDecodeRows, packed.n - first);
    packed.format->decode(packed, first, out.block(first, 0, rows, packed.k));
  });
}

}  // namespace quantloom
