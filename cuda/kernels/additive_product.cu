// Products with additive codes that do not lie in fragment order: the choice of a kernel, and decoding.
#include <algorithm>
#include <array>

#include "common/check.cuh"
#include "common/load_float.cuh"
#include "kernels/additive_product.hpp"
#include "kernels/dense_product.cuh"
#include "kernels/packed_codes.cuh"
#include "kernels/store_eight.cuh"
#include "kernels/tile_products.cuh"
#include "kernels/tile_support.cuh"

namespace quantloom::cuda {
namespace {

using additive::kSliceBlocks;
using additive::PartEntry;
using additive::PartList;

constexpr std::string_view kParts = "additive_parts";
// Two or three tokens read all codes; for more than so many, decoding once is faster.
constexpr int64_t kMostPartsTokens = 8;
constexpr int kThreads = 256;
constexpr int kPieceColumns = 8;

constexpr std::array<CudaProduct, 2> kProducts = {{
    {.name = kParts,
     .description = "a large table in parts, each in the shared memory of some processors",
     .max_tokens = kMostPartsTokens,
     .workspace = true},
    {.name = "decode",
     .description = "decoded once, multiplied by cuBLASLt",
     .float32 = true,
     .workspace = true},
}};

// What of cuBLASLt's product does not depend on the order of the weights.
FragmentMatrix dense_matrix(const AdditiveLayout& layout) {
  FragmentMatrix w;
  w.n = layout.n;
  w.k = layout.k;
  w.row_blocks = static_cast<int>(std::max<int64_t>(ceil_div(layout.n, 64), 1));
  w.column_blocks = static_cast<int>(layout.column_blocks());
  return w;
}

std::optional<std::string> why_no_parts(const AdditiveLayout& layout, int64_t m, DType dtype,
                                        const DeviceFacts& device) {
  if (!layout.in_parts()) {
    return text_of("kernel ", kParts,
                   " takes one table of more than 128 KiB of vectors of 8 or 16 weights of ",
                   "a row, and one scale for a row");
  }
  if (dtype != DType::f16 && dtype != DType::bf16) {
    return text_of("kernel ", kParts, " takes no ", name_of(dtype), " activations");
  }
  if (m > kMostPartsTokens) {
    return text_of("kernel ", kParts, " takes 1 to ", kMostPartsTokens, " tokens, not ", m);
  }
  if (parts_bytes(layout) > device.shared_memory) {
    return text_of("kernel ", kParts, " needs ", parts_bytes(layout),
                   " bytes of shared memory, this device has ", device.shared_memory);
  }
  return std::nullopt;
}

struct DecodedRows {
  const uint32_t* codes;
  const __half* table;
  const void* scales;
  DType scale_dtype;
  int codebooks;
  int bits;
  int in_group;
  int out_group;
  int k;
  int scale_columns;
  int64_t row_words;
  int64_t scale_count;
  int64_t first_row;
  int64_t rows;
  int64_t pieces;  // of kPieceColumns, of a row
  int64_t stride;
};

// A thread decodes eight columns of a row; tables are added in order, then scaled, as on the CPU.
template <class Out>
__global__ void __launch_bounds__(kThreads)
    decode_rows(const __grid_constant__ DecodedRows w, Out* __restrict__ out) {
  const int64_t i = static_cast<int64_t>(blockIdx.x) * kThreads + threadIdx.x;
  const int64_t in_rows = i / w.pieces;
  if (in_rows >= w.rows) return;
  const int first = static_cast<int>(i - in_rows * w.pieces) * kPieceColumns;
  const int64_t row = w.first_row + in_rows;
  const int64_t row_group = row / w.out_group;
  const auto row_in_group = static_cast<int>(row - row_group * w.out_group);
  const uint32_t* const codes = w.codes + row_group * w.row_words;
  const int dim = w.in_group * w.out_group;
  float values[kPieceColumns];
#pragma unroll
  for (int c = 0; c < kPieceColumns; ++c) values[c] = 0.0F;
  for (int table = 0; table < w.codebooks; ++table) {
    const __half* const entries = w.table + (static_cast<int64_t>(table) << w.bits) * dim;
    int block = -1;
    const __half* entry = nullptr;
#pragma unroll
    for (int c = 0; c < kPieceColumns; ++c) {
      const int column = first + c;
      if (column >= w.k) continue;
      if (column / w.in_group != block) {
        block = column / w.in_group;
        const uint32_t code = read_code(codes, w.bits, static_cast<int64_t>(block) * w.codebooks + table);
        entry = entries + static_cast<int64_t>(code) * dim + row_in_group * w.in_group;
      }
      const float value = __half2float(entry[column - block * w.in_group]);
      values[c] = table == 0 ? value : __fadd_rn(values[c], value);
    }
  }
#pragma unroll
  for (int c = 0; c < kPieceColumns; ++c) {
    if (first + c >= w.k) continue;
    const int64_t scale = row_group * w.scale_count + (first + c) / w.scale_columns;
    values[c] = __fmul_rn(values[c], load_float(w.scales, w.scale_dtype, scale));
  }
  store_eight(values, out + in_rows * w.stride + first);
}

struct DecodedParts {
  const uint16_t* codes;
  const uint8_t* places;
  const uint32_t* lists;
  const uint4* table;
  const void* scales;
  DType scale_dtype;
  int parts;
  uint32_t last_vector;  // of the table
  int64_t n;
  int64_t capacity;
  int64_t blocks;
  int64_t slices;
  int64_t first_row;
  int64_t stride;
};

// Eight values of the table, scaled.
template <class Out>
__device__ __forceinline__ void store_scaled(uint4 pairs, float scale, Out* to) {
  const uint32_t words[4] = {pairs.x, pairs.y, pairs.z, pairs.w};
  float values[8];
#pragma unroll
  for (int c = 0; c < 4; ++c) {
    values[2 * c] = __fmul_rn(HalfPair<__half>::low(words[c]), scale);
    values[2 * c + 1] = __fmul_rn(HalfPair<__half>::high(words[c]), scale);
  }
  store_eight(values, to);
}

// A block of threads decodes the lists of a row and slice, a thread a vector at a time, into shared memory,
// from where they go to memory in the order of their columns.
template <class Out, int kDim>
__global__ void __launch_bounds__(kThreads)
    decode_parts(const __grid_constant__ DecodedParts w, Out* __restrict__ out) {
  constexpr int kBits = additive::part_bits(kDim);
  extern __shared__ __align__(16) unsigned char memory[];
  Out* const values_of_slice = reinterpret_cast<Out*>(memory);
  const auto thread = static_cast<int>(threadIdx.x);
  const int64_t in_rows = blockIdx.x / w.slices;
  const int64_t slice = blockIdx.x - in_rows * w.slices;
  const int64_t row = w.first_row + in_rows;
  const int64_t of_row = slice * w.n + row;
  const float scale = load_float(w.scales, w.scale_dtype, row);
  const auto blocks =
      static_cast<int>(min(w.blocks - slice * kSliceBlocks, static_cast<int64_t>(kSliceBlocks)));
  // Vectors of several parts are on their way at once.
  constexpr int kBatch = kDim == 8 ? 4 : 2;
  for (int first_part = 0; first_part < w.parts; first_part += kBatch) {
    PartList lists[kBatch];
    int longest = 0;
#pragma unroll
    for (int b = 0; b < kBatch; ++b) {
      const int part = first_part + b;
      lists[b] = PartList::from(part < w.parts ? __ldg(w.lists + of_row * w.parts + part) : 0U);
      longest = max(longest, lists[b].count);
    }
    for (int i = thread; i < longest; i += kThreads) {
      uint32_t low[kBatch];
      uint32_t high[kBatch];
#pragma unroll
      for (int b = 0; b < kBatch; ++b) {
        const int64_t at = of_row * w.capacity + lists[b].first + i;
        low[b] = i < lists[b].count ? __ldg(w.codes + at) : 0U;
        high[b] = i < lists[b].count ? __ldg(w.places + at) : 0U;
      }
      uint4 pairs[kBatch][kDim / 8];
#pragma unroll
      for (int b = 0; b < kBatch; ++b) {
        const uint32_t code = PartEntry::from(kBits, low[b], high[b]).code;
        const uint32_t vector = min(code | static_cast<uint32_t>(first_part + b) << kBits, w.last_vector);
#pragma unroll
        for (int e = 0; e < kDim / 8; ++e) pairs[b][e] = __ldg(w.table + vector * (kDim / 8) + e);
      }
#pragma unroll
      for (int b = 0; b < kBatch; ++b) {
        const uint32_t place = PartEntry::from(kBits, low[b], high[b]).place;
        if (i >= lists[b].count || static_cast<int>(place) >= blocks) continue;
#pragma unroll
        for (int e = 0; e < kDim / 8; ++e) {
          store_scaled(pairs[b][e], scale, values_of_slice + place * kDim + 8 * e);
        }
      }
    }
  }
  __syncthreads();
  constexpr int kPiece = 16 / static_cast<int>(sizeof(Out));
  auto* const to = reinterpret_cast<uint4*>(out + in_rows * w.stride + slice * kSliceBlocks * kDim);
  for (int i = thread; i < blocks * kDim / kPiece; i += kThreads)
    to[i] = reinterpret_cast<const uint4*>(memory)[i];
}

dim3 grid_for(int64_t threads) {
  const int64_t blocks = ceil_div(threads, kThreads);
  if (blocks > 2147483647) throw Unsupported(text_of("no kernel for ", threads, " pieces of additive codes"));
  return dim3(static_cast<unsigned>(blocks));
}

template <class Out>
void launch_decode(const AdditiveLayout& layout, const PreparedPlanes& w, int64_t first_row, int64_t rows,
                   Out* out, int64_t stride, cudaStream_t stream) {
  if (layout.in_parts()) {
    const DecodedParts decoded{reinterpret_cast<const uint16_t*>(w.plane("codes").bytes()),
                               reinterpret_cast<const uint8_t*>(w.plane("places").bytes()),
                               reinterpret_cast<const uint32_t*>(w.plane("lists").bytes()),
                               reinterpret_cast<const uint4*>(w.plane("codebook").bytes()),
                               w.plane("scales").bytes(),
                               layout.scale_dtype,
                               layout.parts,
                               (1U << layout.bits) - 1U,
                               layout.n,
                               layout.capacity,
                               layout.blocks,
                               layout.slices,
                               first_row,
                               stride};
    const auto kernel = layout.in_group == 8 ? decode_parts<Out, 8> : decode_parts<Out, 16>;
    const auto bytes = static_cast<int>(std::min<int64_t>(layout.blocks, kSliceBlocks) * layout.in_group *
                                        static_cast<int64_t>(sizeof(Out)));
    check_cuda(cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, bytes),
               "shared memory of decode_parts");
    kernel<<<grid_for(rows * layout.slices * kThreads), kThreads, static_cast<size_t>(bytes), stream>>>(
        decoded, out);
  } else {
    const DecodedRows decoded{reinterpret_cast<const uint32_t*>(w.plane("codes").bytes()),
                              reinterpret_cast<const __half*>(w.plane("codebook").bytes()),
                              w.plane("scales").bytes(),
                              layout.scale_dtype,
                              layout.codebooks,
                              layout.bits,
                              layout.in_group,
                              layout.out_group,
                              static_cast<int>(layout.k),
                              static_cast<int>(layout.scale_columns),
                              layout.row_words,
                              layout.scale_count,
                              first_row,
                              rows,
                              layout.padded_k() / kPieceColumns,
                              stride};
    decode_rows<Out><<<grid_for(rows * decoded.pieces), kThreads, 0, stream>>>(decoded, out);
  }
  check_cuda(cudaGetLastError(), "launch of the decoding of additive codes");
}

void run_decoded(const AdditiveLayout& layout, const PreparedPlanes& w, const CudaMatmulArguments& a) {
  ProductLaunch launch;
  ProductArguments& p = launch.arguments;
  p.w = dense_matrix(layout);
  p.x = a.x;
  p.x_stride = a.x_stride;
  p.bias = a.bias;
  p.y = a.y;
  p.y_stride = a.y_stride;
  p.m = static_cast<int>(a.m);
  launch.dtype = a.dtype;
  launch.stream = static_cast<cudaStream_t>(a.stream);
  if (layout.k == 0) return launch_bias_alone(launch);
  const DecodedPlan plan = decoded_plan(p.w, p.m, a.dtype, 0);
  for (int64_t first = 0; first < layout.n; first += plan.rows) {
    const ProductLaunch part = part_of_rows(launch, first, plan.rows, 0);
    decode_additive(layout, w, first, plan.rows, a.workspace, a.dtype, layout.padded_k(), launch.stream);
    multiply_decoded(part, plan, first == 0, a.workspace);
  }
}

}  // namespace

