// Products of few tokens with trellis codes: activations are scaled, rotated and made digits, ring words pass
// from memory through registers to the tensor cores, and sums are rotated and scaled.
// A team of thread blocks has some bands of 128 rows to itself; each of its blocks has some of the columns,
// and digits of their activations in shared memory. Its warps walk through the pieces of 64 x 64 in order,
// each a run of equal length, the next pieces' words on their way to registers. A band's sums are added in a
// fixed order: the warps', then the blocks'. In a team that is a cluster each block sends its sums to the one
// that finishes the band; else they meet in memory, for a second launch.
#pragma once

#include "common/check.cuh"
#include "common/cluster.cuh"
#include "kernels/overlap.cuh"
#include "kernels/trellis_operands.cuh"
#include "kernels/trellis_spans.cuh"

namespace quantloom::cuda {

// Where things lie in shared memory.
struct TrellisMemory {
  int units = 0;     // float [chunks][tokens]: what a sum of digits is worth
  int shares = 0;    // float [chunks][tokens]: the sums of the activations
  int sums = 0;      // float [tokens]: those over all chunks
  int met = 0;       // int2 [64-row pieces]: the first warp that meets it, and how many do
  int delivery = 0;  // the barrier of what is received
  int parts = 0;     // float [64-row pieces][parts][tokens][64]
  int received = 0;  // float [own bands][blocks][tokens][128]
  int bytes = 0;

  QUANTLOOM_HOST_DEVICE TrellisMemory(const TrellisDeal& deal, int operand_bytes, int tokens) {
    const int scales = deal.most_chunks() * tokens * 4;
    units = 2 * deal.most_spans() * operand_bytes;
    shares = units + scales;
    sums = shares + scales;
    met = (sums + tokens * 4 + 7) / 8 * 8;
    delivery = met + 2 * deal.most_bands() * 8;
    parts = (delivery + 8 + 15) / 16 * 16;
    received = parts + 2 * deal.most_bands() * deal.parts * tokens * 256;
    bytes = received + deal.own_bands() * deal.blocks * tokens * 512;
  }
};

// One of two activations, or (kDigits = 4) what they are along the axes of an octagon.
template <int kDigits>
__device__ __forceinline__ float along(float x, float y, int axis) {
  if constexpr (kDigits == 4) {
    constexpr float kDiagonal =
        static_cast<float>(trellis::kOctagonDiagonal) / static_cast<float>(trellis::kOctagonAxis);
    if (axis >= 2) return (axis == 2 ? x + y : x - y) * kDiagonal;
  }
  return axis == 0 ? x : y;
}

constexpr int kMostChunkSpans = 4;

// What a warp asks for at once: the spans of a chunk.
template <int kTokens, int kSpans>
struct ChunkLoad {
  SpanLoad spans[kSpans];

