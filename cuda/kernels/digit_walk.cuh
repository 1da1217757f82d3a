// The walk of one warp of the streaming loop for one token, on integers: the tensor cores multiply codes, as
// bytes, by the digits of the activations. See activation_digits.cuh.
//
// Four of the eight columns of a product hold the digits. Sums start at kMagic, whose last bit is worth 1 as
// a float: seen as a float, a sum is kMagic plus the integer. Over a stretch the integers stay below 2^22.
#pragma once

#include "kernels/activation_digits.cuh"
#include "kernels/fragment_parameters.cuh"

namespace quantloom::cuda {

// kZeros: the grid has zero points.
template <class Decoder, class T, bool kZeros>
class DigitWalk {
 public:
  static constexpr int kBits = Decoder::kBits;
  static constexpr int kTiles = 1;
  static constexpr int kColumns = 1;

  explicit __device__ __forceinline__ DigitWalk(const ProductArguments& p)
      : p_(p), lane_(static_cast<int>(threadIdx.x % 32)) {}

  // Asks for the first codes and parameters of blocks [begin, end) of the row blocks from `first_row` on. A
  // row has whole stretches; of the walk's first and last, one block may be another warp's.
  __device__ __forceinline__ void begin(const StreamDeal& deal, int first_row, int begin, int end) {
    left_ = 0;
    if (end <= begin) return;
    const int columns = p_.w.column_blocks;
    row_ = static_cast<int>(deal.by_columns.divide(static_cast<uint32_t>(begin)));
    column_ = begin - row_ * columns;
    until_row_ = (columns - column_ + 1) / 2;
    left_ = (end - 1) / 2 - begin / 2 + 1;
    short_end_ = end & 1;
    codes_ = p_.w.codes + (static_cast<int64_t>(first_row) * columns + (begin & ~1)) * (kBits * 32) + lane_;
    unasked_ = left_;
    if ((begin & 1) == 0) load_codes(ahead_[0], 0);
    if (unasked_ > short_end_) load_codes(ahead_[1], 1);
    next_codes();
    const auto in_row = static_cast<int>(deal.by_group.divide(static_cast<uint32_t>(column_)));
    // Less what take_parameters() adds.
    until_group_ = in_row * group_blocks() - (column_ & ~1);
    const int64_t group = static_cast<int64_t>(first_row + row_) * p_.w.group_count + in_row;
    scales_at_ =
        static_cast<const uint4*>(p_.w.scales) + group * scale_pieces() + lane_ / 4 * (scale_pieces() / 8);
    if constexpr (kZeros) zeros_at_ = reinterpret_cast<const uint2*>(p_.w.zeros) + group * 8 + lane_ / 4;
    const int last = end - 1;
    const auto last_row = static_cast<int>(deal.by_columns.divide(static_cast<uint32_t>(last)));
    const auto last_in_row =
        static_cast<int>(deal.by_group.divide(static_cast<uint32_t>(last - last_row * columns)));
    groups_ = (last_row - row_) * p_.w.group_count + last_in_row - in_row;
    load_parameters();
  }

  // After the digits have been written: calls leave(row, sums) as WarpWalk::run() does.
  template <class Leave>
  __device__ __forceinline__ void run(const ActivationDigits& digits, Leave leave) {
    if (left_ == 0) return;
    reader_ = ActivationDigits::Reader(digits, column_, lane_);
    load_digits();
    if ((column_ & 1) != 0) x_[0] = make_uint4(0, 0, 0, 0);
    // Groups of an odd number of blocks may end within a stretch.
    odd_groups_ = p_.w.group_count > 1 && (group_blocks() & 1) != 0;
    take_parameters();
    while (multiply_next(leave)) continue;
  }

 private:
  static constexpr float kMagic = 12582912.0F;  // 1.5 * 2^23
  static constexpr uint32_t kMagicBits = 0x4B400000U;
  static constexpr float kHalfUnit = static_cast<float>(1 << Decoder::row_position(1));
  static __host__ __device__ constexpr float unit_of(int half) { return half == 0 ? 1.0F : kHalfUnit; }
  // Zero points are subtracted by a step of their own where they are no integers, or each row has its own.
  static constexpr bool kApart = kZeros || kBits == 1;

