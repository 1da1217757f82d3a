// Products of one token with vectors of 8-bit codes, in fragment order, by look-ups.
//
// A block of threads takes a few blocks of 64 columns ("pass") and some rows. First it makes, in shared
// memory, the products of the pass's inputs with all entries of all tables; then each code of 4 or 8 weights
// is one look-up and one addition. Eight vectors lie side by side in a block's columns, so each product is
// there four times: word `lane` of 32 belongs to that lane alone, and no look-up waits for another.
//
// In fragment order the vectors of neighbouring lanes are of different rows, for the tensor cores. Lanes
// exchange codes so that each has those of one column of vectors, for rows in its registers.
//
// Sums of passes meet in memory and are added in a fixed order by a second kernel.
#include <algorithm>
#include <cmath>
#include <limits>

#include "common/check.cuh"
#include "common/half_pairs.cuh"
#include "common/load_float.cuh"
#include "kernels/lookups.hpp"
#include "kernels/overlap.cuh"

namespace quantloom::cuda {
namespace {

constexpr int kThreads = 512;
constexpr int kWarps = kThreads / 32;
constexpr int kEntries = 256;
// A plane has the products of one table with the eight vectors side by side: [entry][32 lanes]. Two planes
// lie in turns, so that an entry's address is its code in the second byte.
constexpr int kEntryBytes = 256;
constexpr int kPairBytes = kEntries * kEntryBytes;
constexpr int kFinishThreads = 256;
constexpr int kFinishRows = 32;
constexpr int kMostRanges = 64;

// How vectors of kDim weights with kTables tables lie in a block of 64 x 64, of which as many make a pass as
// fill kPlanes planes.
template <int kDim, int kTables, int kPlanes>
struct Order {
  static constexpr int kWords = kTables * 8 / kDim;  // of a lane in a unit of 16 rows
  // A block's planes: for vectors of 4 weights, those of its first 32 columns of each 64... are apart from
  // the others.
  static constexpr int kSets = kDim == 8 ? 1 : 2;
  static constexpr int kBlockPlanes = kSets * kTables;
  static constexpr int kBlocks = kPlanes / kBlockPlanes;  // of columns, in a pass
  static constexpr int kBytes = (kBlocks * kBlockPlanes + 1) / 2 * kPairBytes;
};

__host__ __device__ constexpr int plane_offset(int plane) {
  return plane / 2 * kPairBytes + plane % 2 * 128;
}

// Which of eight vectors side by side a lane looks up, and which of the four copies of their products.
template <int kDim>
__device__ __forceinline__ int vector_of(int lane) {
  return kDim == 8 ? lane >> 1 & 7 : lane & 7;
}
template <int kDim>
__device__ __forceinline__ int copy_of(int lane) {
  return kDim == 8 ? (lane & 1) | (lane >> 3 & 2) : lane >> 3;
}

// Lanes `mask` apart exchange `b` of the one without the bit for `a` of the one with it.
__device__ __forceinline__ void exchange_words(uint32_t& a, uint32_t& b, int lane, int mask) {
  const bool upper = (lane & mask) != 0;
  const uint32_t received = __shfl_xor_sync(~0U, upper ? a : b, mask);
  a = upper ? received : a;
  b = upper ? b : received;
}
// The same for parts of words: the second of each pair of halves (or bytes) of both words.
__device__ __forceinline__ void exchange_halves(uint32_t& a, uint32_t& b, int lane, int mask) {
  const bool upper = (lane & mask) != 0;
  const uint32_t sent = __byte_perm(a, b, upper ? 0x5410 : 0x7632);
  const uint32_t received = __shfl_xor_sync(~0U, sent, mask);
  a = __byte_perm(a, received, upper ? 0x3254 : 0x5410);
  b = __byte_perm(b, received, upper ? 0x3276 : 0x7610);
}
__device__ __forceinline__ void exchange_bytes(uint32_t& a, uint32_t& b, int lane, int mask) {
  const bool upper = (lane & mask) != 0;
  const uint32_t sent = __byte_perm(a, b, upper ? 0x6420 : 0x7531);
  const uint32_t received = __shfl_xor_sync(~0U, sent, mask);
  a = __byte_perm(a, received, upper ? 0x3514 : 0x5240);
  b = __byte_perm(b, received, upper ? 0x3716 : 0x7260);
}

// The codes of a lane's block [unit][word] so that all are of vector_of(lane). Then, with bits a, b, ... of
// the place of a code in its unit, lowest first, they are of the rows 16 unit + ...
//   vectors of 8   a + 2 b + 4 (lane / 16) + 8 (lane % 2), a and b those of the field
//   vectors of 4   2 (lane / 8) + a + 8 i, a that of the step; second bit of the step: the set of planes
template <int kDim, int kTables>
__device__ __forceinline__ void exchange(uint32_t (&w)[4][kTables * 8 / kDim], int lane) {
  if constexpr (kDim == 8 && kTables == 1) {
#pragma unroll
    for (int unit = 0; unit < 4; unit += 2) {
      exchange_halves(w[unit][0], w[unit + 1][0], lane, 8);
      exchange_bytes(w[unit][0], w[unit + 1][0], lane, 4);
    }
  } else {
#pragma unroll
    for (int unit = 0; unit < 4; ++unit) {
      if constexpr (kDim == 8 && kTables == 2) {
        exchange_words(w[unit][0], w[unit][1], lane, 8);
        exchange_halves(w[unit][0], w[unit][1], lane, 4);
      } else if constexpr (kDim == 8) {
        exchange_words(w[unit][0], w[unit][2], lane, 8);
        exchange_words(w[unit][1], w[unit][3], lane, 8);
        exchange_words(w[unit][0], w[unit][1], lane, 4);
        exchange_words(w[unit][2], w[unit][3], lane, 4);
      } else if constexpr (kTables == 1) {
        exchange_halves(w[unit][0], w[unit][1], lane, 4);
      } else {
        exchange_words(w[unit][0], w[unit][1], lane, 4);
        exchange_words(w[unit][2], w[unit][3], lane, 4);
      }
    }
  }
}

// Sum i of a unit's four, and plane, of the code in byte `byte` of a lane's words.
template <int kDim, int kTables>
__device__ __forceinline__ constexpr int sum_of(int byte) {
  if constexpr (kDim == 8) return byte / kTables;
  // Fields 2 * step + i: the step's first bit, and i.
  const int field = byte / kTables;
  return field % 4;
}
template <int kDim, int kTables>
__device__ __forceinline__ constexpr int plane_of(int byte) {
  if constexpr (kDim == 8) return byte % kTables;
  return byte / kTables / 4 * kTables + byte % kTables;
}

// The row in its block of sum `i` of unit `unit`.
template <int kDim>
__device__ __forceinline__ int row_of_sum(int lane, int unit, int i) {
  if constexpr (kDim == 8) return 16 * unit + i + (lane >> 4 & 1) * 4 + (lane & 1) * 8;
  return 16 * unit + i / 2 + (lane >> 3) * 2 + (i & 1) * 8;
}

struct LookupArguments {
  const uint4* codes;
  const void* table;  // float16 [tables][entries][dim]
  int entries;
  const void* x;
  DType dtype;
  int64_t k;
  float* partial;  // [passes][64 * row_blocks]
  int row_blocks;
  int column_blocks;
  int ranges;  // of rows
};

// Products of the pass's inputs with all entries.
template <int kDim, int kTables, int kPlanes>
__device__ __forceinline__ void fill(const LookupArguments& p, int first_block, unsigned char* planes) {
  using O = Order<kDim, kTables, kPlanes>;
  constexpr int kPlaneSets = O::kBlocks * O::kSets;
  const int lane = static_cast<int>(threadIdx.x) % 32;
  const int vector = lane % 8;
  float x[kPlaneSets][kDim];
#pragma unroll
  for (int s = 0; s < kPlaneSets; ++s) {
    const int64_t first = int64_t{64} * first_block + (s * 8 + vector) * kDim;
#pragma unroll
    for (int i = 0; i < kDim; ++i) {
      x[s][i] = first + i < p.k ? load_float(p.x, p.dtype, first + i) : 0.0F;
    }
  }
#pragma unroll
  for (int t = 0; t < kTables; ++t) {
#pragma unroll 2
    for (int entry = static_cast<int>(threadIdx.x) / 8; entry < kEntries; entry += kThreads / 8) {
      float value[kDim];
#pragma unroll
      for (int i = 0; i < kDim; ++i) value[i] = 0.0F;
      if (entry < p.entries) {
        const auto* const from = static_cast<const __half*>(p.table) + (t * p.entries + entry) * kDim;
        uint32_t pairs[kDim / 2];
        if constexpr (kDim == 8) {
          const uint4 all = __ldg(reinterpret_cast<const uint4*>(from));
          pairs[0] = all.x, pairs[1] = all.y, pairs[2] = all.z, pairs[3] = all.w;
        } else {
          const uint2 all = __ldg(reinterpret_cast<const uint2*>(from));
          pairs[0] = all.x, pairs[1] = all.y;
        }
#pragma unroll
        for (int i = 0; i < kDim / 2; ++i) {
          value[2 * i] = HalfPair<__half>::low(pairs[i]);
          value[2 * i + 1] = HalfPair<__half>::high(pairs[i]);
        }
      }
#pragma unroll
      for (int s = 0; s < kPlaneSets; ++s) {
        float sum = value[0] * x[s][0];
#pragma unroll
        for (int i = 1; i < kDim; ++i) sum = fmaf(value[i], x[s][i], sum);
        const int plane = s * kTables + t;
        // The copies of a vector's product follow each other.
        *reinterpret_cast<float4*>(planes + plane_offset(plane) + entry * kEntryBytes + vector * 16) =
            make_float4(sum, sum, sum, sum);
      }
    }
  }
}

template <int kWords, int kBlocks>
__device__ __forceinline__ void load_codes(const LookupArguments& p, int row_block, int first_block, int lane,
                                           uint4 (&pieces)[kBlocks][kWords]) {
#pragma unroll
  for (int b = 0; b < kBlocks; ++b) {
    // A block past the last: its planes are zeros.
    const int block = min(first_block + b, p.column_blocks - 1);
    const int64_t place = (static_cast<int64_t>(row_block) * p.column_blocks + block) * kWords;
#pragma unroll
    for (int c = 0; c < kWords; ++c) pieces[b][c] = __ldcs(p.codes + (place + c) * 32 + lane);
  }
}

template <int kDim, int kTables, int kPlanes>
__global__ void __launch_bounds__(kThreads, 1) look_up(const __grid_constant__ LookupArguments p) {
  using O = Order<kDim, kTables, kPlanes>;
  constexpr int kWords = O::kWords;
  extern __shared__ __align__(128) unsigned char planes[];
  const int warp = static_cast<int>(threadIdx.x) / 32;
  const int lane = static_cast<int>(threadIdx.x) % 32;
  const int pass = static_cast<int>(blockIdx.x) / p.ranges;
  const int range = static_cast<int>(blockIdx.x) % p.ranges;
  const int first_block = pass * O::kBlocks;
  const int first_row = static_cast<int>(static_cast<int64_t>(p.row_blocks) * range / p.ranges);
  const int last_row = static_cast<int>(static_cast<int64_t>(p.row_blocks) * (range + 1) / p.ranges);

  uint4 next[O::kBlocks][kWords];
  int row_block = first_row + warp;
  if (row_block < last_row) load_codes<kWords, O::kBlocks>(p, row_block, first_block, lane, next);
  let_next_begin();
  wait_for_previous();
  fill<kDim, kTables, kPlanes>(p, first_block, planes);
  __syncthreads();

  // The address of entry 0 in the lane's words.
  const auto own = static_cast<uint32_t>(vector_of<kDim>(lane) * 16 + copy_of<kDim>(lane) * 4);
  const int64_t sums_at = static_cast<int64_t>(pass) * p.row_blocks * 64;
  for (; row_block < last_row; row_block += kWarps) {
    uint4 pieces[O::kBlocks][kWords];
#pragma unroll
    for (int b = 0; b < O::kBlocks; ++b) {
#pragma unroll
      for (int c = 0; c < kWords; ++c) pieces[b][c] = next[b][c];
    }
    if (row_block + kWarps < last_row) {
      load_codes<kWords, O::kBlocks>(p, row_block + kWarps, first_block, lane, next);
    }
    float sums[4][4] = {};
#pragma unroll
    for (int b = 0; b < O::kBlocks; ++b) {
      uint32_t w[4][kWords];
#pragma unroll
      for (int i = 0; i < 4 * kWords; ++i) {
        const uint4& piece = pieces[b][i / 4];
        w[i / kWords][i % kWords] = i % 4 == 0   ? piece.x
                                    : i % 4 == 1 ? piece.y
                                    : i % 4 == 2 ? piece.z
                                                 : piece.w;
      }
      exchange<kDim, kTables>(w, lane);
#pragma unroll
      for (int unit = 0; unit < 4; ++unit) {
#pragma unroll
        for (int byte = 0; byte < 4 * kWords; ++byte) {
          const uint32_t address = __byte_perm(w[unit][byte / 4], own, 0x5504U | (byte % 4) << 4);
          constexpr int kBlockPlanes = O::kBlockPlanes;
          const int plane = b * kBlockPlanes + plane_of<kDim, kTables>(byte);
          sums[unit][sum_of<kDim, kTables>(byte)] +=
              *reinterpret_cast<const float*>(planes + address + plane_offset(plane));
        }
      }
    }

    // Over the eight vectors: each lane is left with two of its sixteen sums.
    constexpr int kFirst = kDim == 8 ? 2 : 1;
    float eight[8];
    const bool b0 = (lane & kFirst) != 0;
#pragma unroll
    for (int i = 0; i < 8; ++i) {
      const float low = sums[i / 4][i % 4];
      const float high = sums[i / 4 + 2][i % 4];
      const float other = __shfl_xor_sync(~0U, b0 ? low : high, kFirst);
      eight[i] = (b0 ? high : low) + other;
    }
    float four[4];
    const bool b1 = (lane & 2 * kFirst) != 0;
#pragma unroll
    for (int i = 0; i < 4; ++i) {
      const float other = __shfl_xor_sync(~0U, b1 ? eight[i] : eight[i + 4], 2 * kFirst);
      four[i] = (b1 ? eight[i + 4] : eight[i]) + other;
    }
    const bool b2 = (lane & 4 * kFirst) != 0;
#pragma unroll
    for (int i = 0; i < 2; ++i) {
      const float other = __shfl_xor_sync(~0U, b2 ? four[i] : four[i + 2], 4 * kFirst);
      const float sum = (b2 ? four[i + 2] : four[i]) + other;
      const int unit = (b0 ? 2 : 0) + (b1 ? 1 : 0);
      const int row = row_of_sum<kDim>(lane, unit, (b2 ? 2 : 0) + i);
      p.partial[sums_at + static_cast<int64_t>(row_block) * 64 + row] = sum;
    }
  }
}

struct FinishArguments {
  const float* partial;
  int passes;
  int64_t padded_n;
  int64_t n;
  const void* scales;  // fragment order, one group
  DType scale_dtype;
  const void* bias;
  void* y;
  DType dtype;
};

__global__ void __launch_bounds__(kFinishThreads) add_passes(const __grid_constant__ FinishArguments p) {
  __shared__ float parts[kFinishThreads / kFinishRows][kFinishRows];
  const int part = static_cast<int>(threadIdx.x) / kFinishRows;
  const int in_rows = static_cast<int>(threadIdx.x) % kFinishRows;
  const int64_t row = static_cast<int64_t>(blockIdx.x) * kFinishRows + in_rows;
  constexpr int kParts = kFinishThreads / kFinishRows;
  let_next_begin();
  wait_for_previous();
  float sum = 0.0F;
#pragma unroll 8
  for (int pass = part; pass < p.passes; pass += kParts) sum += p.partial[pass * p.padded_n + row];
  parts[part][in_rows] = sum;
  __syncthreads();
  if (part > 0 || row >= p.n) return;
#pragma unroll
  for (int i = 1; i < kParts; ++i) sum += parts[i][in_rows];
  const int64_t at = row / 64 * 64 + fragments::parameter_in_block(static_cast<int>(row % 64));
  sum *= load_float(p.scales, p.scale_dtype, at);
  if (p.bias != nullptr) sum += load_float(p.bias, p.dtype, row);
  if (p.dtype == DType::f16) {
    static_cast<__half*>(p.y)[row] = __float2half_rn(sum);
  } else {
    static_cast<__nv_bfloat16*>(p.y)[row] = __float2bfloat16_rn(sum);
  }
}

// Planes of the blocks of a pass, and ranges of rows.
struct Deal {
  int planes = 0;
  int passes = 0;
  int ranges = 1;
};

// Planes of a block of 64 columns.
int block_planes(const FragmentLayout& layout) {
  return layout.tables * (layout.dim == 8 ? 1 : 2);
}

// The least estimated time; `splits`: ranges, if not 0.
Deal deal_of(const FragmentLayout& layout, int processors, int splits) {
  // Microseconds, fitted to an H200: of a block of threads and of each of its planes; of a word of codes in
  // each of its warps, and of what is left to do for a block of rows.
  constexpr double kBegin = 1.5;
  constexpr double kPlane = 0.25;
  constexpr double kWord = 0.22;
  constexpr double kRows = 0.15;
  const auto row_blocks = static_cast<int>(layout.row_blocks);
  Deal best;
  double least = std::numeric_limits<double>::infinity();
  for (const int planes : {6, 4, 2}) {
    if (planes < block_planes(layout) || planes % block_planes(layout) != 0) continue;
    const int blocks = planes / block_planes(layout);
    const auto passes = static_cast<int>(ceil_div(layout.column_blocks, int64_t{blocks}));
    for (int ranges = 1; ranges <= std::min(row_blocks, kMostRanges); ++ranges) {
      if (splits > 0 && ranges != std::min({splits, row_blocks, kMostRanges})) continue;
      const double waves = std::ceil(static_cast<double>(passes) * ranges / processors);
      const double rounds = std::ceil(std::ceil(static_cast<double>(row_blocks) / ranges) / kWarps);
      const double time =
          waves * (kBegin + planes * kPlane + rounds * (blocks * layout.bits * kWord + kRows));
      if (time >= least) continue;
      least = time;
      best = {planes, passes, ranges};
    }
  }
  return best;
}

template <int kDim, int kTables, int kPlanes>
void launch_order(const LookupArguments& arguments, int passes, const ProductLaunch& launch) {
  const auto kernel = look_up<kDim, kTables, kPlanes>;
  constexpr int kBytes = Order<kDim, kTables, kPlanes>::kBytes;
  check_cuda(cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, kBytes),
             "matmul_cuda: shared memory of look_up");
  LaunchSettings settings(dim3(static_cast<unsigned>(passes * arguments.ranges)), dim3(kThreads),
                          launch.stream, launch.overlap, 1);
  settings.config.dynamicSmemBytes = kBytes;
  check_cuda(cudaLaunchKernelEx(&settings.config, kernel, arguments), "matmul_cuda: launch of look_up");
}

template <int kDim, int kTables>
void launch_planes(const LookupArguments& arguments, const Deal& deal, const ProductLaunch& launch) {
  if constexpr (kTables * 8 / kDim == 4) {
    launch_order<kDim, kTables, 4>(arguments, deal.passes, launch);
  } else if (deal.planes == 6) {
    launch_order<kDim, kTables, 6>(arguments, deal.passes, launch);
  } else if (deal.planes == 4) {
    launch_order<kDim, kTables, 4>(arguments, deal.passes, launch);
  } else {
    launch_order<kDim, kTables, 2>(arguments, deal.passes, launch);
  }
}

}  // namespace

