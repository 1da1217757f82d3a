// The walks of one warp through a run of blocks of 64 x 128 signs of all planes: signs come from memory to
// registers, which are the operands of the tensor cores' products.
//
// One token is multiplied on single bits: counts of the signs that are + where a bit of an activation is set
// (bit_digits.cuh), so that no sign is unpacked. With s = +-1 and b = (s + 1) / 2, a group's sum is
// sum_i scale_i (2 b_i x) + (offset - sum_i scale_i) sum(x). More tokens are multiplied on float16 or
// bfloat16, with the signs made +-1.
#pragma once

#include "kernels/bit_digits.cuh"
#include "kernels/fragment_parameters.cuh"
#include "kernels/tile_support.cuh"

namespace quantloom::cuda {

// d = a b on single bits: 16 rows x 128 columns by 128 x 8.
__device__ __forceinline__ void count_bits(uint32_t (&d)[4], uint32_t a0, uint32_t a1, uint32_t b) {
  asm("mma.sync.aligned.m16n8k128.row.col.s32.b1.b1.s32.and.popc {%0, %1, %2, %3}, {%4, %5}, {%6}, "
      "{%7, %7, %7, %7};"
      : "=r"(d[0]), "=r"(d[1]), "=r"(d[2]), "=r"(d[3])
      : "r"(a0), "r"(a1), "r"(b), "r"(0U));
}

// Where a walk is, and its signs and parameters on their way. kFine: groups are no multiples of 128 columns,
// or scales are float32; those are loaded when they are used.
template <int kPlanes, bool kFine>
class BitPlaneRun {
 public:
  explicit __device__ __forceinline__ BitPlaneRun(const BitPlaneLaunch& launch)
      : launch_(launch), lane_(static_cast<int>(threadIdx.x % 32)) {}

  // Asks for the first signs and parameters of blocks [begin, end) of the row blocks from `first_row` on.
  __device__ __forceinline__ void begin(const StreamDeal& deal, int first_row, int begin, int end) {
    left_ = max(end - begin, 0);
    if (left_ == 0) return;
    const FragmentMatrix& w = launch_.arguments.w;
    row_ = static_cast<int>(deal.by_columns.divide(static_cast<uint32_t>(begin)));
    column_ = begin - row_ * w.column_blocks;
    signs_ = w.codes + (static_cast<int64_t>(first_row) * w.column_blocks + begin) * (kPlanes * 64) + lane_;
    ask_all_signs();
    const auto group =
        static_cast<int>(deal.by_group.divide(static_cast<uint32_t>(kFine ? 4 * column_ : column_)));
    const int64_t first = static_cast<int64_t>(first_row + row_) * w.group_count + group;
    if constexpr (!kFine) until_group_ = (group + 1) * (launch_.group_words / 4) - column_;
    parameters_ = static_cast<const uint4*>(w.scales) + first * launch_.parameters * parameter_pieces() +
                  lane_ / 4 * (parameter_pieces() / 8);
    if (w.scale_dtype == DType::f32) return;
#pragma unroll
    for (int plane = 0; plane < kPlanes; ++plane) ask_parameters(plane);
    if (launch_.parameters > kPlanes) ask_parameters(kPlanes);
  }

  __device__ __forceinline__ bool any() const {
    return left_ > 0;
  }
  __device__ __forceinline__ bool more() const {
    return left_ > 1;
  }
  __device__ __forceinline__ bool row_ends() const {
    return left_ == 1 || column_ + 1 == launch_.arguments.w.column_blocks;
  }
  __device__ __forceinline__ int row() const {
    return row_;
  }
  __device__ __forceinline__ int column() const {
    return column_;
  }
  __device__ __forceinline__ const uint4& signs(int plane, int half) const {
    return ring_[plane][half];
  }

