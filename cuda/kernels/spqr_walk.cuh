// The walk of one warp of the streaming loop through a matrix of the format "spqr": codes from memory through
// registers to the tensor cores, in stretches of 128 columns: eight steps of 16.
//
// Scales and zero points are decoded on the way. A lane turns the grids of one unit of 16 rows and one step
// into the constants with which codes decode, and the warp shares them in shared memory. A step need not be
// a group of its own; its row's scale and zero point are applied to its sum of products:
//   y += scale * (sum of codes * x - zero point * sum of x)
// One token: the eight columns of a tensor-core product are the eight steps, each with that step's
// activations alone, so that the products of a stretch add up to the sums of all its steps. More tokens: the
// columns are tokens, each step has products of its own, and decoded parameters pass through shared memory.
#pragma once

#include "common/half_pairs.cuh"
#include "formats/bilevel.cuh"
#include "formats/half_fragments.cuh"
#include "kernels/spqr_product.hpp"
#include "kernels/stream_walk.cuh"

namespace quantloom::cuda {

// kWide: parameters of 16 bytes. kFew: with blocks of 8 warps, for wide codes.
template <int kCodeBits, bool kWide, int kTokens, bool kFew>
class SpqrFragments : public HalfFragments<kCodeBits> {
 public:
  static constexpr bool kWideParameters = kWide;
  static constexpr int kSharedBytes = spqr_shared_bytes(kTokens, kFew);

  template <class T>
  __device__ __forceinline__ void prepare(const void* /*table*/, int /*entries*/, void* shared) {
    shared_ = static_cast<unsigned char*>(shared) + threadIdx.x / 32 * spqr_warp_bytes(kTokens);
  }
  __device__ __forceinline__ unsigned char* shared() const { return shared_; }

 private:
  unsigned char* shared_ = nullptr;
};

// What walks of one and of more tokens share: their place, codes, parameters and constants.
template <class Decoder>
class SpqrPlanes {
 public:
  static constexpr int kBits = Decoder::kBits;
  using Codes = BilevelCodes<Decoder::kWideParameters>;

  __device__ __forceinline__ SpqrPlanes(const ProductArguments& p, const Decoder& decoder)
      : p_(p), decoder_(decoder), lane_(static_cast<int>(threadIdx.x % 32)) {}

  // Asks for codes and parameters of the first of stretches [begin, end) of the row blocks from `first_row`
  // on.
  __device__ __forceinline__ void begin(const StreamDeal& deal, int first_row, int begin, int end) {
    left_ = end - begin;
    if (left_ <= 0) return;
    by_group_ = deal.by_group;
    row_ = static_cast<int>(deal.by_columns.divide(static_cast<uint32_t>(begin)));
    next_ = begin - row_ * p_.w.column_blocks;
    until_row_ = p_.w.column_blocks - next_;
    next_row_ = first_row + row_;
    codes_ = p_.w.codes + (static_cast<int64_t>(first_row) * p_.w.column_blocks + begin) * (2 * kBits * 32) +
             lane_;
    load_codes(0);
    load_codes(1);
    codes_ += 2 * kBits * 32;
    meet_row();
    load_fields();
    load_grid();
    advance();
  }

 protected:
  // The first number with which raised codes decode, and what is added: number = x * raised + y. Of scales in
  // x and y, of negated zero points, less what fragments are off the codes, in z and w.
  template <class T>
  static __device__ __forceinline__ float4 constants_of(const BilevelGrids& grid) {
    constexpr float kOff = Decoder::template kHasOffset<T> ? 0.0F : Decoder::kCenter;
    const float scale = grid.scale_step * Codes::kRaised;
    const float zero = grid.zero_step * Codes::kRaised;
    return make_float4(scale, fmaf(-grid.scale_step, grid.scale_zero, -scale), -zero,
                       fmaf(grid.zero_step, grid.zero_zero, zero) + kOff);
  }

  // Of block 0 or 1 of the stretch at codes_. Codes are read once: they leave the caches first.
  __device__ __forceinline__ void load_codes(int block) {
#pragma unroll
    for (int i = 0; i < kBits; ++i) ahead_[block][i] = __ldcs(codes_ + (block * kBits + i) * 32);
  }

