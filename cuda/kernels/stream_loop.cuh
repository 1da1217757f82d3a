// The product loop for few tokens: each code passes once from memory to the tensor cores.
//
// A warp owns 64 rows and a run of columns. It copies codes in fragment order, activations and parameters
// into a ring of its own in shared memory, several blocks ahead; its lanes decode the codes and multiply on
// the tensor cores, 8 or 16 tokens at a time. Scales are applied to the float32 sums, once per group. The
// warps of a block of threads split its columns; the blocks of a cluster split the rest. All parts are added
// in a fixed order.
#pragma once

#include <cooperative_groups.h>

#include <algorithm>

#include "common/check.cuh"
#include "common/half_pairs.cuh"
#include "formats/fragment_order.hpp"
#include "kernels/overlap.cuh"
#include "kernels/products.cuh"

namespace quantloom::cuda {

constexpr int kMostStreamThreads = 512;

// Copies 16 bytes to shared memory in the background, past the first-level cache.
__device__ __forceinline__ void copy_piece(void* to, const void* from) {
  const auto address = static_cast<uint32_t>(__cvta_generic_to_shared(to));
  asm volatile("cp.async.cg.shared.global [%0], [%1], 16;" ::"r"(address), "l"(from) : "memory");
}
__device__ __forceinline__ void close_copies() {
  asm volatile("cp.async.commit_group;" ::: "memory");
}
// Until all but the last kPending groups of this thread's copies are there.
template <int kPending>
__device__ __forceinline__ void wait_for_copies() {
  asm volatile("cp.async.wait_group %0;" ::"n"(kPending) : "memory");
}

// One block of activations for a warp, by single elements: rows that are not aligned, columns that change
// places, and the end of a row.
template <class T>
__device__ __noinline__ void gather_activations(const ProductArguments& p, int block, unsigned char* to) {
  const int lane = static_cast<int>(threadIdx.x) % 32;
  for (int token = 0; token < p.m; ++token) {
    const T* row = static_cast<const T*>(p.x) + token * p.x_stride;
    for (int i = lane; i < fragments::kBlockColumns; i += 32) {
      int64_t from = static_cast<int64_t>(block) * fragments::kBlockColumns + i;
      if (p.w.source != nullptr) from = __ldg(p.w.source + from);
      const bool inside = from >= 0 && from < p.w.k;
      const int chunk = i / 8 ^ (token & 3) << 1;
      reinterpret_cast<T*>(to + token * 128 + chunk * 16)[i % 8] =
          inside ? row[from] : HalfPair<T>::from_float(0.0F);
    }
  }
}

// What a warp copies ahead of its use, for each block of columns.
template <int kBits, int kTiles>
struct StreamStage {
  static constexpr int kCodes = kBits * 512;
  // [8 * kTiles tokens][8 chunks of 8 columns]; chunk c of token t lies at place c ^ (2 * (t % 4)), so that
  // no two lanes that read at the same time meet in a bank.
  static constexpr int kActivations = kTiles * 1024;
  static constexpr int kScales = 256;               // of one group: 64 of up to 4 bytes
  static constexpr int kParameters = kScales + 64;  // and zero points
  // Groups that end in one block: one, or up to four where they are finer than a block.
  static __host__ __device__ constexpr int bytes(bool fine) {
    return kCodes + kActivations + (fine ? 4 : 1) * kParameters;
  }
};

// The part of a product that one warp adds up: 64 rows, 8 * kTiles tokens, columns of blocks [begin, end).
// kZeros: the grid has zero points.
template <class Decoder, class T, int kTiles, int kStages, bool kZeros>
class WarpProduct {
 public:
  static constexpr int kBits = Decoder::kBits;
  static constexpr bool kHasOffset = Decoder::template kHasOffset<T>;
  using Stage = StreamStage<kBits, kTiles>;

