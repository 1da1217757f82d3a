// The Hadamard transform of hadamard.hpp on the current CUDA device.
#pragma once

#include <optional>
#include <string>

#include "quantloom/cuda_matrix.hpp"
#include "quantloom/transforms/hadamard.hpp"

namespace quantloom {

struct CudaHadamardOptions {
  int64_t block = 0;  // as HadamardOptions
  bool inverse = false;
  const uint8_t* signs = nullptr;  // sign_bytes(cols) bytes on the device, or null
  float scale = 1;
  const float* channel_scale = nullptr;  // [cols] on the device, or null
};

// Transforms the rows of x to `out`, of the same dtype and shape, row r at element r * out_stride; `out` may
// be x itself. Queued on `stream` (a cudaStream_t); allocates nothing, waits for nothing and can be captured
// in a graph. Sums are taken in another order than on the CPU: results differ by float32 roundings.
//
// Blocks are powers of two from 16 to 32768, or order * 2^power up to 32768 with 2^power at least 16. For an
// order above 256 the first call on a device (and the first inverse) allocates and uploads M, up to 128 KiB
// that stay; it waits for that, and a graph cannot capture it.
//
// Throws the errors of hadamard(), and Unsupported naming the block if no kernel takes it, or the device has
// too little shared memory for an order above 256.
void hadamard_cuda(const CudaMatrix& x, void* out, int64_t out_stride, const CudaHadamardOptions& options,
                   void* stream);

// Why hadamard_cuda() refuses blocks of a known size; nothing if it takes them.
std::optional<std::string> why_not_hadamard_cuda(HadamardSize size, DType dtype);

}  // namespace quantloom