  // Steps past the last group are padding: activations are 0 there.
  __device__ __forceinline__ int group_of(int step) const {
    const bool whole_blocks = p_.w.group_steps % 4 == 0;
    const auto group =
        static_cast<int>(by_group_.divide(static_cast<uint32_t>(whole_blocks ? step / 4 : step)));
    return min(group, p_.w.group_count - 1);
  }

  // Codes of scales and zero points of two steps, 2 * (lane % 4) and the one after.
  __device__ __forceinline__ void load_fields() {
    const int64_t row = static_cast<int64_t>(next_row_) * p_.w.group_count;
    const int step = kStretchSteps * next_ + lane_ % 4 * 2;
#pragma unroll
    for (int i = 0; i < 2; ++i) fields_[i].load(p_.w.scales, (row + group_of(step + i)) * 8 + lane_ / 4);
  }

  // The grids of unit lane / 8 and step lane % 8.
  __device__ __forceinline__ void load_grid() {
    grid_ = __ldg(grids_ + group_of(kStretchSteps * next_ + lane_ % 8));
  }

  // To the stretch after the next.
  __device__ __forceinline__ void advance() {
    if (++next_ < p_.w.column_blocks) return;
    next_ = 0;
    ++next_row_;
    meet_row();
  }

  // Makes grid_ constants for the warp. A barrier of the warp comes before they are read.
  template <class T>
  __device__ __forceinline__ void put_constants() const {
    reinterpret_cast<float4*>(decoder_.shared())[lane_] = constants_of<T>(BilevelGrids(grid_));
  }
  __device__ __forceinline__ float4 constants(int unit, int step) const {
    return reinterpret_cast<const float4*>(decoder_.shared())[unit * kStretchSteps + step];
  }

  template <class T, int kUnit, int kStep>
  __device__ __forceinline__ void fragment(const uint4 (&codes)[kBits], uint32_t (&a)[4]) const {
    uint32_t words[kBits];
#pragma unroll
    for (int i = 0; i < kBits; ++i) {
      const int at = kUnit * kBits + i;
      const uint4& piece = codes[at / 4];
      words[i] = at % 4 == 0 ? piece.x : at % 4 == 1 ? piece.y : at % 4 == 2 ? piece.z : piece.w;
    }
    Decoder::template raw_fragment<T, kStep>(words, a);
  }

  // sum = c + activations.
  template <class T>
  static __device__ __forceinline__ void add_activations(float (&sum)[4], uint32_t b0, uint32_t b1) {
    constexpr uint32_t kOnes[4] = {HalfPair<T>::kOne, HalfPair<T>::kOne, HalfPair<T>::kOne,
                                   HalfPair<T>::kOne};
    multiply_accumulate<T>(sum, kOnes, b0, b1);
  }
  // sum += what raw fragments of a step hold beyond the codes, negated, times the activations.
  template <class T, int kStep>
  __device__ __forceinline__ void subtract_offset(float (&sum)[4], uint32_t b0, uint32_t b1) const {
    if constexpr (Decoder::template kHasOffset<T>) {
      uint32_t a[4];
      Decoder::template minus_raw_offset<T, kStep>(a);
      multiply_accumulate<T>(sum, a, b0, b1);
    }
  }

  const ProductArguments& p_;
  const Decoder& decoder_;
  int lane_;
  int left_ = 0;  // stretches of the walk
  int until_row_ = 0;
  int row_ = 0;  // row block of the team
  uint4 ahead_[2][kBits];
  Codes fields_[2];
  const uint4* codes_ = nullptr;  // of the next stretch
  int next_ = 0;                  // the stretch of its row
  int next_row_ = 0;              // its row block

 private:
  // Where the lane's grids of the next row block are.
  __device__ __forceinline__ void meet_row() {
    const int unit = min(next_row_, p_.w.row_blocks - 1) * fragments::kUnits + lane_ / 8;
    const auto row = static_cast<uint32_t>(min(int64_t{unit} * 16, p_.w.n - 1));
    grids_ = static_cast<const uint2*>(p_.w.table) +
             static_cast<int64_t>(row / static_cast<uint32_t>(p_.w.grid_rows)) * p_.w.group_count;
  }