  __device__ __forceinline__ int group_blocks() const {
    return static_cast<int>(static_cast<unsigned>(p_.w.group_steps) / 4);
  }
  // 16-byte pieces of a row block's scales of one group.
  __device__ __forceinline__ int scale_pieces() const { return p_.w.scale_dtype == DType::f32 ? 16 : 8; }

  // One stretch. False: it was the last.
  template <class Leave>
  __device__ __forceinline__ bool multiply_next(Leave leave) {
    const float factor = factor_;
    uint32_t sums[4][4];
    uint32_t x_sum[4];
    multiply<true>(sums, x_sum, ahead_[0], x_[0]);
    if (unasked_ > 0) load_codes(ahead_[0], 0);
    if (odd_groups_) {
      add_scaled(sums, x_sum, factor);
      if (--until_group_ == 0) take_parameters();
      multiply<true>(sums, x_sum, ahead_[1], x_[1]);
      --until_group_;
    } else {
      multiply<false>(sums, x_sum, ahead_[1], x_[1]);
      until_group_ -= 2;
    }
    if (unasked_ > short_end_) load_codes(ahead_[1], 1);
    next_codes();
    reader_.advance();
    if (--left_ > 0) load_digits();
    add_scaled(sums, x_sum, factor);
    if (--until_row_ == 0 || left_ == 0) {
      leave_sums(leave);
      if (left_ == 0) return false;
      ++row_;
      until_row_ = p_.w.column_blocks / 2;
      until_group_ = 0;
    }
    if (until_group_ <= 0) take_parameters();
    return true;
  }

  // Those of the next group; a row's follow the last of the row before.
  __device__ __forceinline__ void load_parameters() {
    raw_.scales[0] = __ldg(scales_at_);
    if constexpr (kZeros) {
      raw_.zeros = __ldg(zeros_at_);
      zeros_at_ += 8;
    }
  }

  // Turns the parameters loaded last into those in use, and asks for the next group's, if the walk gets
  // there.
  __device__ __forceinline__ void take_parameters() {
    if (p_.w.scale_dtype == DType::f32) {
      raw_.scales[1] = __ldg(scales_at_ + 1);
      raw_.all_scales(DType::f32, scales_);
    } else {
      raw_.all_scales(p_.w.scale_dtype, scales_);
    }
    if constexpr (kZeros) {
#pragma unroll
      for (int i = 0; i < 8; ++i) zeros_[i] = raw_.zero(i) * unit_of(i % 2);
    }
    until_group_ += group_blocks();
    scales_at_ += scale_pieces();
    if (--groups_ >= 0) load_parameters();
  }

  // Of block 0 or 1 of the next stretch. Codes are read once: they leave the caches first.
  __device__ __forceinline__ void load_codes(uint4 (&to)[kBits], int block) const {
#pragma unroll
    for (int i = 0; i < kBits; ++i) to[i] = __ldcs(codes_ + (block * kBits + i) * 32);
  }
  __device__ __forceinline__ void next_codes() {
    codes_ += 2 * kBits * 32;
    --unasked_;
  }

