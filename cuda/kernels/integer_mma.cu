// Products of integers by the instructions of single warps (mma.sync, m16n8k32), for devices without
// warpgroup products: weights in integer order or in register order, as warps hold both alike.
//
// A block of threads multiplies 128 outputs x 64 tokens: blocks of 128 columns arrive by asynchronous copies
// in a ring of stages, each of eight warps multiplies 16 outputs by all tokens. The additions are those of
// the other kernels (integer_product.cuh, integer_registers.cuh), so that results are the same to the bit.
#include <cuda_bf16.h>
#include <cuda_fp16.h>

#include <algorithm>
#include <array>
#include <limits>

#include "common/check.cuh"
#include "common/shared_memory.cuh"
#include "kernels/integer_mma.hpp"
#include "kernels/overlap.cuh"
#include "kernels/register_order.hpp"

namespace quantloom::cuda {
namespace {

constexpr int kThreads = 256;
constexpr int kTokens = 64;
constexpr int kStages = 3;
constexpr int kOutputs = 128;

// Weights in integer order, or (kRecords) in register order.
template <bool kRecords_, bool kNibbles_, int kSteps_, bool kPairs_>
struct MmaWeights {
  static constexpr bool kRecords = kRecords_;
  static constexpr bool kNibbles = kNibbles_;
  static constexpr bool kGrouped = kSteps_ > 0;
  static constexpr int kSteps = kGrouped ? kSteps_ : 1;
  static constexpr bool kPairs = kPairs_;
  static constexpr bool kTokenSums = kPairs && !kNibbles;
  static constexpr int kSlabBytes =
      kRecords ? registers::record_bytes(kNibbles, kSteps_, kPairs) : integers::kSlabBytes;
  static constexpr int kTokenBytes = kTokens * integers::kBlockBytes;
  static constexpr int kWeights = kTokenBytes;  // places in a stage
  static constexpr int kSums = kWeights + 2 * kSlabBytes;
  static constexpr int kStageBytes = kSums + (kTokenSums ? kSteps * kTokens * 4 : 0);
  static constexpr int kAllBytes = kStages * kStageBytes;
  static_assert(kStageBytes % 16 == 0 && kAllBytes >= kTokens * kOutputs * 2);
};

__device__ __forceinline__ void multiply_bytes(int (&sum)[4], const uint32_t (&a)[4], uint32_t b0,
                                               uint32_t b1) {
  asm("mma.sync.aligned.m16n8k32.row.col.s32.s8.s8.s32 {%0,%1,%2,%3}, {%4,%5,%6,%7}, {%8,%9}, {%0,%1,%2,%3};"
      : "+r"(sum[0]), "+r"(sum[1]), "+r"(sum[2]), "+r"(sum[3])
      : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b0), "r"(b1));
}
__device__ __forceinline__ void load_matrices(uint32_t (&words)[4], const unsigned char* row) {
  const auto address = static_cast<uint32_t>(__cvta_generic_to_shared(row));
  asm volatile("ldmatrix.sync.aligned.m8n8.x4.shared.b16 {%0, %1, %2, %3}, [%4];"
               : "=r"(words[0]), "=r"(words[1]), "=r"(words[2]), "=r"(words[3])
               : "r"(address)
               : "memory");
}
// Of each byte: no borrow crosses from one to the next.
__device__ __forceinline__ uint32_t difference(uint32_t codes, uint32_t zeros) {
  return ((codes | 0x80808080U) - zeros) ^ 0x80808080U;
}

template <class W>
class MmaTile {
 public:
  __device__ __forceinline__ MmaTile(const RegisterArguments& p, unsigned char* memory)
      : p_(p),
        memory_(memory),
        row_tile_(static_cast<int64_t>(blockIdx.x) % p.row_tiles),
        token_tile_(static_cast<int64_t>(blockIdx.x) / p.row_tiles),
        warp_(static_cast<int>(threadIdx.x) / 32),
        lane_(static_cast<int>(threadIdx.x) % 32) {}

  __device__ __forceinline__ void run() {
    for (int block = 0; block < kStages - 1; ++block) fetch(block);
#pragma unroll 1
    for (int block = 0; block < p_.blocks; ++block) {
      wait_for_copies_but<kStages - 2>();
      __syncthreads();
      fetch(block + kStages - 1);
      multiply(memory_ + block % kStages * W::kStageBytes);
    }
    wait_for_copies_but<0>();
    __syncthreads();
    finish();
  }

