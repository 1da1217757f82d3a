// Matrices of every type, on the host and on the device, for the tests of rounding.
#pragma once

#include <cstring>
#include <string>
#include <utility>
#include <vector>

#include "device_memory.hpp"
#include "quantloom/cuda_matrix.hpp"
#include "quantloom/rounding/cuda.hpp"

namespace quantloom {

// The same matrix in both memories, with `padding` elements of NaN after each row.
class TwinMatrix {
 public:
  TwinMatrix(const std::vector<float>& values, int64_t rows, int64_t cols, DType dtype, int64_t padding = 0)
      : rows_(rows), cols_(cols), stride_(cols + padding), dtype_(dtype) {
    const int64_t element = size_of(dtype);
    bytes_.assign(static_cast<size_t>(rows * stride_ * element), std::byte{0xff});
    for (int64_t r = 0; r < rows; ++r) {
      for (int64_t c = 0; c < cols; ++c) set(r, c, values[static_cast<size_t>(r * cols + c)]);
    }
    send();
  }
  // Replaces one value in both memories.
  void replace(int64_t r, int64_t c, float value) {
    set(r, c, value);
    send();
  }
  FloatMatrix host() const { return {bytes_.data(), dtype_, rows_, cols_, stride_}; }
  CudaMatrix device() const { return {memory_.get(), dtype_, rows_, cols_, stride_}; }

 private:
  void set(int64_t r, int64_t c, float value) {
    std::byte* at = bytes_.data() + (r * stride_ + c) * size_of(dtype_);
    if (dtype_ == DType::f32) {
      std::memcpy(at, &value, 4);
    } else {
      const uint16_t bits = dtype_ == DType::f16 ? f16_from_float(value) : bf16_from_float(value);
      std::memcpy(at, &bits, 2);
    }
  }
  void send() {
    const auto count = static_cast<int64_t>(bytes_.size());
    memory_ = device_bytes(count);
    if (count > 0) upload(bytes_.data(), memory_.get(), count);
  }

  int64_t rows_;
  int64_t cols_;
  int64_t stride_;
  DType dtype_;
  std::vector<std::byte> bytes_;
  std::shared_ptr<std::byte> memory_;
};

inline PackedTensor to_host(const PackedTensor& packed) {
  PackedTensor copy{packed.format, packed.n, packed.k, {}};
  for (const auto& [name, plane] : packed.planes) {
    Tensor host(plane.dtype(), plane.shape());
    if (plane.byte_count() > 0) {
      const std::vector<std::byte> bytes = download(plane.bytes(), plane.byte_count());
      std::memcpy(host.bytes(), bytes.data(), bytes.size());
    }
    copy.planes.emplace(name, std::move(host));
  }
  return copy;
}

// Planes on the device, full of poison.
inline PackedTensor poisoned_planes(const std::shared_ptr<const Format>& format, int64_t n, int64_t k,
                                    bool with_group_index = false) {
  PackedTensor packed = empty_packed_cuda(format, n, k, with_group_index);
  for (auto& [name, plane] : packed.planes) {
    if (plane.byte_count() == 0) continue;
    check_cuda(cudaMemset(plane.bytes(), 0xA5, static_cast<size_t>(plane.byte_count())), "poison");
  }
  return packed;
}

// "" if both hold the same planes with the same bytes, else the first difference.
inline std::string difference(const PackedTensor& a, const PackedTensor& b) {
  if (a.planes.size() != b.planes.size())
    return text_of(a.planes.size(), " and ", b.planes.size(), " planes");
  for (const auto& [name, plane] : a.planes) {
    const auto found = b.planes.find(name);
    if (found == b.planes.end()) return "no plane " + name;
    if (plane.shape() != found->second.shape() || plane.dtype() != found->second.dtype()) {
      return "another shape or dtype of plane " + name;
    }
    for (int64_t i = 0; i < plane.byte_count(); ++i) {
      if (plane.bytes()[i] != found->second.bytes()[i]) {
        return text_of("plane ", name, " differs at byte ", i, " of ", plane.byte_count());
      }
    }
  }
  return "";
}

// The text of the error that `body` throws as E; "" if it throws nothing.
template <class E, class Body>
std::string message_of(const Body& body) {
  try {
    body();
  } catch (const E& error) {
    return error.what();
  }
  return "";
}

}  // namespace quantloom
