// What the Hadamard kernels use of cuda/common/half_pairs.cuh, on the CPU.
#pragma once

#include <type_traits>

#include "emulated_device.hpp"

namespace quantloom::cuda {

template <class T>
struct HalfPair {
  static constexpr uint32_t kOne = std::is_same_v<T, __half> ? 0x3C003C00U : 0x3F803F80U;
  static float to_float(uint16_t bits) {
    return std::is_same_v<T, __half> ? float_from_f16(bits) : float_from_bf16(bits);
  }
};

// By the layout of fragments of mma.m16n8k16 in the PTX manual.
template <class T>
void multiply_accumulate(float (&sum)[4], const uint32_t (&a)[4], uint32_t b0, uint32_t b1) {
  auto* words = emulated::block->words.data() + (threadIdx.x & ~31U);
  const unsigned lane = threadIdx.x & 31U;
  words[lane] = {a[0], a[1], a[2], a[3], b0, b1};
  __syncwarp();
  const auto half = [](uint32_t word, unsigned index) {
    return HalfPair<T>::to_float(static_cast<uint16_t>(word >> (16 * index)));
  };
  for (unsigned i = 0; i < 4; ++i) {
    const unsigned row = lane / 4 + 8 * (i / 2);
    const unsigned col = 2 * (lane % 4) + i % 2;
    double total = sum[i];
    for (unsigned k = 0; k < 16; ++k) {
      const auto& of_a = words[row % 8 * 4 + k % 8 / 2];
      const auto& of_b = words[col * 4 + k % 8 / 2];
      total += static_cast<double>(half(of_a[row / 8 + 2 * (k / 8)], k % 2)) * half(of_b[4 + k / 8], k % 2);
    }
    sum[i] = static_cast<float>(total);
  }
  __syncwarp();
}

}  // namespace quantloom::cuda
