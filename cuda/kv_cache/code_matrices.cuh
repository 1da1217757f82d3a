// Keys by channel and values by token as ldmatrix brings them, whose codes become operands of mma.m16n8k16 by
// one mask for each pair: a code within the mantissa of a float16 is that number times 2^-24 (a subnormal
// one, which tensor cores take at full speed) and times 2^place, exactly. The scales are multiplied into the
// other operand: those of keys' channels into the queries, those of values' tokens into the weights. The
// least values make products of their own.
//
// A chunk is 16 bytes of a row of codes, a window 16 bits of it. Row r of matrix m (8 x 8 windows) is a token
// of CodeRows::token(). Of keys, lane 4 g + t has the word (two windows, paired) t of row g; of values,
// window g of the rows 2 t and 2 t + 1, paired.
#pragma once

#include "kv_cache/fragments.cuh"

namespace quantloom::kv_cache {

// Words from an address that is a multiple of theirs, up to 16 bytes.
template <int kCount>
__device__ __forceinline__ void load_words(uint32_t (&words)[kCount], const uint32_t* from) {
  if constexpr (kCount == 2) {
    const auto two = *reinterpret_cast<const uint2*>(from);
    words[0] = two.x, words[1] = two.y;
  } else {
#pragma unroll
    for (int i = 0; i < kCount; i += 4) {
      const auto four = *reinterpret_cast<const uint4*>(from + i);
      words[i] = four.x, words[i + 1] = four.y, words[i + 2] = four.z, words[i + 3] = four.w;
    }
  }
}

// A number that is not computed again where it is used: registers are spared less than instructions.
template <class T>
__device__ __forceinline__ T keep(T value) {
  asm volatile("" : "+r"(value));
  return value;
}

template <class T>
__device__ __forceinline__ T* keep(T* pointer) {
  asm volatile("" : "+l"(pointer));
  return pointer;
}

// The larger numbers of two pairs.
__device__ __forceinline__ uint32_t larger_halves(uint32_t a, uint32_t b) {
  const __half2 larger =
      __hmax2(*reinterpret_cast<const __half2*>(&a), *reinterpret_cast<const __half2*>(&b));
  return *reinterpret_cast<const uint32_t*>(&larger);
}

// Adds the weights themselves to rows g + 8.
__device__ __forceinline__ void sum_weights(const uint32_t (&weights)[2], float (&parts)[4]) {
  const uint32_t a[4] = {0, Halves::kOne, 0, Halves::kOne};
  cuda::multiply_accumulate<__half>(parts, a, weights[0], weights[1]);
}

// Rows of codes of a unit in shared memory: in segments that lie 16 bytes further apart than they are long,
// so that the rows of a matrix begin in different banks.
template <int kBits, int kDim>
struct CodeRows {
  static constexpr int kRowBytes = kDim * kBits / 8;
  static constexpr int kChunks = kRowBytes / 16;
  static constexpr int kWindow = 16 / kBits;  // codes
  static constexpr int kSegments = (kChunks & 1) != 0   ? 1
                                   : (kChunks & 2) != 0 ? 2
                                   : (kChunks & 4) != 0 ? 4
                                                        : 8;
  static constexpr int kSegmentTokens = kUnitTokens / kSegments;
  static constexpr int kSegmentBytes = kSegmentTokens * kRowBytes;
  static constexpr int kBytes = kUnitTokens * kRowBytes + kSegments * 16;
  static_assert(kRowBytes % 16 == 0);

