// The product loop for few tokens: each code passes once from memory, through registers, to the tensor cores.
//
// Blocks of threads form teams. A team has some row blocks to itself and walks through their blocks of
// 64 x 64 codes in order, each of its warps a run of equal length (src/kernels/stream_deal.hpp). A warp has
// the codes of its next blocks on their way to registers; its lanes decode them and multiply on the tensor
// cores, 8 tokens at a time. Scales are applied to the float32 sums. A row block's sum comes in parts, one of
// each warp that met it: they are left in the shared memory of the team's cluster, or in memory, and added
// in the order of the warps.
#pragma once

#include <algorithm>

#include "common/check.cuh"
#include "common/cluster.cuh"
#include "common/half_pairs.cuh"
#include "kernels/fragment_parameters.cuh"
#include "kernels/overlap.cuh"
#include "kernels/products.cuh"

namespace quantloom::cuda {

// Four activations. Not through the read-only path, which may be read before wait_for_previous().
__device__ __forceinline__ uint2 load_four(const void* from) {
  uint2 value;
  asm volatile("ld.global.v2.u32 {%0, %1}, [%2];" : "=r"(value.x), "=r"(value.y) : "l"(from));
  return value;
}

// One block of activations [m][64 columns] for a warp, by single elements: rows that are not aligned, columns
// that change places, and the end of a row.
template <class T>
__device__ __noinline__ void gather_activations(const ProductArguments& p, int block, T* to) {
  const int lane = static_cast<int>(threadIdx.x % 32);
  __syncwarp();
  for (int token = 0; token < p.m; ++token) {
    const T* const row = static_cast<const T*>(p.x) + token * p.x_stride;
    for (int i = lane; i < fragments::kBlockColumns; i += 32) {
      int64_t from = static_cast<int64_t>(block) * fragments::kBlockColumns + i;
      if (p.w.source != nullptr) from = __ldg(p.w.source + from);
      const bool inside = from >= 0 && from < p.w.k;
      to[token * fragments::kBlockColumns + i] = inside ? row[from] : HalfPair<T>::from_float(0.0F);
    }
  }
  __syncwarp();
}

// Blocks of codes that a warp has on their way while it works on one: more cost registers, and were slower.
constexpr int stream_depth(int bits, int warps) {
  if (warps == 8) return bits <= 2 ? 4 : 2;
  return bits == 1 || (bits == 2 && warps == 12) ? 2 : 1;
}

// The walk of one warp. kTokens: 1, or up to 8 or 16. kZeros: the grid has zero points. kFine: groups are no
// multiples of 64 columns.
template <class Decoder, class T, int kTokens, bool kZeros, bool kFine>
class WarpWalk {
 public:
  static constexpr int kBits = Decoder::kBits;
  static constexpr bool kHasOffset = Decoder::template kHasOffset<T>;
  static constexpr int kTiles = kTokens > 8 ? 2 : 1;
  // Tokens of a tile that a lane has sums of: two, of which one token needs one.
  static constexpr int kColumns = kTokens == 1 ? 1 : 2;
  static constexpr int kDepth = stream_depth(kBits, stream_warps(kTokens, kFine));

  // `gathered`: kTokens * 64 of the warp's own, for activations that are not loaded from memory directly.
  __device__ __forceinline__ WarpWalk(const ProductArguments& p, const Decoder& decoder, T* gathered)
      : p_(p), decoder_(decoder), lane_(static_cast<int>(threadIdx.x % 32)), gathered_(gathered) {}

