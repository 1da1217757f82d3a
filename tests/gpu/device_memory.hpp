// Memory of the current CUDA device for tests, and matrices whose planes lie in it.
#pragma once

#include <cuda_runtime_api.h>

#include <cmath>
#include <memory>
#include <string>
#include <vector>

#include "common/check.cuh"
#include "quantloom/formats/bit_packing.hpp"
#include "quantloom/formats/uniform.hpp"
#include "quantloom/packed_tensor.hpp"
#include "quantloom/random.hpp"

namespace quantloom {

inline bool has_cuda_device() {
  int count = 0;
  return cudaGetDeviceCount(&count) == cudaSuccess && count > 0;
}

inline std::shared_ptr<std::byte> device_bytes(int64_t count) {
  void* memory = nullptr;
  check_cuda(cudaMalloc(&memory, static_cast<size_t>(count > 0 ? count : 1)), "cudaMalloc");
  return {static_cast<std::byte*>(memory), [](std::byte* p) { static_cast<void>(cudaFree(p)); }};
}

inline void upload(const void* from, void* to, int64_t bytes) {
  check_cuda(cudaMemcpy(to, from, static_cast<size_t>(bytes), cudaMemcpyHostToDevice), "upload");
}

inline std::vector<std::byte> download(const void* from, int64_t bytes) {
  std::vector<std::byte> host(static_cast<size_t>(bytes));
  check_cuda(cudaMemcpy(host.data(), from, host.size(), cudaMemcpyDeviceToHost), "download");
  return host;
}

inline Tensor to_device(const Tensor& plane) {
  auto memory = device_bytes(plane.byte_count());
  if (plane.byte_count() > 0) upload(plane.bytes(), memory.get(), plane.byte_count());
  return {plane.dtype(), plane.shape(), memory.get(), memory, Device::cuda};
}

inline PackedTensor to_device(const PackedTensor& packed) {
  PackedTensor copy{packed.format, packed.n, packed.k, {}};
  for (const auto& [name, plane] : packed.planes) copy.planes.emplace(name, to_device(plane));
  return copy;
}

// A matrix of random codes, scales of both signs and many magnitudes, and random zero points.
inline PackedTensor random_packed(const Uniform& uniform, int64_t n, int64_t k, uint64_t seed,
                                  bool with_group_index = false) {
  const CounterRandom random(seed);
  uint64_t draw = 0;
  PackedTensor packed{std::make_shared<const Uniform>(uniform), n, k, {}};
  const auto fill_codes = [&](Tensor& plane, int64_t count) {
    if (plane.element_count() == 0) return;
    const int64_t words = plane.shape()[1];
    std::vector<uint8_t> codes(static_cast<size_t>(count));
    for (int64_t row = 0; row < plane.shape()[0]; ++row) {
      for (uint8_t& code : codes) {
        code = static_cast<uint8_t>(random.below(draw++, uint64_t{1} << uniform.bits));
      }
      pack_bits(
          codes, uniform.bits,
          plane.values<uint32_t>().subspan(static_cast<size_t>(row * words), static_cast<size_t>(words)));
    }
  };
  for (const PlaneSpec& spec : uniform.planes(n, k)) {
    if (spec.name == "group_index" && !with_group_index) continue;
    Tensor plane(spec.dtype, spec.shape);
    if (spec.name == "codes") {
      fill_codes(plane, k);
    } else if (spec.name == "zeros") {
      fill_codes(plane, uniform.group_size == Uniform::kPerTensor ? 1 : n);
    } else if (spec.name == "scales") {
      for (int64_t i = 0; i < plane.element_count(); ++i) {
        const auto scale =
            static_cast<float>(random.normal(draw++) * std::exp2(static_cast<double>(i % 30) - 20));
        switch (spec.dtype) {
          case DType::f16:
            plane.values<uint16_t>()[static_cast<size_t>(i)] = f16_from_float(scale);
            break;
          case DType::bf16:
            plane.values<uint16_t>()[static_cast<size_t>(i)] = bf16_from_float(scale);
            break;
          default:
            plane.values<float>()[static_cast<size_t>(i)] = scale;
        }
      }
    } else {
      // Columns dealt to the groups in turn: no group is larger than it may be.
      const int64_t groups = uniform.group_count(k);
      for (int64_t c = 0; c < k; ++c) {
        plane.values<int32_t>()[static_cast<size_t>(c)] = static_cast<int32_t>((k - 1 - c) % groups);
      }
    }
    packed.planes.emplace(spec.name, std::move(plane));
  }
  return packed;
}

}  // namespace quantloom