  __device__ __forceinline__ void load_digits() {
    x_[0] = reader_.template digits<0>();
    x_[1] = reader_.template digits<1>();
    factor_ = reader_.factor();
    if (left_ <= short_end_) x_[1] = make_uint4(0, 0, 0, 0);
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

  // sum = a b + (kFirst ? kMagic : sum).
  template <bool kFirst>
  static __device__ __forceinline__ void multiply_step(uint32_t (&sum)[4], const uint32_t (&a)[4],
                                                       uint32_t b0, uint32_t b1) {
    if constexpr (kFirst) {
      const uint32_t start[4] = {kMagicBits, kMagicBits, kMagicBits, kMagicBits};
      multiply_add_bytes(sum, a, b0, b1, start);
    } else {
      multiply_add_bytes(sum, a, b0, b1, sum);
    }
  }

  // Four codes of 1 in a step.
  static __host__ __device__ constexpr uint32_t one(int step) {
    return 0x01010101U << Decoder::step_position(step);
  }

  // A block of codes. kFirst: sums begin.
  template <bool kFirst>
  __device__ __forceinline__ void multiply(uint32_t (&sums)[4][4], uint32_t (&x_sum)[4],
                                           const uint4 (&codes)[kBits], const uint4& x) const {
    constexpr uint32_t kLow[4] = {one(0), one(0), one(1), one(1)};
    constexpr uint32_t kHigh[4] = {one(2), one(2), one(3), one(3)};
    multiply_step<kFirst>(x_sum, kLow, x.x, x.y);
    multiply_unit<0, kFirst>(sums[0], codes, x);
    multiply_unit<1, kFirst>(sums[1], codes, x);
    multiply_unit<2, kFirst>(sums[2], codes, x);
    multiply_unit<3, kFirst>(sums[3], codes, x);
    multiply_step<false>(x_sum, kHigh, x.z, x.w);
  }

  template <int kUnit, bool kFirst>
  static __device__ __forceinline__ void multiply_unit(uint32_t (&sum)[4], const uint4 (&codes)[kBits],
                                                       const uint4& x) {
    uint32_t words[kBits];
    words_of<kUnit>(codes, words);
    const uint32_t low[4] = {Decoder::template quad<0, 0>(words), Decoder::template quad<0, 1>(words),
                             Decoder::template quad<1, 0>(words), Decoder::template quad<1, 1>(words)};
    multiply_step<kFirst>(sum, low, x.x, x.y);
    const uint32_t high[4] = {Decoder::template quad<2, 0>(words), Decoder::template quad<2, 1>(words),
                              Decoder::template quad<3, 0>(words), Decoder::template quad<3, 1>(words)};
    multiply_step<false>(sum, high, x.z, x.w);
  }

  // total += scale * factor * (sums less what the zero points make of the activations).
  __device__ __forceinline__ void add_scaled(const uint32_t (&sums)[4][4], const uint32_t (&x_sum)[4],
                                             float factor) {
    const float x = __uint_as_float(x_sum[0]) - kMagic;
    float minus[2] = {kMagic, kMagic};
    if constexpr (!kApart) {
      minus[0] = fmaf(x, Decoder::kCenter, kMagic);
      minus[1] = fmaf(x, Decoder::kCenter * kHalfUnit, kMagic);
    }
#pragma unroll
    for (int i = 0; i < 8; ++i) {
      float sum = __uint_as_float(sums[i / 2][i % 2 * 2]) - minus[i % 2];
      if constexpr (kApart) {
        sum = fmaf(kZeros ? -zeros_[i] : -Decoder::kCenter * unit_of(i % 2), x, sum);
      }
      total_[0][i][0] = fmaf(scales_[i] * factor, sum, total_[0][i][0]);
    }
  }

  // Adds up what the digits' columns are worth.
  template <class Leave>
  __device__ __forceinline__ void leave_sums(Leave leave) {
    const float worth = __int_as_float((127 + lane_ % 4 * 8) << 23);
#pragma unroll
    for (int i = 0; i < 8; ++i) {
      float& sum = total_[0][i][0];
      sum *= worth * (1.0F / unit_of(i % 2));
      sum += __shfl_xor_sync(~0U, sum, 1);
      sum += __shfl_xor_sync(~0U, sum, 2);
    }
    leave(row_, total_);
#pragma unroll
    for (int i = 0; i < 8; ++i) total_[0][i][0] = 0.0F;
  }

  const ProductArguments& p_;
  int lane_;
  int left_;         // stretches of the walk
  int unasked_;      // of these, those whose codes are not on their way
  int short_end_;    // 1 if the second block of the last is not the walk's
  int until_row_;    // stretches of the row block
  int until_group_;  // blocks of the group
  int groups_;       // whose parameters are not asked for
  int row_;          // row block of the team
  int column_;       // the walk's first
  bool odd_groups_;
  const uint4* codes_;
  const uint4* scales_at_;  // the next group's
  const uint2* zeros_at_;
  ActivationDigits::Reader reader_;
  uint4 ahead_[2][kBits];
  uint4 x_[2];
  float factor_;
  RawParameters raw_;
  float scales_[8];
  float zeros_[8];
  float total_[1][8][1] = {};
};

}  // namespace quantloom::cuda