  // Asks for the first codes and parameters of blocks [begin, end) of the row blocks from `first_row` on.
  __device__ __forceinline__ void begin(const StreamDeal& deal, int first_row, int begin, int end) {
    left_ = end - begin;
    if (left_ <= 0) return;
    const int columns = p_.w.column_blocks;
    codes_ = p_.w.codes + (static_cast<int64_t>(first_row) * columns + begin) * (kBits * 32) + lane_;
#pragma unroll
    for (int d = 0; d < kDepth; ++d) {
      if (d < left_) load_codes(ring_[d]);
    }
    unasked_ = left_ - kDepth;
    row_ = static_cast<int>(deal.by_columns.divide(static_cast<uint32_t>(begin)));
    next_ = begin - row_ * columns;
    row_left_ = columns - next_;
    const int64_t group = static_cast<int64_t>(first_row + row_) * p_.w.group_count;
    if constexpr (kFine) {
      fine_at_ = group * 64 + lane_ / 4 * 8;
      group_ = static_cast<int>(deal.by_group.divide(static_cast<uint32_t>(4 * next_)));
      group_left_ = (group_ + 1) * p_.w.group_steps - 4 * next_;
      load_fine_parameters(fine_[0]);
      run_ = min(row_left_, left_);
    } else {
      const auto in_row = static_cast<int>(deal.by_group.divide(static_cast<uint32_t>(next_)));
      group_left_ = (in_row + 1) * group_blocks() - next_;
      scales_at_ = static_cast<const uint4*>(p_.w.scales) + (group + in_row) * scale_pieces() +
                   lane_ / 4 * (scale_pieces() / 8);
      if constexpr (kZeros) {
        zeros_at_ = reinterpret_cast<const uint2*>(p_.w.zeros) + (group + in_row) * 8 + lane_ / 4;
      }
      load_parameters();
      run_ = min(min(group_left_, row_left_), left_);
    }
    whole_blocks_ = p_.x_in_pieces ? static_cast<int>(p_.w.k / fragments::kBlockColumns) : 0;
#pragma unroll
    for (int tile = 0; tile < kTiles; ++tile) {
      x_[tile] = static_cast<const T*>(p_.x) + token_of(tile) * p_.x_stride + lane_ % 4 * 4;
    }
  }

  // Once the previous kernel's results can be read.
  __device__ __forceinline__ void load_first_activations() {
    if (left_ <= 0) return;
    load_activations(b_[0]);
    advance();
  }

  // Calls leave(row, sums) for each row block that the walk meets, `row` counted from the team's first:
  // sums[tile][i][c] is that of row lane / 4 + 8 * i and token 8 * tile + lane % 4 * 2 + c.
  template <class Leave>
  __device__ __forceinline__ void run(Leave leave) {
    if (left_ <= 0) return;
    if constexpr (!kFine) take_parameters();
    until_turn_ = run_;
    while (multiply_next<0>(leave) && multiply_next<1>(leave)) {
      if constexpr (kDepth > 2) {
        if (!multiply_next<2>(leave) || !multiply_next<3>(leave)) break;
      }
    }
  }

 private:
  // One block of codes, the one of index kPlace modulo the number that the ring or b_ holds. False: it was
  // the last.
  template <int kPlace, class Leave>
  __device__ __forceinline__ bool multiply_next(Leave leave) {
    uint4(&codes)[kBits] = ring_[kPlace % kDepth];
    load_activations(b_[(kPlace + 1) % 2]);
    if constexpr (kFine) {
      if (left_ - run_ + until_turn_ > 1) load_fine_parameters(fine_[(kPlace + 1) % 2]);
    }
    advance();
    if constexpr (kFine) {
      multiply_fine(codes, b_[kPlace % 2], fine_[kPlace % 2]);
    } else {
      multiply(codes, b_[kPlace % 2]);
    }
    if (unasked_ > 0) load_codes(codes);
    --unasked_;
    if (--until_turn_ > 0) return true;
    turn(leave);
    until_turn_ = run_;
    return left_ > 0;
  }

  __device__ __forceinline__ int group_blocks() const {
    return static_cast<int>(static_cast<unsigned>(p_.w.group_steps) / 4);
  }
  // 16-byte pieces of a row block's scales of one group.
  __device__ __forceinline__ int scale_pieces() const {
    return p_.w.scale_dtype == DType::f32 ? 16 : 8;
  }

  // Those of the next group; a row's follow the last of the row before.
  __device__ __forceinline__ void load_parameters() {
    raw_.scales[0] = __ldg(scales_at_);
    if (p_.w.scale_dtype == DType::f32) raw_.scales[1] = __ldg(scales_at_ + 1);
    scales_at_ += scale_pieces();
    if constexpr (kZeros) {
      raw_.zeros = __ldg(zeros_at_);
      zeros_at_ += 8;
    }
  }