  // `ring`: kStages stages of the warp's own.
  __device__ __forceinline__ WarpProduct(const ProductArguments& p, const Decoder& decoder,
                                         unsigned char* ring, int row_block, int begin, int end)
      : p_(p),
        decoder_(decoder),
        ring_(ring),
        fine_(p.w.group_steps % 4 != 0),
        stage_bytes_(Stage::bytes(fine_)),
        lane_(static_cast<int>(threadIdx.x) % 32),
        begin_(begin),
        end_(end) {
    codes_ = p.w.codes + (static_cast<int64_t>(row_block) * p.w.column_blocks + begin) * (kBits * 32) + lane_;
    parameters_ = static_cast<int64_t>(row_block) * p.w.group_count * 64;
    x_ = static_cast<const T*>(p.x) + lane_ / 8 * p.x_stride + lane_ % 8 * 8;
    chunk_place_ = lane_ / 8 * 128 + (lane_ % 8 ^ lane_ / 8 << 1) * 16;
    whole_blocks_ = whole_blocks();
    // Groups are counted in steps where they are finer than a block, else in blocks.
    unit_ = fine_ ? p.w.group_steps : p.w.group_steps / 4;
    const auto first = static_cast<unsigned>(fine_ ? 4 * begin : begin);
    copy_group_ = static_cast<int>(first / static_cast<unsigned>(unit_));
    copy_left_ = (copy_group_ + 1) * unit_ - static_cast<int>(first);
    left_ = copy_left_;
#pragma unroll 1
    for (int s = 0; s < kStages; ++s) {
      if (begin + s < end) copy_weights(s, begin + s);
      close_copies();
    }
  }

  // After the previous kernel's results can be read.
  __device__ __forceinline__ void run() {
    load_first_activations();
    if (fine_) {
      run_blocks<true>();
    } else {
      run_blocks<false>();
    }
  }

  // Sum of row lane / 4 + 8 * i and token 8 * tile + 2 * (lane % 4) + c.
  __device__ __forceinline__ float sum(int tile, int i, int c) const {
    return total_[tile][i / 2][i % 2 * 2 + c];
  }

 private:
  __device__ __forceinline__ unsigned char* stage(int s) const {
    return ring_ + s * stage_bytes_;
  }
  __device__ __forceinline__ unsigned char* activations(int s) const {
    return stage(s) + Stage::kCodes;
  }
  __device__ __forceinline__ unsigned char* parameters(int s) const {
    return stage(s) + Stage::kCodes + Stage::kActivations;
  }

  // Codes and the parameters of groups that end in block `block`; blocks come in order.
  __device__ __forceinline__ void copy_weights(int s, int block) {
    unsigned char* to = stage(s) + lane_ * 16;
#pragma unroll
    for (int i = 0; i < kBits; ++i) copy_piece(to + i * 512, codes_ + i * 32);
    codes_ += kBits * 32;
    if (!fine_) {
      if (--copy_left_ == 0 || block == end_ - 1) copy_parameters(parameters(s));
      return;
    }
    for (int step = 0; step < 4; ++step) {
      if (--copy_left_ == 0 || (step == 3 && block == end_ - 1)) {
        copy_parameters(parameters(s) + step * Stage::kParameters);
      }
    }
  }

  __device__ __forceinline__ void copy_parameters(unsigned char* to) {
    // Columns past the last group are padding: activations are 0 there.
    const int64_t at = parameters_ + static_cast<int64_t>(min(copy_group_, p_.w.group_count - 1)) * 64;
    const int size = p_.w.scale_dtype == DType::f32 ? 4 : 2;
    if (lane_ < 4 * size) {
      copy_piece(to + lane_ * 16, static_cast<const unsigned char*>(p_.w.scales) + at * size + lane_ * 16);
    } else if (lane_ >= 16 && lane_ < 20 && kZeros) {
      copy_piece(to + Stage::kScales + (lane_ - 16) * 16, p_.w.zeros + at + (lane_ - 16) * 16);
    }
    ++copy_group_;
    copy_left_ = unit_;
  }

