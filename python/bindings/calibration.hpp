// A Hessian that threads of Python may share: add() waits for readers and for other calls of add().
#pragma once

#include <memory>
#include <mutex>
#include <shared_mutex>

#include "quantloom/calibration/hessian.hpp"

namespace quantloom::python {

// To be used without the GIL: a thread that waits here must not keep the other from ending.
class SharedHessian {
 public:
  explicit SharedHessian(Hessian hessian) : hessian_(std::move(hessian)) {}

  void add(const FloatMatrix& x, int threads) {
    const std::unique_lock lock(mutex_);
    hessian_.add(x, threads);
  }
  // The value may be read as long as the lock is held.
  std::shared_lock<std::shared_mutex> lock() const { return std::shared_lock(mutex_); }
  const Hessian& value() const { return hessian_; }

 private:
  Hessian hessian_;
  mutable std::shared_mutex mutex_;
};

// Read locks on two Hessians, either of which may be null or the same as the other.
class HessianPair {
 public:
  HessianPair(const SharedHessian* first, const SharedHessian* second)
      : first_(first == nullptr ? nullptr : &first->value()),
        second_(second == nullptr ? nullptr : &second->value()) {
    if (first != nullptr) first_lock_ = first->lock();
    if (second != nullptr && second != first) second_lock_ = second->lock();
  }
  const Hessian* first() const { return first_; }
  const Hessian* second() const { return second_; }

 private:
  std::shared_lock<std::shared_mutex> first_lock_;
  std::shared_lock<std::shared_mutex> second_lock_;
  const Hessian* first_;
  const Hessian* second_;
};

}  // namespace quantloom::python
