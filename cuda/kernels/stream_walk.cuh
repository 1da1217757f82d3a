// The walk of one warp of the streaming loop: codes from memory through registers to the tensor cores.
#pragma once

#include "common/half_pairs.cuh"
#include "kernels/fragment_parameters.cuh"
#include "kernels/product_arguments.cuh"

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

}  // namespace quantloom::cuda