  // Chunk `i` of a block of threads' `count` spans. Chunks of all tokens, those of a chunk in turn. Past the
  // last: zeros.
  __device__ __forceinline__ void ask(const TrellisProduct& p, int first_span, int count, int i) {
    const int chunk = kTokens == 1 ? i : i / p.m;
    const int token = kTokens == 1 ? 0 : i - chunk * p.m;
#pragma unroll
    for (int s = 0; s < kSpans; ++s) {
      const int span = chunk * kSpans + s;
      spans[s] = span < count ? ask_span(p, token, first_span + span) : SpanLoad();
    }
  }
};

// Makes the digits of one chunk of one token: by one warp. kSpans: deal.chunk. Calls arrived() once the
// activations are there.
template <class Decoder, int kTokens, int kSpans, class Arrived>
__device__ __forceinline__ void make_digits(const TrellisProduct& p, const TrellisMemory& place,
                                            unsigned char* memory, const ChunkLoad<kTokens, kSpans>& load,
                                            int spans, int chunk, int token, Arrived arrived) {
  using Operand = TrellisOperand<Decoder, kTokens>;
  const int lane = static_cast<int>(threadIdx.x % 32);
  const int begin = chunk * kSpans;
  const int count = min(kSpans, spans - begin);
  float v[kSpans][4];
#pragma unroll
  for (int s = 0; s < kSpans; ++s) scale_span(p, load.spans[s], v[s]);
  if (p.rotated) rotate_spans(v);
  __syncwarp();
  arrived();
  float largest = 0.0F;
  bool finite = true;
#pragma unroll
  for (int s = 0; s < kSpans; ++s) {
#pragma unroll
    for (int i = 0; i < 4; ++i) finite = finite && fabsf(v[s][i]) <= 2.0e38F;
#pragma unroll
    for (int i = 0; i < 4; i += 2) {
#pragma unroll
      for (int j = 0; j < Operand::kDigits; ++j) {
        largest = fmaxf(largest, fabsf(along<Operand::kDigits>(v[s][i], v[s][i + 1], j)));
      }
    }
  }
  // Numbers of one sign order as their bits do.
  largest = __uint_as_float(__reduce_max_sync(~0U, __float_as_uint(largest)));
  finite = __all_sync(~0U, finite);
  float unit;
  float inverse;
  if constexpr (Decoder::kHalves) {
    // A power of two, so that the largest is from 1024 to 2047.
    const int exponent = min(max(static_cast<int>(__float_as_uint(largest) >> 23), 30), 250) - 127 - 10;
    unit = __int_as_float((127 + exponent) << 23);
    inverse = __int_as_float((127 - exponent) << 23);
  } else {
    // Tinier than 2^-97 are as good as zero.
    largest = largest < 0x1p-97F ? 0.0F : largest;
    unit = ByteDigits::unit_of(largest);
    inverse = ByteDigits::inverse_of(largest);
  }
  float share = 0.0F;
  int whole = 0;
#pragma unroll
  for (int s = 0; s < kSpans; ++s) {
    if (s >= count) break;
    unsigned char* const piece = memory + (2 * (begin + s) + lane / 16) * Operand::kBytes;
#pragma unroll
    for (int i = 0; i < 4; i += 2) {
      uint32_t digits[Operand::kDigits][2];
#pragma unroll
      for (int j = 0; j < Operand::kDigits; ++j) {
        const float scaled = along<Operand::kDigits>(v[s][i], v[s][i + 1], j) * inverse;
        if constexpr (Decoder::kHalves) {
          const __half high = __float2half_rn(scaled);
          const __half low = __float2half_rn(scaled - __half2float(high));
          digits[j][0] = __half_as_ushort(high);
          digits[j][1] = __half_as_ushort(low);
          share += __half2float(high) + __half2float(low);
        } else {
          const int rounded = __float2int_rn(scaled);
          whole += rounded;
          // 256 * high + low, low from -128 to 127.
          digits[j][0] = static_cast<uint32_t>(rounded);
          digits[j][1] = static_cast<uint32_t>((rounded + 128) >> 8);
        }
      }
      // Activations 4 * (lane % 16) + i of the piece: of a tile, 2 a + 8 b with a = 2 * (lane % 2) + i / 2.
      const int pair = 2 * (2 * (lane & 1) + i / 2) + (lane >> 1 & 1);
      Operand::store(piece, token, lane % 16 / 4, pair, digits);
    }
  }
  if constexpr (Decoder::kHalves) {
#pragma unroll
    for (int distance = 16; distance > 0; distance /= 2) share += __shfl_xor_sync(~0U, share, distance);
  } else {
    share = static_cast<float>(__reduce_add_sync(~0U, whole));
  }
  if (lane == 0) {
    const float worth = finite ? unit : __uint_as_float(0x7FC00000U);
    reinterpret_cast<float*>(memory + place.units)[chunk * kTokens + token] = worth * p.map.slope;
    reinterpret_cast<float*>(memory + place.shares)[chunk * kTokens + token] = worth * share * p.map.offset;
  }
}

// Asks for what is needed first, calls meanwhile(), and makes the digits of all chunks of a block of threads.
//
// A warp cannot wait for some of its loads alone. So words are at first only brought nearer, and asked for
// when the first activations are there.
template <class Decoder, int kTokens, int kSpans, class Walk, class Meanwhile>
__device__ __forceinline__ void begin_walk(const TrellisProduct& p, const TrellisMemory& place,
                                           unsigned char* memory, int first_span, int spans, Walk& walk,
                                           Meanwhile meanwhile) {
  const int warp = static_cast<int>(threadIdx.x / 32);
  const int count = (spans + kSpans - 1) / kSpans * (kTokens == 1 ? 1 : p.m);
  ChunkLoad<kTokens, kSpans> load;
  // Activations must not be read before the previous kernel has ended, as words may.
  if (warp < count) {
    walk.bring_nearer();
    if (p.overlap) wait_for_previous();
    load.ask(p, first_span, spans, warp);
  } else {
    walk.ask_first();
    if (p.overlap) wait_for_previous();
  }
  meanwhile();
#pragma unroll 1
  for (int i = warp; i < count; i += kTrellisWarps) {
    const ChunkLoad<kTokens, kSpans> now = load;
    const int chunk = kTokens == 1 ? i : i / p.m;
    const auto arrived = [&] {
      if (i == warp) walk.ask_first();
      if (i + kTrellisWarps < count) load.ask(p, first_span, spans, i + kTrellisWarps);
    };
    make_digits<Decoder, kTokens, kSpans>(p, place, memory, now, spans, chunk,
                                          kTokens == 1 ? 0 : i - chunk * p.m, arrived);
  }
}

// The walk of one warp.
template <class Decoder, int kTokens>
class TrellisWalk {
 public:
  static constexpr int kBits = Decoder::kBits;
  // Pieces that a warp holds, all but one on their way: enough bytes to cover the time to memory.
  static constexpr int kBuffers = kBits <= 2 ? 3 : 2;
  using Operand = TrellisOperand<Decoder, kTokens>;

