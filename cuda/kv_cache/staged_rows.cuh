// Any keys and values as float16 in a warp's part of shared memory: one lane decodes one token. Slower than
// decoding in the operands' registers: for exact tokens, and for the formats that those do not take.
#pragma once

#include "kv_cache/fragments.cuh"

namespace quantloom::kv_cache {

// Where the tokens of a unit are: in a record, in global memory as they are, or nowhere (zeros).
struct UnitTokens {
  const std::byte* record;     // in global memory
  int slot;                    // of the first token
  int position;                // of it in its sequence
  int coded_begin, coded_end;  // positions of tokens that are codes
  int exact_end;               // positions from here on have no token here
  const std::byte* exact;      // of the head: [first + window, head_dim]

  // The exact token at a position, or null.
  __device__ __forceinline__ const std::byte* exact_row(const KVView& view, int at) const {
    if (at >= exact_end || (at >= coded_begin && at < coded_end)) return nullptr;
    const int slot_of = at < view.first ? at : view.first + (at - view.first) % view.window;
    return exact + slot_of * static_cast<int>(view.layout.head_dim) * (view.dtype == DType::f32 ? 4 : 2);
  }
};

// What tables of kvquant give a head.
struct HeadRanges {
  const float* values;    // [2^bits]
  const __half2* ranges;  // (scale, middle) [head_dim]: of keys
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

// Eight channels from `first` (a multiple of 8) on of the token in `slot`, from their codes.
__device__ __forceinline__ void decode_eight(const KVPart& part, const HeadRanges& tables, int head_dim,
                                             const std::byte* record, int slot, int first, float (&x)[8]) {
  const int bits = part.bits;
  const int bit = first * bits;
  const std::byte* row = record + part.codes + slot * static_cast<int>(part.row_bytes) + bit / 32 * 4;
  const uint64_t words = load_record<uint32_t>(row) | static_cast<uint64_t>(load_record<uint32_t>(row + 4))
                                                          << 32;
  const uint64_t shifted = words >> (bit % 32);
  int codes[8];
#pragma unroll
  for (int j = 0; j < 8; ++j)
    codes[j] = static_cast<int>(static_cast<uint32_t>(shifted >> (j * bits)) & ((1U << bits) - 1));
  const auto group_size = static_cast<int>(part.group);
  const std::byte* ranges = record + part.parameters;
  if (part.codec == KVCodec::channel_grid || part.codec == KVCodec::channel_table) {
    const bool grid = part.codec == KVCodec::channel_grid;
    const auto* from =
        grid ? reinterpret_cast<const uint4*>(ranges + (slot / group_size * head_dim + first) * 4)
             : reinterpret_cast<const uint4*>(tables.ranges + first);
    const uint4 a = __ldg(from);
    const uint4 b = __ldg(from + 1);
    const uint32_t pairs[8] = {a.x, a.y, a.z, a.w, b.x, b.y, b.z, b.w};
#pragma unroll
    for (int j = 0; j < 8; ++j) {
      const float2 range = range_of(pairs[j]);
      x[j] = fmaf(grid ? static_cast<float>(codes[j]) : tables.values[codes[j]], range.x, range.y);
    }
  } else if (part.codec == KVCodec::token_table) {
    const float2 range = range_of(load_record<uint32_t>(ranges + slot * 4));
#pragma unroll
    for (int j = 0; j < 8; ++j) x[j] = fmaf(tables.values[codes[j]], range.x, range.y);
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

// Adds the outliers of the token in `slot`: emit(channel, value).
template <class Emit>
__device__ __forceinline__ void decode_outliers(const KVPart& part, const HeadRanges& tables, int head_dim,
                                                const std::byte* record, int slot, Emit emit) {
  const auto before = [&](int s) {
    return static_cast<int>(static_cast<int64_t>(s) * head_dim * part.outlier_share / 10000);
  };
  for (int i = before(slot); i < before(slot + 1); ++i) {
    const auto entry = load_record<uint32_t>(record + part.outliers + i * 4);
    const int d = static_cast<int>(entry & 0xFFFFU) - slot * head_dim;
    float eight[8];
    decode_eight(part, tables, head_dim, record, slot, d / 8 * 8, eight);
    float value = 0;
#pragma unroll
    for (int j = 0; j < 8; ++j) value = d % 8 == j ? eight[j] : value;
    emit(d, value + Halves::high(entry));
  }
}

// Eight consecutive elements as float16; the row is aligned to 16 bytes.
__device__ __forceinline__ void exact_halves(const std::byte* row, DType dtype, int channel,
                                             uint32_t (&pairs)[4]) {
  const auto pair_of = [](float a, float b) {
    const __half2 pair = __floats2half2_rn(a, b);
    return *reinterpret_cast<const uint32_t*>(&pair);
  };
  if (dtype == DType::f32) {
    const auto* from = reinterpret_cast<const float4*>(row + channel * 4);
    const float4 a = __ldg(from);
    const float4 b = __ldg(from + 1);
    pairs[0] = pair_of(a.x, a.y), pairs[1] = pair_of(a.z, a.w);
    pairs[2] = pair_of(b.x, b.y), pairs[3] = pair_of(b.z, b.w);
    return;
  }
  const uint4 four = __ldg(reinterpret_cast<const uint4*>(row + channel * 2));
  pairs[0] = four.x, pairs[1] = four.y, pairs[2] = four.z, pairs[3] = four.w;
  if (dtype == DType::f16) return;
  using Pair = cuda::HalfPair<__nv_bfloat16>;
#pragma unroll
  for (uint32_t& pair : pairs) pair = pair_of(Pair::low(pair), Pair::high(pair));
}

// Words of a row: pairs of channels and one more, which spreads rows over the banks.
__host__ __device__ constexpr int staged_words(int head_dim) {
  return head_dim / 2 + 1;
}
__host__ __device__ constexpr int staged_bytes(int head_dim) {
  return kUnitTokens * staged_words(head_dim) * 4;
}

// Row of a lane's token: half of channel d at place(d).
template <int kDim, class Place>
__device__ __forceinline__ void stage_unit(const KVView& view, const KVPart& part, const HeadRanges& tables,
                                           const UnitTokens& tokens, __half* row, Place place) {
  const int lane = threadIdx.x % 32;
  const int at = tokens.position + lane;
  if (at >= tokens.coded_begin && at < tokens.coded_end) {
    const int slot = tokens.slot + lane;
#pragma unroll 4
    for (int d = 0; d < kDim; d += 8) {
      float x[8];
      decode_eight(part, tables, kDim, tokens.record, slot, d, x);
#pragma unroll
      for (int j = 0; j < 8; ++j) row[place(d + j)] = __float2half_rn(x[j]);
    }
    if (part.outlier_share > 0) {
      decode_outliers(part, tables, kDim, tokens.record, slot,
                      [&](int d, float value) { row[place(d)] = __float2half_rn(value); });
    }
    return;
  }
  const std::byte* exact = tokens.exact_row(view, at);
#pragma unroll 8
  for (int d = 0; d < kDim; d += 8) {
    uint32_t pairs[4] = {};
    if (exact != nullptr) exact_halves(exact, view.dtype, d, pairs);
#pragma unroll
    for (int i = 0; i < 4; ++i) {
      row[place(d + 2 * i)] = __ushort_as_half(static_cast<unsigned short>(pairs[i]));
      row[place(d + 2 * i + 1)] = __ushort_as_half(static_cast<unsigned short>(pairs[i] >> 16));
    }
  }
}

template <int kDim>
struct StagedKeys {
  static constexpr int kRun = kDim / 8;
  const uint32_t* rows[4];

  // Word d of a row is channels d and d + kDim / 2. All lanes together.
  __device__ __forceinline__ void stage(const KVView& view, const HeadRanges& tables,
                                        const UnitTokens& tokens, std::byte* memory, Lane lane) {
    auto* words = reinterpret_cast<uint32_t*>(memory);
    const int index = threadIdx.x % 32;
    auto* row = reinterpret_cast<__half*>(words + index * staged_words(kDim));
    __syncwarp();
    stage_unit<kDim>(view, view.layout.keys, tables, tokens, row,
                     [](int d) { return d < kDim / 2 ? 2 * d : 2 * (d - kDim / 2) + 1; });
    __syncwarp();
    if (view.rotated > 0) rotate(view, tokens, words, index);
#pragma unroll
    for (int i = 0; i < 4; ++i)
      rows[i] = words + (token_of_row(lane.g) + 8 * i) * staged_words(kDim) + lane.t * kRun;
  }

  // Rotary embeddings: lanes take the channels of one token after the other.
  static __device__ __forceinline__ void rotate(const KVView& view, const UnitTokens& tokens, uint32_t* words,
                                                int lane) {
    const auto half = static_cast<int>(view.rotated / 2);
    const auto at = [](int d) { return d < kDim / 2 ? 2 * d : 2 * (d - kDim / 2) + 1; };
    for (int token = 0; token < kUnitTokens && tokens.position + token < tokens.exact_end; ++token) {
      auto* row = reinterpret_cast<__half*>(words + token * staged_words(kDim));
      const int64_t from = static_cast<int64_t>(tokens.position + token) * half;
      for (int i = lane; i < half; i += 32) {
        const float a = __half2float(row[at(i)]);
        const float b = __half2float(row[at(half + i)]);
        const float c = view.cosines[from + i];
        const float s = view.sines[from + i];
        row[at(i)] = __float2half_rn(a * c - b * s);
        row[at(half + i)] = __float2half_rn(b * c + a * s);
      }
    }
    __syncwarp();
  }

  __device__ __forceinline__ void multiply(const uint32_t* row, float (&scores)[2][4]) const {
#pragma unroll
    for (int k = 0; k < kDim / 16; ++k) {
      const auto query = *reinterpret_cast<const uint2*>(row + 2 * k);
#pragma unroll
      for (int tile = 0; tile < 2; ++tile) {
        uint32_t a[4];
#pragma unroll
        for (int i = 0; i < 4; ++i) a[i] = rows[2 * tile + i % 2][2 * k + i / 2];
        cuda::multiply_accumulate<__half>(scores[tile], a, query.x, query.y);
      }
    }
  }
};

template <int kDim>
struct StagedValues {
  static constexpr int kRun = kDim / 8;
  const uint32_t* rows[4];

  __device__ __forceinline__ void stage(const KVView& view, const HeadRanges& tables,
                                        const UnitTokens& tokens, std::byte* memory) {
    auto* words = reinterpret_cast<uint32_t*>(memory);
    auto* row = reinterpret_cast<__half*>(words + threadIdx.x % 32 * staged_words(kDim));
    __syncwarp();
    stage_unit<kDim>(view, view.layout.values, tables, tokens, row, [](int d) { return d; });
    __syncwarp();
  }
  // The tile of tokens from `token` of the unit on.
  __device__ __forceinline__ void load(const std::byte* memory, int token, Lane lane) {
    const auto* words = reinterpret_cast<const uint32_t*>(memory);
#pragma unroll
    for (int i = 0; i < 4; ++i)
      rows[i] = words + (token + lane.t + 4 * i) * staged_words(kDim) + lane.g * kRun / 2;
  }
  __device__ __forceinline__ void step(int j, uint32_t (&a)[4]) const {
#pragma unroll
    for (int i = 0; i < 2; ++i) {
      a[2 * i] = low_halves(rows[2 * i][j], rows[2 * i + 1][j]);
      a[2 * i + 1] = high_halves(rows[2 * i][j], rows[2 * i + 1][j]);
    }
  }
};

}  // namespace quantloom::kv_cache
