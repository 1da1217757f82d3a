// Units of coded keys or values for the path by rows (staged_rows.cuh): a warp copies a unit's part of a
// record into shared memory while it works on the one before, and decodes it eight channels of a token at a
// time.
#pragma once

#include "kv_cache/code_matrices.cuh"

namespace quantloom::kv_cache {

// Rows of float16 of a unit's tokens, which begin in different banks.
__host__ __device__ constexpr int staged_row_bytes(int head_dim) {
  return head_dim * 2 + 16;
}
__host__ __device__ constexpr int staged_bytes(int head_dim) {
  return kUnitTokens * staged_row_bytes(head_dim);
}

// Whether units of keys or values are copied: they do not cross pages, and eight channels share a range.
__host__ __device__ inline bool copies_units(const KVLayout& layout, const KVPart& part) {
  if (layout.page_tokens % kUnitTokens != 0) return false;
  if (part.codec == KVCodec::channel_grid) return part.group % kUnitTokens == 0;
  return part.has_table() || part.group % 8 == 0 || part.groups == 1;
}

// Outliers of the tokens in slots before this one, of which a page has few.
__host__ __device__ inline int outliers_before(const KVPart& part, int head_dim, int slot) {
  return slot * head_dim * static_cast<int>(part.outlier_share) / 10000;
}

// Where the parameters of a copied unit lie behind its codes, and its outliers behind those.
__host__ __device__ inline int unit_parameters(const KVPart& part) {
  return kUnitTokens * static_cast<int>(part.row_bytes);
}
__host__ __device__ inline int unit_outliers(const KVLayout& layout, const KVPart& part) {
  const int at = unit_parameters(part);
  switch (part.codec) {
    case KVCodec::channel_grid:
      return at + static_cast<int>(layout.head_dim) * 4;
    case KVCodec::token_grid:
      return at + GridRanges::unit_bytes(part);
    case KVCodec::digits:
      return at + DigitRanges::unit_bytes(part);
    case KVCodec::channel_table:
      return at;
    default:
      return at + kUnitTokens * 4;
  }
}
// All of it: outliers begin up to twelve bytes after a multiple of 16, and what is decoded together may be
// read up to eight bytes beyond the codes.
__host__ __device__ inline int staged_unit_bytes(const KVLayout& layout, const KVPart& part) {
  if (!copies_units(layout, part)) return 0;
  const int most = outliers_before(part, static_cast<int>(layout.head_dim), kUnitTokens) + 1;
  return (unit_outliers(layout, part) + (part.outlier_share > 0 ? most * 4 + 12 : 8) + 15) / 16 * 16;
}

// Begins to copy a multiple of 16 bytes.
__device__ __forceinline__ void copy_bytes(std::byte* to, const std::byte* from, int bytes) {
#pragma unroll 1
  for (int i = static_cast<int>(threadIdx.x) % 32 * 16; i < bytes; i += 32 * 16)
    cuda::copy_async(to + i, from + i);
}

// A unit's outliers in a record: from a multiple of 16 bytes on, and how many before its own.
struct UnitOutliers {
  int begin;
  int skipped;
  int count;

  __device__ __forceinline__ UnitOutliers(const KVPart& part, int head_dim, int slot, int tokens) {
    const int first = outliers_before(part, head_dim, slot);
    skipped = first % 4;
    begin = static_cast<int>(part.outliers) + (first - skipped) * 4;
    count = outliers_before(part, head_dim, slot + tokens) - first;
  }
};

// Begins to copy the unit in the slots from `slot` on.
template <int kDim>
__device__ __forceinline__ void copy_unit(const KVLayout& layout, const KVPart& part, const std::byte* record,
                                          int slot, std::byte* to) {
  const auto row_bytes = static_cast<int>(part.row_bytes);
  copy_bytes(to, record + part.codes + slot * row_bytes, kUnitTokens * row_bytes);
  std::byte* parameters = to + unit_parameters(part);
  const std::byte* from = record + part.parameters;
  switch (part.codec) {
    case KVCodec::channel_grid:
      copy_bytes(parameters, from + slot / static_cast<int>(part.group) * kDim * 4, kDim * 4);
      break;
    case KVCodec::token_grid:
      copy_bytes(parameters, from + slot * static_cast<int>(part.groups) * 4, GridRanges::unit_bytes(part));
      break;
    case KVCodec::digits:
      copy_bytes(parameters, from + slot * 2, kUnitTokens * 2);
      copy_bytes(parameters + kUnitTokens * 2, record + part.shifts + slot * part.shift_bytes,
                 kUnitTokens * static_cast<int>(part.shift_bytes));
      break;
    case KVCodec::token_table:
      copy_bytes(parameters, from + slot * 4, kUnitTokens * 4);
      break;
    default:
      break;
  }
  if (part.outlier_share == 0) return;
  const UnitOutliers outliers(part, kDim, slot, kUnitTokens);
  copy_bytes(to + unit_outliers(layout, part), record + outliers.begin,
             (outliers.skipped + outliers.count + 3) / 4 * 16);
}

// The values of two codes, first the lower one's, in copies that keep lanes apart: entry i of a lane is word
// i * kCopies + lane % kCopies.
template <int kBits>
struct PairTable {
  static constexpr int kCopies = kBits == 4 ? 4 : kBits == 3 ? 16 : 32;
  static constexpr int kEntries = 1 << (2 * kBits);

