// Decodes vectors of 8 weights with codes of 8 bits, in fragment order, to rows of values.
//
// The tables lie in shared memory eight times, so that the eight lanes which read 16 bytes at the same time
// meet in no bank. A lane stores whole vectors: of fragment order's lanes those of a pair have neighbouring
// vectors of a row, 32 bytes. Of a large matrix it takes 1.7 to 1.9 times as long as a fill of the memory,
// whatever the number of tables.
#include <algorithm>

#include "common/check.cuh"
#include "common/half_pairs.cuh"
#include "common/load_float.cuh"
#include "kernels/lookups.hpp"
#include "kernels/store_eight.cuh"

namespace quantloom::cuda {
namespace {

constexpr int kThreads = 256;
constexpr int kWarps = kThreads / 32;
constexpr int kEntries = 256;
constexpr int kCopies = 8;
constexpr int kVectorBytes = 16;
constexpr int kTableBytes = kEntries * kCopies * kVectorBytes;
// Blocks of 64 x 64 that a warp decodes one after the other, of a row of blocks.
constexpr int kRun = 8;

// `entries`: of a table. Tables are added in order, then scaled, as on the CPU.
template <class Out, int kTables>
__global__ void __launch_bounds__(kThreads)
    decode_vectors(const __grid_constant__ FragmentMatrix w, int entries, Out* __restrict__ out,
                   int64_t stride) {
  extern __shared__ __align__(128) unsigned char tables[];
  const int warp = static_cast<int>(threadIdx.x) / 32;
  const int lane = static_cast<int>(threadIdx.x) % 32;
  for (int i = static_cast<int>(threadIdx.x); i < kTables * kEntries * kCopies; i += kThreads) {
    const int entry = i / kCopies % kEntries;
    const int table = i / (kCopies * kEntries);
    reinterpret_cast<uint4*>(tables)[i] =
        entry < entries ? __ldg(static_cast<const uint4*>(w.table) + table * entries + entry)
                        : make_uint4(0U, 0U, 0U, 0U);
  }
  __syncthreads();
  const unsigned char* const own = tables + lane % kCopies * kVectorBytes;

  const int runs = (w.column_blocks + kRun - 1) / kRun;
  const int64_t all = static_cast<int64_t>(w.row_blocks) * runs;
  for (int64_t i = static_cast<int64_t>(blockIdx.x) * kWarps + warp; i < all;
       i += static_cast<int64_t>(gridDim.x) * kWarps) {
    const int64_t row_block = i / runs;
    const int first = static_cast<int>(i - row_block * runs) * kRun;
    const int last = min(first + kRun, w.column_blocks);
    const int in_unit = lane / 4 + lane % 2 * 8;
    float scales[4];
#pragma unroll
    for (int unit = 0; unit < 4; ++unit) {
      scales[unit] = load_float(w.scales, w.scale_dtype,
                                row_block * 64 + fragments::parameter_in_block(16 * unit + in_unit));
    }
    const uint4* codes = w.codes + (row_block * w.column_blocks + first) * kTables * 32 + lane;
    const int64_t row = row_block * 64 + in_unit;
    Out* to = out + row * stride + static_cast<int64_t>(first) * 64 + lane % 4 / 2 * 8;
    uint4 next[kTables];
#pragma unroll
    for (int c = 0; c < kTables; ++c) next[c] = __ldcs(codes + 32 * c);
    for (int block = first; block < last; ++block) {
      uint32_t words[4 * kTables];
#pragma unroll
      for (int c = 0; c < kTables; ++c) {
        words[4 * c] = next[c].x;
        words[4 * c + 1] = next[c].y;
        words[4 * c + 2] = next[c].z;
        words[4 * c + 3] = next[c].w;
      }
      codes += 32 * kTables;
      if (block + 1 < last) {
#pragma unroll
        for (int c = 0; c < kTables; ++c) next[c] = __ldcs(codes + 32 * c);
      }
#pragma unroll
      for (int unit = 0; unit < 4; ++unit) {
        if (row + 16 * unit >= w.n) break;
#pragma unroll
        for (int step = 0; step < 4; ++step) {
          float values[8];
#pragma unroll
          for (int t = 0; t < kTables; ++t) {
            const int byte = (unit * 4 + step) * kTables + t;
            const uint32_t code = __byte_perm(words[byte / 4], 0U, 0x4440U | byte % 4);
            const uint4 entry =
                *reinterpret_cast<const uint4*>(own + t * kTableBytes + code * (kCopies * kVectorBytes));
            const uint32_t pairs[4] = {entry.x, entry.y, entry.z, entry.w};
#pragma unroll
            for (int c = 0; c < 4; ++c) {
              const float low = HalfPair<__half>::low(pairs[c]);
              const float high = HalfPair<__half>::high(pairs[c]);
              values[2 * c] = t == 0 ? low : __fadd_rn(values[2 * c], low);
              values[2 * c + 1] = t == 0 ? high : __fadd_rn(values[2 * c + 1], high);
            }
          }
#pragma unroll
          for (int c = 0; c < 8; ++c) values[c] = __fmul_rn(values[c], scales[unit]);
          store_eight(values, to + 16 * unit * stride + 16 * step);
        }
      }
      to += 64;
    }
  }
}

template <class Out, int kTables>
void launch(const FragmentMatrix& w, int entries, void* out, int64_t stride, const DeviceFacts& device,
            cudaStream_t stream) {
  const auto kernel = decode_vectors<Out, kTables>;
  constexpr int kBytes = kTables * kTableBytes;
  check_cuda(cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, kBytes),
             "shared memory of decode_vectors");
  const int64_t runs = int64_t{w.row_blocks} * ceil_div(int64_t{w.column_blocks}, int64_t{kRun});
  // As many as are there at a time: each fills its tables once.
  const int64_t resident = std::max(device.processor_memory / (kBytes + 1024), 1);
  const int64_t most = std::min<int64_t>(resident, 2048 / kThreads) * device.processors;
  const auto blocks = static_cast<unsigned>(std::min(ceil_div(runs, int64_t{kWarps}), most));
  kernel<<<blocks, kThreads, kBytes, stream>>>(w, entries, static_cast<Out*>(out), stride);
  check_cuda(cudaGetLastError(), "launch of decode_vectors");
}

}  // namespace

bool decodes_vectors(const FragmentLayout& layout, const DeviceFacts& device) {
  return is_looked_up(layout) && layout.dim == 8 && layout.tables * kTableBytes <= device.shared_memory;
}

void decode_vectors_to(const FragmentLayout& layout, const FragmentMatrix& w, void* out, int64_t stride,
                       DType dtype, const DeviceFacts& device, cudaStream_t stream) {
  if (w.n == 0 || w.column_blocks == 0) return;
  const auto entries = static_cast<int>(layout.table_entries);
  const auto launch_tables = [&]<class Out>(Out*) {
    if (layout.tables == 1) return launch<Out, 1>(w, entries, out, stride, device, stream);
    if (layout.tables == 2) return launch<Out, 2>(w, entries, out, stride, device, stream);
    launch<Out, 4>(w, entries, out, stride, device, stream);
  };
  if (dtype == DType::f16) {
    launch_tables(static_cast<__half*>(nullptr));
  } else if (dtype == DType::bf16) {
    launch_tables(static_cast<__nv_bfloat16*>(nullptr));
  } else {
    launch_tables(static_cast<float*>(nullptr));
  }
}

}  // namespace quantloom::cuda
