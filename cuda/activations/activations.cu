#include <algorithm>
#include <string>

#include "activations/activation_arguments.hpp"
#include "activations/activation_groups.cuh"
#include "activations/batch_facts.hpp"
#include "activations/token_kernel.cuh"
#include "activations/token_sinks.cuh"
#include "activations/token_sources.cuh"
#include "quantloom/activations/cuda_activations.hpp"
#include "quantloom/checked_math.hpp"

namespace quantloom {
namespace cuda {
namespace {

constexpr int kThreads = 256;

// One scale for all tokens: that of the format, or of the range of all.
__global__ void tensor_grid_kernel(const uint32_t* const range, const GridRule rule, float* const scale,
                                   int8_t* const zero) {
  const bool good = range[2] == 0;
  const DeviceGrid grid = good ? grid_between(rule, __uint_as_float(range[0]), __uint_as_float(range[1]))
                               : DeviceGrid{__uint_as_float(kRefusedScale), 0};
  *scale = grid.scale;
  if (zero != nullptr) *zero = static_cast<int8_t>(grid.zero);
}

unsigned blocks_of(int64_t count) {
  return static_cast<unsigned>(ceil_div(count, int64_t{kThreads}));
}

// One batch on its way, with checked arguments.
template <class T>
struct Batch {
  const ActivationFormat& format;
  TokenMatrix<T> x;
  int64_t rows;
  OutlierList outliers;
  std::byte* workspace;
  WorkspacePlan plan;
  cudaStream_t stream;