  // Of pieces [begin, end) of a block whose rows have `columns` pieces, from
  // `codes` on.
  __device__ __forceinline__ TrellisWalk(const TrellisProduct& p, const uint4* codes, int columns,
                                         const Divider& by_columns, int begin, int end)
      : lane_(static_cast<int>(threadIdx.x % 32)),
        columns_(columns),
        row_(static_cast<int>(by_columns.divide(static_cast<uint32_t>(begin)))),
        column_(begin - row_ * columns),
        left_(end - begin),
        row_step_((p.column_pieces - columns) * (kBits * 32)) {
    codes_ = codes + (static_cast<int64_t>(row_) * p.column_pieces + column_) * (kBits * 32) + lane_;
    asked_ = column_;
  }

  // Brings the first words to the second level cache.
  __device__ __forceinline__ void bring_nearer() const {
#pragma unroll
    for (int i = 0; i < (kBuffers - 1) * kBits; ++i) {
      if (i / kBits < min(left_, columns_ - column_))
        asm volatile("prefetch.global.L2 [%0];" ::"l"(codes_ + i * 32));
    }
  }

  __device__ __forceinline__ void ask_first() {
#pragma unroll
    for (int i = 0; i < kBuffers - 1; ++i) ask(ahead_[i], left_ > i);
  }

  // Calls leave(row, totals) for each row of pieces that the walk meets: totals[2 * unit + r] is that of row
  // 16 * unit + 8 * r + lane / 4 and token lane % 4.
  template <class Leave>
  __device__ __forceinline__ void run(const TrellisMap& map, const unsigned char* operands,
                                      const float* units, int chunk_pieces, Leave leave) {
    if (left_ <= 0) return;
    operands_ = operands + Operand::lane_place(lane_);
    units_ = units + (kTokens > 1 ? lane_ % 4 : 0);
    chunk_ = chunk_pieces;
    at_ = operands_ + column_ * Operand::kBytes;
    unit_ = units_ + column_ / chunk_pieces * kTokens;
    clear_totals();
    clear_sums();
    if constexpr (kBuffers == 3) {
      while (multiply_piece(map, ahead_[0], ahead_[2], leave) &&
             multiply_piece(map, ahead_[1], ahead_[0], leave) &&
             multiply_piece(map, ahead_[2], ahead_[1], leave)) {
        continue;
      }
    } else {
      while (multiply_piece(map, ahead_[0], ahead_[1], leave) &&
             multiply_piece(map, ahead_[1], ahead_[0], leave)) {
        continue;
      }
    }
  }

