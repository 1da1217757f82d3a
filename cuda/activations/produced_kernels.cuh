// Picks the kernel for a source of produced values.
#pragma once

#include "activations/produced.hpp"
#include "activations/producer_sources.cuh"
#include "activations/token_kernel.cuh"
#include "activations/token_sinks.cuh"
#include "quantloom/checked_math.hpp"

namespace quantloom::cuda {

template <class Source>
void launch_produced(const Source& source, int64_t rows, int64_t cols, const ActivationFormat* format,
                     const ProducedPlaces& to, const void* outlier_index, int64_t outliers,
                     cudaStream_t stream, bool overlap) {
  using T = typename Source::Value;
  TokenTask task;
  task.rows = task.padded_rows = rows;
  task.cols = cols;
  const bool wide = reinterpret_cast<uintptr_t>(to.values) % 16 == 0 &&
                    to.stride * static_cast<int64_t>(sizeof(T)) % 16 == 0;
  if (format == nullptr) {
    return launch_token_kernel(source, CopySink<T>{static_cast<T*>(to.values), to.stride, wide}, task, stream,
                               overlap);
  }
  task.rule = GridRule::of(*format);
  if (outlier_index != nullptr)
    task.outliers = {static_cast<const uint32_t*>(outlier_index), outliers, nullptr};
  if (to.integers != nullptr) {
    task.padded_rows = ceil_div(rows, int64_t{kTokenRows}) * kTokenRows;
    task.sums = to.integers->sums;
    task.outliers.found = to.integers->outlier_count;
    return launch_token_kernel(source, order_sink(*to.integers, cols), task, stream, overlap);
  }
  if (to.planes == nullptr) {
    return launch_token_kernel(source, RoundedSink<T>{static_cast<T*>(to.values), to.stride, wide}, task,
                               stream, overlap);
  }
  const auto plane = [&](const char* name) -> std::byte* {
    const auto found = to.planes->planes.find(name);
    return found == to.planes->planes.end() ? nullptr : const_cast<std::byte*>(found->second.bytes());
  };
  auto* const codes = reinterpret_cast<int8_t*>(plane("codes"));
  const PlaneSink sink{codes,
                       reinterpret_cast<float*>(plane("scales")),
                       reinterpret_cast<int8_t*>(plane("zeros")),
                       reinterpret_cast<float*>(plane("outlier_values")),
                       outliers,
                       cols,
                       reinterpret_cast<uintptr_t>(codes) % 8 == 0 && cols % 8 == 0};
  launch_token_kernel(source, sink, task, stream, overlap);
}

}  // namespace quantloom::cuda
