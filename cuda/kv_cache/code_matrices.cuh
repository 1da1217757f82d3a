// Keys by channel and values by token as ldmatrix brings them, whose codes become operands of mma.m16n8k16 by
// one mask for each pair: a code within the mantissa of a float16 is that number times 2^-24 (a subnormal
// one, which tensor cores take at full speed) and times 2^place, exactly. The scales are multiplied into the
// other operand: those of keys' channels into the queries, those of values' tokens into the weights. The
// least values make products of their own.
//
// A chunk is 16 bytes of a row of codes, a window 16 bits of it. Row r of matrix m (8 x 8 windows) is a token
// of CodeRows. Of keys, lane 4 g + t has the word (two windows, paired) t of row g; of values, window g of
// the rows 2 t and 2 t + 1, paired.
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

// Chunks of 16 bytes in lines of 128 bytes of shared memory, which copies fill (whole_lines()). Rows that
// begin in the same banks differ in the order of their chunks within a line: kTurns orders, each for kLines
// lines. Memory begins at a multiple of 128 bytes.
template <int kTurns, int kLines>
struct TurnedLines {
  static __host__ __device__ constexpr int turn(int n) { return n / 8 / kLines % kTurns; }
  // Where chunk n lies, in bytes.
  static __host__ __device__ constexpr int place(int n) { return (n ^ turn(n)) * 16; }
  // Where chunk i of a row lies of which the first is at `row`.
  static __host__ __device__ constexpr uint32_t in_row(uint32_t row, int i) {
    return (row ^ static_cast<uint32_t>(i % kTurns * 16)) + static_cast<uint32_t>(i / kTurns * kTurns * 16);
  }
  // Begins to copy kBytes, if they exist, to `to`; a lane copies the 16 bytes at `from` and every 512 on.
  // kOnce: with the hint that they are not read again soon.
  template <int kBytes, bool kOnce>
  static __device__ __forceinline__ void fetch(uint32_t to, const std::byte* from, bool exist) {
    const int lane = static_cast<int>(threadIdx.x) % 32;
#pragma unroll
    for (int i = 0; i < kBytes; i += 512) {
      const bool some = i + 512 <= kBytes || lane * 16 + i < kBytes;
      // Lanes are bits of their own of n, but where lines are divided by three.
      const auto at = static_cast<uint32_t>(
          (kLines & (kLines - 1)) == 0 ? (place(lane) ^ turn(i / 16) * 16) + i : place(lane + i / 16));
      if constexpr (kOnce) {
        cuda::copy_once_if(exist && some, to + at, from + i);
      } else if (exist && some) {
        cuda::copy_async(__cvta_shared_to_generic(to + at), from + i);
      }
    }
  }
};

constexpr int most_turns(int chunks) {
  return (chunks & 1) != 0 ? 1 : (chunks & 2) != 0 ? 2 : (chunks & 4) != 0 ? 4 : 8;
}

// Rows of codes of a unit in shared memory. Row r of matrix m is token 8 m + r.
template <int kBits, int kDim>
struct CodeRows {
  static constexpr int kRowBytes = kDim * kBits / 8;
  static constexpr int kChunks = kRowBytes / 16;
  static constexpr int kWindow = 16 / kBits;  // codes
  static constexpr int kBytes = kUnitTokens * kRowBytes;
  using Lines = TurnedLines<most_turns(kChunks), kChunks / most_turns(kChunks)>;
  static_assert(kRowBytes % 16 == 0);