 private:
  // One piece, while the words of the next ones are on their way. False: it was the last.
  template <class Leave>
  __device__ __forceinline__ bool multiply_piece(const TrellisMap& map, const uint4 (&words)[kBits],
                                                 uint4 (&next)[kBits], Leave leave) {
    ask(next, left_ > kBuffers - 1);
    Operand operand;
    operand.load(at_);
    at_ += Operand::kBytes;
    multiply<0>(map, words, operand);
    multiply<1>(map, words, operand);
    multiply<2>(map, words, operand);
    multiply<3>(map, words, operand);
    --left_;
    ++column_;
    const bool row_ends = column_ == columns_;
    if (row_ends || left_ == 0 || (column_ & (chunk_ - 1)) == 0) {
      add_scaled(*unit_);
      unit_ += kTokens;
      clear_sums();
      if (row_ends || left_ == 0) {
        leave(row_, totals_);
        if (left_ == 0) return false;
        clear_totals();
        ++row_;
        column_ = 0;
        at_ = operands_;
        unit_ = units_;
      }
    }
    return true;
  }

  // Words are read once: they leave the caches first. Without a branch, after which loads wait for others.
  __device__ __forceinline__ void ask(uint4 (&to)[kBits], bool wanted) {
#pragma unroll
    for (int i = 0; i < kBits; ++i) {
      asm volatile(
          "{ .reg .pred wanted; setp.ne.s32 wanted, %5, 0;\n"
          "@wanted ld.global.cs.v4.u32 {%0, %1, %2, %3}, [%4]; }"
          : "=r"(to[i].x), "=r"(to[i].y), "=r"(to[i].z), "=r"(to[i].w)
          : "l"(codes_ + i * 32), "r"(wanted ? 1 : 0));
    }
    const bool row_ends = asked_ + 1 == columns_;
    if (wanted) {
      codes_ += kBits * 32 + (row_ends ? row_step_ : 0);
      asked_ = row_ends ? 0 : asked_ + 1;
    }
  }

  template <int kUnit>
  __device__ __forceinline__ void multiply(const TrellisMap& map, const uint4 (&pieces)[kBits],
                                           const Operand& operand) {
    uint32_t words[kBits];
#pragma unroll
    for (int i = 0; i < kBits; ++i) {
      const int at = kUnit * kBits + i;
      const uint4& piece = pieces[at / 4];
      words[i] = at % 4 == 0 ? piece.x : at % 4 == 1 ? piece.y : at % 4 == 2 ? piece.z : piece.w;
    }
    const typename Decoder::Windows windows(words);
    multiply_eight<kUnit, 0>(map, windows, operand);
    multiply_eight<kUnit, 1>(map, windows, operand);
    multiply_eight<kUnit, 2>(map, windows, operand);
    multiply_eight<kUnit, 3>(map, windows, operand);
  }

  // The eight positions from 8 * kEight on: two products, or one if a word is of two weights. Rows lane / 4
  // have the first four.
  template <int kUnit, int kEight>
  __device__ __forceinline__ void multiply_eight(const TrellisMap& map,
                                                 const typename Decoder::Windows& windows,
                                                 const Operand& operand) {
    if constexpr (Decoder::kWeights == 2) {
      const uint32_t a[4] = {Decoder::template word<4 * kEight>(windows, map),
                             Decoder::template word<4 * kEight + 2>(windows, map),
                             Decoder::template word<4 * kEight + 1>(windows, map),
                             Decoder::template word<4 * kEight + 3>(windows, map)};
      sums_[kUnit].add(a, operand.template word<2 * kEight>(), operand.template word<2 * kEight + 1>());
    } else {
      multiply_four<kUnit, kEight, 0>(map, windows, operand);
      multiply_four<kUnit, kEight, 1>(map, windows, operand);
    }
  }

  template <int kUnit, int kEight, int kHalf>
  __device__ __forceinline__ void multiply_four(const TrellisMap& map,
                                                const typename Decoder::Windows& windows,
                                                const Operand& operand) {
    constexpr int kFirst = 8 * kEight + 2 * kHalf;
    const uint32_t a[4] = {
        Decoder::template word<kFirst>(windows, map), Decoder::template word<kFirst + 4>(windows, map),
        Decoder::template word<kFirst + 1>(windows, map), Decoder::template word<kFirst + 5>(windows, map)};
    constexpr int kIndex = 4 * kEight + 2 * kHalf;
    sums_[kUnit].add(a, operand.template word<kIndex>(), operand.template word<kIndex + 1>());
  }

