// Products of a few tokens with codes of one large table (formats/additive_order.hpp).
//
// A table of 65536 vectors lies in the L2 cache, which gives a processor two of them in three clocks. So a
// block of threads keeps one part of it in shared memory, which gives three a clock, and multiplies the codes
// of that part alone: a list for each row and slice of columns. The inputs of a slice lie beside the part.
//
// Sums of parts and slices meet in memory and are added in a fixed order by a second kernel.
#include <algorithm>

#include "common/check.cuh"
#include "common/half_pairs.cuh"
#include "common/load_float.cuh"
#include "kernels/additive_product.hpp"
#include "kernels/overlap.cuh"
#include "kernels/tile_pipeline.cuh"

namespace quantloom::cuda {
namespace {

using additive::kPieceEntries;
using additive::kSliceBlocks;
using additive::PartList;

constexpr int kThreads = 1024;
constexpr int kWarps = kThreads / 32;
constexpr int kFinishThreads = 128;
// Pieces of a list that a lane has loaded ahead.
template <int kTokens>
constexpr int kAhead = kTokens == 1 ? 4 : 3;

struct PartsArguments {
  const uint2* codes;      // [slices][n][capacity / 4]
  const uint32_t* places;  // [slices][n][capacity / 4]
  const uint32_t* lists;   // [slices][n][parts]
  const uint4* table;
  const void* x;
  int64_t x_stride;
  float* partial;  // [tokens][slices][parts][n]
  int64_t k;
  int64_t n;
  int64_t pieces;  // of a row and slice
  int parts;
  int ranges;  // of rows
  int slices;
};

template <int kDim>
constexpr int kInputBytes = kSliceBlocks* kDim * 2;

// sums[t] += the product of a vector of the table and those of the tokens.
template <class T, int kDim, int kTokens>
__device__ __forceinline__ void add_products(const unsigned char* table, const unsigned char* x, int lane,
                                             float (&sums)[kTokens]) {
#pragma unroll
  for (int i = 0; i < kDim / 8; ++i) {
    // Of vectors of 16, neighbouring lanes read different halves, which lie in different banks.
    const int at = kDim == 8 ? 0 : 16 * (i ^ (lane & 1));
    const uint4 values = *reinterpret_cast<const uint4*>(table + at);
    const uint32_t pairs[4] = {values.x, values.y, values.z, values.w};
#pragma unroll
    for (int t = 0; t < kTokens; ++t) {
      const uint4 inputs = *reinterpret_cast<const uint4*>(x + t * kInputBytes<kDim> + at);
      const uint32_t words[4] = {inputs.x, inputs.y, inputs.z, inputs.w};
#pragma unroll
      for (int c = 0; c < 4; ++c) {
        sums[t] = fmaf(HalfPair<__half>::low(pairs[c]), HalfPair<T>::low(words[c]), sums[t]);
        sums[t] = fmaf(HalfPair<__half>::high(pairs[c]), HalfPair<T>::high(words[c]), sums[t]);
      }
    }
  }
}

// The products of a lane's four entries, of which the first `count` count.
template <class T, int kDim, int kTokens>
__device__ __forceinline__ void add_piece(const unsigned char* table, const unsigned char* x, int lane,
                                          uint2 codes, uint32_t places, int count,
                                          float (&sums)[2][kTokens]) {
  constexpr int kBits = additive::part_bits(kDim);
  constexpr int kShift = kDim == 8 ? 4 : 5;  // bytes of a vector
  constexpr uint32_t kCodes = ((1U << kBits) - 1U) << kShift;
  constexpr int kLow = 16 - kBits;  // bits of a place beside the code
#pragma unroll
  for (int i = 0; i < kPieceEntries; ++i) {
    const uint32_t word = i < 2 ? codes.x : codes.y;
    const uint32_t code = i % 2 == 0 ? word << kShift : word >> (16 - kShift);
    const uint32_t low = (word >> (i % 2 * 16 + kBits)) & ((1U << kLow) - 1U);
    const uint32_t high = (places >> (8 * i)) & 0xFFU;
    if (i < count) {
      add_products<T, kDim, kTokens>(table + (code & kCodes), x + ((low | high << kLow) << kShift), lane,
                                     sums[i % 2]);
    }
  }
}

// Pieces of a row's list, of which a lane has every kLanes-th.
template <int kPieces, int kLanes>
struct Pieces {
  uint2 codes[kPieces];
  uint32_t places[kPieces];