  // Codes are read once: they leave the caches first.
  __device__ __forceinline__ void load_codes(uint4 (&to)[kBits]) {
#pragma unroll
    for (int i = 0; i < kBits; ++i) to[i] = __ldcs(codes_ + i * 32);
    codes_ += kBits * 32;
  }

  // Of block `next_`.
  __device__ __forceinline__ void load_activations(uint2 (&to)[kTiles][4]) {
    if (next_ < whole_blocks_) {
#pragma unroll
      for (int tile = 0; tile < kTiles; ++tile) {
        const T* const from = x_[tile] + static_cast<int64_t>(next_) * fragments::kBlockColumns;
#pragma unroll
        for (int step = 0; step < 4; ++step) to[tile][step] = load_four(from + 16 * step);
      }
      return;
    }
    gather_activations<T>(p_, next_, gathered_);
#pragma unroll
    for (int tile = 0; tile < kTiles; ++tile) {
      const T* const from = gathered_ + token_of(tile) * fragments::kBlockColumns + lane_ % 4 * 4;
#pragma unroll
      for (int step = 0; step < 4; ++step) to[tile][step] = *reinterpret_cast<const uint2*>(from + 16 * step);
    }
  }

  // The lane's token of a tile. One past the last is another copy of it, whose sums nobody reads.
  __device__ __forceinline__ int token_of(int tile) const {
    return kTokens == 1 ? 0 : min(8 * tile + lane_ / 4, p_.m - 1);
  }

  __device__ __forceinline__ void advance() {
    if (++next_ < p_.w.column_blocks) return;
    next_ = 0;
    if constexpr (kFine) {
      fine_at_ += static_cast<int64_t>(p_.w.group_count) * 64;
      group_ = 0;
      group_left_ = p_.w.group_steps;
    }
  }

  // Those of the four steps of block `next_`.
  __device__ __forceinline__ void load_fine_parameters(RawParameters (&to)[4]) {
#pragma unroll
    for (int step = 0; step < 4; ++step) {
      // Columns past the last group are padding: activations are 0 there.
      to[step].load(p_.w, fine_at_ + static_cast<int64_t>(min(group_, p_.w.group_count - 1)) * 64);
      if (--group_left_ == 0) {
        group_left_ = p_.w.group_steps;
        ++group_;
      }
    }
  }

  template <int kUnit>
  static __device__ __forceinline__ void words_of(const uint4 (&codes)[kBits], uint32_t (&words)[kBits]) {
#pragma unroll
    for (int i = 0; i < kBits; ++i) {
      const int at = kUnit * kBits + i;
      const uint4& piece = codes[at / 4];
      words[i] = at % 4 == 0 ? piece.x : at % 4 == 1 ? piece.y : at % 4 == 2 ? piece.z : piece.w;
    }
  }

  template <int kUnit, int kStep>
  __device__ __forceinline__ void fragment(const uint4 (&codes)[kBits], uint32_t (&a)[4]) const {
    uint32_t words[kBits];
    words_of<kUnit>(codes, words);
    decoder_.template raw_fragment<T, kStep>(words, a);
  }

  // sum += what the raw fragments of a step hold beyond the codes (less the center, on grids without zero
  // points), negated, times the activations.
  template <int kStep>
  __device__ __forceinline__ void subtract_offset(float (&sum)[kTiles][4],
                                                  const uint2 (&b)[kTiles][4]) const {
    if constexpr (kHasOffset) {
      uint32_t a[4];
      decoder_.template minus_raw_offset<T, kStep, !kZeros>(a);
#pragma unroll
      for (int tile = 0; tile < kTiles; ++tile) {
        multiply_accumulate<T>(sum[tile], a, b[tile][kStep].x, b[tile][kStep].y);
      }
    }
  }

  // sum += activations.
  template <int kStep>
  static __device__ __forceinline__ void add_activations(float (&sum)[kTiles][4],
                                                         const uint2 (&b)[kTiles][4]) {
    if constexpr (kZeros) {
      const uint32_t ones[4] = {HalfPair<T>::kOne, HalfPair<T>::kOne, HalfPair<T>::kOne, HalfPair<T>::kOne};
#pragma unroll
      for (int tile = 0; tile < kTiles; ++tile) {
        multiply_accumulate<T>(sum[tile], ones, b[tile][kStep].x, b[tile][kStep].y);
      }
    }
  }

