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
  const IntegerOrderSink<T> sink{out.codes,
                                 out.terms,
                                 static_cast<uint16_t*>(out.places == nullptr ? nullptr : out.outlier_values),
                                 out.outlier_count,
                                 out.outliers,
                                 ceil_div(x.cols, int64_t{integers::kBlockBytes}),
                                 ceil_div(2 * out.outliers, int64_t{integers::kBlockBytes})};
  launch_token_kernel(MatrixSource<T>{x}, sink, task, stream, overlap);
}

}  // namespace

void round_tokens(const CudaMatrix& x, const ActivationFormat& format, const IntegerTokens& out,
                  cudaStream_t stream, bool overlap, const uint32_t* range) {
  require_valid(format);
  const bool whole = format.scope == ActivationScope::tensor && !format.grid;
  if (format.has_shifts() || format.scope == ActivationScope::group || whole != (range != nullptr)) {
    throw InvalidArgument("activations", format.spec(),
                          "a scale for each token, or for all with its grid or their range");
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
  task.places = out.places;
  with_token_matrix(x, [&](const auto& matrix) { round_matrix(matrix, task, out, stream, overlap); });
}

}  // namespace quantloom::cuda