  __device__ __forceinline__ void add_scaled(float unit) {
#pragma unroll
    for (int i = 0; i < 4; ++i) {
      totals_[2 * i] = fmaf(unit, sums_[i].template value<0>(), totals_[2 * i]);
      totals_[2 * i + 1] = fmaf(unit, sums_[i].template value<1>(), totals_[2 * i + 1]);
    }
  }
  __device__ __forceinline__ void clear_sums() {
#pragma unroll
    for (int i = 0; i < 4; ++i) sums_[i].clear();
  }
  __device__ __forceinline__ void clear_totals() {
#pragma unroll
    for (int i = 0; i < 8; ++i) totals_[i] = 0.0F;
  }

  int lane_;
  int columns_;
  int row_;
  int column_;
  int left_;   // pieces of the walk
  int asked_;  // the column of the next piece to ask for
  int row_step_;
  int chunk_;  // pieces that share a scale
  const unsigned char* operands_;
  const unsigned char* at_;  // of the piece
  const float* units_;
  const float* unit_;  // of the chunk
  const uint4* codes_;
  uint4 ahead_[kBuffers][kBits];
  TrellisSums<Decoder::kHalves> sums_[4];
  float totals_[8];
};

// Grid: [deal.teams * deal.blocks]; the blocks of a team are a cluster, unless p.partial is given.
template <class Decoder, int kTokens>
__global__ void __launch_bounds__(32 * kTrellisWarps, 1)
    multiply_trellis(const __grid_constant__ TrellisProduct p, const __grid_constant__ TrellisDeal deal) {
  using Operand = TrellisOperand<Decoder, kTokens>;
  extern __shared__ __align__(128) unsigned char memory[];
  const TrellisMemory place(deal, Operand::kBytes, kTokens);
  const int lane = static_cast<int>(threadIdx.x % 32);
  const int warp = static_cast<int>(threadIdx.x / 32);
  const int team = static_cast<int>(deal.by_blocks.divide(blockIdx.x));
  const int rank = static_cast<int>(blockIdx.x) - team * deal.blocks;
  const int first_band = deal.first_band(team);
  const int bands = deal.bands_of(team);
  const int first_span = deal.first_span(rank);
  const int spans = deal.spans_of(rank);
  const int columns = 2 * spans;
  const TrellisRuns runs{2 * bands * columns, kTrellisWarps};

  let_next_begin();
  const bool in_cluster = deal.blocks > 1 && p.partial == nullptr;
  const int tokens = kTokens == 1 ? 1 : p.m;
  // Bands that this block finishes.
  const auto own_bands =
      static_cast<int>(deal.by_blocks.divide(static_cast<uint32_t>(bands - rank + deal.blocks - 1)));
  auto* const delivery = reinterpret_cast<uint64_t*>(memory + place.delivery);
  if (in_cluster) {
    if (threadIdx.x == 0) {
      Delivery::prepare(delivery);
      Delivery::expect(delivery, own_bands * deal.blocks * tokens * (kTrellisBand * 4));
      Delivery::all_expected(delivery);
    }
    cluster_begin();
  }
  TrellisWalk<Decoder, kTokens> walk(
      p,
      p.codes +
          (static_cast<int64_t>(2 * first_band) * p.column_pieces + 2 * first_span) * (Decoder::kBits * 32),
      columns, deal.columns_of(rank), runs.begin(warp), runs.begin(warp + 1));
  auto* const met = reinterpret_cast<int2*>(memory + place.met);
  const auto find_met = [&] {
#pragma unroll 1
    for (int row = 32 * kTrellisWarps - 1 - static_cast<int>(threadIdx.x); row < 2 * bands && columns > 0;
         row += 32 * kTrellisWarps) {
      const int first = runs.warp_of(row * columns);
      met[row] = make_int2(first, runs.warp_of((row + 1) * columns - 1) - first + 1);
    }
  };
  if (deal.chunk == kMostChunkSpans) {
    begin_walk<Decoder, kTokens, kMostChunkSpans>(p, place, memory, first_span, spans, walk, find_met);
  } else {
    begin_walk<Decoder, kTokens, 1>(p, place, memory, first_span, spans, walk, find_met);
  }
  const int chunks = (spans + deal.chunk - 1) / deal.chunk;
  // Columns of tokens that are not there stay apart from the others, but must hold numbers.
  if constexpr (kTokens > 1) {
    constexpr int kColumnPieces = 4;  // of 16 bytes
    const int unused = (kTokens - p.m) * 2 * kColumnPieces;
#pragma unroll 1
    for (int i = static_cast<int>(threadIdx.x); i < unused * Operand::kPieces * columns;
         i += 32 * kTrellisWarps) {
      unsigned char* const to = memory + i / unused * Operand::kPieceBytes;
      reinterpret_cast<uint4*>(to)[p.m * 2 * kColumnPieces + i % unused] = make_uint4(0, 0, 0, 0);
    }
#pragma unroll 1
    for (int i = static_cast<int>(threadIdx.x); i < chunks * (kTokens - p.m); i += 32 * kTrellisWarps) {
      reinterpret_cast<float*>(memory +
                               place.units)[i / (kTokens - p.m) * kTokens + p.m + i % (kTokens - p.m)] = 0.0F;
    }
  }
  __syncthreads();

  auto* const parts = reinterpret_cast<float*>(memory + place.parts);
  walk.run(p.map, memory, reinterpret_cast<const float*>(memory + place.units), 2 * deal.chunk,
           [&](int row, const float(&totals)[8]) {
             if (lane % 4 >= kTokens) return;
             const int part = warp - met[row].x;
             float* const to = parts + ((row * deal.parts + part) * kTokens + lane % 4) * 64 + lane / 4 * 8;
             *reinterpret_cast<float4*>(to) = make_float4(totals[0], totals[1], totals[2], totals[3]);
             *reinterpret_cast<float4*>(to + 4) = make_float4(totals[4], totals[5], totals[6], totals[7]);
           });
  // The warps that have the fewest pieces, one for each token.
  if (const int token = kTrellisWarps - 1 - warp; token < tokens) {
    float sum = 0.0F;
    for (int chunk = lane; chunk < chunks; chunk += 32) {
      sum += reinterpret_cast<const float*>(memory + place.shares)[chunk * kTokens + token];
    }
#pragma unroll
    for (int distance = 16; distance > 0; distance /= 2) sum += __shfl_xor_sync(~0U, sum, distance);
    if (lane == 0) reinterpret_cast<float*>(memory + place.sums)[token] = sum;
  }
  BandScales scales;
  if (p.partial == nullptr && warp < own_bands * tokens)
    scales.ask(p, first_band + (kTokens == 1 ? warp : warp / tokens) * deal.blocks + rank);
  if (in_cluster) cluster_wait();  // the shared memory of the others is there
  __syncthreads();

  // The block's sums, four at a time, to the block that finishes the band.
  auto* const received = reinterpret_cast<float*>(memory + place.received);
  const int four = static_cast<int>(threadIdx.x) % 16;
  for (int i = static_cast<int>(threadIdx.x) / 16; i < 2 * bands * kTokens; i += 2 * kTrellisWarps) {
    const int row = i / kTokens;
    const int token = i % kTokens;
    if (token >= tokens) continue;
    float4 sum = make_float4(0.0F, 0.0F, 0.0F, 0.0F);
    if (columns > 0) {
      const auto* from =
          reinterpret_cast<const float4*>(parts + (row * deal.parts * kTokens + token) * 64) + four;
      const int count = met[row].y;
#pragma unroll 4
      for (int part = 0; part < count; ++part, from += kTokens * 16) {
        sum.x += from->x;
        sum.y += from->y;
        sum.z += from->z;
        sum.w += from->w;
      }
      const float share = reinterpret_cast<const float*>(memory + place.sums)[token];
      sum = make_float4(sum.x + share, sum.y + share, sum.z + share, sum.w + share);
    }
    const int band = row / 2;
    const int at = row % 2 * 64 + 4 * four;
    if (p.partial != nullptr) {
      *reinterpret_cast<float4*>(
          p.partial +
          ((static_cast<int64_t>(first_band + band) * deal.blocks + rank) * kTokens + token) * kTrellisBand +
          at) = sum;
      continue;
    }
    const auto own = static_cast<int>(deal.by_blocks.divide(static_cast<uint32_t>(band)));
    float* const to = received + ((own * deal.blocks + rank) * kTokens + token) * kTrellisBand + at;
    if (in_cluster) {
      Delivery::send(to, delivery, band - own * deal.blocks, sum);
    } else {
      *reinterpret_cast<float4*>(to) = sum;
    }
  }
  if (p.partial != nullptr) return;
  if (!in_cluster) __syncthreads();
  if (warp >= own_bands * tokens) return;
  if (in_cluster) Delivery::wait(delivery);
#pragma unroll 1
  for (int i = warp; i < own_bands * tokens; i += kTrellisWarps) {
    const int own = kTokens == 1 ? i : i / tokens;
    const int band = first_band + own * deal.blocks + rank;
    if (i != warp) scales.ask(p, band);
    finish_band(p, deal, scales, received + own * deal.blocks * kTokens * kTrellisBand, kTokens, band,
                i - own * tokens);
  }
}

// Bytes of shared memory that a deal takes.
template <class Decoder, int kTokens>
int trellis_memory(const TrellisDeal& deal) {
  return TrellisMemory(deal, TrellisOperand<Decoder, kTokens>::kBytes, kTokens).bytes;
}

template <class Decoder, int kTokens>
void launch_trellis(const TrellisLaunch& launch) {
  const int shared = trellis_memory<Decoder, kTokens>(launch.deal);
  LaunchSettings settings(dim3(static_cast<unsigned>(launch.deal.teams * launch.deal.blocks)),
                          dim3(32 * kTrellisWarps), launch.stream, launch.overlap,
                          launch.product.partial != nullptr ? 1 : launch.deal.blocks);
  settings.config.dynamicSmemBytes = static_cast<size_t>(shared);
  const auto kernel = multiply_trellis<Decoder, kTokens>;
  check_cuda(cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, shared),
             "matmul_cuda: shared memory of multiply_trellis");
  check_cuda(cudaLaunchKernelEx(&settings.config, kernel, launch.product, launch.deal),
             "matmul_cuda: launch of multiply_trellis");
  if (launch.product.partial != nullptr) launch_trellis_sums(launch);
}