  // Blocks of activations before this one can be copied in pieces of 16 bytes.
  __device__ __forceinline__ int whole_blocks() const {
    return p_.x_in_pieces ? static_cast<int>(p_.w.k / fragments::kBlockColumns) : 0;
  }

  // Lane's chunk `i` of a block: of token 4 * i + lane / 8.
  __device__ __forceinline__ const T* chunk_source(int block, int i) const {
    return x_ + static_cast<int64_t>(4 * i) * p_.x_stride +
           static_cast<int64_t>(block) * fragments::kBlockColumns;
  }
  __device__ __forceinline__ unsigned char* chunk_place(int s, int i) const {
    return activations(s) + i * 512 + chunk_place_;
  }
  __device__ __forceinline__ bool has_token(int i) const {
    return 4 * i + lane_ / 8 < p_.m;
  }

  __device__ __forceinline__ void copy_activations(int s, int block) {
    if (block >= whole_blocks_) {
      gather_activations<T>(p_, block, activations(s));
      return;
    }
#pragma unroll
    for (int i = 0; i < 2 * kTiles; ++i) {
      if (4 * i >= p_.m) break;
      if (has_token(i)) copy_piece(chunk_place(s, i), chunk_source(block, i));
    }
  }

  // Not in the background, so that they do not queue behind the codes that are on their way already.
  __device__ __forceinline__ void load_first_activations() {
    uint4 values[kStages][2 * kTiles];
    const int whole = min(end_, whole_blocks_);
#pragma unroll
    for (int s = 0; s < kStages; ++s) {
#pragma unroll
      for (int i = 0; i < 2 * kTiles; ++i) {
        const bool wanted = begin_ + s < whole && has_token(i);
        const T* from = wanted ? chunk_source(begin_ + s, i) : static_cast<const T*>(p_.x);
        values[s][i] = make_uint4(0, 0, 0, 0);
        if (wanted) values[s][i] = __ldg(reinterpret_cast<const uint4*>(from));
      }
    }
#pragma unroll
    for (int s = 0; s < kStages; ++s) {
#pragma unroll
      for (int i = 0; i < 2 * kTiles; ++i) *reinterpret_cast<uint4*>(chunk_place(s, i)) = values[s][i];
    }
    __syncwarp();
    for (int s = 0; s < kStages && begin_ + s < end_; ++s) {
      if (begin_ + s >= whole_blocks_) gather_activations<T>(p_, begin_ + s, activations(s));
    }
  }

  template <bool kFine>
  __device__ __forceinline__ void run_blocks() {
    int s = 0;
    for (int block = begin_; block < end_; ++block) {
      wait_for_copies<kStages - 1>();
      __syncwarp();
      multiply<kFine>(s, block == end_ - 1);
      __syncwarp();
      if (block + kStages < end_) {
        copy_weights(s, block + kStages);
        copy_activations(s, block + kStages);
      }
      close_copies();
      s = s + 1 == kStages ? 0 : s + 1;
    }
  }

  template <bool kFine>
  __device__ __forceinline__ void multiply(int s, bool last) {
    uint4 codes[kBits];
    const unsigned char* from = stage(s) + lane_ * 16;
#pragma unroll
    for (int i = 0; i < kBits; ++i) codes[i] = *reinterpret_cast<const uint4*>(from + i * 512);
    multiply_step<kFine, 0>(s, codes, false);
    multiply_step<kFine, 1>(s, codes, false);
    multiply_step<kFine, 2>(s, codes, false);
    multiply_step<kFine, 3>(s, codes, last);
    if constexpr (!kFine) {
      if (--left_ == 0 || last) flush(parameters(s));
    }
  }