std::span<const CudaProduct> additive_products() {
  return kProducts;
}

AdditivePlan additive_plan(const AdditiveLayout& layout, int64_t m, DType dtype, const DeviceFacts& device,
                           const CudaMatmulOptions& options) {
  AdditivePlan plan;
  bool known = options.kernel.empty();
  const bool empty = m == 0 || layout.n == 0 || layout.k == 0;
  for (const CudaProduct& product : kProducts) {
    if (!options.kernel.empty() && product.name != options.kernel) continue;
    known = true;
    std::optional<std::string> reason;
    if (product.name == kParts) {
      reason = why_no_parts(layout, m, dtype, device);
      if (!empty && !reason) plan.workspace = parts_workspace(layout, m, device);
    } else if (dtype != DType::f16 && dtype != DType::bf16 && dtype != DType::f32) {
      reason = text_of("kernel ", product.name, " takes no ", name_of(dtype), " activations");
    } else if (!empty) {
      plan.workspace = decoded_workspace(dense_matrix(layout), static_cast<int>(m), dtype);
    }
    if (!reason) {
      plan.product = &product;
      return plan;
    }
    plan.reason += (plan.reason.empty() ? "" : "; ") + *reason;
  }
  if (!known) {
    throw InvalidArgument("kernel", options.kernel, "a kernel of additive codes of the kernel table");
  }
  return plan;
}

void run_additive(const AdditiveLayout& layout, const AdditivePlan& plan, const PreparedPlanes& w,
                  const CudaMatmulArguments& a, const DeviceFacts& device) {
  if (plan.product->name == kParts) return launch_parts(layout, w, a, device);
  run_decoded(layout, w, a);
}

void decode_additive(const AdditiveLayout& layout, const PreparedPlanes& w, int64_t first_row, int64_t rows,
                     void* out, DType dtype, int64_t stride, cudaStream_t stream) {
  rows = std::min(rows, layout.n - first_row);
  if (rows <= 0 || layout.k == 0) return;
  if (dtype == DType::f16) {
    launch_decode(layout, w, first_row, rows, static_cast<__half*>(out), stride, stream);
  } else if (dtype == DType::bf16) {
    launch_decode(layout, w, first_row, rows, static_cast<__nv_bfloat16*>(out), stride, stream);
  } else {
    launch_decode(layout, w, first_row, rows, static_cast<float*>(out), stride, stream);
  }
}

}  // namespace quantloom::cuda