  // Piece `i` of a lane. `first`: its first one.
  __device__ __forceinline__ void load(const PartsArguments& p, int i, int64_t first, int count, int lane) {
    codes[i] = make_uint2(0U, 0U);
    places[i] = 0U;
    if ((i * kLanes + lane) * kPieceEntries < count) {
      codes[i] = __ldcs(p.codes + first + i * kLanes);
      places[i] = __ldcs(p.places + first + i * kLanes);
    }
  }
};

// Asks for a part of the table in shared memory.
__device__ __forceinline__ void copy_part(const uint4* part, unsigned char* to) {
  constexpr int kPieces = additive::kPartBytes / 16;
  const uint32_t place = shared_address(to) + threadIdx.x * 16;
#pragma unroll
  for (int i = 0; i < kPieces / kThreads; ++i) {
    copy_piece(place + i * kThreads * 16, part + i * kThreads + threadIdx.x);
  }
  close_copies();
}

// kLanes of a warp take a row.
template <class T, int kDim, int kTokens, int kLanes>
__global__ void __launch_bounds__(kThreads, 1) multiply_parts(const __grid_constant__ PartsArguments p) {
  extern __shared__ __align__(128) unsigned char memory[];
  unsigned char* const table = memory;
  unsigned char* const x = memory + additive::kPartBytes;
  const int warp = static_cast<int>(threadIdx.x) / 32;
  const int lane = static_cast<int>(threadIdx.x) % 32;
  const int part = static_cast<int>(blockIdx.x) % p.parts;
  const int range = static_cast<int>(blockIdx.x) / p.parts;
  const auto first_row = static_cast<int>(p.n * range / p.ranges);
  const auto last_row = static_cast<int>(p.n * (range + 1) / p.ranges);
  let_next_begin();
  wait_for_previous();
  copy_part(p.table + part * (additive::kPartBytes / 16), table);
  for (int slice = 0; slice < p.slices; ++slice) {
    // The list of a row is known a turn before its pieces are loaded, and those a turn before they are used.
    constexpr int kRows = 32 / kLanes;
    constexpr int kStep = kWarps * kRows;
    const int in_row = lane % kLanes;
    const int64_t of_slice = slice * p.n;
    int row = first_row + warp * kRows + lane / kLanes;
    const auto list_of = [&](int at) {
      return at < last_row ? __ldg(p.lists + (of_slice + at) * p.parts + part) : 0U;
    };
    const auto first_piece = [&](int at, PartList list) {
      return (of_slice + at) * p.pieces + list.first / kPieceEntries + in_row;
    };
    PartList list = PartList::from(list_of(row));
    PartList next_list = PartList::from(list_of(row + kStep));
    if (slice > 0) __syncthreads();
    const int64_t first_input = int64_t{slice} * kSliceBlocks * kDim;
#pragma unroll
    for (int t = 0; t < kTokens; ++t) {
      const auto* const inputs = static_cast<const uint16_t*>(p.x) + t * p.x_stride + first_input;
      auto* const to = reinterpret_cast<uint16_t*>(x + t * kInputBytes<kDim>);
      for (int i = static_cast<int>(threadIdx.x); i < kSliceBlocks * kDim; i += kThreads) {
        to[i] = first_input + i < p.k ? inputs[i] : uint16_t{0};
      }
    }
    Pieces<kAhead<kTokens>, kLanes> pieces;
#pragma unroll
    for (int i = 0; i < kAhead<kTokens>; ++i) {
      pieces.load(p, i, first_piece(row, list), list.count, in_row);
    }
    wait_for_copies<0>();
    __syncthreads();
    for (int turn = first_row + warp * kRows; turn < last_row; turn += kStep) {
      const uint32_t after_next = list_of(row + 2 * kStep);
      const int64_t next_piece = first_piece(row + kStep, next_list);
      float sums[2][kTokens] = {};
#pragma unroll
      for (int i = 0; i < kAhead<kTokens>; ++i) {
        const uint2 codes = pieces.codes[i];
        const uint32_t places = pieces.places[i];
        pieces.load(p, i, next_piece, next_list.count, in_row);
        const int left = list.count - (i * kLanes + in_row) * kPieceEntries;
        if (left > 0) add_piece<T, kDim, kTokens>(table, x, lane, codes, places, left, sums);
      }
      const int64_t first = first_piece(row, list);
      for (int at = kAhead<kTokens> * kLanes; (at + in_row) * kPieceEntries < list.count; at += kLanes) {
        add_piece<T, kDim, kTokens>(table, x, lane, __ldcs(p.codes + first + at),
                                    __ldcs(p.places + first + at), list.count - (at + in_row) * kPieceEntries,
                                    sums);
      }
      __syncwarp();
#pragma unroll
      for (int t = 0; t < kTokens; ++t) {
        float sum = sums[0][t] + sums[1][t];
#pragma unroll
        for (int mask = kLanes / 2; mask > 0; mask /= 2) sum += __shfl_xor_sync(~0U, sum, mask);
        const int64_t place = (int64_t{t} * p.slices + slice) * p.parts + part;
        if (in_row == 0 && row < last_row) p.partial[place * p.n + row] = sum;
      }
      list = next_list;
      next_list = PartList::from(after_next);
      row += kStep;
    }
  }
}

struct FinishArguments {
  const float* partial;
  int count;  // of lists of a row
  int64_t n;
  const void* scales;
  DType scale_dtype;
  const void* bias;
  void* y;
  int64_t y_stride;
  DType dtype;
};

__global__ void __launch_bounds__(kFinishThreads) add_parts(const __grid_constant__ FinishArguments p) {
  const int64_t row = static_cast<int64_t>(blockIdx.x) * kFinishThreads + threadIdx.x;
  const int64_t token = blockIdx.y;
  let_next_begin();
  wait_for_previous();
  if (row >= p.n) return;
  float sum = 0.0F;
#pragma unroll 8
  for (int i = 0; i < p.count; ++i) sum += p.partial[(token * p.count + i) * p.n + row];
  if (p.count > 0) sum *= load_float(p.scales, p.scale_dtype, row);
  if (p.bias != nullptr) sum += load_float(p.bias, p.dtype, row);
  const int64_t to = token * p.y_stride + row;
  if (p.dtype == DType::f16) {
    static_cast<__half*>(p.y)[to] = __float2half_rn(sum);
  } else {
    static_cast<__nv_bfloat16*>(p.y)[to] = __float2bfloat16_rn(sum);
  }
}

int input_bytes(const AdditiveLayout& layout) {
  return layout.in_group == 8 ? kInputBytes<8> : kInputBytes<16>;
}

template <class T, int kDim, int kTokens, int kLanes>
void launch_lanes(const PartsArguments& arguments, cudaStream_t stream) {
  constexpr int kBytes = additive::kPartBytes + kTokens * kInputBytes<kDim>;
  const auto kernel = multiply_parts<T, kDim, kTokens, kLanes>;
  check_cuda(cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, kBytes),
             "matmul_cuda: shared memory of multiply_parts");
  LaunchSettings settings(dim3(static_cast<unsigned>(arguments.parts * arguments.ranges)), dim3(kThreads),
                          stream, false, 1);
  settings.config.dynamicSmemBytes = kBytes;
  check_cuda(cudaLaunchKernelEx(&settings.config, kernel, arguments),
             "matmul_cuda: launch of multiply_parts");
}

template <class T, int kDim, int kTokens>
void launch_tokens(const PartsArguments& arguments, int64_t list, cudaStream_t stream) {
  // Eight lanes for lists that they have mostly loaded ahead.
  if (list <= 8 * kPieceEntries * (kAhead<kTokens> - 1)) {
    return launch_lanes<T, kDim, kTokens, 8>(arguments, stream);
  }
  launch_lanes<T, kDim, kTokens, 16>(arguments, stream);
}

// `list`: entries of a list on average.
template <class T>
void launch_of(const PartsArguments& arguments, int dim, int tokens, int64_t list, cudaStream_t stream) {
  if (dim == 16) return launch_tokens<T, 16, 1>(arguments, list, stream);
  if (tokens == 1) return launch_tokens<T, 8, 1>(arguments, list, stream);
  if (tokens == 2) return launch_tokens<T, 8, 2>(arguments, list, stream);
  launch_tokens<T, 8, 3>(arguments, list, stream);
}

// Tokens that have room at a time.
int tokens_at_once(const AdditiveLayout& layout, const DeviceFacts& device) {
  const int room = (device.shared_memory - additive::kPartBytes) / input_bytes(layout);
  return std::clamp(room, 1, layout.in_group == 8 ? 3 : 1);
}

}  // namespace

