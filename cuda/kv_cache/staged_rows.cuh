// Any keys and values as rows of float16 in a warp's part of shared memory, from which ldmatrix takes
// operands of mma.m16n8k16: rows of keys as they are, rows of values transposed. For exact tokens, and for
// the formats that are not decoded in the operands' registers.
//
// Channels i and i + head_dim / 2 of keys are in the same registers, so that rotary embeddings turn them
// there: keys by the tokens' offsets in their unit, queries back by the unit's position.
#pragma once

#include "kv_cache/staged_codes.cuh"

namespace quantloom::kv_cache {

// A unit's tokens: the first `coded` are codes in a record, those up to `end` are in global memory as they
// are, and others are zeros.
struct UnitTokens {
  const std::byte* record;
  int slot;      // of the first token in the record
  int position;  // of it in its sequence
  int coded;
  int end;
  const std::byte* exact;  // of the head: [first + window, head_dim]

  // The slot of the unit's first token among those that are exact, and of a token that is.
  __device__ __forceinline__ int exact_begin(const KVView& view) const {
    return position < view.first || view.window == 0 ? position
                                                     : view.first + (position - view.first) % view.window;
  }
  static __device__ __forceinline__ int exact_slot(const KVView& view, int begin, int token) {
    int slot = begin + token;
    if (begin < view.first) return slot;
    while (slot >= view.first + view.window) slot -= view.window;
    return slot;
  }
};

template <class T>
__device__ __forceinline__ T load_record(const std::byte* from) {
  return __ldg(reinterpret_cast<const T*>(from));
}
__device__ __forceinline__ float2 range_of(uint32_t pair) {
  return {Halves::low(pair), Halves::high(pair)};
}

// The shift of a group of digits.
__device__ __forceinline__ int digits_shift(const KVPart& part, const std::byte* record, int slot,
                                            int group) {
  const std::byte* shifts = record + part.shifts + slot * static_cast<int>(part.shift_bytes);
  const int bit = group * part.shift_bits;
  int word = load_record<uint8_t>(shifts + bit / 8);
  if (bit % 8 + part.shift_bits > 8) word |= load_record<uint8_t>(shifts + bit / 8 + 1) << 8;
  return (word >> (bit % 8)) & ((1 << part.shift_bits) - 1);
}

// Eight channels from `first` (a multiple of 8) on of the token in `slot`, from their codes on a grid.
__device__ __forceinline__ void decode_eight(const KVPart& part, int head_dim, const std::byte* record,
                                             int slot, int first, float (&x)[8]) {
  const int bits = part.bits;
  const uint2 eight = eight_codes(record + part.codes + slot * part.row_bytes, first / 8, bits);
  const uint64_t words = static_cast<uint64_t>(eight.y) << 32 | eight.x;
  int codes[8];
#pragma unroll
  for (int j = 0; j < 8; ++j)
    codes[j] = static_cast<int>(static_cast<uint32_t>(words >> (j * bits)) & ((1U << bits) - 1));
  const auto group_size = static_cast<int>(part.group);
  const std::byte* ranges = record + part.parameters;
  if (part.codec == KVCodec::channel_grid) {
    ranges += slot / group_size * head_dim * 4;
#pragma unroll
    for (int j = 0; j < 8; ++j) {
      const ChannelPlace place(bits, head_dim, first + j);
      const auto scale = load_record<unsigned short>(ranges + place.scale);
      const auto least = load_record<unsigned short>(ranges + place.least);
      x[j] = fmaf(static_cast<float>(codes[j]), __half2float(__ushort_as_half(scale)),
                  __half2float(__ushort_as_half(least)));
    }
  } else {
    const bool one_group = group_size % 8 == 0 || part.groups == 1;
    const int group = first / group_size;
    const bool grid = part.codec == KVCodec::token_grid;
    const float scale =
        grid ? 0 : __half2float(__ushort_as_half(load_record<unsigned short>(ranges + slot * 2)));
    const auto range_at = [&](int of) -> float2 {
      if (!grid) return {scale * static_cast<float>(1 << digits_shift(part, record, slot, of)), 0};
      return range_of(load_record<uint32_t>(ranges + (slot * static_cast<int>(part.groups) + of) * 4));
    };
    const int half = grid ? 0 : 1 << (bits - 1);
    float2 range = range_at(group);
#pragma unroll
    for (int j = 0; j < 8; ++j) {
      if (!one_group && j > 0) range = range_at((first + j) / group_size);
      x[j] = fmaf(static_cast<float>((codes[j] ^ half) - half), range.x, range.y);
    }
  }
}

// Eight bfloat16 as float16.
__device__ __forceinline__ uint4 halves_of_bfloats(const uint4& x) {
  using Pair = cuda::HalfPair<__nv_bfloat16>;
  return {halves_of(Pair::low(x.x), Pair::high(x.x)), halves_of(Pair::low(x.y), Pair::high(x.y)),
          halves_of(Pair::low(x.z), Pair::high(x.z)), halves_of(Pair::low(x.w), Pair::high(x.w))};
}

// Eight consecutive elements as float16; the row is aligned to 16 bytes.
__device__ __forceinline__ void exact_halves(const std::byte* row, DType dtype, int channel,
                                             uint32_t (&pairs)[4]) {
  if (dtype == DType::f32) {
    const auto* from = reinterpret_cast<const float4*>(row + channel * 4);
    const float4 a = __ldg(from);
    const float4 b = __ldg(from + 1);
    pairs[0] = halves_of(a.x, a.y), pairs[1] = halves_of(a.z, a.w);
    pairs[2] = halves_of(b.x, b.y), pairs[3] = halves_of(b.z, b.w);
    return;
  }
  uint4 four = __ldg(reinterpret_cast<const uint4*>(row + channel * 2));
  if (dtype == DType::bf16) four = halves_of_bfloats(four);
  pairs[0] = four.x, pairs[1] = four.y, pairs[2] = four.z, pairs[3] = four.w;
}

// Rows of a unit's coded tokens whose record is not copied.
template <int kDim>
__device__ __forceinline__ void decode_rows(const KVPart& part, const UnitTokens& tokens, std::byte* rows) {
  const LaneChunk<kDim> lane;
  lane.template for_tokens<1>(rows, 0, tokens.coded, [&](int token, uint32_t(&pairs)[4]) {
    if (token >= tokens.coded) return;
    float x[8];
    decode_eight(part, kDim, tokens.record, tokens.slot + token, lane.chunk * 8, x);
#pragma unroll
    for (int k = 0; k < 4; ++k) pairs[k] = halves_of(x[2 * k], x[2 * k + 1]);
  });
}

// Rows of a unit's other tokens, in two steps: those of 16 bits are copied as they are, all at once, and what
// remains is done when the copies have arrived.
template <int kDim>
__device__ __forceinline__ void copy_exact(const KVView& view, const UnitTokens& tokens, std::byte* rows) {
  const LaneChunk<kDim> lane;
  if (view.dtype == DType::f32 || !lane.exists()) return;
  const int begin = tokens.exact_begin(view);
  const std::byte* const from = tokens.exact + lane.chunk * 16;
  std::byte* const to = rows + lane.chunk * 16;
#pragma unroll 1
  for (int token = tokens.coded + lane.first; token < kUnitTokens; token += lane.kTokens) {
    std::byte* const row = to + token * staged_row_bytes(kDim);
    if (token < tokens.end) {
      cuda::copy_async(row, from + tokens.exact_slot(view, begin, token) * kDim * 2);
    } else {
      *reinterpret_cast<uint4*>(row) = {0, 0, 0, 0};
    }
  }
}
template <int kDim>
__device__ __forceinline__ void finish_exact(const KVView& view, const UnitTokens& tokens, std::byte* rows) {
  const LaneChunk<kDim> lane;
  if (view.dtype == DType::f32) {
    const int begin = tokens.exact_begin(view);
    lane.template for_tokens<4>(rows, tokens.coded, kUnitTokens, [&](int token, uint32_t(&pairs)[4]) {
      pairs[0] = pairs[1] = pairs[2] = pairs[3] = 0;
      if (token < tokens.coded || token >= tokens.end) return;
      exact_halves(tokens.exact + tokens.exact_slot(view, begin, token) * kDim * 4, DType::f32,
                   lane.chunk * 8, pairs);
    });
  } else if (view.dtype == DType::bf16 && lane.exists()) {
#pragma unroll 2
    for (int token = tokens.coded + lane.first; token < tokens.end; token += lane.kTokens) {
      auto* row = reinterpret_cast<uint4*>(rows + token * staged_row_bytes(kDim) + lane.chunk * 16);
      *row = halves_of_bfloats(*row);
    }
  }
}

// Brings them near beforehand.
template <int kDim>
__device__ __forceinline__ void prefetch_exact(const KVView& view, const UnitTokens& tokens) {
  const int bytes = kDim * (view.dtype == DType::f32 ? 4 : 2);
  const int token = static_cast<int>(threadIdx.x) % 32;
  if (token < tokens.coded || token >= tokens.end) return;
  const std::byte* row = tokens.exact + tokens.exact_slot(view, tokens.exact_begin(view), token) * bytes;
  for (int i = 0; i < bytes; i += 128) asm volatile("prefetch.global.L2 [%0];" ::"l"(row + i));
}

// Exact keys of 16 bits may do without rows: each lane takes runs of channels, as in fragments.cuh.
template <int kDim>
__device__ __forceinline__ bool takes_exact_runs(const KVView& view, const UnitTokens& keys) {
  return kDim % 64 == 0 && kDim <= 128 && keys.coded == 0 && view.dtype != DType::f32 && view.rotated == 0;
}
template <int kDim>
__device__ __forceinline__ void multiply_exact(const KVView& view, const UnitTokens& keys,
                                               const uint32_t* queries, Lane lane, float (&scores)[2][4]) {
  constexpr int kRun = kDim / 8;
  constexpr int kFours = kRun / 8 > 0 ? kRun / 8 : 1;
  const int begin = keys.exact_begin(view);
#pragma unroll
  for (int tile = 0; tile < 2; ++tile) {
    uint4 runs[2][2][kFours];  // of row g or g + 8, of the lower or the upper half
#pragma unroll
    for (int row = 0; row < 2; ++row) {
      const int token = 16 * tile + 8 * row + lane.g;
      const int slot = token < keys.end ? keys.exact_slot(view, begin, token) : 0;
      const std::byte* from = keys.exact + (slot * kDim + lane.t * kRun) * 2;
#pragma unroll
      for (int half = 0; half < 2; ++half) {
#pragma unroll
        for (int i = 0; i < kFours; ++i) {
          uint4& four = runs[row][half][i];
          four = {0, 0, 0, 0};
          if (token < keys.end) four = __ldg(reinterpret_cast<const uint4*>(from + half * kDim) + i);
        }
      }
    }
    if (view.dtype == DType::bf16) {
#pragma unroll
      for (int i = 0; i < 4 * kFours; ++i) {
        uint4& four = runs[i / (2 * kFours)][i / kFours % 2][i % kFours];
        four = halves_of_bfloats(four);
      }
    }
#pragma unroll
    for (int k = 0; k < kRun / 2; ++k) {
      const auto two = *reinterpret_cast<const uint2*>(queries + lane.t * kRun + 2 * k);
      const auto word = [&](const uint4& four) {
        return k % 4 == 0 ? four.x : k % 4 == 1 ? four.y : k % 4 == 2 ? four.z : four.w;
      };
      const uint32_t a[4] = {word(runs[0][0][k / 4]), word(runs[1][0][k / 4]), word(runs[0][1][k / 4]),
                             word(runs[1][1][k / 4])};
      cuda::multiply_accumulate<__half>(scores[tile], a, low_halves(two.x, two.y), high_halves(two.x, two.y));
    }
  }
}

// Rotary embeddings of a unit's rows: lanes take the channels of one token after the other.
template <int kDim>
__device__ __forceinline__ void rotate_rows(const KVView& view, const UnitTokens& tokens, std::byte* rows) {
  const auto half = static_cast<int>(view.rotated / 2);
  for (int token = 0; token < tokens.end; ++token) {
    auto* row = reinterpret_cast<__half*>(rows + token * staged_row_bytes(kDim));
    const int64_t from = static_cast<int64_t>(tokens.position + token) * half;
    for (int i = static_cast<int>(threadIdx.x) % 32; i < half; i += 32) {
      const float a = __half2float(row[i]);
      const float b = __half2float(row[half + i]);
      const float c = view.cosines[from + i];
      const float s = view.sines[from + i];
      row[i] = __float2half_rn(a * c - b * s);
      row[half + i] = __float2half_rn(b * c + a * s);
    }
  }
  __syncwarp();
}

// Cosines and sines of the offsets in a unit, as rows: those of channel i at i and i + kDim / 2. Tables may
// be scaled; the scale is left to the unit's position.
template <int kDim>
__device__ __forceinline__ void fill_turns(const KVView& view, std::byte* rows) {
  constexpr int kHalf = kDim / 2;
  for (int i = static_cast<int>(threadIdx.x); i < kUnitTokens * kHalf; i += static_cast<int>(blockDim.x)) {
    const int token = i / kHalf;
    const int d = i % kHalf;
    const float c = view.cosines[i];
    const float s = view.sines[i];
    const float first_c = view.cosines[d];
    const float first_s = view.sines[d];
    const float scale = 1.0F / (first_c * first_c + first_s * first_s);
    auto* row = reinterpret_cast<__half*>(rows + token * staged_row_bytes(kDim));
    row[d] = __float2half_rn((c * first_c + s * first_s) * scale);
    row[kHalf + d] = __float2half_rn((s * first_c - c * first_s) * scale);
  }
}

__device__ __forceinline__ uint32_t negative(uint32_t pair) {
  const __half2 result = __hneg2(*reinterpret_cast<const __half2*>(&pair));
  return *reinterpret_cast<const uint32_t*>(&result);
}

// Adds the products of rows of keys with queries, whose word i is channels i and i + kDim / 2. If they are
// turned, `turns` are those of the offsets in a unit, and `position` its cosines and sines [2, kDim / 2].
template <bool kTurned, int kDim>
__device__ __forceinline__ void multiply_keys(const std::byte* rows, const std::byte* turns,
                                              const std::byte* position, const uint32_t* queries, Lane lane,
                                              float (&scores)[2][4]) {
  constexpr int kHalf = kDim / 2;
  const int index = lane.g * 4 + lane.t;
  const int offset = (index / 8 % 2 * 8 + index % 8) * staged_row_bytes(kDim) + index / 16 * kDim;
  const auto* cosines = reinterpret_cast<const float2*>(position);
  const auto* sines = cosines + kHalf / 2;
#pragma unroll
  for (int b = 0; b < kDim / 16; ++b) {
    const auto two = *reinterpret_cast<const uint2*>(queries + 8 * b + 2 * lane.t);
    uint32_t low = low_halves(two.x, two.y);
    uint32_t high = high_halves(two.x, two.y);
    if constexpr (kTurned) {
      const float2 c = cosines[4 * b + lane.t];
      const float2 s = sines[4 * b + lane.t];
      const float2 x = {Halves::low(low), Halves::high(low)};
      const float2 y = {Halves::low(high), Halves::high(high)};
      low = halves_of(c.x * x.x + s.x * y.x, c.y * x.y + s.y * y.y);
      high = halves_of(c.x * y.x - s.x * x.x, c.y * y.y - s.y * x.y);
    }
#pragma unroll
    for (int tile = 0; tile < 2; ++tile) {
      const int at = offset + tile * 16 * staged_row_bytes(kDim) + b * 16;
      uint32_t a[4];
      cuda::load_matrices(a, rows + at);
      if constexpr (kTurned) {
        uint32_t turn[4];
        cuda::load_matrices(turn, turns + at);
#pragma unroll
        for (int i = 0; i < 2; ++i) {
          const uint32_t x = a[i];
          const uint32_t y = a[2 + i];
          a[i] = Halves::multiply_add(y, negative(turn[2 + i]), Halves::multiply(x, turn[i]));
          a[2 + i] = Halves::multiply_add(x, turn[2 + i], Halves::multiply(y, turn[i]));
        }
      }
      cuda::multiply_accumulate<__half>(scores[tile], a, low, high);
    }
  }
}

// Adds the rows of values with their weights.
template <int kDim>
__device__ __forceinline__ void multiply_rows(const std::byte* rows, const uint32_t (&weights)[2][2],
                                              Lane lane, float (&outputs)[kDim / 16][4]) {
  const int index = lane.g * 4 + lane.t;
  const int offset = (index / 16 * 8 + index % 8) * staged_row_bytes(kDim) + index / 8 % 2 * 16;
#pragma unroll
  for (int tile = 0; tile < 2; ++tile) {
#pragma unroll
    for (int j = 0; j < kDim / 16; ++j) {
      uint32_t a[4];
      cuda::load_transposed(a, rows + offset + tile * 16 * staged_row_bytes(kDim) + j * 32);
      cuda::multiply_accumulate<__half>(outputs[j], a, weights[tile][0], weights[tile][1]);
    }
  }
}

// Calls emit(channel, column c, sums of two neighbouring channels): rows g and g + 8 of tile j are channels
// 16 j + g and 16 j + 8 + g, of which neighbouring lanes exchange one. Other columns than `rows` are
// nobody's.
template <int kDim, class Emit>
__device__ __forceinline__ void for_row_sums(const float (&outputs)[kDim / 16][4], int rows, Lane lane,
                                             Emit emit) {
  const bool odd = lane.g % 2 != 0;
#pragma unroll
  for (int j = 0; j < kDim / 16; ++j) {
#pragma unroll
    for (int c = 0; c < 2; ++c) {
      const float other = __shfl_xor_sync(0xFFFFFFFFU, odd ? outputs[j][c] : outputs[j][2 + c], 4);
      const float2 two = odd ? float2{other, outputs[j][2 + c]} : float2{outputs[j][c], other};
      if (2 * lane.t + c < rows) emit(16 * j + (odd ? 7 + lane.g : lane.g), c, two);
    }
  }
}

// A warp's part of shared memory: rows, the cosines and sines of a unit's position, a unit of keys and one of
// values.
template <int kDim>
struct StagedMemory {
  int position;
  int keys;
  int values;
  int bytes;

