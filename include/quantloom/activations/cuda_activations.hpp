// Activations as integers on the current CUDA device: the codes, scales and values of
// quantized_activations.hpp, bit for bit.
//
// Every `stream` is a cudaStream_t of that device. Work is queued on it: nothing waits, nothing is allocated,
// and all of it can be captured in a graph. Arguments are checked before anything is queued: all functions
// throw TypeMismatch or InvalidArgument naming the argument, and Unsupported in a CPU-only build.
//
// What a value is, only the device knows: where the CPU refuses one that is not finite, or 2^127 and more in
// magnitude, here all values that share its scale become NaN (its scale is NaN, codes are 0). With a static
// scale that is the token, or in planes, where one scale serves all, the batch. Outliers are kept whatever
// they are.
#pragma once

#include <cstdint>
#include <span>
#include <vector>

#include "quantloom/activations/producers.hpp"
#include "quantloom/activations/quantized_activations.hpp"
#include "quantloom/cuda_matrix.hpp"

namespace quantloom {

// Outlier columns as kernels read them: a bit for each of k inputs in ceil(k/32) words, then the columns.
// Throws InvalidArgument unless the columns rise from 0 to k - 1.
int64_t outlier_index_words(int64_t k, int64_t columns);
std::vector<int32_t> outlier_index(std::span<const int32_t> columns, int64_t k);

// Memory on the device beside operands.
struct CudaActivationScratch {
  // An outlier_index(): as find_activation_outliers_cuda() gives it, or of a format's outlier_columns.
  const int32_t* outlier_index = nullptr;
  // activations_cuda_workspace() bytes, at a multiple of 16.
  void* workspace = nullptr;
  int64_t workspace_bytes = 0;
};

// Bytes of workspace for a batch [m, k].
int64_t activations_cuda_workspace(const ActivationFormat& format, int64_t m, int64_t k);

// The outlier_index() of inputs that reach outlier_threshold in any token, to memory for all k columns
// (outlier_index_words(k, k)), and how many they are, as one int32 on the device. For formats with outliers
// that are not static.
void find_activation_outliers_cuda(const CudaMatrix& x, const ActivationFormat& format, int32_t* index,
                                   int32_t* count, void* stream);

// Fills the planes of `out`, on the device, for its format, m and k (activation_planes()). With outliers,
// scratch.outlier_index must be given, of as many columns as outlier_columns is long.
void quantize_activations_cuda(const CudaMatrix& x, QuantizedActivations& out,
                               const CudaActivationScratch& scratch, void* stream);

// x rounded to the format and to its own dtype: row t of `out` at element t * out_stride. `out` may be x.
// With static outliers scratch.outlier_index must be given; others are found on the way.
void round_activations_cuda(const CudaMatrix& x, const ActivationFormat& format, void* out,
                            int64_t out_stride, const CudaActivationScratch& scratch, void* stream);

// The values that the codes of planes on the device stand for, in float32, float16 or bfloat16.
void dequantize_activations_cuda(const QuantizedActivations& x, void* out, DType dtype, int64_t out_stride,
                                 void* stream);

// ActivationProducer with memory on the device; of layer_norm and rms_norm, or of silu_mul.
struct CudaProducer {
  ProducerKind kind = ProducerKind::rms_norm;
  const void* weight = nullptr;  // [k], or null: ones
  const void* bias = nullptr;    // [k], or null
  DType dtype = DType::f32;      // of both: float32, or that of x
  float epsilon = 1e-6F;
  bool add_one = false;
  CudaMatrix up = {};
};

// Both functions above of what `producer` makes of x: produce_activations(), then rounding, with the same
// bytes as on the CPU under the condition that producers.hpp states. One kernel does both for values of
// formats with a scale for each token or a static one, and for planes of the former, outliers that are not
// static apart; others go through the workspace, of produced_cuda_workspace() bytes.
int64_t produced_cuda_workspace(const ActivationFormat& format, DType dtype, int64_t m, int64_t k);
void quantize_produced_cuda(const CudaMatrix& x, const CudaProducer& producer, QuantizedActivations& out,
                            const CudaActivationScratch& scratch, void* stream);
void round_produced_cuda(const CudaMatrix& x, const CudaProducer& producer, const ActivationFormat& format,
                         void* out, int64_t out_stride, const CudaActivationScratch& scratch, void* stream);
// The produced values themselves.
void produce_activations_cuda(const CudaMatrix& x, const CudaProducer& producer, void* out,
                              int64_t out_stride, void* stream);

}  // namespace quantloom