bool is_looked_up(const FragmentLayout& layout) {
  if (layout.outliers || layout.gathered || layout.group_count != 1) return false;
  if (layout.code_bits != 8 * layout.tables || layout.bits * layout.dim != layout.code_bits) return false;
  if (layout.dim == 8) return layout.tables == 1 || layout.tables == 2 || layout.tables == 4;
  return layout.dim == 4 && layout.tables <= 2;
}

int lookup_bytes(const FragmentLayout& layout) {
  return (block_planes(layout) == 4 ? 4 : 6) / 2 * kPairBytes;
}

int64_t lookup_workspace(const FragmentLayout& layout, const DeviceFacts& device, int splits) {
  const Deal deal = deal_of(layout, device.processors, splits);
  return checked_mul(checked_mul(deal.passes, layout.row_blocks), 64 * 4);
}

void launch_lookups(const FragmentLayout& layout, const ProductLaunch& launch, const DeviceFacts& device) {
  const ProductArguments& p = launch.arguments;
  const Deal deal = deal_of(layout, device.processors, launch.splits);
  const LookupArguments arguments{p.w.codes,  p.w.table,      static_cast<int>(layout.table_entries),
                                  p.x,        launch.dtype,   p.w.k,
                                  p.partial,  p.w.row_blocks, p.w.column_blocks,
                                  deal.ranges};
  if (deal.passes > 0) {
    if (layout.dim == 8 && layout.tables == 1) launch_planes<8, 1>(arguments, deal, launch);
    if (layout.dim == 8 && layout.tables == 2) launch_planes<8, 2>(arguments, deal, launch);
    if (layout.dim == 8 && layout.tables == 4) launch_planes<8, 4>(arguments, deal, launch);
    if (layout.dim == 4 && layout.tables == 1) launch_planes<4, 1>(arguments, deal, launch);
    if (layout.dim == 4 && layout.tables == 2) launch_planes<4, 2>(arguments, deal, launch);
  }
  const FinishArguments finish{p.partial, deal.passes, layout.row_blocks * 64,
                               p.w.n,     p.w.scales,  p.w.scale_dtype,
                               p.bias,    p.y,         launch.dtype};
  LaunchSettings settings(dim3(static_cast<unsigned>(ceil_div(layout.row_blocks * 64, int64_t{kFinishRows}))),
                          dim3(kFinishThreads), launch.stream, device.code >= 90, 1);
  check_cuda(cudaLaunchKernelEx(&settings.config, add_passes, finish), "matmul_cuda: launch of add_passes");
}

}  // namespace quantloom::cuda