  __host__ __device__ explicit StagedMemory(const KVLayout& layout)
      : position(whole_lines(staged_bytes(kDim))),
        keys(position + whole_lines(kDim * 4)),
        values(keys + whole_lines(staged_unit_bytes(layout, layout.keys))),
        bytes(values + whole_lines(staged_unit_bytes(layout, layout.values))) {}
};

// What a block's warps share: tables of pairs of codes of keys and of values, turns of the offsets in a unit.
template <int kDim>
struct StagedTables {
  int pairs[2];
  int turns;
  int bytes;

  __host__ __device__ explicit StagedTables(const KVLayout& layout) {
    const bool tables = layout.keys.has_table();
    pairs[0] = 0;
    pairs[1] = (tables ? pair_table_bytes(layout.keys.bits) : 0);
    turns = pairs[1] + (tables ? pair_table_bytes(layout.values.bits) : 0);
    bytes = turns + (tables ? staged_bytes(kDim) : 0);
  }
};

// Whether keys are turned in registers.
template <int kDim>
__host__ __device__ inline bool turns_in_registers(const KVView& view) {
  return view.rotated == kDim && view.composes;
}

// How queries lie in shared memory for products with rows: word i of one is channels i and i + head_dim / 2.
template <int kDim>
struct RowQueries {
  static constexpr int kPairDistance = kDim / 2;
  static constexpr int kQueryWords = kDim / 2 + 4;

  static __device__ __forceinline__ int place(int word) { return word; }
  static __device__ __forceinline__ int channel(int word) { return word; }
};

// What a kernel by rows attends to: caches of any format, or the rest of those whose codes are decoded in
// registers, which has no tables.
struct AnyRows {
  static constexpr bool kTables = true;
};
struct RestRows {
  static constexpr bool kTables = false;
};

template <class Rows>
constexpr bool has_tables = [] {
  if constexpr (requires { Rows::kTables; }) return Rows::kTables;
  return false;
}();

// By a whole block, before it synchronizes.
template <int kDim>
__device__ __forceinline__ void fill_tables(const KVView& view, std::byte* memory) {
  if (!view.layout.keys.has_table()) return;
  const StagedTables<kDim> at(view.layout);
  fill_pair_table(view.layout.keys.bits, view.key_values, reinterpret_cast<uint32_t*>(memory + at.pairs[0]));
  fill_pair_table(view.layout.values.bits, view.value_values,
                  reinterpret_cast<uint32_t*>(memory + at.pairs[1]));
  if (turns_in_registers<kDim>(view)) fill_turns<kDim>(view, memory + at.turns);
}

}  // namespace quantloom::kv_cache