  // The token of row r of matrix m.
  static __host__ __device__ constexpr int token(int m, int r) {
    return r % kSegments * kSegmentTokens + m * (8 / kSegments) + r / kSegments;
  }
  // Begins to copy rows, if they exist; of them the lane copies the 16 bytes at `from` first.
  static __device__ __forceinline__ void fetch(std::byte* to, const std::byte* from, bool exist) {
#pragma unroll
    for (int i = 0; i < kUnitTokens * kRowBytes; i += 512)
      cuda::copy_async_if(exist, to + i / kSegmentBytes * 16 + i, from + i);
  }
  // Where the lane's row of the four matrices of a chunk begins.
  static __device__ __forceinline__ int lane_offset() {
    const int lane = static_cast<int>(threadIdx.x) % 32;
    const int segment = lane % 8 % kSegments;
    const int index = lane / 8 * (8 / kSegments) + lane % 8 / kSegments;
    return segment * (kSegmentBytes + 16) + index * kRowBytes;
  }
};

// Of codes of a window, those that stay where they are when it is masked, and others after a shift.
template <int kBits, int kInPlace>
struct WindowCodes {
  static __host__ __device__ constexpr int place(int i) { return i % kInPlace * kBits; }
  // Code i of both windows of a word.
  static __device__ __forceinline__ uint32_t pair(uint32_t word, int i) {
    return word >> (i / kInPlace * kInPlace * kBits) & (((1U << kBits) - 1) << place(i)) * 0x10001U;
  }
};

template <int kBits, int kDim>
struct MatrixKeys {
  using Rows = CodeRows<kBits, kDim>;
  static constexpr int kWindow = Rows::kWindow;
  // Places differ by up to 2^4, so that the factors that undo them leave queries their precision.
  using Codes = WindowCodes<kBits, 4 / kBits + 1>;
  static constexpr float kProduct = 1.0F / static_cast<float>(1 << 22);  // products for scores of 1
  static constexpr int kRangeBytes = kDim * 4 + kDim / 32 * 16;

  uint32_t codes;  // what the lane copies first, in a record
  uint32_t ranges;
  int copied_codes;  // where to
  int copied_ranges;
  int row;
  int range;
  const uint32_t* queries;

  // For units of tokens from `slot` of a record on.
  __device__ __forceinline__ MatrixKeys(const KVView& view, int slot, const uint32_t* words, Lane lane,
                                        uint32_t) {
    const KVPart& part = view.layout.keys;
    const int in_warp = static_cast<int>(threadIdx.x) % 32;
    codes = keep(static_cast<uint32_t>(part.codes) +
                 static_cast<uint32_t>(slot * Rows::kRowBytes + in_warp * 16));
    ranges = keep(static_cast<uint32_t>(part.parameters) +
                  static_cast<uint32_t>(slot / static_cast<int>(part.group) * kDim * 4 + in_warp * 16));
    copied_codes = keep(in_warp * 16);
    // Ranges of 32 channels lie 16 bytes further apart than they are long.
    copied_ranges = keep(Rows::kBytes + in_warp * 16 + in_warp / 8 * 16);
    row = keep(Rows::lane_offset());
    range = Rows::kBytes + lane.t * kWindow * 8 + lane.t * kWindow / 16 * 16;
    queries = words + lane.t * kPartWords;
  }

  // A lane's part of a row of queries, and some more words that spread the parts over the banks. Of four
  // words the middle two change places, so that operands are neighbours.
  static constexpr int kPartWords = kDim / 8 + 4;
  static __host__ __device__ constexpr int swapped(int i) {
    return kWindow >= 4 && (i % 4 == 1 || i % 4 == 2) ? i ^ 3 : i;
  }
  // Where word i of a row goes, and its first channel.
  static __device__ __forceinline__ int place(int i) {
    return i / (kDim / 8) * kPartWords + swapped(i % (kDim / 8));
  }
  static __device__ __forceinline__ int channel(int i) {
    const int in_lane = i % (kDim / 8);
    return in_lane / kWindow * (8 * kWindow) + i / (kDim / 8) * (2 * kWindow) + in_lane % kWindow;
  }
  static constexpr int kPairDistance = kWindow;
  static constexpr bool kTakesRest = true;
  static constexpr int kQueryWords = 4 * kPartWords;  // of a row

  static __host__ __device__ int unit_bytes(const KVLayout&) { return Rows::kBytes + kRangeBytes; }
  // Begins to copy a record's unit, if it exists.
  __device__ __forceinline__ void fetch(std::byte* to, const std::byte* record, bool exists) const {
    Rows::fetch(to + copied_codes, record + codes, exists);
#pragma unroll
    for (int i = 0; i < kDim * 4; i += 512) {
      const bool some = i + 512 <= kDim * 4 || static_cast<int>(threadIdx.x) % 32 * 16 + i < kDim * 4;
      cuda::copy_async_if(exists && some, to + copied_ranges + i + i / 128 * 16, record + ranges + i);
    }
  }