  template <bool kFine, int kStep>
  __device__ __forceinline__ void multiply_step(int s, const uint4 (&codes)[kBits], bool last) {
    uint2 b[kTiles];
    const int token = lane_ / 4;
    const unsigned char* from = activations(s) + token * 128 + lane_ % 4 * 8 + (kStep ^ (token & 3)) * 32;
#pragma unroll
    for (int tile = 0; tile < kTiles; ++tile) b[tile] = *reinterpret_cast<const uint2*>(from + tile * 1024);
#pragma unroll
    for (int unit = 0; unit < fragments::kUnits; ++unit) {
      uint32_t words[kBits];
#pragma unroll
      for (int i = 0; i < kBits; ++i) {
        const int at = unit * kBits + i;
        const uint4& piece = codes[at / 4];
        words[i] = at % 4 == 0 ? piece.x : at % 4 == 1 ? piece.y : at % 4 == 2 ? piece.z : piece.w;
      }
      uint32_t a[4];
      decoder_.template raw_fragment<T, kStep>(words, a);
#pragma unroll
      for (int tile = 0; tile < kTiles; ++tile) {
        multiply_accumulate<T>(sum_[tile][unit], a, b[tile].x, b[tile].y);
      }
    }
    // On grids with zero points the codes themselves are summed, else the codes less the center.
    if constexpr (kHasOffset) {
      uint32_t a[4];
      decoder_.template raw_offset<T, kStep>(kZeros ? 0.0F : Decoder::kCenter, a);
#pragma unroll
      for (int tile = 0; tile < kTiles; ++tile) {
        multiply_accumulate<T>(offset_sum_[tile], a, b[tile].x, b[tile].y);
      }
    }
    if constexpr (kZeros) {
      const uint32_t ones[4] = {HalfPair<T>::kOne, HalfPair<T>::kOne, HalfPair<T>::kOne, HalfPair<T>::kOne};
#pragma unroll
      for (int tile = 0; tile < kTiles; ++tile) {
        multiply_accumulate<T>(x_sum_[tile], ones, b[tile].x, b[tile].y);
      }
    }
    if constexpr (kFine) {
      if (--left_ == 0 || last) flush(parameters(s) + kStep * Stage::kParameters);
    }
  }

  // Adds the group's sums, scaled, to the totals.
  __device__ __forceinline__ void flush(const unsigned char* parameters) {
    left_ = unit_;
    float scales[8];
    load_scales(parameters, scales);
#pragma unroll
    for (int i = 0; i < 8; ++i) {
      const float unit_scale = scales[i] * Decoder::kUnit;
#pragma unroll
      for (int tile = 0; tile < kTiles; ++tile) {
#pragma unroll
        for (int c = 0; c < 2; ++c) {
          float& sum = sum_[tile][i / 2][i % 2 * 2 + c];
          float& total = total_[tile][i / 2][i % 2 * 2 + c];
          if constexpr (kHasOffset) sum -= offset_sum_[tile][i % 2 * 2 + c];
          total = fmaf(unit_scale, sum, total);
          sum = 0.0F;
        }
      }
    }
    if constexpr (kHasOffset) clear(offset_sum_);
    if constexpr (kZeros) {
      const uint2 zeros = *reinterpret_cast<const uint2*>(parameters + Stage::kScales + lane_ / 4 * 8);
#pragma unroll
      for (int i = 0; i < 8; ++i) {
        const uint32_t zero = ((i < 4 ? zeros.x : zeros.y) >> (i % 4 * 8)) & 0xFFU;
        const float offset = scales[i] * ((kHasOffset ? 0.0F : Decoder::kCenter) - static_cast<float>(zero));
#pragma unroll
        for (int tile = 0; tile < kTiles; ++tile) {
#pragma unroll
          for (int c = 0; c < 2; ++c) {
            float& total = total_[tile][i / 2][i % 2 * 2 + c];
            total = fmaf(offset, x_sum_[tile][c], total);
          }
        }
      }
      clear(x_sum_);
    }
  }