  template <int kUnit, int kStep>
  __device__ __forceinline__ void multiply_step(float (&sum)[kTiles][4], const float (&start)[kTiles][4],
                                                const uint4 (&codes)[kBits],
                                                const uint2 (&b)[kTiles][4]) const {
    uint32_t a[4];
    fragment<kUnit, kStep>(codes, a);
#pragma unroll
    for (int tile = 0; tile < kTiles; ++tile) {
      multiply_add<T>(sum[tile], a, b[tile][kStep].x, b[tile][kStep].y, start[tile]);
    }
  }

  // total += factor * (sum of row `i`).
  __device__ __forceinline__ void add_scaled(int i, float factor, const float (&sum)[kTiles][4], int row) {
#pragma unroll
    for (int tile = 0; tile < kTiles; ++tile) {
#pragma unroll
      for (int c = 0; c < kColumns; ++c) {
        total_[tile][i][c] = fmaf(factor, sum[tile][2 * row + c], total_[tile][i][c]);
      }
    }
  }

  __device__ __forceinline__ void multiply(const uint4 (&codes)[kBits], const uint2 (&b)[kTiles][4]) {
    float start[kTiles][4] = {};
    subtract_offset<0>(start, b);
    subtract_offset<1>(start, b);
    subtract_offset<2>(start, b);
    subtract_offset<3>(start, b);
    add_activations<0>(x_sum_, b);
    add_activations<1>(x_sum_, b);
    add_activations<2>(x_sum_, b);
    add_activations<3>(x_sum_, b);
    multiply_units<0>(start, codes, b);
    multiply_units<2>(start, codes, b);
  }

  // Two units of 16 rows side by side.
  template <int kUnit>
  __device__ __forceinline__ void multiply_units(const float (&start)[kTiles][4], const uint4 (&codes)[kBits],
                                                 const uint2 (&b)[kTiles][4]) {
    float one[kTiles][4];
    float two[kTiles][4];
    multiply_step<kUnit, 0>(one, start, codes, b);
    multiply_step<kUnit + 1, 0>(two, start, codes, b);
    multiply_step<kUnit, 1>(one, one, codes, b);
    multiply_step<kUnit + 1, 1>(two, two, codes, b);
    multiply_step<kUnit, 2>(one, one, codes, b);
    multiply_step<kUnit + 1, 2>(two, two, codes, b);
    multiply_step<kUnit, 3>(one, one, codes, b);
    multiply_step<kUnit + 1, 3>(two, two, codes, b);
#pragma unroll
    for (int row = 0; row < 2; ++row) {
      add_scaled(2 * kUnit + row, scales_[2 * kUnit + row], one, row);
      add_scaled(2 * kUnit + 2 + row, scales_[2 * kUnit + 2 + row], two, row);
    }
  }

  __device__ __forceinline__ void multiply_fine(const uint4 (&codes)[kBits], const uint2 (&b)[kTiles][4],
                                                const RawParameters (&parameters)[4]) {
    multiply_fine_step<0>(codes, b, parameters[0]);
    multiply_fine_step<1>(codes, b, parameters[1]);
    multiply_fine_step<2>(codes, b, parameters[2]);
    multiply_fine_step<3>(codes, b, parameters[3]);
  }

  template <int kStep>
  __device__ __forceinline__ void multiply_fine_step(const uint4 (&codes)[kBits], const uint2 (&b)[kTiles][4],
                                                     const RawParameters& parameters) {
    float scales[8];
    parameters.all_scales(p_.w.scale_dtype, scales);
    float start[kTiles][4] = {};
    float x_sum[kTiles][4] = {};
    subtract_offset<kStep>(start, b);
    add_activations<kStep>(x_sum, b);
    multiply_fine_unit<0, kStep>(start, x_sum, scales, codes, b, parameters);
    multiply_fine_unit<1, kStep>(start, x_sum, scales, codes, b, parameters);
    multiply_fine_unit<2, kStep>(start, x_sum, scales, codes, b, parameters);
    multiply_fine_unit<3, kStep>(start, x_sum, scales, codes, b, parameters);
  }

