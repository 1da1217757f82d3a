// The walk of spqr_walk.cuh for up to 8 tokens.
#pragma once

#include "kernels/spqr_walk.cuh"

namespace quantloom::cuda {

template <int kCodeBits, bool kWide, bool kFew, class T>
class WarpWalk<SpqrFragments<kCodeBits, kWide, 8, kFew>, T, 8, true, kFew>
    : public SpqrPlanes<SpqrFragments<kCodeBits, kWide, 8, kFew>> {
  using Decoder = SpqrFragments<kCodeBits, kWide, 8, kFew>;
  using Planes = SpqrPlanes<Decoder>;
  using Planes::ahead_;
  using Planes::codes_;
  using Planes::decoder_;
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
  static constexpr int kColumns = 2;

  __device__ __forceinline__ WarpWalk(const ProductArguments& p, const Decoder& decoder, T* gathered)
      : Planes(p, decoder), gathered_(gathered) {}

  __device__ __forceinline__ void begin(const StreamDeal& deal, int first_row, int begin, int end) {
    Planes::begin(deal, first_row, begin, end);
    if (left_ <= 0) return;
    at_ = (end - left_) - row_ * p_.w.column_blocks;
    whole_blocks_ = p_.x_in_pieces ? static_cast<int>(p_.w.k / fragments::kBlockColumns) : 0;
    // A token past the last is another copy of it, whose sums nobody reads.
    x_ = static_cast<const T*>(p_.x) + min(lane_ / 4, p_.m - 1) * p_.x_stride + lane_ % 4 * 4;
  }

  // Once the previous kernel's results can be read.
  __device__ __forceinline__ void load_first_activations() {
    if (left_ > 0) load_activations(b_[0], 2 * at_);
  }

  template <class Leave>
  __device__ __forceinline__ void run(Leave leave) {
    while (left_ > 0) {
      __syncwarp();  // what the warp shares has been read
      this->template put_constants<T>();
      __syncwarp();
      put_parameters<0>();
      put_parameters<1>();
      __syncwarp();
      load_activations(b_[1], 2 * at_ + 1);
      if (left_ > 1) {
        this->load_grid();
        this->load_fields();
      }
      multiply_block<0>();
      if (left_ > 1) this->load_codes(0);
      if (left_ > 1) load_activations(b_[0], 2 * next_);
      multiply_block<1>();
      if (left_ > 1) this->load_codes(1);
      codes_ += 2 * kBits * 32;
      at_ = next_;
      --left_;
      if (left_ > 0) this->advance();
      if (--until_row_ > 0 && left_ > 0) continue;
      leave(row_, total_);
      ++row_;
      until_row_ = p_.w.column_blocks;
#pragma unroll
      for (int i = 0; i < 8; ++i) total_[0][i][0] = total_[0][i][1] = 0.0F;
    }
  }

 private:
  // Of column block `block`.
  __device__ __forceinline__ void load_activations(uint2 (&to)[4], int block) {
    if (block < whole_blocks_) {
      const T* const from = x_ + static_cast<int64_t>(block) * fragments::kBlockColumns;
#pragma unroll
      for (int step = 0; step < 4; ++step) to[step] = load_four(from + 16 * step);
      return;
    }
    gather_activations<T>(p_, block, gathered_);
    const T* const from = gathered_ + min(lane_ / 4, p_.m - 1) * fragments::kBlockColumns + lane_ % 4 * 4;
#pragma unroll
    for (int step = 0; step < 4; ++step) to[step] = *reinterpret_cast<const uint2*>(from + 16 * step);
  }

  __device__ __forceinline__ float4* parameters(int step) const {
    return reinterpret_cast<float4*>(decoder_.shared() + kSpqrConstantBytes + step * kSpqrStepBytes);
  }

  // Decodes scales and zero points of the lane's eight rows and one of its two steps for the warp.
  template <int kStep>
  __device__ __forceinline__ void put_parameters() const {
    const int step = lane_ % 4 * 2 + kStep;
#pragma unroll
    for (int unit = 0; unit < fragments::kUnits; ++unit) {
      const float4 c = this->constants(unit, step);
      parameters(step)[unit * 8 + lane_ / 4] =
          make_float4(fmaf(fields_[kStep].raised(false, 2 * unit), c.x, c.y),
                      fmaf(fields_[kStep].raised(false, 2 * unit + 1), c.x, c.y),
                      fmaf(fields_[kStep].raised(true, 2 * unit), c.z, c.w),
                      fmaf(fields_[kStep].raised(true, 2 * unit + 1), c.z, c.w));
    }
  }

  template <int kBlock>
  __device__ __forceinline__ void multiply_block() {
    multiply_step<kBlock, 0>();
    multiply_step<kBlock, 1>();
    multiply_step<kBlock, 2>();
    multiply_step<kBlock, 3>();
  }

  template <int kBlock, int kStep>
  __device__ __forceinline__ void multiply_step() {
    const uint2 b = b_[kBlock][kStep];
    float x_sum[4] = {};
    float start[4] = {};
    this->template add_activations<T>(x_sum, b.x, b.y);
    this->template subtract_offset<T, kStep>(start, b.x, b.y);
    multiply_unit<kBlock, kStep, 0>(b, x_sum, start);
    multiply_unit<kBlock, kStep, 1>(b, x_sum, start);
    multiply_unit<kBlock, kStep, 2>(b, x_sum, start);
    multiply_unit<kBlock, kStep, 3>(b, x_sum, start);
  }

  template <int kBlock, int kStep, int kUnit>
  __device__ __forceinline__ void multiply_unit(uint2 b, const float (&x_sum)[4], const float (&start)[4]) {
    uint32_t a[4];
    this->template fragment<T, kUnit, kStep>(ahead_[kBlock], a);
    float sum[4];
    multiply_add<T>(sum, a, b.x, b.y, start);
    const float4 c = parameters(4 * kBlock + kStep)[kUnit * 8 + lane_ / 4];
#pragma unroll
    for (int token = 0; token < 2; ++token) {
      float& first = total_[0][2 * kUnit][token];
      float& second = total_[0][2 * kUnit + 1][token];
      first = fmaf(c.x, fmaf(c.z, x_sum[token], sum[token]), first);
      second = fmaf(c.y, fmaf(c.w, x_sum[token], sum[2 + token]), second);
    }
  }

  T* gathered_;
  int at_ = 0;  // stretch in its row
  int whole_blocks_ = 0;
  const T* x_ = nullptr;
  uint2 b_[2][4];
  float total_[1][8][2] = {};
};

}  // namespace quantloom::cuda
