// A Hessian that threads of Python may share: add() waits for readers and for other calls of add().
#pragma once

#include <array>
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

// Read locks on Hessians, any of which may be null or the same as another.
class HessianLocks {
 public:
  HessianLocks(const SharedHessian* first, const SharedHessian* second, const SharedHessian* third = nullptr)
      : first_(first == nullptr ? nullptr : &first->value()),
        second_(second == nullptr ? nullptr : &second->value()),
        third_(third == nullptr ? nullptr : &third->value()) {
    if (first != nullptr) locks_[0] = first->lock();
    if (second != nullptr && second != first) locks_[1] = second->lock();
    if (third != nullptr && third != first && third != second) locks_[2] = third->lock();
  }
  const Hessian* first() const { return first_; }
  const Hessian* second() const { return second_; }
  const Hessian* third() const { return third_; }

 private:
  std::array<std::shared_lock<std::shared_mutex>, 3> locks_;
  const Hessian* first_;
  const Hessian* second_;
  const Hessian* third_;
};

}  // namespace quantloom::python