  template <int kUnit, int kStep>
  __device__ __forceinline__ void multiply_fine_unit(const float (&start)[kTiles][4],
                                                     const float (&x_sum)[kTiles][4],
                                                     const float (&scales)[8], const uint4 (&codes)[kBits],
                                                     const uint2 (&b)[kTiles][4],
                                                     const RawParameters& parameters) {
    float sum[kTiles][4];
    multiply_step<kUnit, kStep>(sum, start, codes, b);
#pragma unroll
    for (int row = 0; row < 2; ++row) {
      const int i = 2 * kUnit + row;
      add_scaled(i, scales[i] * Decoder::kUnit, sum, row);
      if constexpr (kZeros) add_scaled(i, scales[i] * offset_of(parameters.zero(i)), x_sum, row);
    }
  }

  // weight = scale * (kUnit * sum's code + offset).
  static __device__ __forceinline__ float offset_of(float zero) {
    return (kHasOffset ? 0.0F : Decoder::kCenter) - zero;
  }

  // A row block or a group ends, or the walk.
  template <class Leave>
  __device__ __forceinline__ void turn(Leave leave) {
    left_ -= run_;
    row_left_ -= run_;
    if constexpr (!kFine) {
      group_left_ -= run_;
      add_zeros();
    }
    if (row_left_ == 0 || left_ == 0) {
      leave(row_, total_);
      ++row_;
      row_left_ = p_.w.column_blocks;
      if constexpr (!kFine) group_left_ = 0;
#pragma unroll
      for (int tile = 0; tile < kTiles; ++tile) {
#pragma unroll
        for (int i = 0; i < 8; ++i) {
#pragma unroll
          for (int c = 0; c < kColumns; ++c) total_[tile][i][c] = 0.0F;
        }
      }
    }
    if (left_ == 0) return;
    run_ = min(row_left_, left_);
    if constexpr (!kFine) {
      if (group_left_ == 0) {
        group_left_ = group_blocks();
        take_parameters();
      }
      run_ = min(run_, group_left_);
    }
  }

  // Turns the parameters loaded last into those in use, and asks for the next group's.
  __device__ __forceinline__ void take_parameters() {
    raw_.all_scales(p_.w.scale_dtype, scales_);
#pragma unroll
    for (int i = 0; i < 8; ++i) scales_[i] *= Decoder::kUnit;
    if constexpr (kZeros) zeros_ = raw_.zeros;
    if (left_ > min(group_left_, row_left_)) load_parameters();
  }

  __device__ __forceinline__ void add_zeros() {
    if constexpr (kZeros) {
      RawParameters parameters;
      parameters.zeros = zeros_;
#pragma unroll
      for (int i = 0; i < 8; ++i) {
        const float factor = scales_[i] * (1.0F / Decoder::kUnit) * offset_of(parameters.zero(i));
        add_scaled(i, factor, x_sum_, 0);
      }
#pragma unroll
      for (int tile = 0; tile < kTiles; ++tile) {
#pragma unroll
        for (int c = 0; c < 4; ++c) x_sum_[tile][c] = 0.0F;
      }
    }
  }

