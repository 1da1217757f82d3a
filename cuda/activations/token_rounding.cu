#include <bit>

#include "activations/even_tokens.cuh"
#include "activations/produced.hpp"
#include "activations/token_kernel.cuh"
#include "activations/token_rounding.hpp"
#include "activations/token_sinks.cuh"
#include "activations/token_sources.cuh"
#include "quantloom/checked_math.hpp"
#include "quantloom/error.hpp"

namespace quantloom::cuda {
namespace {

constexpr int64_t kMostInputs = int64_t{1} << 23;

template <class T>
void round_matrix(const TokenMatrix<T>& x, const TokenTask& task, const IntegerTokens& out,
                  cudaStream_t stream, bool overlap) {
  const IntegerOrderSink sink = order_sink(out, x.cols);
  if constexpr (sizeof(T) == 2) {
    if (task.padded_rows > 0 && takes_even_tokens(x, task) &&
        launch_even_tokens(x, sink, task, stream, overlap))
      return;
  }
  launch_token_kernel(MatrixSource<T>{x}, sink, task, stream, overlap);
}

}  // namespace

std::optional<std::string> why_not_integer_order(const ActivationFormat& format) {
  require_valid(format);
  if (format.scope == ActivationScope::group) return "one scale for each token, or for all";
  if (!format.has_shifts()) return std::nullopt;
  if (format.base_bits > 8) return "significant digits of integers of 8 bits at most";
  const int64_t lanes = format.group_size / kVectorValues;
  if (format.group_size % kVectorValues == 0 && std::has_single_bit(static_cast<uint64_t>(lanes)) &&
      lanes <= 32) {
    return std::nullopt;
  }
  return "shifts for 8, 16, 32, 64, 128 or 256 inputs";
}

void round_tokens(const CudaMatrix& x, const ActivationFormat& format, const IntegerTokens& out,
                  cudaStream_t stream, bool overlap, const uint32_t* range) {
  if (const auto reason = why_not_integer_order(format))
    throw InvalidArgument("activations", format.spec(), *reason);
  if ((format.scope == ActivationScope::tensor && !format.grid) != (range != nullptr)) {
    throw InvalidArgument("range", range == nullptr ? "none" : "one",
                          text_of(range == nullptr ? "one" : "none", " for ", format.spec()));
  }
  // Sums of codes fit 32 bits, at 255 each.
  if (x.cols > kMostInputs)
    throw InvalidArgument("x", text_of(x.cols, " inputs"), text_of("at most ", kMostInputs));
  TokenTask task;
  task.rows = x.rows;
  task.padded_rows = ceil_div(x.rows, int64_t{kTokenRows}) * kTokenRows;
  task.cols = x.cols;
  task.rule = GridRule::of(format);
  task.range = range;
  if (out.outlier_index != nullptr) {
    task.outliers = {static_cast<const uint32_t*>(out.outlier_index), out.outliers, out.outlier_count};
  }
  task.sums = out.sums;
  if (format.has_shifts()) {
    task.cut_bits = format.bits;
    task.cut_lanes = static_cast<int>(format.group_size / kVectorValues);
  }
  with_token_matrix(x, [&](const auto& matrix) { round_matrix(matrix, task, out, stream, overlap); });
}

void round_produced_tokens(const CudaMatrix& x, const CudaProducer& producer, const ActivationFormat& format,
                           const IntegerTokens& out, cudaStream_t stream, bool overlap) {
  require_valid(format);
  if (format.has_shifts() || format.scope == ActivationScope::group ||
      (format.scope == ActivationScope::tensor && !format.grid)) {
    throw InvalidArgument("activations", format.spec(), "a scale for each token, or a static one");
  }
  if (x.cols > kMostInputs)
    throw InvalidArgument("x", text_of(x.cols, " inputs"), text_of("at most ", kMostInputs));
  ProducedPlaces to;
  to.integers = &out;
  const auto launch = producer.kind == ProducerKind::silu_mul ? launch_silu : launch_norm;
  launch(x, producer, &format, to, out.outlier_index, out.outliers, stream, overlap);
}

}  // namespace quantloom::cuda