  Divider by_group_;
  const uint2* grids_ = nullptr;
  uint2 grid_;
};

template <int kCodeBits, bool kWide, bool kFew, class T>
class WarpWalk<SpqrFragments<kCodeBits, kWide, 1, kFew>, T, 1, true, kFew>
    : public SpqrPlanes<SpqrFragments<kCodeBits, kWide, 1, kFew>> {
  using Decoder = SpqrFragments<kCodeBits, kWide, 1, kFew>;
  using Planes = SpqrPlanes<Decoder>;
  using Planes::ahead_;
  using Planes::codes_;
  using Planes::fields_;
  using Planes::kBits;
  using Planes::lane_;
  using Planes::left_;
  using Planes::next_;
  using Planes::p_;
  using Planes::row_;
  using Planes::until_row_;

 public:
  static constexpr int kTiles = 1;
  static constexpr int kColumns = 1;

  __device__ __forceinline__ WarpWalk(const ProductArguments& p, const Decoder& decoder, T* /*gathered*/)
      : Planes(p, decoder) {}

  __device__ __forceinline__ void begin(const StreamDeal& deal, int first_row, int begin, int end) {
    Planes::begin(deal, first_row, begin, end);
    if (left_ <= 0) return;
    first_ = (end - left_) - row_ * p_.w.column_blocks;
    if (!p_.x_in_pieces) ask_inputs(first_);
  }

  // Once the previous kernel's results can be read.
  __device__ __forceinline__ void load_first_activations() {
    if (left_ > 0) load_activations(first_);
  }

  template <class Leave>
  __device__ __forceinline__ void run(Leave leave) {
    while (left_ > 0) {
      __syncwarp();  // the constants before have been read
      this->template put_constants<T>();
      if (left_ > 1) this->load_grid();
      const uint2 x = x_;
      if (left_ > 1) load_activations(next_);
      float x_sum[4] = {};
      float start[4] = {};
      sum_block<0>(x_sum, start, x);
      sum_block<4>(x_sum, start, x);
      float sums[4][4];
#pragma unroll
      for (int unit = 0; unit < 4; ++unit) {
#pragma unroll
        for (int i = 0; i < 4; ++i) sums[unit][i] = start[i];
      }
      multiply_block<0>(sums, x);
      if (left_ > 1) this->load_codes(0);
      multiply_block<1>(sums, x);
      if (left_ > 1) this->load_codes(1);
      codes_ += 2 * kBits * 32;
      __syncwarp();
      add_unit<0>(sums[0], x_sum);
      add_unit<1>(sums[1], x_sum);
      add_unit<2>(sums[2], x_sum);
      add_unit<3>(sums[3], x_sum);
      --left_;
      if (left_ > 0) {
        this->load_fields();
        this->advance();
      }
      if (--until_row_ > 0 && left_ > 0) continue;
      leave_sums(leave);
      ++row_;
      until_row_ = p_.w.column_blocks;
    }
  }

 private:
  // Of stretch `at` of a row: the lane's step is lane / 4.
  __device__ __forceinline__ void load_activations(int at) {
    const int64_t column = static_cast<int64_t>(at) * kStretchColumns + lane_ * 4;
    if (p_.x_in_pieces) {
      x_ = column < p_.w.k ? load_four(static_cast<const T*>(p_.x) + column) : make_uint2(0, 0);
      return;
    }
    const int inputs[4] = {inputs_.x, inputs_.y, inputs_.z, inputs_.w};
    uint32_t four[4];
#pragma unroll
    for (int i = 0; i < 4; ++i) {
      unsigned short bits = 0;
      if (inputs[i] >= 0 && inputs[i] < p_.w.k) {
        asm volatile("ld.global.u16 %0, [%1];" : "=h"(bits) : "l"(static_cast<const T*>(p_.x) + inputs[i]));
      }
      four[i] = bits;
    }
    x_ = make_uint2(four[0] | four[1] << 16, four[2] | four[3] << 16);
    ask_inputs(at + 1 < p_.w.column_blocks ? at + 1 : 0);
  }

  // Which inputs the lane's columns of stretch `at` are.
  __device__ __forceinline__ void ask_inputs(int at) {
    const int column = at * kStretchColumns + lane_ * 4;
    inputs_ = p_.w.source != nullptr ? __ldg(reinterpret_cast<const int4*>(p_.w.source + column))
                                     : make_int4(column, column + 1, column + 2, column + 3);
  }

  // Activations of one step, in the column of the step.
  __device__ __forceinline__ uint2 of_step(uint2 x, int step) const {
    return lane_ / 4 == step ? x : make_uint2(0, 0);
  }

  // Sums of activations, and of what raw fragments hold beyond the codes, of the four steps from kFirst on.
  template <int kFirst>
  __device__ __forceinline__ void sum_block(float (&x_sum)[4], float (&start)[4], uint2 x) const {
    sum_step<kFirst, 0>(x_sum, start, x);
    sum_step<kFirst, 1>(x_sum, start, x);
    sum_step<kFirst, 2>(x_sum, start, x);
    sum_step<kFirst, 3>(x_sum, start, x);
  }
  template <int kFirst, int kStep>
  __device__ __forceinline__ void sum_step(float (&x_sum)[4], float (&start)[4], uint2 x) const {
    const uint2 b = of_step(x, kFirst + kStep);
    this->template add_activations<T>(x_sum, b.x, b.y);
    this->template subtract_offset<T, kStep>(start, b.x, b.y);
  }

  template <int kBlock>
  __device__ __forceinline__ void multiply_block(float (&sums)[4][4], uint2 x) const {
    multiply_step<kBlock, 0>(sums, of_step(x, 4 * kBlock));
    multiply_step<kBlock, 1>(sums, of_step(x, 4 * kBlock + 1));
    multiply_step<kBlock, 2>(sums, of_step(x, 4 * kBlock + 2));
    multiply_step<kBlock, 3>(sums, of_step(x, 4 * kBlock + 3));
  }
  template <int kBlock, int kStep>
  __device__ __forceinline__ void multiply_step(float (&sums)[4][4], uint2 b) const {
    multiply_unit<kBlock, kStep, 0>(sums[0], b);
    multiply_unit<kBlock, kStep, 1>(sums[1], b);
    multiply_unit<kBlock, kStep, 2>(sums[2], b);
    multiply_unit<kBlock, kStep, 3>(sums[3], b);
  }
  template <int kBlock, int kStep, int kUnit>
  __device__ __forceinline__ void multiply_unit(float (&sum)[4], uint2 b) const {
    uint32_t a[4];
    this->template fragment<T, kUnit, kStep>(ahead_[kBlock], a);
    multiply_accumulate<T>(sum, a, b.x, b.y);
  }

  // Sums of a unit's two rows and the lane's two steps, with their scales and zero points.
  template <int kUnit>
  __device__ __forceinline__ void add_unit(const float (&sum)[4], const float (&x_sum)[4]) {
#pragma unroll
    for (int i = 0; i < 2; ++i) {
      const float4 c = this->constants(kUnit, lane_ % 4 * 2 + i);
#pragma unroll
      for (int half = 0; half < 2; ++half) {
        const int row = 2 * kUnit + half;
        const float scale = fmaf(fields_[i].raised(false, row), c.x, c.y);
        const float minus_zero = fmaf(fields_[i].raised(true, row), c.z, c.w);
        total_[0][row][0] = fmaf(scale, fmaf(minus_zero, x_sum[i], sum[2 * half + i]), total_[0][row][0]);
      }
    }
  }

  template <class Leave>
  __device__ __forceinline__ void leave_sums(Leave leave) {
#pragma unroll
    for (int i = 0; i < 8; ++i) {
      float& sum = total_[0][i][0];
      sum += __shfl_xor_sync(~0U, sum, 1);
      sum += __shfl_xor_sync(~0U, sum, 2);
    }
    leave(row_, total_);
#pragma unroll
    for (int i = 0; i < 8; ++i) total_[0][i][0] = 0.0F;
  }

  int first_ = 0;  // stretch
  uint2 x_;
  int4 inputs_;
  float total_[1][8][1] = {};
};

}  // namespace quantloom::cuda