  // Products with the queries, and what is the same for all tokens.
  __device__ __forceinline__ void multiply(const std::byte* unit, float (&products)[2][4],
                                           float (&least)[2]) const {
    float leasts[2][4] = {};
    // The other operand of code i of a window: times 2^(2 - place).
    const auto scaled = [](uint32_t query, uint32_t scales, int i) {
      const uint32_t product = Halves::multiply(query, scales);
      const uint32_t factor = static_cast<uint32_t>(17 - Codes::place(i)) * 0x04000400U;
      return Codes::place(i) == 2 ? product : Halves::multiply(product, factor);
    };
#pragma unroll
    for (int chunk = 0; chunk < Rows::kChunks; ++chunk) {
      uint32_t words[4];
      cuda::load_matrices(words, unit + row + chunk * 16);
      constexpr int kChunkRanges = 32 * kWindow;
      uint32_t range_pairs[2 * kWindow];  // scales, then least values
      load_words(range_pairs, reinterpret_cast<const uint32_t*>(unit + range + chunk * kChunkRanges +
                                                                chunk * kChunkRanges / 128 * 16));
      uint32_t query[kWindow];
      load_words(query, queries + chunk * kWindow);
#pragma unroll
      for (int i = 0; i < kWindow; i += 2) {
        const uint32_t first = scaled(query[swapped(i)], range_pairs[i], i);
        const uint32_t second = scaled(query[swapped(i + 1)], range_pairs[i + 1], i + 1);
#pragma unroll
        for (int tile = 0; tile < 2; ++tile) {
          const uint32_t a[4] = {Codes::pair(words[2 * tile], i), Codes::pair(words[2 * tile + 1], i),
                                 Codes::pair(words[2 * tile], i + 1),
                                 Codes::pair(words[2 * tile + 1], i + 1)};
          cuda::multiply_accumulate<__half>(products[tile], a, first, second);
        }
      }
      // The least values make two more tokens: rows g of one product, rows g + 8 of another.
      if constexpr (kWindow == 2) {
        const uint32_t a[4] = {range_pairs[2], range_pairs[2], range_pairs[3], range_pairs[3]};
        cuda::multiply_accumulate<__half>(leasts[0], a, query[0], query[1]);
      } else {
#pragma unroll
        for (int i = 0; i < kWindow; i += 4) {
          const uint32_t a[4] = {range_pairs[kWindow + i], range_pairs[kWindow + i + 1],
                                 range_pairs[kWindow + i + 2], range_pairs[kWindow + i + 3]};
          cuda::multiply_accumulate<__half>(leasts[0], a, query[i], query[i + 1]);
          cuda::multiply_accumulate<__half>(leasts[1], a, query[i + 2], query[i + 3]);
        }
      }
    }
#pragma unroll
    for (int c = 0; c < 2; ++c) least[c] = leasts[0][c] + leasts[1][2 + c];
  }
};

// Of up to four groups of channels of a token, of which none ends within a window, and up to four lie in a
// chunk: as many times fewer queries share a product, whose columns then are the weights with the scales of
// one group after the other. kFour: whether there are four, whose ranges are rows of a matrix.
template <int kBits, int kDim, bool kFour = false>
struct MatrixValues {
  using Rows = CodeRows<kBits, kDim>;
  static constexpr int kWindow = Rows::kWindow;
  using Codes = WindowCodes<kBits, 10 / kBits>;
  static constexpr bool kDividesGroups = kDim == 128 && !kFour;
  using OfFourGroups = MatrixValues<kBits, kDim, true>;
  // The ranges of a unit, as operands beside ones that sum the weights: rows 2 n of pairs of tokens are the
  // scales of group n, rows 2 n + 1 its least values. And the codes of the first chunk.
  struct Loaded {
    uint32_t ranges[2][4];
    uint32_t words[4];
  };
  static constexpr int kSpread = 128 / Rows::kSegments;  // bytes between segments of ranges of 16 bytes
  // Two rows of ones, as far apart as the rows of ranges of the two products.
  static constexpr int kOnes = Rows::kBytes + kUnitTokens * 16 + 128;
  static constexpr int kNextRanges = 2 * (8 / Rows::kSegments) * 16;