  static __device__ __forceinline__ void fill(const float* values, uint32_t* words) {
    for (int i = static_cast<int>(threadIdx.x); i < kEntries * kCopies; i += static_cast<int>(blockDim.x)) {
      const int entry = i / kCopies;
      const __half2 pair = __floats2half2_rn(values[entry % (1 << kBits)], values[entry >> kBits]);
      words[i] = *reinterpret_cast<const uint32_t*>(&pair);
    }
  }
  // Of codes 2 k and 2 k + 1 of eight; `table` is the lane's first entry.
  static __device__ __forceinline__ uint32_t at(const std::byte* table, uint32_t eight, int k) {
    const uint32_t entry =
        kBits == 4 ? __byte_perm(eight, 0, 0x4440 + k) : (eight >> (2 * kBits * k)) & (kEntries - 1);
    return *reinterpret_cast<const uint32_t*>(table + entry * (kCopies * 4));
  }
};
__host__ __device__ inline int pair_table_bytes(int bits) {
  const int copies = bits == 4   ? PairTable<4>::kCopies
                     : bits == 3 ? PairTable<3>::kCopies
                                 : PairTable<1>::kCopies;
  return (1 << (2 * bits)) * copies * 4;
}
__device__ __forceinline__ void fill_pair_table(int bits, const float* values, uint32_t* words) {
  switch (bits) {
    case 1:
      return PairTable<1>::fill(values, words);
    case 2:
      return PairTable<2>::fill(values, words);
    case 3:
      return PairTable<3>::fill(values, words);
    default:
      return PairTable<4>::fill(values, words);
  }
}
// Eight codes of a row from code 8 * chunk on, the first in the lowest bits.
__device__ __forceinline__ uint2 eight_codes(const std::byte* row, int chunk, int bits) {
  const int byte = chunk * bits;
  const auto* words = reinterpret_cast<const uint32_t*>(row) + byte / 4;
  const int bit = byte % 4 * 8;
  const int end = bit + 8 * bits;
  const uint32_t next = end > 32 ? words[1] : 0;
  const uint32_t last = end > 64 ? words[2] : 0;
  return {__funnelshift_r(words[0], next, bit), __funnelshift_r(next, last, bit)};
}

// Codes 2 k and 2 k + 1 of eight as numbers, with the bits of `flip` flipped before.
__device__ __forceinline__ uint32_t code_numbers(uint2 eight, int k, int bits, uint32_t flip) {
  const uint64_t two = (static_cast<uint64_t>(eight.y) << 32 | eight.x) >> (2 * k * bits);
  const uint32_t mask = (1U << bits) - 1;
  const auto low = static_cast<uint32_t>(two);
  const uint32_t pair = (low & mask) | (low >> bits & mask) << 16;
  return Halves::add((pair ^ flip) | Halves::kInteger, Halves::kBoth<-1024.0F>);
}

// Scales and least (or middle) values of eight channels, in pairs.
struct ChunkRanges {
  uint32_t scales[4];
  uint32_t leasts[4];