  const ProductArguments& p_;
  const Decoder& decoder_;
  int lane_;
  int left_;  // blocks of the walk, from the last turn on
  int run_;   // of these, those until the next turn
  int until_turn_;
  int row_left_;            // of the row block, from the last turn on
  int group_left_;          // of the group; kFine: steps
  int unasked_;             // blocks whose codes are not on their way
  int row_;                 // row block of the team
  int next_;                // column block whose activations are next
  int group_;               // kFine: the next step's
  int whole_blocks_;        // of activations that can be read four at a time
  const uint4* scales_at_;  // the next group's
  const uint2* zeros_at_;
  int64_t fine_at_;  // kFine: place of the parameters of the row block's first group
  const uint4* codes_;
  const T* x_[kTiles];
  T* gathered_;
  uint4 ring_[kDepth][kBits];
  uint2 b_[2][kTiles][4];
  RawParameters raw_;
  RawParameters fine_[2][4];
  float scales_[8];
  uint2 zeros_;
  float x_sum_[kTiles][4] = {};
  float total_[kTiles][8][kColumns] = {};
};

template <class T>
__device__ __forceinline__ void store_sum(const ProductArguments& p, int row_block, int token, int place,
                                          float sum) {
  const int64_t row =
      static_cast<int64_t>(row_block) * fragments::kBlockRows + fragments::block_row_of(place);
  if (row >= p.w.n) return;
  if (p.bias != nullptr) sum += HalfPair<T>::to_float(static_cast<const T*>(p.bias)[row]);
  static_cast<T*>(p.y)[token * p.y_stride + row] = HalfPair<T>::from_float(sum);
}

// Adds the parts of a block's own row blocks, every deal.blocks-th of the team from `rank` on. kSharers lanes
// share the parts of a sum.
template <class T, int kSharers>
__device__ __forceinline__ void add_parts(const ProductArguments& p, const StreamDeal& deal, int first_row,
                                          int rank, int own_rows, const float* parts,
                                          const StreamParts* parts_of_rows) {
  constexpr int kVectors = 32 / kSharers;  // of four sums, of a warp at a time
  const int part_size = stream_part_size(p.m);
  const int lane = static_cast<int>(threadIdx.x % 32);
  const int sharer = lane / kVectors;
  const int warps_of_row = (p.m * fragments::kBlockRows / 4 + kVectors - 1) / kVectors;
  int row = 0;
  int chunk = static_cast<int>(threadIdx.x / 32);
  for (;;) {
    for (; chunk >= warps_of_row; chunk -= warps_of_row) ++row;
    if (row >= own_rows) return;
    const int at = (chunk * kVectors + lane % kVectors) * 4;
    const bool inside = at < p.m * fragments::kBlockRows;
    const StreamParts met = parts_of_rows[row];
    const float* const from = parts + static_cast<int64_t>(row) * deal.parts * part_size + at;
    float4 sum = make_float4(0.0F, 0.0F, 0.0F, 0.0F);
#pragma unroll 4
    for (int part = sharer; inside && part < met.count; part += kSharers) {
      const int place = (met.first + part) & (deal.parts - 1);
      const float4 four = *reinterpret_cast<const float4*>(from + place * part_size);
      sum.x += four.x;
      sum.y += four.y;
      sum.z += four.z;
      sum.w += four.w;
    }
#pragma unroll
    for (int distance = kVectors; distance < 32; distance *= 2) {
      sum.x += __shfl_xor_sync(~0U, sum.x, distance);
      sum.y += __shfl_xor_sync(~0U, sum.y, distance);
      sum.z += __shfl_xor_sync(~0U, sum.z, distance);
      sum.w += __shfl_xor_sync(~0U, sum.w, distance);
    }
    if (sharer == 0 && inside) {
      const int row_block = first_row + row * deal.blocks + rank;
      const int token = at / fragments::kBlockRows;
      const int place = at % fragments::kBlockRows;
      store_sum<T>(p, row_block, token, place, sum.x);
      store_sum<T>(p, row_block, token, place + 1, sum.y);
      store_sum<T>(p, row_block, token, place + 2, sum.z);
      store_sum<T>(p, row_block, token, place + 3, sum.w);
    }
    chunk += static_cast<int>(blockDim.x / 32);
  }
}

// Grid: [deal.teams * deal.blocks]; the blocks of a team are a cluster, unless p.partial is given.
template <class Decoder, class T, int kTokens, bool kZeros, bool kFine>
__global__ void __launch_bounds__(32 * stream_warps(kTokens, kFine), 1)
    multiply_stream(const __grid_constant__ ProductArguments p, const __grid_constant__ StreamDeal deal) {
  using Walk = WarpWalk<Decoder, T, kTokens, kZeros, kFine>;
  // The decoder's table, the parts, and what parts_of() says of each own row block.
  extern __shared__ __align__(128) unsigned char memory[];
  __shared__ uint64_t delivery;
  __shared__ __align__(16) T gathered[stream_warps(kTokens, kFine)][kTokens * fragments::kBlockColumns];
  auto* const parts = reinterpret_cast<float*>(memory + Decoder::kSharedBytes);
  const int part_size = stream_part_size(p.m);
  const bool in_cluster = deal.blocks > 1 && p.partial == nullptr;
  const int lane = static_cast<int>(threadIdx.x % 32);
  const int columns = p.w.column_blocks;
  const int team = static_cast<int>(deal.by_blocks.divide(blockIdx.x));
  const int rank = static_cast<int>(blockIdx.x) - team * deal.blocks;
  const int warp = (rank * static_cast<int>(blockDim.x) + static_cast<int>(threadIdx.x)) / 32;
  const int first_row = deal.first_row(team);
  const StreamRuns& runs = deal.runs_of(team);

  let_next_begin();
  if (in_cluster) {
    if (kTokens == 1 && threadIdx.x == 0) Delivery::prepare(&delivery);
    cluster_begin();
  }
  Decoder decoder;
  Walk walk(p, decoder, gathered[threadIdx.x / 32]);
  const bool takes_part = warp < deal.warps;
  walk.begin(deal, first_row, takes_part ? runs.begin(warp) : 0, takes_part ? runs.begin(warp + 1) : 0);
  decoder.template prepare<T>(p.w.table, p.w.table_entries, memory);
  if constexpr (Decoder::kSharedBytes > 0) __syncthreads();
  wait_for_previous();
  walk.load_first_activations();
  const int own_rows = p.partial != nullptr ? 0 : (deal.rows_of(team) - rank + deal.blocks - 1) / deal.blocks;
  auto* const parts_of_rows =
      reinterpret_cast<StreamParts*>(parts + static_cast<int64_t>(own_rows) * deal.parts * part_size);
  if (threadIdx.x < 32) {
#pragma unroll 1
    for (int row = lane; row < own_rows; row += 32) {
      const StreamParts met = parts_of(runs, row * deal.blocks + rank, columns);
      parts_of_rows[row] = met;
      if (kTokens == 1 && in_cluster)
        Delivery::expect(&delivery, met.count * p.m * fragments::kBlockRows * 4);
    }
    __syncwarp();
    if (kTokens == 1 && in_cluster && lane == 0) Delivery::all_expected(&delivery);
  }
  if (in_cluster) cluster_wait();

  walk.run([&](int row, const auto& sums) {
    const int place = warp & (deal.parts - 1);
    const auto own_row = static_cast<int>(deal.by_blocks.divide(static_cast<uint32_t>(row)));
    const int owner = row - own_row * deal.blocks;
    float* to = p.partial != nullptr
                    ? p.partial + (static_cast<int64_t>(first_row + row) * deal.parts + place) * part_size
                    : parts + (own_row * deal.parts + place) * part_size;
    if (kTokens > 1 && in_cluster) to = cluster_place(to, owner);
#pragma unroll
    for (int tile = 0; tile < Walk::kTiles; ++tile) {
#pragma unroll
      for (int c = 0; c < Walk::kColumns; ++c) {
        const int token = 8 * tile + lane % 4 * 2 + c;
        if (token >= p.m) continue;
        float* const eight = to + token * fragments::kBlockRows + lane / 4 * 8;
        const auto& s = sums[tile];
#pragma unroll
        for (int i = 0; i < 8; i += 4) {
          const float4 four = make_float4(s[i][c], s[i + 1][c], s[i + 2][c], s[i + 3][c]);
          if (kTokens == 1 && in_cluster) {
            Delivery::send(eight + i, &delivery, owner, four);
          } else {
            *reinterpret_cast<float4*>(eight + i) = four;
          }
        }
      }
    }
  });
  if (p.partial != nullptr) return;

  // parts_of_rows comes from the first warp: with the delivery, or before a barrier.
  if (in_cluster) {
    if constexpr (kTokens == 1) {
      Delivery::wait(&delivery);
    } else {
      cluster_arrive();
      cluster_wait();
    }
  } else {
    __syncthreads();
  }
  add_parts<T, kTokens == 1   ? 8
               : kTokens == 8 ? 4
                              : 1>(p, deal, first_row, rank, own_rows, parts, parts_of_rows);
}

// Adds the parts that multiply_stream left in memory.
template <class T>
__global__ void add_partials(const __grid_constant__ ProductArguments p,
                             const __grid_constant__ StreamDeal deal) {
  wait_for_previous();
  const int64_t i = static_cast<int64_t>(blockIdx.x) * blockDim.x + threadIdx.x;
  const int size = p.m * fragments::kBlockRows;
  const auto row_block = static_cast<int>(i / size);
  if (row_block >= p.w.row_blocks) return;
  const int longer = deal.extra * (deal.rows + 1);
  const int team =
      row_block < longer ? row_block / (deal.rows + 1) : deal.extra + (row_block - longer) / deal.rows;
  const StreamParts met = parts_of(deal.runs_of(team), row_block - deal.first_row(team), p.w.column_blocks);
  const int at = static_cast<int>(i % size);
  const int64_t part_size = stream_part_size(p.m);
  const float* const from = p.partial + static_cast<int64_t>(row_block) * deal.parts * part_size + at;
  float sum = 0.0F;
  for (int part = 0; part < met.count; ++part) {
    sum += from[((met.first + part) & (deal.parts - 1)) * part_size];
  }
  store_sum<T>(p, row_block, at / fragments::kBlockRows, at % fragments::kBlockRows, sum);
}

template <class Decoder, class T, int kTokens, bool kZeros, bool kFine>
void launch_stream_kernel(const ProductLaunch& launch) {
  const ProductArguments& p = launch.arguments;
  const StreamDeal& deal = launch.deal;
  const bool in_memory = p.partial != nullptr;
  const auto shared =
      Decoder::kSharedBytes + (in_memory ? 0 : static_cast<int>(stream_parts_bytes(deal, p.m)));
  LaunchSettings settings(dim3(static_cast<unsigned>(deal.teams * deal.blocks)),
                          dim3(32 * stream_warps(kTokens, kFine)), launch.stream, launch.overlap,
                          in_memory ? 1 : deal.blocks);
  const auto kernel = multiply_stream<Decoder, T, kTokens, kZeros, kFine>;
  settings.config.dynamicSmemBytes = static_cast<size_t>(shared);
  check_cuda(cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, shared),
             "matmul_cuda: shared memory of multiply_stream");
  check_cuda(cudaLaunchKernelEx(&settings.config, kernel, p, deal), "matmul_cuda: launch of multiply_stream");
  if (!in_memory) return;
  const int64_t count = static_cast<int64_t>(p.m) * p.w.row_blocks * fragments::kBlockRows;
  LaunchSettings add(dim3(static_cast<unsigned>((count + 255) / 256)), dim3(256), launch.stream,
                     launch.overlap, 1);
  check_cuda(cudaLaunchKernelEx(&add.config, add_partials<T>, p, deal),
             "matmul_cuda: launch of add_partials");
}

