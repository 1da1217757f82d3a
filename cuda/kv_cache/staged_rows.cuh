// Any keys and values as float16 in a warp's part of shared memory: one lane decodes one token. Slower than
// decoding in the operands' registers, for the formats that those do not take.
#pragma once

#include "kv_cache/fragments.cuh"

namespace quantloom::kv_cache {

// Where the tokens of a unit are: in a record, in global memory as they are, or nowhere (zeros).
struct UnitTokens {
  const std::byte* record;     // in shared memory
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

__device__ __forceinline__ float2 half_range(const std::byte* from) {
  return __half22float2(*reinterpret_cast<const __half2*>(from));
}

// Decodes the token in `slot` of a record: emit(channel, value) for eight channels at a time, from another
// place in each lane.
template <class Emit>
__device__ __forceinline__ void decode_token(const KVPart& part, const HeadRanges& tables, int head_dim,
                                             const std::byte* record, int slot, Emit emit) {
  const int bits = part.bits;
  const auto group_size = static_cast<int>(part.group);
  const std::byte* row = record + part.codes + slot * static_cast<int>(part.row_bytes);
  const uint32_t mask = (1U << bits) - 1;
  const int half = 1 << (bits - 1);
  const int blocks = head_dim / 8;
  // The number of channel d, whose group within the token is `group`, with this code.
  const auto value_of = [&](int d, int group, int code) {
    if (part.codec == KVCodec::digits) {
      const float scale = __half2float(*reinterpret_cast<const __half*>(record + part.parameters + slot * 2));
      const std::byte* shifts = record + part.shifts + slot * static_cast<int>(part.shift_bytes);
      const int bit = group * part.shift_bits;
      int word = static_cast<int>(shifts[bit / 8]);
      if (bit % 8 + part.shift_bits > 8) word |= static_cast<int>(shifts[bit / 8 + 1]) << 8;
      const int shift = (word >> (bit % 8)) & ((1 << part.shift_bits) - 1);
      return scale * static_cast<float>(((code ^ half) - half) * (1 << shift));
    }
    if (part.codec == KVCodec::channel_table) {
      const float2 range = __half22float2(tables.ranges[d]);
      return fmaf(tables.values[code], range.x, range.y);
    }
    const std::byte* ranges = record + part.parameters;
    if (part.codec == KVCodec::token_table) {
      const float2 range = half_range(ranges + slot * 4);
      return fmaf(tables.values[code], range.x, range.y);
    }
    const int pair = part.codec == KVCodec::channel_grid ? slot / group_size * head_dim + d
                                                         : slot * static_cast<int>(part.groups) + group;
    const float2 range = half_range(ranges + pair * 4);
    return fmaf(static_cast<float>(code), range.x, range.y);
  };
  for (int i = 0; i < blocks; ++i) {
    const int block = (i + static_cast<int>(threadIdx.x)) % blocks;
    const int bit = block * 8 * bits;
    const auto* words = reinterpret_cast<const uint32_t*>(row) + bit / 32;
    uint64_t codes = words[0] | static_cast<uint64_t>(words[1]) << 32;
    codes >>= bit % 32;
    int group = block * 8 / group_size;
    int left = (group + 1) * group_size - block * 8;
#pragma unroll
    for (int j = 0; j < 8; ++j, --left) {
      if (left == 0) ++group, left = group_size;
      emit(block * 8 + j, value_of(block * 8 + j, group, static_cast<int>(codes & mask)));
      codes >>= bits;
    }
  }
  if (part.outlier_share == 0) return;
  const auto before = [&](int s) {
    return static_cast<int>(static_cast<int64_t>(s) * head_dim * part.outlier_share / 10000);
  };
  for (int i = before(slot); i < before(slot + 1); ++i) {
    const auto entry = *reinterpret_cast<const uint32_t*>(record + part.outliers + i * 4);
    const int d = static_cast<int>(entry & 0xFFFFU) - slot * head_dim;
    const int bit = d * bits;
    const auto* words = reinterpret_cast<const uint32_t*>(row) + bit / 32;
    const auto pair = words[0] | static_cast<uint64_t>(bit % 32 + bits > 32 ? words[1] : 0) << 32;
    const auto code = static_cast<int>((pair >> (bit % 32)) & mask);
    emit(d, value_of(d, d / group_size, code) + Halves::high(entry));
  }
}

// Words of a row: pairs of channels and one more, which spreads rows over the banks.
__host__ __device__ constexpr int staged_words(int head_dim) {
  return head_dim / 2 + 1;
}
__host__ __device__ constexpr int staged_bytes(int head_dim) {
  return kUnitTokens * staged_words(head_dim) * 4;
}

// Row of a lane's token: half of channel d at place(d).
template <class Place>
__device__ __forceinline__ void stage_unit(const KVView& view, const KVPart& part, const HeadRanges& tables,
                                           const UnitTokens& tokens, __half* row, Place place) {
  const auto dim = static_cast<int>(view.layout.head_dim);
  const int lane = threadIdx.x % 32;
  const int at = tokens.position + lane;
  if (at >= tokens.coded_begin && at < tokens.coded_end) {
    decode_token(part, tables, dim, tokens.record, tokens.slot + lane,
                 [&](int d, float value) { row[place(d)] = __float2half_rn(value); });
    return;
  }
  const std::byte* exact = tokens.exact_row(view, at);
  for (int d = 0; d < dim; ++d) {
    row[place(d)] = exact == nullptr ? __half(0.0F) : __float2half_rn(cuda::load_float(exact, view.dtype, d));
  }
}

template <int kDim>
struct StagedKeys {
  static constexpr bool kStaged = true;
  static constexpr int kRun = kDim / 8;
  const uint32_t* rows[4];

  // Word d of a row is channels d and d + kDim / 2. All lanes together.
  __device__ __forceinline__ void stage(const KVView& view, const HeadRanges& tables,
                                        const UnitTokens& tokens, std::byte* memory, Lane lane) {
    auto* words = reinterpret_cast<uint32_t*>(memory);
    const int index = threadIdx.x % 32;
    auto* row = reinterpret_cast<__half*>(words + index * staged_words(kDim));
    __syncwarp();
    stage_unit(view, view.layout.keys, tables, tokens, row,
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

  __device__ __forceinline__ void step(int k, uint32_t (&first)[4], uint32_t (&second)[4]) const {
#pragma unroll
    for (int i = 0; i < 2; ++i) {
      first[2 * i] = rows[0][2 * k + i];
      first[2 * i + 1] = rows[1][2 * k + i];
      second[2 * i] = rows[2][2 * k + i];
      second[2 * i + 1] = rows[3][2 * k + i];
    }
  }
};

template <int kDim>
struct StagedValues {
  static constexpr bool kStaged = true;
  static constexpr int kRun = kDim / 8;
  const uint32_t* rows[4];

  __device__ __forceinline__ void stage(const KVView& view, const HeadRanges& tables,
                                        const UnitTokens& tokens, std::byte* memory) {
    auto* words = reinterpret_cast<uint32_t*>(memory);
    auto* row = reinterpret_cast<__half*>(words + threadIdx.x % 32 * staged_words(kDim));
    __syncwarp();
    stage_unit(view, view.layout.values, tables, tokens, row, [](int d) { return d; });
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