  // Of (scale, middle) for each channel.
  __device__ __forceinline__ void load(const void* from) {
    const auto* fours = static_cast<const uint4*>(from);
    const uint4 a = fours[0];
    const uint4 b = fours[1];
    scales[0] = low_halves(a.x, a.y), leasts[0] = high_halves(a.x, a.y);
    scales[1] = low_halves(a.z, a.w), leasts[1] = high_halves(a.z, a.w);
    scales[2] = low_halves(b.x, b.y), leasts[2] = high_halves(b.x, b.y);
    scales[3] = low_halves(b.z, b.w), leasts[3] = high_halves(b.z, b.w);
  }
  // Of channels from 8 * chunk on, as keys by channel have them.
  __device__ __forceinline__ void load_channels(const std::byte* from, int bits, int head_dim, int chunk) {
    // ChannelPlace without divisions.
    const bool windows = has_code_windows(bits, head_dim);
    const int shift = bits == 8 ? 1 : 4 - bits / 2;  // 16 / bits is 2^shift
    uint32_t halves[2][8];
#pragma unroll
    for (int i = 0; i < 8; ++i) {
      const int channel = 8 * chunk + i;
      const int in_word = channel & ((2 << shift) - 1);
      const int in_order = (in_word & ((1 << shift) - 1)) * 2 + (in_word >> shift);
      const int scale = windows ? (channel - in_word) * 4 + in_order * 2 : channel * 4;
      halves[0][i] = *reinterpret_cast<const uint16_t*>(from + scale);
      halves[1][i] = *reinterpret_cast<const uint16_t*>(from + scale + (windows ? 4 << shift : 2));
    }
#pragma unroll
    for (int k = 0; k < 4; ++k) {
      scales[k] = low_halves(halves[0][2 * k], halves[0][2 * k + 1]);
      leasts[k] = low_halves(halves[1][2 * k], halves[1][2 * k + 1]);
    }
  }
  // Of one for all.
  __device__ __forceinline__ void spread(uint32_t range) {
#pragma unroll
    for (int k = 0; k < 4; ++k) scales[k] = low_halves(range, range), leasts[k] = high_halves(range, range);
  }
};

// The chunks of eight channels that a lane takes: that one of all tokens first, first + kTokens, ...
template <int kDim>
struct LaneChunk {
  static constexpr int kChunks = kDim / 8;
  static constexpr int kTokens = 32 / kChunks;
  static constexpr bool kEven = kTokens * kChunks == 32;  // all lanes take as many

  int chunk = static_cast<int>(threadIdx.x) % 32 % kChunks;
  int first = static_cast<int>(threadIdx.x) % 32 / kChunks;

  __device__ __forceinline__ bool exists() const { return kEven || first < kTokens; }