template <class Decoder, class T, bool kZeros>
void launch_stream_with(const ProductLaunch& launch) {
  const int m = launch.arguments.m;
  if (launch.arguments.w.group_steps % 4 != 0) {
    m <= 8 ? launch_stream_kernel<Decoder, T, 8, kZeros, true>(launch)
           : launch_stream_kernel<Decoder, T, 16, kZeros, true>(launch);
  } else if (m == 1) {
    launch_stream_kernel<Decoder, T, 1, kZeros, false>(launch);
  } else {
    m <= 8 ? launch_stream_kernel<Decoder, T, 8, kZeros, false>(launch)
           : launch_stream_kernel<Decoder, T, 16, kZeros, false>(launch);
  }
}

template <class Decoder, class T>
void launch_stream_of(const ProductLaunch& launch) {
  if constexpr (Decoder::kHasZeros) {
    if (launch.arguments.w.zeros != nullptr) return launch_stream_with<Decoder, T, true>(launch);
  }
  launch_stream_with<Decoder, T, false>(launch);
}

// m up to 16. Defined for each decoder in a translation unit of its own.
template <class Decoder>
void launch_stream(const ProductLaunch& launch) {
  launch.dtype == DType::f16 ? launch_stream_of<Decoder, __half>(launch)
                             : launch_stream_of<Decoder, __nv_bfloat16>(launch);
}

}  // namespace quantloom::cuda