  // At the begin of a block: from now on, what is asked for is the next block's.
  __device__ __forceinline__ void turn() {
    signs_ += kPlanes * 64;
    if constexpr (!kFine) {
      if (--until_group_ == 0 || row_ends()) {
        until_group_ = launch_.group_words / 4;
        parameters_ += launch_.parameters * 8;
      }
    }
  }
  __device__ __forceinline__ void ask_signs(int plane, int half) {
    ring_[plane][half] = __ldcs(signs_ + (2 * plane + half) * 32);
  }
  __device__ __forceinline__ void ask_all_signs() {
#pragma unroll
    for (int plane = 0; plane < kPlanes; ++plane) {
      ask_signs(plane, 0);
      ask_signs(plane, 1);
    }
  }
  // Scales of a plane; the offsets are those of plane kPlanes.
  __device__ __forceinline__ void ask_parameters(int plane) {
    raw_[plane] = __ldg(parameters_ + plane * 8);
  }
  // Parameter `i` of the rows lane / 4 + 8 * j.
  __device__ __forceinline__ void parameters(int i, float (&values)[8]) const {
    RawParameters raw;
    raw.scales[0] = raw_[i];
    if (launch_.arguments.w.scale_dtype == DType::f16) {
      raw.all_scales(DType::f16, values);
    } else {
      raw.all_scales(DType::bf16, values);
    }
  }
  // Fine: the next group is `count` further; from now on, the parameters that are asked for are its.
  __device__ __forceinline__ void advance_group(int count) {
    here_ = parameters_;
    parameters_ += static_cast<int64_t>(count) * launch_.parameters * parameter_pieces();
  }
  // The next group from group `group` on, the last that meets this block: 0 if it meets the next as well.
  __device__ __forceinline__ int groups_to_next_block(const Divider& by_group, int group) const {
    const FragmentMatrix& w = launch_.arguments.w;
    if (column_ + 1 == w.column_blocks) return w.group_count - group;
    return static_cast<int>(by_group.divide(static_cast<uint32_t>(4 * column_ + 4))) - group;
  }
  // Fine: parameter `i` of the group; asks for that of the next, if there is one.
  __device__ __forceinline__ void take_parameters(int i, bool more, float (&values)[8]) {
    if (launch_.arguments.w.scale_dtype != DType::f32) {
      parameters(i, values);
      if (more) ask_parameters(i);
      return;
    }
    RawParameters raw;
    raw.scales[0] = __ldg(here_ + i * 16);
    raw.scales[1] = __ldg(here_ + i * 16 + 1);
    raw.all_scales(DType::f32, values);
  }
  // To the next block.
  __device__ __forceinline__ void advance() {
    --left_;
    if (++column_ < launch_.arguments.w.column_blocks) return;
    column_ = 0;
    ++row_;
  }

 private:
  // 16-byte pieces of a row block's parameters of one kind.
  __device__ __forceinline__ int parameter_pieces() const {
    return launch_.arguments.w.scale_dtype == DType::f32 ? 16 : 8;
  }

  const BitPlaneLaunch& launch_;
  int lane_;
  int left_ = 0;
  int row_ = 0;  // row block of the team
  int column_ = 0;
  int until_group_ = 0;
  const uint4* signs_ = nullptr;
  const uint4* parameters_ = nullptr;  // that are asked for next
  const uint4* here_ = nullptr;        // of float32, those in use
  uint4 ring_[kPlanes][2];
  uint4 raw_[kPlanes + 1];
};

// One token.
template <int kPlanes, bool kFine>
class BitPlaneCounts {
 public:
  explicit __device__ __forceinline__ BitPlaneCounts(const BitPlaneLaunch& launch)
      : run_(launch), launch_(launch), lane_(static_cast<int>(threadIdx.x % 32)) {}

  __device__ __forceinline__ void begin(const StreamDeal& deal, int first_row, int begin, int end) {
    run_.begin(deal, first_row, begin, end);
    by_group_ = deal.by_group;
  }