  // Writes the rows of the tokens from `begin` to `end`: eight(token, pairs) gives the lane's chunk of one.
  // It is called for others, too, and kAtOnce times before what it gave is written, so that nothing waits.
  template <int kAtOnce, class Eight>
  __device__ __forceinline__ void for_tokens(std::byte* rows, int begin, int end, const Eight& eight) const {
    constexpr int kSteps = (kUnitTokens + kTokens - 1) / kTokens;
    std::byte* to = rows + first * staged_row_bytes(kDim) + chunk * 16;
#pragma unroll 1
    for (int step = 0; step < kSteps; step += kAtOnce) {
      uint32_t pairs[kAtOnce][4];
#pragma unroll
      for (int i = 0; i < kAtOnce; ++i) eight((step + i) * kTokens + first, pairs[i]);
#pragma unroll
      for (int i = 0; i < kAtOnce; ++i) {
        const int token = (step + i) * kTokens + first;
        if (exists() && token >= begin && token < end) {
          *reinterpret_cast<uint4*>(to + (step + i) * kTokens * staged_row_bytes(kDim)) = {
              pairs[i][0], pairs[i][1], pairs[i][2], pairs[i][3]};
        }
      }
    }
  }
};

// Codes into a table. The (scale, middle) are those of the head's `channels`, or of tokens.
template <int kBits, int kDim, KVSide kSide>
__device__ __forceinline__ void decode_by_table(const std::byte* unit, const std::byte* table,
                                                const __half2* channels, int coded, std::byte* rows) {
  constexpr int kRowBytes = (kDim * kBits + 31) / 32 * 4;
  const LaneChunk<kDim> lane;
  table += threadIdx.x % PairTable<kBits>::kCopies * 4;
  ChunkRanges ranges;
  if constexpr (kSide == KVSide::keys) ranges.load(channels + lane.chunk * 8);
  const auto* of_tokens = reinterpret_cast<const uint32_t*>(unit + kUnitTokens * kRowBytes);
  lane.template for_tokens<4>(rows, 0, coded, [&](int token, uint32_t(&pairs)[4]) {
    const uint32_t eight = eight_codes(unit + token * kRowBytes, lane.chunk, kBits).x;
    if constexpr (kSide == KVSide::values) ranges.spread(of_tokens[token]);
#pragma unroll
    for (int k = 0; k < 4; ++k) {
      pairs[k] =
          Halves::multiply_add(PairTable<kBits>::at(table, eight, k), ranges.scales[k], ranges.leasts[k]);
    }
  });
}

// Codes that are numbers of steps.
template <int kDim>
__device__ __forceinline__ void decode_steps(const KVPart& part, const std::byte* unit, int coded,
                                             std::byte* rows) {
  const LaneChunk<kDim> lane;
  const int bits = part.bits;
  const auto row_bytes = static_cast<int>(part.row_bytes);
  const std::byte* parameters = unit + kUnitTokens * row_bytes;
  const int group = lane.chunk * 8 / static_cast<int>(part.group);
  const bool digits = part.codec == KVCodec::digits;
  const uint32_t flip = digits ? 0x10001U << (bits - 1) : 0;
  ChunkRanges ranges;
  if (part.codec == KVCodec::channel_grid) ranges.load_channels(parameters, bits, kDim, lane.chunk);
  lane.template for_tokens<2>(rows, 0, coded, [&](int token, uint32_t(&pairs)[4]) {
    const uint2 eight = eight_codes(unit + token * row_bytes, lane.chunk, bits);
    if (digits) ranges.spread(DigitRanges(part).at(parameters, token, group));
    if (part.codec == KVCodec::token_grid) ranges.spread(GridRanges(part).at(parameters, token, group));
#pragma unroll
    for (int k = 0; k < 4; ++k) {
      pairs[k] = Halves::multiply_add(code_numbers(eight, k, bits, flip), ranges.scales[k], ranges.leasts[k]);
    }
  });
}

// Adds what is missing at outliers of a unit from `slot` on; no two are in one place.
template <int kDim>
__device__ __forceinline__ void add_outliers(const uint32_t* entries, int count, int slot, std::byte* rows) {
  for (int i = static_cast<int>(threadIdx.x) % 32; i < count; i += 32) {
    const int place = static_cast<int>(entries[i] & 0xFFFFU) - slot * kDim;
    auto* value = reinterpret_cast<__half*>(rows + place / kDim * staged_row_bytes(kDim)) + place % kDim;
    *value = __float2half_rn(__half2float(*value) + Halves::high(entries[i]));
  }
}

// Decodes the first `coded` tokens of a copied unit into rows, by a whole warp; the copy may be overwritten
// after that.
template <int kDim, KVSide kSide, bool kTables>
__device__ __forceinline__ void decode_unit(const KVLayout& layout, const std::byte* unit, int slot,
                                            int coded, const std::byte* table, const __half2* channels,
                                            std::byte* rows) {
  const KVPart& part = kSide == KVSide::keys ? layout.keys : layout.values;
  if (kTables && part.has_table()) {
    switch (part.bits) {
      case 1:
        decode_by_table<1, kDim, kSide>(unit, table, channels, coded, rows);
        break;
      case 2:
        decode_by_table<2, kDim, kSide>(unit, table, channels, coded, rows);
        break;
      case 3:
        decode_by_table<3, kDim, kSide>(unit, table, channels, coded, rows);
        break;
      default:
        decode_by_table<4, kDim, kSide>(unit, table, channels, coded, rows);
        break;
    }
  } else {
    decode_steps<kDim>(part, unit, coded, rows);
  }
  __syncwarp();
  if (kTables && part.outlier_share > 0) {
    const UnitOutliers outliers(part, kDim, slot, coded);
    const auto* entries = reinterpret_cast<const uint32_t*>(unit + unit_outliers(layout, part));
    add_outliers<kDim>(entries + outliers.skipped, outliers.count, slot, rows);
  }
}

}  // namespace quantloom::kv_cache