 private:
  // Starts the copies of a block, if there is one.
  __device__ __forceinline__ void fetch(int block) {
    if (block < p_.blocks) {
      unsigned char* const stage = memory_ + block % kStages * W::kStageBytes;
      // Tokens of a tile are a slab.
      const int64_t rows = min(int64_t{kTokens}, p_.m_padded - token_tile_ * kTokens);
      copy(stage, p_.tokens + (token_tile_ * p_.blocks + block) * integers::kSlabBytes,
           static_cast<int>(rows) * integers::kBlockBytes);
#pragma unroll
      for (int slab = 0; slab < 2; ++slab) {
        copy(stage + W::kWeights + slab * W::kSlabBytes,
             p_.weights + ((2 * row_tile_ + slab) * p_.blocks + block) * W::kSlabBytes, W::kSlabBytes);
      }
      if constexpr (W::kTokenSums) {
#pragma unroll
        for (int step = 0; step < W::kSteps; ++step) {
          const float* const from =
              p_.token_sums + (int64_t{block} * W::kSteps + step) * p_.sums_tokens + token_tile_ * kTokens;
          copy(stage + W::kSums + step * kTokens * 4, from, kTokens * 4);
        }
      }
    }
    commit_copies();
  }
  __device__ __forceinline__ void copy(unsigned char* to, const void* from, int bytes) const {
    for (int at = 16 * static_cast<int>(threadIdx.x); at < bytes; at += 16 * kThreads) {
      copy_async(to + at, static_cast<const unsigned char*>(from) + at);
    }
  }

  __device__ __forceinline__ void multiply(const unsigned char* stage) {
    const unsigned char* const slab = stage + W::kWeights + warp_ / 4 * W::kSlabBytes;
    uint2 terms[W::kSteps][2] = {};  // rows g and g + 8
    if constexpr (W::kGrouped) {
#pragma unroll
      for (int i = 0; i < 2 * W::kSteps; ++i) {
        const int row = warp_ % 4 * 16 + lane_ / 4 + 8 * (i % 2);
        const unsigned char* const from = slab + registers::place_of_term(row, i / 2, W::kNibbles, W::kPairs);
        if constexpr (W::kPairs) {
          terms[i / 2][i % 2] = *reinterpret_cast<const uint2*>(from);
        } else {
          terms[i / 2][i % 2].x = *reinterpret_cast<const uint32_t*>(from);
        }
      }
    }
    uint32_t w[4][4];
    load_weights(w, slab, terms);
#pragma unroll
    for (int j = 0; j < kTokens / 8; ++j) {
      // Row r of a token's block has piece i at place i ^ (r % 8).
      const unsigned char* const row = stage + (8 * j + lane_ % 8) * integers::kBlockBytes;
      uint32_t x[2][4];
#pragma unroll
      for (int half = 0; half < 2; ++half) {
        load_matrices(x[half], row + ((4 * half + lane_ / 8) ^ (lane_ % 8)) * 16);
      }
      if constexpr (W::kGrouped) {
#pragma unroll
        for (int run = 0; run < W::kSteps; ++run) {
          int sum[4] = {};
#pragma unroll
          for (int i = 0; i < 4 / W::kSteps; ++i) {
            const int step = run * (4 / W::kSteps) + i;
            multiply_bytes(sum, w[step], x[step / 2][step % 2 * 2], x[step / 2][step % 2 * 2 + 1]);
          }
          add_run(j, sum, terms[run], stage, run);
        }
      } else {
#pragma unroll
        for (int step = 0; step < 4; ++step) {
          multiply_bytes(sums_[j], w[step], x[step / 2][step % 2 * 2], x[step / 2][step % 2 * 2 + 1]);
        }
      }
    }
  }
  __device__ __forceinline__ void add_run(int j, const int (&sum)[4], const uint2 (&terms)[2],
                                          const unsigned char* stage, int run) {
    float2 codes{};
    if constexpr (W::kTokenSums) {
      codes =
          *reinterpret_cast<const float2*>(stage + W::kSums + (run * kTokens + 8 * j + lane_ % 4 * 2) * 4);
    }
#pragma unroll
    for (int i = 0; i < 4; ++i) {
      auto own = static_cast<float>(sum[i]);
      if constexpr (W::kTokenSums) {
        own = __fmaf_rn(__uint_as_float(terms[i / 2].y), i % 2 == 0 ? codes.x : codes.y, own);
      }
      float& to = reinterpret_cast<float&>(sums_[j][i]);
      to = __fmaf_rn(own, __uint_as_float(terms[i / 2].x), to);
    }
  }

