// Division by a number that the host knows before a launch: two instructions instead of about twenty.
#pragma once

#include <cuda_runtime.h>

#include <bit>
#include <cstdint>

namespace quantloom::cuda {

// Of numbers 0 <= a < 2^31. With 2^(l - 1) < divisor <= 2^l, the inverse is 2^(31 + l) / divisor, rounded up:
// a times what it is too large by stays below 2^(31 + l), so that quotients are exact.
class Divisor {
 public:
  // divisor: 1 to 2^31 - 1.
  __host__ explicit Divisor(int divisor = 1)
      : divisor_(divisor), shift_(31 + std::bit_width(static_cast<uint32_t>(divisor) - 1)) {
    const auto wide = static_cast<uint64_t>(divisor);
    inverse_ = static_cast<uint32_t>(((uint64_t{1} << shift_) + wide - 1) / wide);
  }
  __host__ __device__ int quotient(int a) const {
    return static_cast<int>(static_cast<uint64_t>(static_cast<uint32_t>(a)) * inverse_ >> shift_);
  }
  __host__ __device__ int remainder(int a) const { return a - quotient(a) * divisor_; }

 private:
  int divisor_;
  int shift_;
  uint32_t inverse_;
};

}  // namespace quantloom::cuda
