// The column loop of error feedback inside a block of columns.
//
// A thread block holds 32 rows: their weights of the block of columns and the block's triangle of U lie in
// shared memory. Columns go in runs of 16: one warp, a lane per row, walks through a run with the run's
// weights in registers; then all warps push the run's errors onto the rest of the block.
#include <cmath>
#include <type_traits>

#include "common/load_float.cuh"
#include "quantloom/error.hpp"
#include "rounding/walk_block.hpp"

namespace quantloom::cuda {
namespace {

constexpr int kThreads = 128;
constexpr int kWarp = 32;
constexpr int kWarps = kThreads / kWarp;
constexpr int kRows = kWarp;
constexpr int kRun = 16;
constexpr int kQuad = 4;  // columns pushed onto at a time
// Strides that spread both ways of walking over the banks of shared memory.
constexpr int kValueStride = kRows + 1;
constexpr int kCodeStride = kWalkBlock + 4;

struct Shared {
  float upper[kWalkBlock][kWalkBlock];    // rows of U from the block's first column on; zero elsewhere
  float value[kWalkBlock][kValueStride];  // by column: the weights; once a column is rounded, its errors
  uint8_t code[kRows][kCodeStride];
};
static_assert(sizeof(Shared) <= 99 * 1024, "the shared memory of one block on sm_86 and sm_89");

// The error that is left: of an outlier what float16 misses of it.
__device__ float keep_outlier(const WalkTask& task, int64_t position, int64_t row, float value, float decoded,
                              float pivot, float error) {
  if (!(fabsf(error) > task.largest) || row >= task.n || task.dead_at[position] != 0) return error;
  const __half missing = __float2half_rn(__fsub_rn(value, decoded));
  const int64_t at = row * task.k + position;
  if (__hisinf(missing) != 0) atomicMin(task.overflow, static_cast<unsigned long long>(at));
  task.missing[at] = __half_as_ushort(missing);
  atomicAdd(task.outlier_count, 1ULL);
  return __fdiv_rn(__fsub_rn(value, __fadd_rn(decoded, __half2float(missing))), pivot);
}

// Rounds columns [run, run + count) of this lane's row and pushes errors within the run.
template <class R, bool kOutliers>
__device__ __forceinline__ void round_run(const WalkTask& task, const R& rounder, Shared& shared,
                                          int64_t begin, int run, int count, int64_t row) {
  const int lane = threadIdx.x % kWarp;
  float value[kRun];
  typename R::Column own[kRun];
  // Rows past the end repeat the last one; what they make is not stored.
  const int64_t parameter_row = min(row, task.n - 1);
#pragma unroll
  for (int j = 0; j < kRun; ++j) {
    const int column = min(run + j, run + count - 1);
    const auto group = static_cast<int64_t>(task.group_at[begin + column]);
    value[j] = shared.value[run + j][lane];
    own[j] = rounder.column(parameter_row, group);
  }
#pragma unroll
  for (int j = 0; j < kRun; ++j) {
    if (j < count) {
      const float* upper = &shared.upper[run + j][run];
      const EncodedValue encoded = rounder.encode(own[j], value[j]);
      float error = __fdiv_rn(__fsub_rn(value[j], encoded.decoded), upper[j]);
      if constexpr (kOutliers) {
        error = keep_outlier(task, begin + run + j, row, value[j], encoded.decoded, upper[j], error);
      }
#pragma unroll
      for (int later = j + 1; later < kRun; ++later) {
        value[later] = __fmaf_rn(-upper[later], error, value[later]);
      }
      shared.value[run + j][lane] = error;
      shared.code[lane][run + j] = static_cast<uint8_t>(encoded.code);
    }
  }
}

// Pushes the errors of run [run, run + kRun) onto the columns after it. Columns beyond the block's width and
// errors beyond the run's count are zero.
__device__ __forceinline__ void push_run(Shared& shared, int run, int width) {
  const int lane = threadIdx.x % kWarp;
  const int warp = threadIdx.x / kWarp;
  float error[kRun];
#pragma unroll
  for (int j = 0; j < kRun; ++j) error[j] = shared.value[run + j][lane];
  for (int column = run + kRun + warp * kQuad; column < width; column += kWarps * kQuad) {
    float value[kQuad];
#pragma unroll
    for (int i = 0; i < kQuad; ++i) value[i] = shared.value[column + i][lane];
#pragma unroll
    for (int j = 0; j < kRun; ++j) {
      const float4 upper = *reinterpret_cast<const float4*>(&shared.upper[run + j][column]);
      value[0] = __fmaf_rn(-upper.x, error[j], value[0]);
      value[1] = __fmaf_rn(-upper.y, error[j], value[1]);
      value[2] = __fmaf_rn(-upper.z, error[j], value[2]);
      value[3] = __fmaf_rn(-upper.w, error[j], value[3]);
    }
#pragma unroll
    for (int i = 0; i < kQuad; ++i) shared.value[column + i][lane] = value[i];
  }
}

template <class R, bool kOutliers>
__global__ void __launch_bounds__(kThreads)
    walk_block_kernel(WalkTask task, R rounder, int64_t begin, int width) {
  extern __shared__ float4 shared_memory[];
  Shared& shared = *reinterpret_cast<Shared*>(shared_memory);
  const int lane = threadIdx.x % kWarp;
  const int warp = threadIdx.x / kWarp;
  const int64_t first_row = static_cast<int64_t>(blockIdx.x) * kRows;

#pragma unroll 8
  for (int i = warp; i < kWalkBlock; i += kWarps) {
#pragma unroll
    for (int part = 0; part < kWalkBlock; part += kWarp) {
      const int column = part + lane;
      const bool wanted = i < width && column < width && column >= i;
      shared.upper[i][column] = wanted ? task.upper[(begin + i) * task.upper_stride + begin + column] : 0.0F;
    }
  }
  for (int r = warp; r < kRows; r += kWarps) {
    const bool row_inside = first_row + r < task.n;
#pragma unroll
    for (int part = 0; part < kWalkBlock; part += kWarp) {
      const int column = part + lane;
      shared.value[column][r] =
          row_inside && column < width ? task.working[(first_row + r) * task.stride + begin + column] : 0.0F;
    }
  }
  __syncthreads();

  for (int run = 0; run < width; run += kRun) {
    if (warp == 0) {
      round_run<R, kOutliers>(task, rounder, shared, begin, run, min(kRun, width - run), first_row + lane);
    }
    __syncthreads();
    if (run + kRun < width) push_run(shared, run, width);
    __syncthreads();
  }

  for (int r = warp; r < kRows; r += kWarps) {
    const int64_t row = first_row + r;
    if (row >= task.n) continue;
#pragma unroll
    for (int part = 0; part < kWalkBlock; part += kWarp) {
      const int column = part + lane;
      if (column >= width) continue;
      task.errors[row * kWalkBlock + column] = shared.value[column][r];
      task.codes[row * task.k + begin + column] = shared.code[r][column];
    }
  }
}

__global__ void __launch_bounds__(kThreads)
    gather_kernel(CudaMatrix w, const int32_t* order, const uint8_t* dead, float* out, int64_t stride) {
  for (int64_t row = blockIdx.y; row < w.rows; row += gridDim.y) {
    for (int64_t p = static_cast<int64_t>(blockIdx.x) * kThreads + threadIdx.x; p < stride;
         p += static_cast<int64_t>(gridDim.x) * kThreads) {
      float value = 0.0F;
      if (p < w.cols) {
        const int64_t column = order[p];
        if (dead[column] == 0) value = load_float(w.data, w.dtype, row * w.stride + column);
      }
      out[row * stride + p] = value;
    }
  }
}

}  // namespace

void walk_block(const WalkTask& task, const Rounder& rounder, int64_t begin, int width, cudaStream_t stream) {
  std::visit(
      [&](const auto& own) {
        using R = std::decay_t<decltype(own)>;
        const auto launch = [&](auto kernel) {
          check_cuda(cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize,
                                          static_cast<int>(sizeof(Shared))),
                     "shared memory of walk_block");
          kernel<<<static_cast<unsigned>(ceil_div(task.n, kRows)), kThreads, sizeof(Shared), stream>>>(
              task, own, begin, width);
        };
        if constexpr (!std::is_same_v<R, BcqRounder>) {
          if (task.missing != nullptr) return launch(walk_block_kernel<R, true>);
        }
        launch(walk_block_kernel<R, false>);
      },
      rounder);
  check_cuda(cudaGetLastError(), "launch of walk_block");
}

void gather_columns(const CudaMatrix& w, const int32_t* order, const uint8_t* dead, float* out,
                    int64_t stride, cudaStream_t stream) {
  const dim3 blocks(static_cast<unsigned>(std::clamp<int64_t>(ceil_div(stride, kThreads), 1, 64)),
                    static_cast<unsigned>(std::clamp<int64_t>(w.rows, 1, 65535)));
  gather_kernel<<<blocks, kThreads, 0, stream>>>(w, order, dead, out, stride);
  check_cuda(cudaGetLastError(), "launch of gather_columns");
}

}  // namespace quantloom::cuda