  static __device__ __forceinline__ void clear(float (&sums)[kTiles][4]) {
#pragma unroll
    for (int tile = 0; tile < kTiles; ++tile) {
#pragma unroll
      for (int c = 0; c < 4; ++c) sums[tile][c] = 0.0F;
    }
  }

  // The scales of the lane's eight rows, lane / 4 + 8 * i.
  __device__ __forceinline__ void load_scales(const unsigned char* parameters, float (&scales)[8]) const {
    if (p_.w.scale_dtype == DType::f32) {
      const auto* from = reinterpret_cast<const float4*>(parameters) + lane_ / 4 * 2;
      const float4 low = from[0];
      const float4 high = from[1];
      scales[0] = low.x;
      scales[1] = low.y;
      scales[2] = low.z;
      scales[3] = low.w;
      scales[4] = high.x;
      scales[5] = high.y;
      scales[6] = high.z;
      scales[7] = high.w;
      return;
    }
    const uint4 raw = reinterpret_cast<const uint4*>(parameters)[lane_ / 4];
    const uint32_t words[4] = {raw.x, raw.y, raw.z, raw.w};
    const bool brain = p_.w.scale_dtype == DType::bf16;
#pragma unroll
    for (int i = 0; i < 4; ++i) {
      const float2 pair = __half22float2(*reinterpret_cast<const __half2*>(&words[i]));
      scales[2 * i] = brain ? __uint_as_float(words[i] << 16) : pair.x;
      scales[2 * i + 1] = brain ? __uint_as_float(words[i] & 0xFFFF0000U) : pair.y;
    }
  }

