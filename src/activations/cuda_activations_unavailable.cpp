// Stands in for rounding of activations on CUDA devices in a CPU-only build.
#include "quantloom/activations/cuda_activations.hpp"
#include "quantloom/error.hpp"

namespace quantloom {
namespace {

[[noreturn]] void refuse(const char* function) {
  throw Unsupported(std::string(function) +
                    ": this build of quantloom holds no CUDA kernels; build it where nvcc is found");
}

}  // namespace

int64_t activations_cuda_workspace(const ActivationFormat& /*format*/, int64_t /*m*/, int64_t /*k*/) {
  refuse("activations_cuda_workspace");
}

void find_activation_outliers_cuda(const CudaMatrix& /*x*/, const ActivationFormat& /*format*/,
                                   int32_t* /*index*/, int32_t* /*count*/, void* /*stream*/) {
  refuse("find_activation_outliers_cuda");
}

void quantize_activations_cuda(const CudaMatrix& /*x*/, QuantizedActivations& /*out*/,
                               const CudaActivationScratch& /*scratch*/, void* /*stream*/) {
  refuse("quantize_activations_cuda");
}

void round_activations_cuda(const CudaMatrix& /*x*/, const ActivationFormat& /*format*/, void* /*out*/,
                            int64_t /*out_stride*/, const CudaActivationScratch& /*scratch*/,
                            void* /*stream*/) {
  refuse("round_activations_cuda");
}

void dequantize_activations_cuda(const QuantizedActivations& /*x*/, void* /*out*/, DType /*dtype*/,
                                 int64_t /*out_stride*/, void* /*stream*/) {
  refuse("dequantize_activations_cuda");
}

int64_t produced_cuda_workspace(const ActivationFormat& /*format*/, DType /*dtype*/, int64_t /*m*/,
                                int64_t /*k*/) {
  refuse("produced_cuda_workspace");
}

void quantize_produced_cuda(const CudaMatrix& /*x*/, const CudaProducer& /*producer*/,
                            QuantizedActivations& /*out*/, const CudaActivationScratch& /*scratch*/,
                            void* /*stream*/) {
  refuse("quantize_produced_cuda");
}

void round_produced_cuda(const CudaMatrix& /*x*/, const CudaProducer& /*producer*/,
                         const ActivationFormat& /*format*/, void* /*out*/, int64_t /*out_stride*/,
                         const CudaActivationScratch& /*scratch*/, void* /*stream*/) {
  refuse("round_produced_cuda");
}

void produce_activations_cuda(const CudaMatrix& /*x*/, const CudaProducer& /*producer*/, void* /*out*/,
                              int64_t /*out_stride*/, void* /*stream*/) {
  refuse("produce_activations_cuda");
}

}  // namespace quantloom
