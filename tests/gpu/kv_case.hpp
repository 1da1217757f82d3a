// Keys and values on the device beside the same ones on the host, and caches of both that must agree.
#pragma once

#include <gtest/gtest.h>

#include <cstring>

#include "device_memory.hpp"
#include "kv_cache/kv_tokens.hpp"
#include "quantloom/kv_cache/cuda_kv_cache.hpp"

namespace quantloom {

struct TwinTokens {
  TwinTokens(const KVShape& shape, int64_t tokens, uint64_t seed)
      : host(shape, tokens, seed), memory(device_bytes(host.memory.byte_count())) {
    copy();
  }
  // After a change of the values on the host.
  void copy() {
    if (host.memory.byte_count() > 0) upload(host.memory.bytes(), memory.get(), host.memory.byte_count());
  }
  KVTokens on_host(int64_t first, int64_t count) const { return host.view(first, count); }
  KVTokens on_device(int64_t first, int64_t count) const {
    KVTokens view = host.view(first, count);
    view.data = memory.get() + (static_cast<const std::byte*>(view.data) - host.memory.bytes());
    return view;
  }

  testing::RandomTokens host;
  std::shared_ptr<std::byte> memory;
};

inline CudaKVCache make_cuda_cache(const KVFormat& format, const KVShape& shape, int64_t capacity = 0) {
  return CudaKVCache(format, shape, capacity,
                     format.kind == KVKind::kvquant ? testing::random_tables(format, shape) : nullptr);
}

inline float element(const std::byte* data, DType dtype, size_t i) {
  if (dtype == DType::f32) return reinterpret_cast<const float*>(data)[i];
  const uint16_t bits = reinterpret_cast<const uint16_t*>(data)[i];
  return dtype == DType::f16 ? float_from_f16(bits) : float_from_bf16(bits);
}

// Reads of tokens [first, first + count) are the same, rounded to `dtype`.
inline ::testing::AssertionResult same_reads(const KVCache& cpu, const CudaKVCache& gpu, int64_t s,
                                             KVSide side, int64_t first, int64_t count, DType dtype) {
  const int64_t dim = cpu.shape().head_dim;
  const int64_t heads = cpu.shape().kv_heads;
  const int64_t bytes = heads * count * dim * size_of(dtype);
  const auto memory = device_bytes(bytes);
  gpu.read(side, s, first, count, memory.get(), dtype);
  const std::vector<std::byte> actual = download(memory.get(), bytes);
  std::vector<float> row(static_cast<size_t>(count * dim + 16));
  for (int64_t h = 0; h < heads; ++h) {
    cpu.read(side, s, h, first, count, row.data());
    for (size_t i = 0; i < static_cast<size_t>(count * dim); ++i) {
      float expected = row[i];
      if (dtype == DType::f16) expected = float_from_f16(f16_from_float(expected));
      if (dtype == DType::bf16) expected = float_from_bf16(bf16_from_float(expected));
      const float got = element(actual.data(), dtype, static_cast<size_t>(h * count * dim) + i);
      if (std::bit_cast<uint32_t>(expected) == std::bit_cast<uint32_t>(got)) continue;
      return ::testing::AssertionFailure()
             << (side == KVSide::keys ? "keys" : "values") << " of sequence " << s << ", head " << h
             << ", token " << first + static_cast<int64_t>(i) / dim << ", channel "
             << static_cast<int64_t>(i) % dim << " as " << name_of(dtype) << ": " << got << ", expected "
             << expected;
    }
  }
  return ::testing::AssertionSuccess();
}

inline ::testing::AssertionResult same_records(const KVCache& cpu, const CudaKVCache& gpu, int64_t s) {
  const KVLayout& layout = cpu.layout();
  const int64_t coded = std::max(cpu.coded(KVSide::keys, s), cpu.coded(KVSide::values, s));
  for (int64_t page = 0; page * layout.page_tokens < coded; ++page) {
    for (int64_t h = 0; h < cpu.shape().kv_heads; ++h) {
      const std::vector<std::byte> actual = gpu.record(s, page, h);
      const std::byte* expected = cpu.record(s, page, h);
      for (size_t i = 0; i < actual.size(); ++i) {
        if (actual[i] == expected[i]) continue;
        return ::testing::AssertionFailure()
               << "sequence " << s << ", page " << page << ", head " << h << ", byte " << i << " of "
               << actual.size() << " (parts at " << layout.keys.codes << ", " << layout.keys.parameters
               << ", " << layout.values.codes << ", " << layout.values.parameters
               << "): " << static_cast<int>(actual[i]) << ", expected " << static_cast<int>(expected[i]);
      }
    }
  }
  return ::testing::AssertionSuccess();
}

// Everything that both hold is the same, bit for bit.
inline ::testing::AssertionResult same_caches(const KVCache& cpu, const CudaKVCache& gpu) {
  for (int64_t s = 0; s < cpu.shape().sequences; ++s) {
    if (cpu.length(s) != gpu.length(s)) {
      return ::testing::AssertionFailure()
             << "sequence " << s << " has " << gpu.length(s) << " tokens, expected " << cpu.length(s);
    }
    if (const auto result = same_records(cpu, gpu, s); !result) return result;
    for (const KVSide side : {KVSide::keys, KVSide::values}) {
      if (cpu.coded(side, s) != gpu.coded(side, s)) return ::testing::AssertionFailure() << "coded tokens";
      const auto result = same_reads(cpu, gpu, s, side, 0, cpu.length(s), DType::f32);
      if (!result) return result;
    }
  }
  return ::testing::AssertionSuccess();
}

}  // namespace quantloom