  __device__ __forceinline__ void load_weights(uint32_t (&w)[4][4], const unsigned char* slab,
                                               const uint2 (&terms)[W::kSteps][2]) const {
    const int thread = static_cast<int>(threadIdx.x) % registers::kThreads;
    if constexpr (!W::kRecords) {
      // Rows g, rows g + 8, both once more 16 bytes further.
      const int row = warp_ % 4 * 16 + lane_ % 16;
#pragma unroll
      for (int step = 0; step < 4; ++step) {
        const int piece = 2 * step + lane_ / 16;
        load_matrices(w[step], slab + row * integers::kBlockBytes + (piece ^ (row % 8)) * 16);
      }
    } else if constexpr (!W::kNibbles) {
#pragma unroll
      for (int step = 0; step < 4; ++step) {
        *reinterpret_cast<uint4*>(w[step]) =
            *reinterpret_cast<const uint4*>(slab + (step * registers::kThreads + thread) * 16);
      }
    } else {
#pragma unroll
      for (int pair = 0; pair < 2; ++pair) {
        const uint4 four = *reinterpret_cast<const uint4*>(slab + (pair * registers::kThreads + thread) * 16);
        const uint32_t words[4] = {four.x, four.y, four.z, four.w};
#pragma unroll
        for (int i = 0; i < 8; ++i) {
          const int step = 2 * pair + i / 4;
          const uint32_t word = words[i / 2];
          if constexpr (W::kPairs) {
            w[step][i % 4] = difference((i % 2 == 0 ? word : word >> 4) & 0x0F0F0F0FU,
                                        terms[step * W::kSteps / 4][i % 2].y);
          } else {
            w[step][i % 4] = (i % 2 == 0 ? word << 4 : word) & 0xF0F0F0F0U;
          }
        }
      }
    }
  }

  // Scales, rounds, and writes by way of shared memory: [tokens][outputs].
  __device__ __forceinline__ void finish() {
    auto* const results = reinterpret_cast<uint16_t*>(memory_);
    float bias[2];
    RowTerms rows[2];
#pragma unroll
    for (int i = 0; i < 2; ++i) {
      const int64_t row = row_tile_ * kOutputs + warp_ * 16 + lane_ / 4 + 8 * i;
      rows[i] = p_.rows[row];
      bias[i] = p_.bias != nullptr && row < p_.n ? load_half(row) : 0.0F;
    }
#pragma unroll
    for (int j = 0; j < kTokens / 8; ++j) {
#pragma unroll
      for (int c = 0; c < 2; ++c) {
        const int token = 8 * j + lane_ % 4 * 2 + c;
        const int64_t absolute = token_tile_ * kTokens + token;
        const integers::TokenTerms terms =
            absolute < p_.m ? p_.terms[absolute] : integers::TokenTerms{0.0F, 0, 0, 0};
#pragma unroll
        for (int i = 0; i < 2; ++i) {
          const int at = token * kOutputs + warp_ * 16 + lane_ / 4 + 8 * i;
          results[at] = round_half(scaled(sums_[j][2 * i + c], rows[i], terms, bias[i]));
        }
      }
    }
    __syncthreads();
    const auto tokens = static_cast<int>(min(int64_t{kTokens}, p_.m - token_tile_ * kTokens));
    const auto outputs = static_cast<int>(min(int64_t{kOutputs}, p_.n - row_tile_ * kOutputs));
    auto* const y = static_cast<uint16_t*>(p_.y) + token_tile_ * kTokens * p_.y_stride + row_tile_ * kOutputs;
    for (int i = static_cast<int>(threadIdx.x); i < tokens * (kOutputs / 8); i += kThreads) {
      const int token = i / (kOutputs / 8);
      const int output = i % (kOutputs / 8) * 8;
      uint16_t* const to = y + token * p_.y_stride + output;
      const uint16_t* const from = results + token * kOutputs + output;
      if (p_.y_in_pieces && output + 8 <= outputs) {
        *reinterpret_cast<uint4*>(to) = *reinterpret_cast<const uint4*>(from);
      } else {
        for (int c = 0; c < min(8, outputs - output); ++c) to[c] = from[c];
      }
    }
  }
  __device__ __forceinline__ float scaled(int sum, const RowTerms& row, const integers::TokenTerms& token,
                                          float bias) const {
    if constexpr (W::kGrouped) {
      float value = __int_as_float(sum);
      if (p_.has_zeros) value = __fmaf_rn(-static_cast<float>(token.zero), __int_as_float(row.sum), value);
      return __fadd_rn(__fmul_rn(value, token.scale), bias);
    } else {
      if constexpr (W::kNibbles) sum >>= 4;
      if (p_.has_zeros) sum -= token.zero * row.sum + row.zero * token.sum;
      return __fmaf_rn(__fmul_rn(static_cast<float>(sum), row.scale), token.scale, bias);
    }
  }
  __device__ __forceinline__ float load_half(int64_t i) const {
    return p_.bfloat16 ? __bfloat162float(static_cast<const __nv_bfloat16*>(p_.bias)[i])
                       : __half2float(static_cast<const __half*>(p_.bias)[i]);
  }
  __device__ __forceinline__ uint16_t round_half(float value) const {
    return p_.bfloat16 ? __bfloat16_as_ushort(__float2bfloat16_rn(value))
                       : __half_as_ushort(__float2half_rn(value));
  }