int parts_bytes(const AdditiveLayout& layout) {
  return additive::kPartBytes + input_bytes(layout);
}

int64_t parts_workspace(const AdditiveLayout& layout, int64_t m, const DeviceFacts& device) {
  const int64_t tokens = std::min<int64_t>(m, tokens_at_once(layout, device));
  return checked_mul(checked_mul(layout.slices, layout.parts), checked_mul(layout.n, 4 * tokens));
}

void launch_parts(const AdditiveLayout& layout, const PreparedPlanes& w, const CudaMatmulArguments& a,
                  const DeviceFacts& device) {
  const auto stream = static_cast<cudaStream_t>(a.stream);
  PartsArguments arguments{reinterpret_cast<const uint2*>(w.plane("codes").bytes()),
                           reinterpret_cast<const uint32_t*>(w.plane("places").bytes()),
                           reinterpret_cast<const uint32_t*>(w.plane("lists").bytes()),
                           reinterpret_cast<const uint4*>(w.plane("codebook").bytes()),
                           nullptr,
                           a.x_stride,
                           static_cast<float*>(a.workspace),
                           layout.k,
                           layout.n,
                           layout.capacity / kPieceEntries,
                           layout.parts,
                           1,
                           static_cast<int>(layout.slices)};
  const int64_t most = ceil_div(layout.n, int64_t{kWarps});
  arguments.ranges = static_cast<int>(std::clamp<int64_t>(device.processors / layout.parts, 1, most));
  const int64_t list = std::min<int64_t>(layout.blocks, kSliceBlocks) / layout.parts;
  const int at_once = tokens_at_once(layout, device);
  for (int64_t token = 0; token < a.m; token += at_once) {
    const auto tokens = static_cast<int>(std::min<int64_t>(at_once, a.m - token));
    arguments.x = static_cast<const uint16_t*>(a.x) + token * a.x_stride;
    if (layout.slices > 0) {
      a.dtype == DType::f16 ? launch_of<__half>(arguments, layout.in_group, tokens, list, stream)
                            : launch_of<__nv_bfloat16>(arguments, layout.in_group, tokens, list, stream);
    }
    const FinishArguments finish{arguments.partial,
                                 static_cast<int>(layout.slices * layout.parts),
                                 layout.n,
                                 w.plane("scales").bytes(),
                                 layout.scale_dtype,
                                 a.bias,
                                 static_cast<uint16_t*>(a.y) + token * a.y_stride,
                                 a.y_stride,
                                 a.dtype};
    LaunchSettings settings(dim3(static_cast<unsigned>(ceil_div(layout.n, int64_t{kFinishThreads})),
                                 static_cast<unsigned>(tokens)),
                            dim3(kFinishThreads), stream, device.code >= 90, 1);
    check_cuda(cudaLaunchKernelEx(&settings.config, add_parts, finish), "matmul_cuda: launch of add_parts");
  }
}

}  // namespace quantloom::cuda