  uint32_t codes;  // what the lane copies first, in a record
  uint32_t ranges;
  int copied_codes;  // where to
  int copied_ranges;
  int groups;
  int row;
  int range;
  int lane_group;    // bytes from a token's ranges
  uint32_t halves;   // the lane's rows of the products of ranges: scales or least values
  int scale_lane;    // that has the scales of the lane's weights, in the first chunk
  int least_lane;    // that has the least values of the lane's channels there
  int chunk_groups;  // lanes further on for each chunk, in sixteenths

  __device__ __forceinline__ MatrixValues(const KVView& view, int slot, int item_rows, Lane lane, uint32_t) {
    const KVPart& part = view.layout.values;
    const int in_warp = static_cast<int>(threadIdx.x) % 32;
    groups = kFour ? 4 : static_cast<int>(part.groups);
    codes = keep(static_cast<uint32_t>(part.codes) +
                 static_cast<uint32_t>(slot * Rows::kRowBytes + in_warp * 16));
    ranges = keep(static_cast<uint32_t>(part.parameters) +
                  static_cast<uint32_t>(slot * groups * 4 + in_warp * 16));
    copied_codes = keep(in_warp * 16);
    const int spread = kFour ? in_warp / Rows::kSegmentTokens * kSpread : 0;
    copied_ranges = keep(Rows::kBytes + in_warp * 16 + spread);
    row = keep(Rows::lane_offset());
    const int group = static_cast<int>(part.group);
    if constexpr (kFour) {
      const int segment = in_warp % 8 % Rows::kSegments;
      range = Rows::kBytes + Rows::token(in_warp / 16, in_warp % 8) * 16 + segment * kSpread;
      if (in_warp / 8 % 2 != 0) range = kOnes;
      range = keep(range);
    } else {
      range = Rows::kBytes + lane.g / 2 * 4;
    }
    halves = lane.g % 2 == 0 ? 0x5410 : 0x7632;
    lane_group = lane.g / 2 < groups ? 1 : 0;
    // Columns of products: item_rows queries for each group of a chunk.
    scale_lane = keep(lane.g / item_rows * 8 + lane.t);
    least_lane = (lane.g * kWindow / group * 2 + 1) * 4 + lane.t;
    chunk_groups = 16 * 8 * kWindow / group;
  }

  static __host__ __device__ int unit_bytes(const KVLayout&) { return kOnes + kNextRanges + 16; }
  // What no copy brings into the memory of a unit.
  static __device__ __forceinline__ void prepare(std::byte* unit) {
    const int in_warp = static_cast<int>(threadIdx.x) % 32;
    if (kFour && in_warp < 2) {
      *reinterpret_cast<uint4*>(unit + kOnes + in_warp * kNextRanges) =
          uint4{Halves::kOne, Halves::kOne, Halves::kOne, Halves::kOne};
    }
  }
  __device__ __forceinline__ void fetch(std::byte* to, const std::byte* record, bool exists) const {
    Rows::fetch(to + copied_codes, record + codes, exists);
    const bool some = kFour || static_cast<int>(threadIdx.x) % 32 < 8 * groups;
    cuda::copy_async_if(exists && some, to + copied_ranges, record + ranges);
  }

