// The kernels for runs of inputs: each with a grid of its own, or integers of its token cut to significant
// digits behind a shift of its own. Some neighbouring lanes of a warp share a run, and read it twice.
#pragma once

#include <cuda_runtime.h>

#include <algorithm>
#include <cstdint>

#include "activations/token_grid.cuh"
#include "activations/token_kernel.cuh"
#include "activations/token_sinks.cuh"
#include "activations/token_values.cuh"
#include "common/check.cuh"

namespace quantloom::cuda {

inline constexpr int kGroupThreads = 256;

// Memory on the device; what the format does not have is null.
struct GroupPlanes {
  int8_t* codes = nullptr;
  bool wide_codes = false;  // rows of codes begin at multiples of 8 bytes
  float* scales = nullptr;
  int8_t* zeros = nullptr;
  uint8_t* shifts = nullptr;
};

struct GroupTask {
  int64_t rows = 0;
  int64_t cols = 0;
  int64_t group_size = 0;
  int64_t groups = 0;                   // of a token
  GridRule rule;                        // of the run, or of the integers that are cut
  int bits = 0;                         // of a cut code
  int lanes_log = 0;                    // lanes of a run
  bool vectors = false;                 // runs begin at multiples of 16 bytes, and are of whole vectors
  const float* token_scales = nullptr;  // of integers that are cut, [rows], or [1] for all
  bool one_scale = false;
  OutlierList outliers;
};

// Lanes that have a run together.
struct LaneGroup {
  int lanes;
  int lane;

