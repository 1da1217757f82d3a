#include "quantloom/tensor.hpp"

#include <algorithm>
#include <cstring>
#include <new>

namespace quantloom {
namespace {

constexpr std::align_val_t kAlignment{64};

}  // namespace

Tensor::Tensor(DType dtype, std::vector<int64_t> shape)
    : dtype_(dtype), shape_(std::move(shape)), element_count_(checked_product(shape_)) {
  const int64_t bytes = checked_pad(std::max<int64_t>(checked_mul(element_count_, size_of(dtype)), 1), 64);
  data_ = ::operator new(static_cast<size_t>(bytes), kAlignment);
  owner_ = std::shared_ptr<const void>(
      data_, [](const void* data) { ::operator delete(const_cast<void*>(data), kAlignment); });
  std::memset(data_, 0, static_cast<size_t>(bytes));
}

Tensor::Tensor(DType dtype, std::vector<int64_t> shape, void* data, std::shared_ptr<const void> owner,
               Device device)
    : dtype_(dtype),
      device_(device),
      shape_(std::move(shape)),
      element_count_(checked_product(shape_)),
      data_(data),
      owner_(std::move(owner)) {
  static_cast<void>(checked_mul(element_count_, size_of(dtype)));
  if (data_ == nullptr && element_count_ > 0) {
    throw InvalidArgument("data", "a null pointer", text_of(element_count_, " elements"));
  }
  if (reinterpret_cast<uintptr_t>(data_) % static_cast<uintptr_t>(size_of(dtype)) != 0) {
    throw InvalidArgument("data", text_of("address ", data_),
                          text_of("a multiple of ", size_of(dtype), ", the size of ", name_of(dtype)));
  }
}

void Tensor::require_element_size(size_t size) const {
  if (static_cast<int64_t>(size) != size_of(dtype_)) {
    throw TypeMismatch("tensor elements", text_of(size, " bytes each"),
                       text_of(name_of(dtype_), " of ", size_of(dtype_), " bytes"));
  }
  if (device_ != Device::cpu) throw TypeMismatch("tensor", "memory of a CUDA device", "memory of the CPU");
}

}  // namespace quantloom
