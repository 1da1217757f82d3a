// Kernels that write to a cache. Nothing here waits or allocates.
#pragma once

#include <cuda_runtime_api.h>

#include "kv_cache/kv_view.cuh"

namespace quantloom::kv_cache {

// Vectors in somebody else's memory: KVTokens without a shape.
struct KVSource {
  const void* data = nullptr;
  DType dtype = DType::f16;
  int64_t strides[3] = {};  // of sequence, head and token, in elements
};

// Numbers for so many sequences travel with a launch; more of them take more launches.
constexpr int kSequencesPerLaunch = 64;

// The sequences [sequence, sequence + sequences) of a call, and its first token of each.
struct KVSpan {
  int64_t tokens = 0;
  int sequence = 0;
  int sequences = 0;
  bool started = false;  // false: all starts are 0
  int64_t starts[kSequencesPerLaunch] = {};
};

// What kernels found, until the host looks. A key is the least of (sequence * kv_heads + head, token of the
// sequence, side), in 31, 32 and 1 bits.
struct KVFaults {
  uint64_t value;  // of a vector that cannot be stored
  uint64_t room;   // the least sequence that had no room
};
constexpr uint64_t kNoFault = ~uint64_t{0};

struct KVReport {
  KVFaults* faults = nullptr;  // on the device
  uint32_t* raised = nullptr;  // memory of the host that the device writes: not 0 after a fault
};

struct KVAppend {
  KVView view;
  KVSource keys;
  KVSource values;
  KVSpan span;
  const int64_t* room = nullptr;  // [sequences]: the longest that each may become
  uint32_t* arrivals = nullptr;   // [sequences], zero between launches
  KVReport report;
};

// Adds the tokens and their number to the lengths; a sequence without room is left alone, and reported.
void launch_append(const KVAppend& append, cudaStream_t stream);

// How keys or queries are changed before they are used: x H / sqrt(head_dim), or rotary embeddings are taken
// off.
struct KVBasis {
  int order = 1;
  int power = 0;
  const int8_t* base = nullptr;  // [order, order], of Hadamard's matrix; for order 1 null
  float factor = 1;
};

struct KVChange {
  KVView view;
  KVSource from;
  int heads = 0;
  KVSpan span;
  bool turn = false;  // takes off rotary embeddings, of tokens behind view.lengths
  KVBasis basis;
  void* out = nullptr;  // [sequences, heads, tokens, head_dim], contiguous
  DType out_dtype = DType::f16;
  KVReport report;  // of keys that cannot be stored as they come; null: not looked for
};

// By plain loops in the order of the CPU's: the same bits. Tokens before their sequence's start are left out.
void launch_change(const KVChange& change, cudaStream_t stream);

// *key = the least index (sequence, head, token of the call) of a vector that cannot be stored, or as it was.
void launch_look(const KVSource& source, int heads, int head_dim, const KVSpan& span, uint64_t* key,
                 cudaStream_t stream);

}  // namespace quantloom::kv_cache
