// Matrices of activations for the tests of their rounding on a device.
#pragma once

#include <cmath>
#include <cstring>
#include <limits>
#include <vector>

#include "device_memory.hpp"
#include "quantloom/cuda_matrix.hpp"
#include "quantloom/matrix_view.hpp"

namespace quantloom {

// [m, k] in a dtype, on the host and on the device, rows `stride` apart, the first one `offset` in. What lies
// between them is NaN.
struct ActivationValues {
  DType dtype = DType::f32;
  int64_t m = 0;
  int64_t k = 0;
  int64_t stride = 0;
  int64_t offset = 0;
  std::vector<std::byte> host;
  std::shared_ptr<std::byte> device;

  FloatMatrix on_host() const { return {host.data() + offset * size_of(dtype), dtype, m, k, stride}; }
  CudaMatrix on_device() const { return {device.get() + offset * size_of(dtype), dtype, m, k, stride}; }
  void put(int64_t token, int64_t input, float value) {
    write(offset + token * stride + input, value);
    upload(host.data(), device.get(), static_cast<int64_t>(host.size()));
  }
  void write(int64_t at, float value) {
    if (dtype == DType::f32) {
      std::memcpy(host.data() + 4 * at, &value, 4);
    } else {
      const uint16_t half = dtype == DType::f16 ? f16_from_float(value) : bf16_from_float(value);
      std::memcpy(host.data() + 2 * at, &half, 2);
    }
  }
};

// Normal values: tokens of different sizes, an outlier input, tokens of zeros, of tiny values, without
// negative ones, and one with ties in plenty.
inline ActivationValues activation_values(int64_t m, int64_t k, DType dtype, uint64_t seed,
                                          int64_t padding = 0, int64_t offset = 0) {
  ActivationValues x{dtype, m, k, k + padding, offset, {}, {}};
  const int64_t count = offset + m * x.stride;
  x.host.resize(static_cast<size_t>(count * size_of(dtype)));
  for (int64_t at = 0; at < count; ++at) x.write(at, std::numeric_limits<float>::quiet_NaN());
  const CounterRandom random(seed);
  for (int64_t t = 0; t < m; ++t) {
    for (int64_t j = 0; j < k; ++j) {
      auto value = static_cast<float>(random.normal(static_cast<uint64_t>(t * k + j)));
      value *= std::ldexp(1.0F, static_cast<int>(t % 5) - 2);
      if (j == k / 3) value *= 60;
      if (t % 11 == 3) value = 0;
      if (t % 11 == 4) value = std::abs(value);
      if (t % 11 == 5) value = -std::abs(value);
      if (t % 11 == 6) value = j == 0 ? 127.0F : static_cast<float>(j % 509 - 254) * 0.5F;
      if (t % 11 == 7) value = std::ldexp(value, dtype == DType::f16 ? -22 : -130);
      x.write(offset + t * x.stride + j, value);
    }
  }
  x.device = device_bytes(static_cast<int64_t>(x.host.size()));
  if (count > 0) upload(x.host.data(), x.device.get(), static_cast<int64_t>(x.host.size()));
  return x;
}

}  // namespace quantloom