  // Returns numbers of which no scale or least value is larger.
  __device__ __forceinline__ uint32_t load(const std::byte* unit, Lane lane, Loaded& loaded) const {
#pragma unroll
    for (int tile = 0; tile < 2; ++tile) {
      if constexpr (kFour) {
        cuda::load_transposed(loaded.ranges[tile], unit + range + tile * kNextRanges);
      } else {
#pragma unroll
        for (int i = 0; i < 2; ++i) {
          const auto* a = reinterpret_cast<const uint32_t*>(
              unit + range + Rows::token(2 * tile + i, 2 * lane.t) * groups * 4);
          const auto* b = reinterpret_cast<const uint32_t*>(
              unit + range + Rows::token(2 * tile + i, 2 * lane.t + 1) * groups * 4);
          loaded.ranges[tile][2 * i] = lane_group != 0 ? __byte_perm(*a, *b, halves) : 0;
          loaded.ranges[tile][2 * i + 1] = Halves::kOne;
        }
      }
    }
    cuda::load_transposed(loaded.words, unit + row);
    return larger_halves(larger_halves(loaded.ranges[0][0], loaded.ranges[0][2]),
                         larger_halves(loaded.ranges[1][0], loaded.ranges[1][2]));
  }

  // Adds the values with their weights.
  __device__ __forceinline__ void multiply(const std::byte* unit, const Loaded& loaded,
                                           const uint32_t (&weights)[2][2], float (&outputs)[kDim / 16][4],
                                           float (&parts)[4]) const {
#pragma unroll
    for (int tile = 0; tile < 2; ++tile)
      cuda::multiply_accumulate<__half>(parts, loaded.ranges[tile], weights[tile][0], weights[tile][1]);
#pragma unroll
    for (int chunk = 0; chunk < Rows::kChunks; ++chunk) {
      uint32_t words[4] = {loaded.words[0], loaded.words[1], loaded.words[2], loaded.words[3]};
      if (chunk > 0) cuda::load_transposed(words, unit + row + chunk * 16);
      const int from = scale_lane + (chunk * chunk_groups >> 4) * 8;
#pragma unroll
      for (int tile = 0; tile < 2; ++tile) {
        const uint32_t first =
            Halves::multiply(weights[tile][0], __shfl_sync(0xFFFFFFFFU, loaded.ranges[tile][0], from));
        const uint32_t second =
            Halves::multiply(weights[tile][1], __shfl_sync(0xFFFFFFFFU, loaded.ranges[tile][2], from));
#pragma unroll
        for (int i = 0; i < kWindow; i += 2) {
          const uint32_t a[4] = {Codes::pair(words[2 * tile], i), Codes::pair(words[2 * tile], i + 1),
                                 Codes::pair(words[2 * tile + 1], i),
                                 Codes::pair(words[2 * tile + 1], i + 1)};
          cuda::multiply_accumulate<__half>(outputs[(chunk * kWindow + i) / 2], a, first, second);
        }
      }
    }
  }

  // Calls emit(channel, column c, sums of two or four neighbouring channels) for those of the lane's columns
  // that count.
  template <class Emit>
  __device__ __forceinline__ void for_sums(const float (&outputs)[kDim / 16][4], const float (&parts)[4],
                                           int item_rows, Lane lane, Emit emit) const {
#pragma unroll
    for (int chunk = 0; chunk < Rows::kChunks; ++chunk) {
      const int from = least_lane + (chunk * chunk_groups >> 4) * 8;
      const float least[2] = {__shfl_sync(0xFFFFFFFFU, parts[0], from),
                              __shfl_sync(0xFFFFFFFFU, parts[1], from)};
      if ((lane.g ^ 2 * lane.t) >= item_rows) continue;
      const auto sum_of = [&](int i, int c) {
        const float factor = 16777216.0F / static_cast<float>(1 << Codes::place(i));
        return fmaf(outputs[(chunk * kWindow + i) / 2][i % 2 * 2 + c], factor, least[c]);
      };
      const int channel = (chunk * 8 + lane.g) * kWindow;
#pragma unroll
      for (int c = 0; c < 2; ++c) {
        if constexpr (kWindow == 2) {
          emit(channel, c, float2{sum_of(0, c), sum_of(1, c)});
        } else {
#pragma unroll
          for (int i = 0; i < kWindow; i += 4)
            emit(channel + i, c, float4{sum_of(i, c), sum_of(i + 1, c), sum_of(i + 2, c), sum_of(i + 3, c)});
        }
      }
    }
  }
};

}  // namespace quantloom::kv_cache