  // The largest of each over the lanes, for all of them. By all lanes of a warp.
  __device__ __forceinline__ uint32_t largest(uint32_t value) const {
    for (int step = lanes / 2; step > 0; step /= 2) value = max(value, __shfl_xor_sync(~0U, value, step));
    return value;
  }
};

// kCut: significant digits. Planes get codes, or `out` values.
template <class T, bool kCut, bool kValues>
__global__ void __launch_bounds__(kGroupThreads)
    round_groups_kernel(const TokenMatrix<T> x, const GroupPlanes planes, T* const out,
                        const int64_t out_stride, const bool wide_out, const GroupTask task) {
  const LaneGroup team{1 << task.lanes_log, static_cast<int>(threadIdx.x) & ((1 << task.lanes_log) - 1)};
  const int64_t count = task.rows * task.groups;
  const int64_t unit = (int64_t{blockIdx.x} * kGroupThreads + threadIdx.x) >> task.lanes_log;
  const bool active = unit < count;
  int64_t row = 0;
  int64_t group = 0;
  if (active) {
    // A division of 64 bits takes longer than rounding eight values.
    if (count <= int64_t{0xFFFFFFFF}) {
      row = static_cast<uint32_t>(unit) / static_cast<uint32_t>(task.groups);
    } else {
      row = unit / task.groups;
    }
    group = unit - row * task.groups;
  }
  const int64_t begin = group * task.group_size;
  const int64_t end = active ? min(begin + task.group_size, task.cols) : begin;
  // Calls visit(values, first, n, kept) for the pieces of this lane: n of eight inputs from `first` on, one
  // where rows do not allow vectors. Outliers are 0.
  const auto each = [&](const auto& visit) {
    const int step = task.vectors ? kVectorValues : 1;
    for (int64_t first = begin + team.lane * step; first < end; first += int64_t{team.lanes} * step) {
      TokenVector<T> values = TokenVector<T>::zeros();
      uint32_t kept = 0;
      if (task.vectors) {
        values = x.load(row, static_cast<int>(first / kVectorValues));
      } else {
        values.put(0, get_bits(x.data + row * x.stride + first));
      }
      if (task.outliers.index != nullptr) {
        kept = task.vectors ? task.outliers.mask(static_cast<int>(first / kVectorValues))
                            : static_cast<uint32_t>(task.outliers.has(first));
        values.clear(kept);
      }
      visit(values, first, step, kept);
    }
  };
  DeviceGrid grid{1.0F, 0};
  bool good = true;
  if constexpr (kCut) {
    if (active) grid.scale = task.token_scales[task.one_scale ? 0 : row];
    good = grid.scale == grid.scale;
  } else {
    TokenRange<T> range;
    each([&](const TokenVector<T>& values, int64_t, int, uint32_t) { range.take(values); });
    range.fold();
    const uint32_t low = team.largest(range.low);
    const uint32_t high = team.largest(range.high);
    good = max(low, high) < ValueBits<T>::kRefused;
    if (good) grid = grid_between(task.rule, ValueBits<T>::to_float(low), ValueBits<T>::to_float(high));
  }
  const float shown = good ? grid.scale : __uint_as_float(kRefusedScale);
  if (!good) grid.scale = 1.0F;
  const Coder coder(task.rule, grid);
  uint32_t any = 0;
  if constexpr (kCut) {
    each([&](const TokenVector<T>& values, int64_t, int n, uint32_t) {
#pragma unroll
      for (int i = 0; i < kVectorValues; ++i) {
        if (i < n) any = max(any, static_cast<uint32_t>(abs(coder.integer(values.value(i)))));
      }
    });
    any = team.largest(any);
    if (!good) any = 0;
  }
  const CutRule cut(any, task.bits);
  const int shift = kCut ? cut.shift : 0;
  each([&](const TokenVector<T>& values, int64_t first, int n, uint32_t kept) {
    uint2 codes = {0, 0};
    if constexpr (kCut) {
#pragma unroll
      for (int i = 0; i < kVectorValues; ++i) {
        const uint32_t code = static_cast<uint32_t>(cut.code(coder.integer(values.value(i)))) & 0xFFU;
        (i < 4 ? codes.x : codes.y) |= code << i % 4 * 8;
      }
    } else {
      codes = first_codes(coder.codes(values), n);
    }
    if (!good) codes = {0, 0};
    if constexpr (kValues) {
      TokenVector<T> result = TokenVector<T>::zeros();
#pragma unroll
      for (int i = 0; i < kVectorValues; ++i) {
        const int code = static_cast<int8_t>((i < 4 ? codes.x : codes.y) >> i % 4 * 8);
        const auto steps = static_cast<float>((code - grid.zero) * (1 << shift));
        result.put(i, ValueBits<T>::from_float(__fmul_rn(shown, steps)));
      }
      result.store(out + row * out_stride + first, n, wide_out && task.vectors, kept);
    } else {
      PlaneSink::store_bytes(planes.codes + row * task.cols + first, codes, n,
                             planes.wide_codes && task.vectors);
    }
  });
  if (kValues || !active || team.lane != 0) return;
  const int64_t at = row * task.groups + group;
  if constexpr (kCut) {
    planes.shifts[at] = static_cast<uint8_t>(shift);
  } else {
    planes.scales[at] = shown;
    if (planes.zeros != nullptr) planes.zeros[at] = static_cast<int8_t>(grid.zero);
  }
}

// `out` null: planes.
template <class T, bool kCut>
void launch_groups(const TokenMatrix<T>& x, const GroupPlanes& planes, T* out, int64_t out_stride,
                   bool wide_out, GroupTask task, cudaStream_t stream) {
  if (task.rows == 0 || task.groups == 0) return;
  task.vectors = x.wide && task.group_size % kVectorValues == 0 && task.cols % kVectorValues == 0;
  const int64_t pieces = std::max<int64_t>(1, task.group_size / (task.vectors ? kVectorValues : 1));
  while (task.lanes_log < 5 && int64_t{1} << task.lanes_log < pieces) ++task.lanes_log;
  const int64_t per_block = kGroupThreads >> task.lanes_log;
  const int64_t blocks = (task.rows * task.groups + per_block - 1) / per_block;
  if (out != nullptr) {
    round_groups_kernel<T, kCut, true><<<static_cast<unsigned>(blocks), kGroupThreads, 0, stream>>>(
        x, planes, out, out_stride, wide_out, task);
  } else {
    round_groups_kernel<T, kCut, false><<<static_cast<unsigned>(blocks), kGroupThreads, 0, stream>>>(
        x, planes, out, out_stride, wide_out, task);
  }
  check_cuda(cudaGetLastError(), "rounding of groups");
}

// The outliers of tokens, as they are, to planes [rows, columns] or to their own columns of `out`.
template <class T>
__global__ void __launch_bounds__(kGroupThreads)
    keep_outliers_kernel(const TokenMatrix<T> x, const int64_t rows, const OutlierList list,
                         float* const planes, const int64_t plane_columns, T* const out,
                         const int64_t out_stride) {
  const int64_t count = list.size();
  const int32_t* const columns = list.columns(x.cols);
  for (int64_t row = blockIdx.x; row < rows; row += gridDim.x) {
    for (int64_t i = threadIdx.x; i < count; i += kGroupThreads) {
      const uint32_t bits = get_bits(x.data + row * x.stride + columns[i]);
      if (out != nullptr) {
        put_value(out + row * out_stride + columns[i], bits);
      } else if (i < plane_columns) {
        planes[row * plane_columns + i] = ValueBits<T>::to_float(bits);
      }
    }
  }
}

}  // namespace quantloom::cuda