  // After the bits of the activations have been written: calls leave(row, sums) as StreamSums::leave() takes
  // them, for each row block that the walk meets.
  template <class Leave>
  __device__ __forceinline__ void run(const BitDigits& digits, Leave leave) {
    if (!run_.any()) return;
    reader_ = BitDigits::Reader(digits, run_.column(), lane_);
    for (;;) {
      const bool more = run_.more();
      run_.turn();
      if constexpr (kFine) {
        multiply_groups(more);
        if (more) run_.ask_all_signs();
      } else {
        multiply(more);
      }
      reader_.advance();
      const bool row_ends = run_.row_ends();
      if (row_ends) leave_sums(leave);
      if (!more) return;
      run_.advance();
    }
  }

 private:
  // The counts of units 2 * half and 2 * half + 1, of their rows lane / 4 and lane / 4 + 8.
  __device__ __forceinline__ void counts(const uint4& signs, const uint32_t (&x)[3], float (&sums)[4]) const {
    uint32_t c[2][3][4];
#pragma unroll
    for (int product = 0; product < 3; ++product) {
      count_bits(c[0][product], signs.x, signs.y, x[product]);
      count_bits(c[1][product], signs.z, signs.w, x[product]);
    }
    // The last bit of the last lane is that of the sign.
    const uint32_t top = lane_ % 4 == 3 ? ~1U : 2U;
#pragma unroll
    for (int i = 0; i < 4; ++i) {
      const auto& unit = c[i / 2];
      const int at = i % 2 * 2;
      const uint32_t low = unit[0][at] + (unit[0][at + 1] << 1);
      const uint32_t middle = unit[1][at] + (unit[1][at + 1] << 1);
      const uint32_t high = unit[2][at] + unit[2][at + 1] * top;
      sums[i] = static_cast<float>(static_cast<int>(low + (middle << 2) + (high << 4)));
    }
  }

  // Of eight values those of rows 2 * (lane % 4) and the next, whose sums of activations the lane adds.
  __device__ __forceinline__ float own(const float (&values)[8], int i) const {
    const float low = (lane_ & 1) == 0 ? values[i] : values[2 + i];
    const float high = (lane_ & 1) == 0 ? values[4 + i] : values[6 + i];
    return (lane_ & 2) == 0 ? low : high;
  }

  __device__ __forceinline__ void multiply(bool more) {
    const uint32_t x[3] = {reader_.template bits<0>(), reader_.template bits<1>(),
                           reader_.template bits<2>()};
    float sums[8] = {};
    float minus[2] = {};
#pragma unroll
    for (int plane = 0; plane < kPlanes; ++plane) {
      float scales[8];
      run_.parameters(plane, scales);
      if (more) run_.ask_parameters(plane);
#pragma unroll
      for (int half = 0; half < 2; ++half) {
        float four[4];
        counts(run_.signs(plane, half), x, four);
        if (more) run_.ask_signs(plane, half);
#pragma unroll
        for (int i = 0; i < 4; ++i)
          sums[4 * half + i] = fmaf(scales[4 * half + i], four[i], sums[4 * half + i]);
      }
      minus[0] -= own(scales, 0);
      minus[1] -= own(scales, 1);
    }
    if (launch_.parameters > kPlanes) {
      float offsets[8];
      run_.parameters(kPlanes, offsets);
      if (more) run_.ask_parameters(kPlanes);
      minus[0] += own(offsets, 0);
      minus[1] += own(offsets, 1);
    }
    const float unit = reader_.twice_unit();
    const float x_sum = reader_.sum();
#pragma unroll
    for (int i = 0; i < 8; ++i) total_[0][i][0] = fmaf(unit, sums[i], total_[0][i][0]);
    own_[0] = fmaf(minus[0], x_sum, own_[0]);
    own_[1] = fmaf(minus[1], x_sum, own_[1]);
  }

  // The group of 32 columns of the block.
  __device__ __forceinline__ int group_of(int word) const {
    return static_cast<int>(by_group_.divide(static_cast<uint32_t>(4 * run_.column() + word)));
  }

