// Tensor: a typed, contiguous, row-major array with shared ownership; the planes of a PackedTensor.
#pragma once

#include <cstddef>
#include <memory>
#include <span>
#include <vector>

#include "quantloom/checked_math.hpp"
#include "quantloom/dtype.hpp"

namespace quantloom {

enum class Device : uint8_t { cpu, cuda };

class Tensor {
 public:
  Tensor() = default;
  // New memory on the CPU: zeroed, 64-byte aligned.
  Tensor(DType dtype, std::vector<int64_t> shape);
  // Memory owned by `owner` (a file mapping, an array of Python, memory of a GPU); kept alive by it.
  // Throws InvalidArgument if `data` is null or not aligned to the size of an element.
  Tensor(DType dtype, std::vector<int64_t> shape, void* data, std::shared_ptr<const void> owner,
         Device device = Device::cpu);

  DType dtype() const { return dtype_; }
  Device device() const { return device_; }
  const std::vector<int64_t>& shape() const { return shape_; }
  int64_t element_count() const { return element_count_; }
  int64_t byte_count() const { return element_count_ * size_of(dtype_); }  // checked when made
  std::byte* bytes() { return static_cast<std::byte*>(data_); }
  const std::byte* bytes() const { return static_cast<const std::byte*>(data_); }

  // The elements as T, whose size must be the dtype's; throws TypeMismatch otherwise.
  template <class T>
  std::span<T> values() {
    require_element_size(sizeof(T));
    return {reinterpret_cast<T*>(data_), static_cast<size_t>(element_count_)};
  }
  template <class T>
  std::span<const T> values() const {
    require_element_size(sizeof(T));
    return {reinterpret_cast<const T*>(data_), static_cast<size_t>(element_count_)};
  }

 private:
  void require_element_size(size_t size) const;

  DType dtype_ = DType::u8;
  Device device_ = Device::cpu;
  std::vector<int64_t> shape_{0};
  int64_t element_count_ = 0;
  void* data_ = nullptr;
  std::shared_ptr<const void> owner_;
};

}  // namespace quantloom