  const RegisterArguments& p_;
  unsigned char* memory_;
  int64_t row_tile_;
  int64_t token_tile_;
  int warp_;
  int lane_;
  int sums_[kTokens / 8][4] = {};  // with groups the bits of float32
};

template <class W>
__global__ void __launch_bounds__(kThreads)
    multiply_integer_mma(const __grid_constant__ RegisterArguments p) {
  let_next_begin();
  wait_for_previous();
  MmaTile<W>(p, dynamic_shared_memory<unsigned char>()).run();
}

template <class W>
void launch(const RegisterArguments& p, bool overlap, cudaStream_t stream) {
  auto* const kernel = multiply_integer_mma<W>;
  check_cuda(cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, W::kAllBytes),
             "matmul_integers_cuda: shared memory of multiply_integer_mma");
  const int64_t blocks = checked_mul(p.row_tiles, p.token_tiles);
  if (blocks > std::numeric_limits<int32_t>::max()) {
    throw Unsupported(text_of("matmul_integers_cuda: no kernel for ", p.m, " tokens"));
  }
  LaunchSettings settings(dim3(static_cast<unsigned>(blocks)), dim3(kThreads), stream, overlap, 1);
  settings.config.dynamicSmemBytes = W::kAllBytes;
  check_cuda(cudaLaunchKernelEx(&settings.config, kernel, p),
             "matmul_integers_cuda: launch of multiply_integer_mma");
}

using Launch = void (*)(const RegisterArguments& p, bool overlap, cudaStream_t stream);

template <bool kNibbles, bool kPairs>
Launch launch_of_groups(int steps) {
  return steps == 1   ? launch<MmaWeights<true, kNibbles, 1, kPairs>>
         : steps == 2 ? launch<MmaWeights<true, kNibbles, 2, kPairs>>
                      : launch<MmaWeights<true, kNibbles, 4, kPairs>>;
}

Launch launch_of(const IntegerLayout& layout) {
  if (!layout.in_registers) return launch<MmaWeights<false, false, 0, false>>;
  if (!layout.grouped()) return launch<MmaWeights<true, true, 0, false>>;
  if (layout.nibbles()) {
    return layout.pairs() ? launch_of_groups<true, true>(layout.steps())
                          : launch_of_groups<true, false>(layout.steps());
  }
  return layout.pairs() ? launch_of_groups<false, true>(layout.steps())
                        : launch_of_groups<false, false>(layout.steps());
}

}  // namespace

void multiply_by_mma(const IntegerLayout& layout, const IntegerArguments& arguments, float* sums,
                     const DeviceFacts& device, cudaStream_t stream) {
  const bool overlap = device.architecture >= 90;
  RegisterArguments p{arguments};
  p.row_tiles = static_cast<int>(ceil_div(layout.n, int64_t{kOutputs}));
  p.token_tiles = static_cast<int>(ceil_div(p.m, int64_t{kTokens}));
  add_token_sums(layout, p, sums, overlap, stream);
  launch_of(layout)(p, overlap, stream);
}

}  // namespace quantloom::cuda