  __device__ __forceinline__ void multiply_groups(bool more) {
    const uint32_t x[3] = {reader_.template bits<0>(), reader_.template bits<1>(),
                           reader_.template bits<2>()};
    const int groups[4] = {group_of(0), group_of(1), group_of(2), group_of(3)};
    const float4 word_sums = reader_.word_sums();
    const int mine = group_of(lane_ % 4);
    // Columns past the last group are padding: activations are 0 there.
    const int last = min(groups[3], launch_.arguments.w.group_count - 1);
    const float unit = reader_.twice_unit();
#pragma unroll 1
    for (int group = groups[0]; group <= last; ++group) {
      const bool next = more || group < last;
      run_.advance_group(group < last ? 1 : run_.groups_to_next_block(by_group_, group));
      const uint32_t mask = mine == group ? ~0U : 0U;
      const uint32_t masked[3] = {x[0] & mask, x[1] & mask, x[2] & mask};
      const float x_sum =
          (groups[0] == group ? word_sums.x : 0.0F) + (groups[1] == group ? word_sums.y : 0.0F) +
          (groups[2] == group ? word_sums.z : 0.0F) + (groups[3] == group ? word_sums.w : 0.0F);
      float sums[8] = {};
      float minus[2] = {};
#pragma unroll
      for (int plane = 0; plane < kPlanes; ++plane) {
        float scales[8];
        run_.take_parameters(plane, next, scales);
#pragma unroll
        for (int half = 0; half < 2; ++half) {
          float four[4];
          counts(run_.signs(plane, half), masked, four);
#pragma unroll
          for (int i = 0; i < 4; ++i) {
            sums[4 * half + i] = fmaf(scales[4 * half + i], four[i], sums[4 * half + i]);
          }
        }
        minus[0] -= own(scales, 0);
        minus[1] -= own(scales, 1);
      }
      if (launch_.parameters > kPlanes) {
        float offsets[8];
        run_.take_parameters(kPlanes, next, offsets);
        minus[0] += own(offsets, 0);
        minus[1] += own(offsets, 1);
      }
#pragma unroll
      for (int i = 0; i < 8; ++i) total_[0][i][0] = fmaf(unit, sums[i], total_[0][i][0]);
      own_[0] = fmaf(minus[0], x_sum, own_[0]);
      own_[1] = fmaf(minus[1], x_sum, own_[1]);
    }
  }

  // Adds up what the lanes' bits are worth.
  template <class Leave>
  __device__ __forceinline__ void leave_sums(Leave leave) {
    const float worth = __int_as_float((127 + lane_ % 4 * 6) << 23);
#pragma unroll
    for (int i = 0; i < 8; ++i) {
      float& sum = total_[0][i][0];
      sum *= worth;
      if (i / 2 == lane_ % 4) sum += own_[i % 2];
      sum += __shfl_xor_sync(~0U, sum, 1);
      sum += __shfl_xor_sync(~0U, sum, 2);
    }
    leave(run_.row(), total_);
#pragma unroll
    for (int i = 0; i < 8; ++i) total_[0][i][0] = 0.0F;
    own_[0] = 0.0F;
    own_[1] = 0.0F;
  }

  BitPlaneRun<kPlanes, kFine> run_;
  const BitPlaneLaunch& launch_;
  int lane_;
  Divider by_group_;
  BitDigits::Reader reader_;
  float total_[1][8][1] = {};
  float own_[2] = {};
};

// Up to 8 * kTiles tokens.
template <class T, int kPlanes, int kTiles, bool kFine>
class BitPlaneHalves {
 public:
  explicit __device__ __forceinline__ BitPlaneHalves(const BitPlaneLaunch& launch)
      : run_(launch), launch_(launch), lane_(static_cast<int>(threadIdx.x % 32)) {}

  __device__ __forceinline__ void begin(const StreamDeal& deal, int first_row, int begin, int end) {
    run_.begin(deal, first_row, begin, end);
    by_group_ = deal.by_group;
    const ProductArguments& p = launch_.arguments;
#pragma unroll
    for (int tile = 0; tile < kTiles; ++tile) {
      // A token past the last is another copy of it, whose sums nobody reads.
      const int token = min(8 * tile + lane_ / 4, p.m - 1);
      x_[tile] = static_cast<const T*>(p.x) + token * p.x_stride;
    }
  }