  uint32_t* range() const { return reinterpret_cast<uint32_t*>(workspace + plan.range); }
  TokenTask task(bool whole) const {
    TokenTask task;
    task.rows = task.padded_rows = rows;
    task.cols = x.cols;
    task.rule = GridRule::of(format);
    task.range = whole ? range() : nullptr;
    task.outliers = outliers;
    return task;
  }
  GroupTask group_task() const {
    GroupTask task;
    task.rows = rows;
    task.cols = x.cols;
    task.group_size = format.group_size;
    task.groups = x.cols == 0 ? 0 : format.group_count(x.cols);
    task.rule = GridRule::of(format);
    task.bits = format.bits;
    task.outliers = outliers;
    return task;
  }
  // The scales of tokens, or the one of all, whose integers are cut.
  GroupTask cut_task(bool whole) const {
    auto* const scales = reinterpret_cast<float*>(workspace + plan.scales);
    GroupTask task = group_task();
    task.token_scales = scales;
    task.one_scale = whole;
    if (whole) {
      tensor_grid_kernel<<<1, 1, 0, stream>>>(range(), task.rule, scales, nullptr);
      check_cuda(cudaGetLastError(), "scale of activations");
    } else {
      launch_token_kernel(MatrixSource<T>{x}, ScaleSink{scales}, this->task(false), stream, false);
    }
    return task;
  }
};

// Of formats with groups, after their codes.
template <class T>
void keep_outliers(const Batch<T>& batch, float* planes, T* out, int64_t out_stride) {
  if (batch.outliers.index == nullptr || batch.rows == 0) return;
  const auto blocks = static_cast<unsigned>(std::min<int64_t>(batch.rows, 65535));
  keep_outliers_kernel<T><<<blocks, kGroupThreads, 0, batch.stream>>>(
      batch.x, batch.rows, batch.outliers, planes, batch.outliers.count, out, out_stride);
  check_cuda(cudaGetLastError(), "outliers of activations");
}

template <class T>
void quantize(const Batch<T>& batch, QuantizedActivations& out) {
  const ActivationFormat& format = batch.format;
  const auto find = [&]<class Element>(const char* name, Element*) -> Element* {
    const auto found = out.planes.find(name);
    if (found == out.planes.end() || found->second.element_count() == 0) return nullptr;
    return reinterpret_cast<Element*>(found->second.bytes());
  };
  auto* const codes = find("codes", static_cast<int8_t*>(nullptr));
  auto* const scales = find("scales", static_cast<float*>(nullptr));
  auto* const zeros = find("zeros", static_cast<int8_t*>(nullptr));
  auto* const outliers = find("outlier_values", static_cast<float*>(nullptr));
  const int64_t columns = batch.outliers.index == nullptr ? 0 : batch.outliers.count;
  if (columns > 0) {
    const auto skipped = static_cast<size_t>(ceil_div(batch.x.cols, int64_t{32}));
    check_cuda(cudaMemcpyAsync(find("outlier_columns", static_cast<int32_t*>(nullptr)),
                               batch.outliers.index + skipped, static_cast<size_t>(columns) * 4,
                               cudaMemcpyDeviceToDevice, batch.stream),
               "columns of outliers");
  }
  const bool wide = reinterpret_cast<uintptr_t>(codes) % 8 == 0 && batch.x.cols % 8 == 0;
  const bool whole = format.scope == ActivationScope::tensor;
  if (whole) {
    // Of no tokens the scale is 1.
    const GridRule rule = batch.rows > 0 ? GridRule::of(format) : GridRule{};
    tensor_grid_kernel<<<1, 1, 0, batch.stream>>>(batch.range(), rule, scales, zeros);
    check_cuda(cudaGetLastError(), "scale of activations");
  }
  if (format.scope == ActivationScope::group || format.has_shifts()) {
    GroupPlanes planes{codes, wide, scales, zeros, find("shifts", static_cast<uint8_t*>(nullptr))};
    GroupTask task = format.has_shifts() ? batch.cut_task(whole) : batch.group_task();
    if (format.has_shifts()) {
      if (!whole && batch.rows > 0) {
        check_cuda(cudaMemcpyAsync(scales, task.token_scales, static_cast<size_t>(batch.rows) * 4,
                                   cudaMemcpyDeviceToDevice, batch.stream),
                   "scales of activations");
      }
      return launch_groups<T, true>(batch.x, planes, nullptr, 0, false, task, batch.stream);
    }
    launch_groups<T, false>(batch.x, planes, nullptr, 0, false, task, batch.stream);
    return keep_outliers<T>(batch, outliers, nullptr, 0);
  }
  const PlaneSink sink{
      codes, whole ? nullptr : scales, whole ? nullptr : zeros, outliers, columns, batch.x.cols, wide};
  launch_token_kernel(MatrixSource<T>{batch.x}, sink, batch.task(whole), batch.stream, false);
}

template <class T>
void round(const Batch<T>& batch, void* out, int64_t stride, bool whole) {
  const bool wide =
      reinterpret_cast<uintptr_t>(out) % 16 == 0 && stride * static_cast<int64_t>(sizeof(T)) % 16 == 0;
  auto* const values = static_cast<T*>(out);
  if (batch.format.has_shifts()) {
    return launch_groups<T, true>(batch.x, {}, values, stride, wide, batch.cut_task(whole), batch.stream);
  }
  if (batch.format.scope == ActivationScope::group) {
    launch_groups<T, false>(batch.x, {}, values, stride, wide, batch.group_task(), batch.stream);
    return keep_outliers<T>(batch, nullptr, values, stride);
  }
  launch_token_kernel(MatrixSource<T>{batch.x}, RoundedSink<T>{values, stride, wide}, batch.task(whole),
                      batch.stream, false);
}

template <class Run>
void with_batch(const CudaMatrix& x, const ActivationFormat& format, const OutlierList& outliers,
                void* workspace, void* stream, const Run& run) {
  with_token_matrix(x, [&]<class T>(const TokenMatrix<T>& matrix) {
    run(Batch<T>{format, matrix, x.rows, outliers, static_cast<std::byte*>(workspace),
                 WorkspacePlan(format, x.rows, x.cols), static_cast<cudaStream_t>(stream)});
  });
}

// Eight codes for a thread of a row.
struct DecodeTask {
  const int8_t* codes;
  const float* scales;
  const int8_t* zeros;
  const uint8_t* shifts;
  int64_t rows;
  int64_t cols;
  int64_t group_size;  // of scales or shifts; cols if there are none
  int64_t groups;
  bool one_scale;     // for all tokens
  bool group_scales;  // a scale for each group
  int64_t stride;
};

template <class T>
__global__ void __launch_bounds__(kThreads) decode_kernel(const DecodeTask task, T* const out) {
  const int64_t per_row = (task.cols + kVectorValues - 1) / kVectorValues;
  const int64_t at = int64_t{blockIdx.x} * kThreads + threadIdx.x;
  const int64_t row = at / per_row;
  if (row >= task.rows) return;
  const int64_t first = (at - row * per_row) * kVectorValues;
  int64_t group = first / task.group_size;
  int64_t next = (group + 1) * task.group_size;
  for (int64_t c = first; c < min(first + kVectorValues, task.cols); ++c) {
    if (c == next) {
      ++group;
      next += task.group_size;
    }
    const int64_t token = task.one_scale ? 0 : row;
    const int64_t scale = task.group_scales ? row * task.groups + group : token;
    const int zero = task.zeros == nullptr ? 0 : task.zeros[scale];
    const int shift = task.shifts == nullptr ? 0 : min(int{task.shifts[row * task.groups + group]}, 16);
    const int steps = (task.codes[row * task.cols + c] - zero) * (1 << shift);
    const float value = __fmul_rn(task.scales[scale], static_cast<float>(steps));
    put_value(out + row * task.stride + c, ValueBits<T>::from_float(value));
  }
}

// Outliers to their columns; a column that does not exist is left out.
template <class T>
__global__ void __launch_bounds__(kThreads)
    restore_kernel(const int32_t* const columns, const float* const values, const int64_t count,
                   const DecodeTask task, T* const out) {
  const int64_t at = int64_t{blockIdx.x} * kThreads + threadIdx.x;
  const int64_t row = at / count;
  if (row >= task.rows) return;
  const int64_t c = columns[at - row * count];
  if (c >= 0 && c < task.cols) put_value(out + row * task.stride + c, ValueBits<T>::from_float(values[at]));
}

}  // namespace
}  // namespace cuda

int64_t activations_cuda_workspace(const ActivationFormat& format, int64_t m, int64_t k) {
  require_valid(format);
  if (m < 0 || k < 0) throw InvalidArgument("shape", text_of("[", m, ", ", k, "]"), "sizes of 0 and more");
  return cuda::WorkspacePlan(format, m, k).bytes;
}

void find_activation_outliers_cuda(const CudaMatrix& x, const ActivationFormat& format, int32_t* index,
                                   int32_t* count, void* stream) {
  cuda::require_batch(x, format);
  if (!format.has_outliers() || format.static_outliers) {
    throw InvalidArgument("activations", format.spec(), "a format with outliers that are not static");
  }
  if (x.cols > 0) cuda::require_device_memory(index, "index");
  cuda::require_device_memory(count, "count");
  cuda::find_outliers(x, format.outlier_threshold, index, count, static_cast<cudaStream_t>(stream));
}

void quantize_activations_cuda(const CudaMatrix& x, QuantizedActivations& out,
                               const CudaActivationScratch& scratch, void* stream) {
  const ActivationFormat& format = out.format;
  cuda::require_batch(x, format);
  cuda::require_activation_planes(out, x.rows, x.cols);
  cuda::require_scratch(scratch, format, activations_cuda_workspace(format, x.rows, x.cols), x.cols,
                        format.has_outliers());
  cuda::OutlierList outliers;
  if (format.has_outliers() && x.cols > 0) {
    outliers = {reinterpret_cast<const uint32_t*>(scratch.outlier_index),
                out.planes.at("outlier_columns").element_count(), nullptr};
  }
  cuda::with_batch(x, format, outliers, scratch.workspace, stream, [&](const auto& batch) {
    if (format.scope == ActivationScope::tensor)
      cuda::find_range(x, outliers.index, batch.range(), batch.stream);
    cuda::quantize(batch, out);
  });
}

void round_activations_cuda(const CudaMatrix& x, const ActivationFormat& format, void* out,
                            int64_t out_stride, const CudaActivationScratch& scratch, void* stream) {
  cuda::require_batch(x, format);
  cuda::require_matrix({out, x.dtype, x.rows, x.cols, out_stride}, "out");
  cuda::require_scratch(scratch, format, activations_cuda_workspace(format, x.rows, x.cols), x.cols,
                        format.static_outliers);
  if (x.rows == 0 || x.cols == 0) return;
  const bool found = format.has_outliers() && !format.static_outliers;
  const cuda::WorkspacePlan plan(format, x.rows, x.cols);
  auto* const workspace = static_cast<std::byte*>(scratch.workspace);
  const auto cuda_stream = static_cast<cudaStream_t>(stream);
  cuda::OutlierList outliers;
  if (found) {
    auto* const own = reinterpret_cast<int32_t*>(workspace + plan.outliers);
    auto* const count = reinterpret_cast<int32_t*>(workspace + plan.count);
    cuda::find_outliers(x, format.outlier_threshold, own, count, cuda_stream);
    outliers = {reinterpret_cast<const uint32_t*>(own), x.cols, count};
  } else if (format.has_outliers()) {
    outliers = {reinterpret_cast<const uint32_t*>(scratch.outlier_index), std::ssize(*format.outlier_columns),
                nullptr};
  }
  const bool whole = format.scope == ActivationScope::tensor && !format.grid;
  cuda::with_batch(x, format, outliers, scratch.workspace, stream, [&](const auto& batch) {
    if (whole) cuda::find_range(x, outliers.index, batch.range(), batch.stream);
    cuda::round(batch, out, out_stride, whole);
  });
}

void dequantize_activations_cuda(const QuantizedActivations& x, void* out, DType dtype, int64_t out_stride,
                                 void* stream) {
  require_valid(x.format);
  cuda::require_activation_planes(x, x.m, x.k);
  cuda::require_matrix({out, dtype, x.m, x.k, out_stride}, "out");
  if (x.m == 0 || x.k == 0) return;
  const auto bytes = [&](const char* name) -> const std::byte* {
    const auto found = x.planes.find(name);
    return found == x.planes.end() ? nullptr : found->second.bytes();
  };
  const bool whole = x.format.scope == ActivationScope::tensor;
  const cuda::DecodeTask task{reinterpret_cast<const int8_t*>(bytes("codes")),
                              reinterpret_cast<const float*>(bytes("scales")),
                              reinterpret_cast<const int8_t*>(bytes("zeros")),
                              reinterpret_cast<const uint8_t*>(bytes("shifts")),
                              x.m,
                              x.k,
                              x.format.group_size > 0 ? x.format.group_size : x.k,
                              x.format.group_count(x.k),
                              whole,
                              x.format.scope == ActivationScope::group,
                              out_stride};
  const int64_t vectors = checked_mul(x.m, ceil_div(x.k, int64_t{cuda::kVectorValues}));
  const auto cuda_stream = static_cast<cudaStream_t>(stream);
  // For its dtype; nothing is read through it.
  cuda::with_token_matrix({out, dtype, x.m, x.k, out_stride}, [&]<class T>(const cuda::TokenMatrix<T>&) {
    auto* const values = static_cast<T*>(out);
    cuda::decode_kernel<T><<<cuda::blocks_of(vectors), cuda::kThreads, 0, cuda_stream>>>(task, values);
    check_cuda(cudaGetLastError(), "decoding of activations");
    if (!x.format.has_outliers()) return;
    const int64_t outliers = x.planes.at("outlier_columns").element_count();
    if (outliers == 0) return;
    cuda::restore_kernel<T><<<cuda::blocks_of(x.m * outliers), cuda::kThreads, 0, cuda_stream>>>(
        reinterpret_cast<const int32_t*>(bytes("outlier_columns")),
        reinterpret_cast<const float*>(bytes("outlier_values")), outliers, task, values);
    check_cuda(cudaGetLastError(), "outliers of activations");
  });
}

}  // namespace quantloom
