#include "activations/produced_kernels.cuh"

namespace quantloom::cuda {
namespace {

template <class T>
NormVector<T> norm_vector(const void* data, DType dtype, DType own, int64_t cols, float missing,
                          float added) {
  NormVector<T> found{{nullptr, 0, cols, false}, {nullptr, 0, cols, false}, missing + added, added};
  if (data == nullptr) return found;
  const CudaMatrix matrix{data, dtype, 1, cols, ceil_div(cols, int64_t{8}) * 8};
  if (dtype == own) {
    found.own = token_matrix<T>(matrix);
  } else {
    found.wide = token_matrix<float>(matrix);
  }
  return found;
}

}  // namespace

void launch_norm(const CudaMatrix& x, const CudaProducer& producer, const ActivationFormat* format,
                 const ProducedPlaces& to, const void* outlier_index, int64_t outliers, cudaStream_t stream,
                 bool overlap) {
  with_token_matrix(x, [&]<class T>(const TokenMatrix<T>& matrix) {
    const bool layer = producer.kind == ProducerKind::layer_norm;
    const NormSource<T> source{matrix,
                               norm_vector<T>(producer.weight, producer.dtype, x.dtype, x.cols,
                                              producer.weight == nullptr && producer.add_one ? 0.0F : 1.0F,
                                              producer.add_one ? 1.0F : 0.0F),
                               norm_vector<T>(producer.bias, producer.dtype, x.dtype, x.cols, 0.0F, 0.0F),
                               producer.epsilon, layer};
    launch_produced(source, x.rows, x.cols, format, to, outlier_index, outliers, stream, overlap);
  });
}

}  // namespace quantloom::cuda