  // Once the previous kernel's results can be read: calls leave(row, sums) for each row block.
  template <class Leave>
  __device__ __forceinline__ void run(Leave leave) {
    if (!run_.any()) return;
    for (;;) {
      const bool more = run_.more();
      load_activations();
      run_.turn();
      if constexpr (kFine) {
        multiply_groups(more);
        if (more) run_.ask_all_signs();
      } else {
        multiply(more);
      }
      if (run_.row_ends()) {
        leave(run_.row(), total_);
#pragma unroll
        for (int tile = 0; tile < kTiles; ++tile) {
#pragma unroll
          for (int i = 0; i < 8; ++i) {
            total_[tile][i][0] = 0.0F;
            total_[tile][i][1] = 0.0F;
          }
        }
      }
      if (!more) return;
      run_.advance();
    }
  }

 private:
  // The lane's 32 columns of the block, as pairs 16 columns apart: bits i and i + 16 of a word of signs.
  __device__ __forceinline__ void load_activations() {
    const ProductArguments& p = launch_.arguments;
    const int64_t first = static_cast<int64_t>(run_.column()) * bit_planes::kBlockColumns +
                          lane_ % 4 * bit_planes::kWordColumns;
    const int64_t left = p.w.k - first;
#pragma unroll
    for (int tile = 0; tile < kTiles; ++tile) {
      uint4 pieces[4];
#pragma unroll
      for (int i = 0; i < 4; ++i) {
        pieces[i] = make_uint4(0, 0, 0, 0);
        if (!p.x_in_pieces) {
          pieces[i] = gather_eight(p, x_[tile], first + 8 * i);
        } else if (8 * i < left) {
          asm volatile("ld.global.v4.u32 {%0, %1, %2, %3}, [%4];"
                       : "=r"(pieces[i].x), "=r"(pieces[i].y), "=r"(pieces[i].z), "=r"(pieces[i].w)
                       : "l"(x_[tile] + first + 8 * i));
        }
      }
      const uint32_t low[8] = {pieces[0].x, pieces[0].y, pieces[0].z, pieces[0].w,
                               pieces[1].x, pieces[1].y, pieces[1].z, pieces[1].w};
      const uint32_t high[8] = {pieces[2].x, pieces[2].y, pieces[2].z, pieces[2].w,
                                pieces[3].x, pieces[3].y, pieces[3].z, pieces[3].w};
#pragma unroll
      for (int step = 0; step < 8; ++step) {
        b_[tile][step][0] = __byte_perm(low[step], high[step], 0x5410);
        b_[tile][step][1] = __byte_perm(low[step], high[step], 0x7632);
      }
    }
  }

  // +1 or -1 for bits kBit and kBit + 16.
  template <int kBit>
  static __device__ __forceinline__ uint32_t signs_of(uint32_t word) {
    // (~a & b) | c, in one operation.
    uint32_t pair;
    asm("lop3.b32 %0, %1, %2, %3, 0xAE;"
        : "=r"(pair)
        : "r"(word << (15 - kBit)), "r"(0x80008000U), "n"(HalfPair<T>::kOne));
    return pair;
  }

  using Activations = uint32_t[kTiles][8][2];

  template <int kStep>
  static __device__ __forceinline__ void multiply_step(float (&sums)[kTiles][4], uint32_t upper,
                                                       uint32_t lower, const Activations& b) {
    const uint32_t a[4] = {signs_of<2 * kStep>(upper), signs_of<2 * kStep>(lower),
                           signs_of<2 * kStep + 1>(upper), signs_of<2 * kStep + 1>(lower)};
#pragma unroll
    for (int tile = 0; tile < kTiles; ++tile) {
      multiply_accumulate<T>(sums[tile], a, b[tile][kStep][0], b[tile][kStep][1]);
    }
  }

  static __device__ __forceinline__ void multiply_unit(float (&sums)[kTiles][4], uint32_t upper,
                                                       uint32_t lower, const Activations& b) {
    multiply_step<0>(sums, upper, lower, b);
    multiply_step<1>(sums, upper, lower, b);
    multiply_step<2>(sums, upper, lower, b);
    multiply_step<3>(sums, upper, lower, b);
    multiply_step<4>(sums, upper, lower, b);
    multiply_step<5>(sums, upper, lower, b);
    multiply_step<6>(sums, upper, lower, b);
    multiply_step<7>(sums, upper, lower, b);
  }

