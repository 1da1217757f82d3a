// Hessians on CUDA devices that threads of Python may share.
#pragma once

#include <pybind11/pybind11.h>

#include <array>
#include <cstdint>
#include <functional>
#include <mutex>
#include <set>
#include <vector>

#include "calibration.hpp"
#include "quantloom/calibration/cuda_hessian.hpp"

namespace quantloom::python {

namespace py = pybind11;

inline void* to_stream(uintptr_t stream) {
  return reinterpret_cast<void*>(stream);
}

// A Hessian that threads of Python may share; every use changes it on the device, so they take turns. To be
// locked without the GIL.
class SharedCudaHessian {
 public:
  explicit SharedCudaHessian(CudaHessian hessian) : hessian_(std::move(hessian)) {}

  template <class Body>
  auto use(const Body& body) {
    const py::gil_scoped_release release;
    const std::scoped_lock lock(mutex_);
    return body(hessian_);
  }
  std::mutex& mutex() { return mutex_; }
  const CudaHessian& value() const { return hessian_; }

 private:
  CudaHessian hessian_;
  std::mutex mutex_;
};

// All locked, without the GIL; any may be null or the same as another.
class CudaHessianLocks {
 public:
  CudaHessianLocks(SharedCudaHessian* first, SharedCudaHessian* second, SharedCudaHessian* third = nullptr)
      : hessians_{first, second, third} {
    // In one order, so that two threads never wait for each other.
    std::set<SharedCudaHessian*, std::less<>> all(hessians_.begin(), hessians_.end());
    all.erase(nullptr);
    for (SharedCudaHessian* hessian : all) locks_.emplace_back(hessian->mutex());
  }
  const CudaHessian* first() const { return value(0); }
  const CudaHessian* second() const { return value(1); }
  const CudaHessian* third() const { return value(2); }

 private:
  const CudaHessian* value(size_t i) const {
    return hessians_[i] == nullptr ? nullptr : &hessians_[i]->value();
  }
  std::array<SharedCudaHessian*, 3> hessians_;
  std::vector<std::unique_lock<std::mutex>> locks_;
};

}  // namespace quantloom::python
