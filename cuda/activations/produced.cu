#include <cmath>

#include "activations/activation_arguments.hpp"
#include "activations/produced.hpp"
#include "quantloom/checked_math.hpp"

namespace quantloom {
namespace {

using cuda::ProducedPlaces;

void require_vector(const void* data, DType dtype, const CudaMatrix& x, const char* argument) {
  if (data == nullptr) return;
  if (dtype != DType::f32 && dtype != x.dtype) {
    throw TypeMismatch(argument, name_of(dtype), text_of("float32 or ", name_of(x.dtype), ", as x"));
  }
  cuda::require_matrix({data, dtype, 1, x.cols, x.cols}, argument);
}

void require_producer(const CudaMatrix& x, const CudaProducer& producer) {
  if (producer.kind == ProducerKind::silu_mul) {
    const CudaMatrix& up = producer.up;
    cuda::require_matrix(up, "up");
    if (up.dtype != x.dtype) throw TypeMismatch("up", name_of(up.dtype), name_of(x.dtype));
    if (up.rows != x.rows || up.cols != x.cols) {
      throw InvalidArgument("up", text_of("shape [", up.rows, ", ", up.cols, "]"),
                            text_of("[", x.rows, ", ", x.cols, "], as the gate"));
    }
    return;
  }
  require_vector(producer.weight, producer.dtype, x, "weight");
  require_vector(producer.bias, producer.dtype, x, "bias");
  if (producer.bias != nullptr && producer.kind != ProducerKind::layer_norm) {
    throw InvalidArgument("bias", "some", "none but for layer_norm");
  }
  if (!(producer.epsilon >= 0 && std::isfinite(producer.epsilon))) {
    throw InvalidArgument("epsilon", text_of(producer.epsilon), "a finite number, 0 or more");
  }
}

void launch(const CudaMatrix& x, const CudaProducer& producer, const ActivationFormat* format,
            const ProducedPlaces& to, const void* outlier_index, int64_t outliers, void* stream) {
  const auto launch_kind = producer.kind == ProducerKind::silu_mul ? cuda::launch_silu : cuda::launch_norm;
  launch_kind(x, producer, format, to, outlier_index, outliers, static_cast<cudaStream_t>(stream), false);
}

// Whether one kernel produces and rounds.
bool is_direct(const ActivationFormat& format, bool planes) {
  if (format.has_shifts() || format.scope == ActivationScope::group) return false;
  if (format.has_outliers() && !format.static_outliers && !planes) return false;
  return format.scope == ActivationScope::token || (format.is_static && !planes);
}

// The produced values in the workspace, behind what rounding them takes.
CudaMatrix produce_to_workspace(const CudaMatrix& x, const CudaProducer& producer,
                                const ActivationFormat& format, const CudaActivationScratch& scratch,
                                void* stream) {
  const int64_t begin = activations_cuda_workspace(format, x.rows, x.cols);
  void* const values = static_cast<std::byte*>(scratch.workspace) + begin;
  produce_activations_cuda(x, producer, values, x.cols, stream);
  return {values, x.dtype, x.rows, x.cols, x.cols};
}

}  // namespace

int64_t produced_cuda_workspace(const ActivationFormat& format, DType dtype, int64_t m, int64_t k) {
  const int64_t bytes = activations_cuda_workspace(format, m, k);
  if (is_direct(format, true) && is_direct(format, false)) return bytes;
  return checked_add(bytes, checked_mul(checked_mul(m, k), size_of(dtype)));
}

void quantize_produced_cuda(const CudaMatrix& x, const CudaProducer& producer, QuantizedActivations& out,
                            const CudaActivationScratch& scratch, void* stream) {
  const ActivationFormat& format = out.format;
  cuda::require_batch(x, format);
  require_producer(x, producer);
  cuda::require_activation_planes(out, x.rows, x.cols);
  cuda::require_scratch(scratch, format, produced_cuda_workspace(format, x.dtype, x.rows, x.cols), x.cols,
                        format.has_outliers());
  if (!is_direct(format, true)) {
    const CudaMatrix values = produce_to_workspace(x, producer, format, scratch, stream);
    return quantize_activations_cuda(values, out, scratch, stream);
  }
  ProducedPlaces to;
  to.planes = &out;
  int64_t outliers = 0;
  const void* index = nullptr;
  if (format.has_outliers() && x.cols > 0) {
    index = scratch.outlier_index;
    Tensor& columns = out.planes.at("outlier_columns");
    outliers = columns.element_count();
    if (outliers > 0) {
      check_cuda(cudaMemcpyAsync(columns.bytes(), scratch.outlier_index + ceil_div(x.cols, int64_t{32}),
                                 static_cast<size_t>(outliers) * 4, cudaMemcpyDeviceToDevice,
                                 static_cast<cudaStream_t>(stream)),
                 "columns of outliers");
    }
  }
  launch(x, producer, &format, to, index, outliers, stream);
}

void round_produced_cuda(const CudaMatrix& x, const CudaProducer& producer, const ActivationFormat& format,
                         void* out, int64_t out_stride, const CudaActivationScratch& scratch, void* stream) {
  cuda::require_batch(x, format);
  require_producer(x, producer);
  cuda::require_matrix({out, x.dtype, x.rows, x.cols, out_stride}, "out");
  cuda::require_scratch(scratch, format, produced_cuda_workspace(format, x.dtype, x.rows, x.cols), x.cols,
                        format.static_outliers);
  if (x.rows == 0 || x.cols == 0) return;
  if (!is_direct(format, false)) {
    const CudaMatrix values = produce_to_workspace(x, producer, format, scratch, stream);
    return round_activations_cuda(values, format, out, out_stride, scratch, stream);
  }
  ProducedPlaces to;
  to.values = out;
  to.stride = out_stride;
  const void* const index = format.has_outliers() ? scratch.outlier_index : nullptr;
  launch(x, producer, &format, to, index, index == nullptr ? 0 : std::ssize(*format.outlier_columns), stream);
}

void produce_activations_cuda(const CudaMatrix& x, const CudaProducer& producer, void* out,
                              int64_t out_stride, void* stream) {
  cuda::require_matrix(x, "x");
  require_producer(x, producer);
  cuda::require_matrix({out, x.dtype, x.rows, x.cols, out_stride}, "out");
  if (x.rows == 0 || x.cols == 0) return;
  ProducedPlaces to;
  to.values = out;
  to.stride = out_stride;
  launch(x, producer, nullptr, to, nullptr, 0, stream);
}

}  // namespace quantloom