  // total += factor * sums of rows `i` and i + 1.
  __device__ __forceinline__ void add_scaled(int i, const float* factors, const float (&sums)[kTiles][4]) {
#pragma unroll
    for (int tile = 0; tile < kTiles; ++tile) {
#pragma unroll
      for (int c = 0; c < 2; ++c) {
        total_[tile][i][c] = fmaf(factors[i], sums[tile][c], total_[tile][i][c]);
        total_[tile][i + 1][c] = fmaf(factors[i + 1], sums[tile][2 + c], total_[tile][i + 1][c]);
      }
    }
  }

  __device__ __forceinline__ void multiply_half(int plane, int half, const float (&scales)[8],
                                                const Activations& b) {
    const uint4& signs = run_.signs(plane, half);
    float one[kTiles][4] = {};
    float two[kTiles][4] = {};
    multiply_unit(one, signs.x, signs.y, b);
    multiply_unit(two, signs.z, signs.w, b);
    add_scaled(4 * half, scales, one);
    add_scaled(4 * half + 2, scales, two);
  }

  // Offsets times the sums of the activations.
  __device__ __forceinline__ void add_offsets(const float (&offsets)[8], const Activations& b) {
    float sums[kTiles][4] = {};
    multiply_unit(sums, ~0U, ~0U, b);
#pragma unroll
    for (int i = 0; i < 8; i += 2) add_scaled(i, offsets, sums);
  }

  __device__ __forceinline__ void multiply(bool more) {
#pragma unroll
    for (int plane = 0; plane < kPlanes; ++plane) {
      float scales[8];
      run_.parameters(plane, scales);
      if (more) run_.ask_parameters(plane);
#pragma unroll
      for (int half = 0; half < 2; ++half) {
        multiply_half(plane, half, scales, b_);
        if (more) run_.ask_signs(plane, half);
      }
    }
    if (launch_.parameters > kPlanes) {
      float offsets[8];
      run_.parameters(kPlanes, offsets);
      if (more) run_.ask_parameters(kPlanes);
      add_offsets(offsets, b_);
    }
  }

  // The group of 32 columns of the block.
  __device__ __forceinline__ int group_of(int word) const {
    return static_cast<int>(by_group_.divide(static_cast<uint32_t>(4 * run_.column() + word)));
  }

  __device__ __forceinline__ void multiply_groups(bool more) {
    const int mine = group_of(lane_ % 4);
    // Columns past the last group are padding: activations are 0 there.
    const int last = min(group_of(3), launch_.arguments.w.group_count - 1);
#pragma unroll 1
    for (int group = group_of(0); group <= last; ++group) {
      const bool next = more || group < last;
      run_.advance_group(group < last ? 1 : run_.groups_to_next_block(by_group_, group));
      const uint32_t mask = mine == group ? ~0U : 0U;
      Activations b;
#pragma unroll
      for (int i = 0; i < 16 * kTiles; ++i) b[i / 16][i / 2 % 8][i % 2] = b_[i / 16][i / 2 % 8][i % 2] & mask;
#pragma unroll
      for (int plane = 0; plane < kPlanes; ++plane) {
        float scales[8];
        run_.take_parameters(plane, next, scales);
        multiply_half(plane, 0, scales, b);
        multiply_half(plane, 1, scales, b);
      }
      if (launch_.parameters > kPlanes) {
        float offsets[8];
        run_.take_parameters(kPlanes, next, offsets);
        add_offsets(offsets, b);
      }
    }
  }

  BitPlaneRun<kPlanes, kFine> run_;
  const BitPlaneLaunch& launch_;
  int lane_;
  Divider by_group_;
  const T* x_[kTiles];
  Activations b_;
  float total_[kTiles][8][2] = {};
};

}  // namespace quantloom::cuda
