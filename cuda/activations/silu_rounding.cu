#include "activations/produced_kernels.cuh"

namespace quantloom::cuda {

void launch_silu(const CudaMatrix& x, const CudaProducer& producer, const ActivationFormat* format,
                 const ProducedPlaces& to, const void* outlier_index, int64_t outliers, cudaStream_t stream,
                 bool overlap) {
  with_token_matrix(x, [&]<class T>(const TokenMatrix<T>& matrix) {
    launch_produced(SiluSource<T>{matrix, token_matrix<T>(producer.up)}, x.rows, x.cols, format, to,
                    outlier_index, outliers, stream, overlap);
  });
}

}  // namespace quantloom::cuda