template <class Decoder>
constexpr TrellisLauncher trellis_launcher_of() {
  return {.launch = {&launch_trellis<Decoder, 1>, &launch_trellis<Decoder, kMostTrellisTokens>},
          .memory = {&trellis_memory<Decoder, 1>, &trellis_memory<Decoder, kMostTrellisTokens>}};
}

template <int kBits>
TrellisLauncher trellis_launcher(TrellisWords words) {
  switch (words) {
    case TrellisWords::bytes:
      return trellis_launcher_of<TrellisBytes<kBits>>();
    case TrellisWords::exl3_bytes:
      if constexpr (kBits >= 2 && kBits <= 4) {
        return trellis_launcher_of<TrellisBytes<kBits, trellis::kExl3Mul1>>();
      } else {
        return trellis_launcher_of<TrellisBytes<kBits>>();
      }
    case TrellisWords::halves:
      return trellis_launcher_of<TrellisHalves<kBits>>();
    case TrellisWords::octagon:
    case TrellisWords::own_octagon:
    case TrellisWords::exact_octagon:
      if constexpr (kBits <= 4) {
        if (words == TrellisWords::octagon) return trellis_launcher_of<TrellisOctagon<kBits>>();
        if (words == TrellisWords::exact_octagon) {
          return trellis_launcher_of<TrellisExact<kBits, TrellisHash::octagon>>();
        }
        return trellis_launcher_of<TrellisOctagon<kBits, trellis::kOctagonMultiplier>>();
      } else {
        return {};
      }
    case TrellisWords::exact_bytes:
      return trellis_launcher_of<TrellisExact<kBits, TrellisHash::bytes>>();
    default:
      return trellis_launcher_of<TrellisExact<kBits, TrellisHash::halves>>();
  }
}

}  // namespace quantloom::cuda