  const ProductArguments& p_;
  const Decoder& decoder_;
  unsigned char* ring_;
  bool fine_;
  int stage_bytes_;
  const uint4* codes_;
  const T* x_;
  int64_t parameters_;
  int lane_;
  int chunk_place_;
  int whole_blocks_;
  int begin_;
  int end_;
  int unit_;
  int copy_group_;
  int copy_left_;
  int left_;
  float sum_[kTiles][fragments::kUnits][4] = {};
  float total_[kTiles][fragments::kUnits][4] = {};
  float offset_sum_[kTiles][4] = {};  // what the products hold beyond those of the codes
  float x_sum_[kTiles][4] = {};
};

// How the blocks of columns are dealt out to warps.
struct StreamRun {
  int splits = 1;
  int blocks = 0;  // to each warp
  int extra = 0;   // warps that take one more
};

// Grid: [splits, rows, ...] blocks, of which those past p.w.row_blocks do nothing; the splits of a row block
// are one cluster, unless p.partial is given.
template <class Decoder, class T, int kTiles, int kStages, bool kZeros>
__global__ void __launch_bounds__(kMostStreamThreads, 1)
    multiply_stream(const __grid_constant__ ProductArguments p, StreamRun run) {
  const int splits = run.splits;
  constexpr int kRows = fragments::kBlockRows;
  using Product = WarpProduct<Decoder, T, kTiles, kStages, kZeros>;
  // The decoder's table, then the rings; the sums of the warps take the place of the rings in the end.
  extern __shared__ __align__(128) unsigned char memory[];
  auto* const parts = reinterpret_cast<float(*)[8 * kTiles][kRows]>(memory + Decoder::kSharedBytes);
  const int warp = static_cast<int>(threadIdx.x) / 32;
  const int lane = static_cast<int>(threadIdx.x) % 32;
  const int ring_bytes = kStages * Product::Stage::bytes(p.w.group_steps % 4 != 0);
  unsigned char* const ring = memory + Decoder::kSharedBytes + warp * ring_bytes;
  const int row_block = static_cast<int>(blockIdx.z * gridDim.y + blockIdx.y);
  const int split = static_cast<int>(blockIdx.x);
  if (row_block >= p.w.row_blocks) return;
  const int warps = static_cast<int>(blockDim.x) / 32;
  // The first `extra` warps of all splits take a block of columns more than the others.
  const int place = split * warps + warp;
  const int begin = place * run.blocks + min(place, run.extra);
  const int end = begin + run.blocks + (place < run.extra ? 1 : 0);

  let_next_begin();
  Decoder decoder;
  Product product(p, decoder, ring, row_block, begin, end);
  decoder.template prepare<T>(p.w.table, p.w.table_entries, memory);
  if constexpr (Decoder::kSharedBytes > 0) __syncthreads();
  wait_for_previous();
  product.run();

  __syncthreads();
#pragma unroll
  for (int tile = 0; tile < kTiles; ++tile) {
#pragma unroll
    for (int i = 0; i < 8; ++i) {
#pragma unroll
      for (int c = 0; c < 2; ++c) {
        const int token = 8 * tile + lane % 4 * 2 + c;
        if (token < p.m) parts[warp][token][lane / 4 + 8 * i] = product.sum(tile, i, c);
      }
    }
  }
  __syncthreads();

  const int count = p.m * kRows;
  const auto sum_of_warps = [&](int i) {
    float sum = 0.0F;
    for (int w = 0; w < warps; ++w) sum += parts[w][i / kRows][i % kRows];
    return sum;
  };
  const auto store = [&](int i, float sum) {
    const int64_t row = static_cast<int64_t>(row_block) * kRows + i % kRows;
    if (row >= p.w.n) return;
    if (p.bias != nullptr) sum += HalfPair<T>::to_float(static_cast<const T*>(p.bias)[row]);
    static_cast<T*>(p.y)[i / kRows * p.y_stride + row] = HalfPair<T>::from_float(sum);
  };
  if (p.partial != nullptr) {
    float* partial = p.partial + static_cast<int64_t>(split) * p.m * p.w.row_blocks * kRows;
    for (int i = static_cast<int>(threadIdx.x); i < count; i += static_cast<int>(blockDim.x)) {
      const int64_t row = static_cast<int64_t>(row_block) * kRows + i % kRows;
      partial[static_cast<int64_t>(i / kRows) * p.w.row_blocks * kRows + row] = sum_of_warps(i);
    }
  } else if (splits == 1) {
    for (int i = static_cast<int>(threadIdx.x); i < count; i += static_cast<int>(blockDim.x))
      store(i, sum_of_warps(i));
  } else {
#if __CUDA_ARCH__ >= 900
    // Each block adds its warps' parts, then takes its share of the results, adding the blocks' parts.
    namespace cg = cooperative_groups;
    const auto cluster = cg::this_cluster();
    for (int i = static_cast<int>(threadIdx.x); i < count; i += static_cast<int>(blockDim.x)) {
      parts[0][i / kRows][i % kRows] = sum_of_warps(i);
    }
    cluster.sync();
    for (int i = split * static_cast<int>(blockDim.x) + static_cast<int>(threadIdx.x); i < count;
         i += splits * static_cast<int>(blockDim.x)) {
      float sum = 0.0F;
      for (int s = 0; s < splits; ++s) {
        sum += *cluster.map_shared_rank(&parts[0][i / kRows][i % kRows], static_cast<unsigned>(s));
      }
      store(i, sum);
    }
    cluster.sync();
#endif
  }
}

// Adds the parts that multiply_stream left in memory.
template <class T>
__global__ void add_partials(const __grid_constant__ ProductArguments p, int splits) {
  wait_for_previous();
  const int64_t rows = static_cast<int64_t>(p.w.row_blocks) * fragments::kBlockRows;
  const int64_t i = static_cast<int64_t>(blockIdx.x) * blockDim.x + threadIdx.x;
  const int64_t row = i % rows;
  const int64_t token = i / rows;
  if (token >= p.m || row >= p.w.n) return;
  float sum = 0.0F;
  for (int s = 0; s < splits; ++s) sum += p.partial[(static_cast<int64_t>(s) * p.m + token) * rows + row];
  if (p.bias != nullptr) sum += HalfPair<T>::to_float(static_cast<const T*>(p.bias)[row]);
  static_cast<T*>(p.y)[token * p.y_stride + row] = HalfPair<T>::from_float(sum);
}

// Blocks of columns that a warp holds in its ring: as many as leave room for two blocks of 8 warps.
template <class Decoder, int kTiles>
constexpr int stream_stages() {
  constexpr int kRoom = (96 * 1024 - Decoder::kSharedBytes) / 8;
  return std::clamp(kRoom / StreamStage<Decoder::kBits, kTiles>::bytes(false), 2, 6);
}

template <class Decoder, class T, int kTiles, bool kZeros>
void launch_stream_with(const ProductLaunch& launch) {
  const ProductArguments& p = launch.arguments;
  const bool in_memory = p.partial != nullptr;
  constexpr int kStages = stream_stages<Decoder, kTiles>();
  using Stage = StreamStage<Decoder::kBits, kTiles>;
  const auto shared_bytes = [&](int warps) {
    const int rings = kStages * Stage::bytes(p.w.group_steps % 4 != 0) * warps;
    const int parts = static_cast<int>(sizeof(float)) * warps * 8 * kTiles * fragments::kBlockRows;
    return Decoder::kSharedBytes + std::max(rings, parts);
  };
  int warps = launch.warps;
  while (warps > 1 && shared_bytes(warps) > launch.shared_memory) warps /= 2;
  const int shared = shared_bytes(warps);
  const int places = launch.splits * warps;
  const StreamRun run{launch.splits, p.w.column_blocks / places, p.w.column_blocks % places};
  const int rows = std::min(p.w.row_blocks, 65535);
  LaunchSettings settings(dim3(static_cast<unsigned>(launch.splits), static_cast<unsigned>(rows),
                               static_cast<unsigned>((p.w.row_blocks + rows - 1) / rows)),
                          dim3(static_cast<unsigned>(32 * warps)), launch.stream, launch.overlap,
                          in_memory ? 1 : launch.splits);
  const auto kernel = multiply_stream<Decoder, T, kTiles, kStages, kZeros>;
  settings.config.dynamicSmemBytes = static_cast<size_t>(shared);
  check_cuda(cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, shared),
             "matmul_cuda: shared memory of multiply_stream");
  check_cuda(cudaLaunchKernelEx(&settings.config, kernel, p, run), "matmul_cuda: launch of multiply_stream");
  if (!in_memory) return;
  const int64_t count = static_cast<int64_t>(p.m) * p.w.row_blocks * fragments::kBlockRows;
  LaunchSettings add(dim3(static_cast<unsigned>((count + 255) / 256)), dim3(256), launch.stream,
                     launch.overlap, 1);
  check_cuda(cudaLaunchKernelEx(&add.config, add_partials<T>, p, launch.splits),
             "matmul_cuda: launch of add_partials");
}

template <class Decoder, class T, int kTiles>
void launch_stream_tiles(const ProductLaunch& launch) {
  if constexpr (Decoder::kHasZeros) {
    if (launch.arguments.w.zeros != nullptr) return launch_stream_with<Decoder, T, kTiles, true>(launch);
  }
  launch_stream_with<Decoder, T, kTiles, false>(launch);
}

// m up to 16. Defined for each decoder in a translation unit of its own.
template <class Decoder>
void launch_stream(const ProductLaunch& launch) {
  const bool one_tile = launch.arguments.m <= 8;
  if (launch.dtype == DType::f16) {
    one_tile ? launch_stream_tiles<Decoder, __half, 1>(launch)
             : launch_stream_tiles<Decoder, __half, 2>(launch);
  } else {
    one_tile ? launch_stream_tiles<Decoder, __nv_bfloat16, 1>(launch)
             : launch_stream_tiles<Decoder, __nv_bfloat16, 2>(launch);
  }
}

}  // namespace quantloom::cuda