  // Where the lane's row of the four matrices of a chunk begins, of the first chunk.
  static __device__ __forceinline__ int lane_row() {
    return Lines::place(static_cast<int>(threadIdx.x) % 32 * kChunks);
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
  // Of the ranges of a word of codes, lanes t read chunks at the same time.
  using Ranges = TurnedLines<(kWindow > 4 ? kWindow / 4 : 1), 1>;
  // Places differ by up to 2^4, so that the factors that undo them leave queries their precision.
  using Codes = WindowCodes<kBits, 4 / kBits + 1>;
  static constexpr float kProduct = 1.0F / static_cast<float>(1 << 22);  // products for scores of 1
  static constexpr int kUnitBytes = whole_lines(Rows::kBytes + kDim * 4);

  int codes;  // what the lane copies first, in a record
  int ranges;
  uint32_t memory;  // addresses in shared memory
  uint32_t row;
  uint32_t range;
  const uint32_t* queries;

  // For units of tokens from `slot` of a record on, which lie at offsets from `unit`.
  __device__ __forceinline__ MatrixKeys(const KVView& view, int slot, std::byte* unit, const uint32_t* words,
                                        Lane lane, uint32_t) {
    const KVPart& part = view.layout.keys;
    const int in_warp = static_cast<int>(threadIdx.x) % 32;
    codes = static_cast<int>(part.codes) + slot * Rows::kRowBytes + in_warp * 16;
    // Mostly a group is a unit.
    const auto group = static_cast<int>(part.group);
    const int first_group = group == kUnitTokens ? slot / kUnitTokens : slot / group;
    ranges = static_cast<int>(part.parameters) + first_group * kDim * 4 + in_warp * 16;
    memory = cuda::shared_address(unit);
    row = memory + Rows::lane_row();
    range = memory + Rows::kBytes + Ranges::place(lane.t * kWindow / 2);
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

  static __host__ __device__ int unit_bytes(const KVLayout&) { return kUnitBytes; }
  // Begins to copy a record's unit, if it exists.
  template <bool kOnce = true>
  __device__ __forceinline__ void fetch(int offset, const std::byte* record, bool exists) const {
    Rows::Lines::template fetch<Rows::kBytes, kOnce>(memory + offset, record + codes, exists);
    Ranges::template fetch<kDim * 4, kOnce>(memory + offset + Rows::kBytes, record + ranges, exists);
  }

  // Products with the queries, and what is the same for all tokens.
  __device__ __forceinline__ void multiply(int offset, float (&products)[2][4], float (&least)[2]) const {
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
      cuda::load_matrices(words, Rows::Lines::in_row(row, chunk) + offset);
      uint32_t range_pairs[2 * kWindow];  // scales, then least values
#pragma unroll
      for (int i = 0; i < kWindow / 2; ++i) {
        const uint4 four = cuda::load_four(Ranges::in_row(range, i) + offset + chunk * 32 * kWindow);
        range_pairs[4 * i] = four.x, range_pairs[4 * i + 1] = four.y;
        range_pairs[4 * i + 2] = four.z, range_pairs[4 * i + 3] = four.w;
      }
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

// Of groups of channels of a token, of which none ends within a window, and up to four lie in a chunk: as
// many times fewer queries share a product, whose columns then are the weights with the scales of one group
// after the other. kGroups: 4 or 8 equal ones, whose ranges are rows of matrices, or 0 for up to four.
template <int kBits, int kDim, int kGroups = 0>
struct MatrixValues {
  using Rows = CodeRows<kBits, kDim>;
  static constexpr int kWindow = Rows::kWindow;
  using Codes = WindowCodes<kBits, 10 / kBits>;
  static constexpr bool kDividesGroups = kDim == 128 && kGroups == 0;
  using OfFourGroups = MatrixValues<kBits, kDim, 4>;
  static constexpr int kParts = kGroups == 8 ? 2 : 1;
  // The ranges of a unit, as operands: rows 2 n of pairs of tokens are the scales of group n, rows 2 n + 1
  // its least values. Beside four groups, ones sum the weights. And the codes of the first chunk.
  struct Loaded {
    uint32_t ranges[2][4];
    uint32_t words[4];
  };
  // Ranges of tokens: chunks of four groups.
  using Ranges = TurnedLines<kParts, 1>;
  static constexpr int kNextRanges = 16 * kParts * 16;  // from those of one product to those of the other
  // Two rows of ones, as far apart.
  static constexpr int kOnes = Rows::kBytes + kUnitTokens * 16;
  static constexpr int kUnitBytes =
      whole_lines(kParts == 2 ? Rows::kBytes + kUnitTokens * 32 : kOnes + kNextRanges + 16);

  int codes;  // what the lane copies first, in a record
  int ranges;
  int groups;
  uint32_t memory;  // addresses in shared memory
  uint32_t row;
  uint32_t range_row;
  const std::byte* range;
  int lane_group;    // whether the lane has a group
  uint32_t halves;   // the lane's rows of the products of ranges: scales or least values
  int scale_lane;    // that has the scales of the lane's weights, in the first chunk
  int least_lane;    // that has the least values of the lane's channels there
  int chunk_groups;  // lanes further on for each chunk, in sixteenths

  __device__ __forceinline__ MatrixValues(const KVView& view, int slot, std::byte* unit, int item_rows,
                                          Lane lane, uint32_t) {
    const KVPart& part = view.layout.values;
    const int in_warp = static_cast<int>(threadIdx.x) % 32;
    const int group = kGroups > 0 ? kGroupSize : static_cast<int>(part.group);
    groups = kGroups > 0 ? kGroups : static_cast<int>(part.groups);
    codes = static_cast<int>(part.codes) + slot * Rows::kRowBytes + in_warp * 16;
    ranges = static_cast<int>(part.parameters) + slot * groups * 4 + in_warp * 16;
    memory = cuda::shared_address(unit);
    row = memory + Rows::lane_row();
    range = unit + Rows::kBytes + lane.g / 2 * 4;
    // Matrices: eight tokens of four groups, the same of the other four or ones, and both of the next tokens.
    const int token = in_warp / 16 * 8 + in_warp % 8;
    const int second = in_warp / 8 % 2;
    range_row =
        memory + (second != 0 && kParts == 1 ? kOnes : Rows::kBytes + Ranges::place(token * kParts + second));
    halves = lane.g % 2 == 0 ? 0x5410 : 0x7632;
    lane_group = lane.g / 2 < groups ? 1 : 0;
    // Columns of products: item_rows queries for each group of a chunk.
    scale_lane = keep((lane.g >> (__ffs(item_rows) - 1)) * 8 + lane.t);
    least_lane = (lane.g * kWindow / group * 2 + 1) * 4 + lane.t;
    chunk_groups = 16 * 8 * kWindow / group;
  }

  static __host__ __device__ int unit_bytes(const KVLayout&) { return kUnitBytes; }
  // What no copy brings into the memory of a unit.
  static __device__ __forceinline__ void prepare(std::byte* unit) {
    const int in_warp = static_cast<int>(threadIdx.x) % 32;
    if (kGroups == 4 && in_warp < 2) {
      *reinterpret_cast<uint4*>(unit + kOnes + in_warp * kNextRanges) =
          uint4{Halves::kOne, Halves::kOne, Halves::kOne, Halves::kOne};
    }
  }
  template <bool kOnce = true>
  __device__ __forceinline__ void fetch(int offset, const std::byte* record, bool exists) const {
    Rows::Lines::template fetch<Rows::kBytes, kOnce>(memory + offset, record + codes, exists);
    const bool some = kGroups > 0 || static_cast<int>(threadIdx.x) % 32 < 8 * groups;
    Ranges::template fetch<kUnitTokens * kParts * 16, kOnce>(memory + offset + Rows::kBytes, record + ranges,
                                                             exists && some);
  }

  // Returns numbers of which no scale or least value is larger.
  __device__ __forceinline__ uint32_t load(int offset, Lane lane, Loaded& loaded) const {
#pragma unroll
    for (int tile = 0; tile < 2; ++tile) {
      if constexpr (kGroups > 0) {
        cuda::load_transposed(loaded.ranges[tile], range_row + offset + tile * kNextRanges);
      } else {
#pragma unroll
        for (int i = 0; i < 2; ++i) {
          const auto* a = reinterpret_cast<const uint32_t*>(range + offset +
                                                            (8 * (2 * tile + i) + 2 * lane.t) * groups * 4);
          const auto* b = reinterpret_cast<const uint32_t*>(
              range + offset + (8 * (2 * tile + i) + 2 * lane.t + 1) * groups * 4);
          loaded.ranges[tile][2 * i] = lane_group != 0 ? __byte_perm(*a, *b, halves) : 0;
          loaded.ranges[tile][2 * i + 1] = Halves::kOne;
        }
      }
    }
    cuda::load_transposed(loaded.words, Rows::Lines::in_row(row, 0) + offset);
    uint32_t largest = larger_halves(larger_halves(loaded.ranges[0][0], loaded.ranges[0][2]),
                                     larger_halves(loaded.ranges[1][0], loaded.ranges[1][2]));
    if constexpr (kGroups == 8) {
      const uint32_t second = larger_halves(larger_halves(loaded.ranges[0][1], loaded.ranges[0][3]),
                                            larger_halves(loaded.ranges[1][1], loaded.ranges[1][3]));
      largest = larger_halves(largest, second);
    }
    return largest;
  }

  // Adds the values with their weights.
  __device__ __forceinline__ void multiply(int offset, const Loaded& loaded, const uint32_t (&weights)[2][2],
                                           float (&outputs)[kDim / 16][4], float (&parts)[kParts][4]) const {
#pragma unroll
    for (int tile = 0; tile < 2; ++tile) {
      if constexpr (kGroups == 8) sum_weights(weights[tile], parts[0]);
      cuda::multiply_accumulate<__half>(parts[kParts - 1], loaded.ranges[tile], weights[tile][0],
                                        weights[tile][1]);
    }
#pragma unroll
    for (int chunk = 0; chunk < Rows::kChunks; ++chunk) {
      uint32_t words[4] = {loaded.words[0], loaded.words[1], loaded.words[2], loaded.words[3]};
      if (chunk > 0) cuda::load_transposed(words, Rows::Lines::in_row(row, chunk) + offset);
      const int from = scale_lane + lanes_on(chunk);
      const int half = in_second(chunk) ? 1 : 0;
#pragma unroll
      for (int tile = 0; tile < 2; ++tile) {
        const uint32_t first =
            Halves::multiply(weights[tile][0], __shfl_sync(0xFFFFFFFFU, loaded.ranges[tile][half], from));
        const uint32_t second =
            Halves::multiply(weights[tile][1], __shfl_sync(0xFFFFFFFFU, loaded.ranges[tile][2 + half], from));
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
  __device__ __forceinline__ void for_sums(const float (&outputs)[kDim / 16][4],
                                           const float (&parts)[kParts][4], int item_rows, Lane lane,
                                           Emit emit) const {
#pragma unroll
    for (int chunk = 0; chunk < Rows::kChunks; ++chunk) {
      const int from = least_lane + lanes_on(chunk);
      const int half = in_second(chunk) ? 2 : 0;
      const float least[2] = {__shfl_sync(0xFFFFFFFFU, parts[kParts - 1][half], from),
                              __shfl_sync(0xFFFFFFFFU, parts[kParts - 1][half + 1], from)};
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

 private:
  static constexpr int kGroupSize = kGroups > 0 ? kDim / kGroups : kDim;
  // Whether the groups of a chunk are the last four of eight, and how many lanes further on their ranges are.
  static __host__ __device__ constexpr bool in_second(int chunk) {
    return kGroups == 8 && chunk * 8 * kWindow / kGroupSize >= 4;
  }
  __device__ __forceinline__ int lanes_on(int chunk) const {
    if constexpr (kGroups > 0) return chunk * 8 * kWindow / kGroupSize % 4 * 8;
    return (chunk * chunk_groups >> 4) * 8;
  }
};

}  // namespace quantloom::kv_cache
