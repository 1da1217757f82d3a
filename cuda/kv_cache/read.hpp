// Keys or values of a cache as numbers.
#pragma once

#include <cuda_runtime_api.h>

#include "kv_cache/kv_view.cuh"

namespace quantloom::kv_cache {

struct KVRead {
  KVView view;
  KVSide side = KVSide::keys;
  int sequence = 0;
  int64_t length = 0;  // of the sequence
  int64_t first = 0;
  int64_t count = 0;
  void* out = nullptr;  // [kv_heads, count, head_dim]
  DType dtype = DType::f16;
};

// The same bits as KVCache::read(), rounded to the dtype.
void launch_read(const KVRead& read, cudaStream_t stream);

}  // namespace quantloom::kv_cache
