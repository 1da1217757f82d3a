// Stands in for the decoder on CUDA devices in a CPU-only build.
#include "quantloom/error.hpp"
#include "quantloom/formats/entropy_cuda.hpp"

namespace quantloom {
namespace {

[[noreturn]] void refuse() {
  throw Unsupported(
      "CudaEntropyStream: this build of quantloom holds no CUDA kernels; build it where nvcc is found");
}

}  // namespace

struct CudaEntropyStream::State {};

CudaEntropyStream::CudaEntropyStream(const EntropyStream& /*stream*/, void* /*cuda_stream*/) {
  refuse();
}
int64_t CudaEntropyStream::count() const {
  refuse();
}
int64_t CudaEntropyStream::chunk() const {
  refuse();
}
int64_t CudaEntropyStream::byte_count() const {
  refuse();
}
void CudaEntropyStream::decode(int64_t /*first*/, int64_t /*count*/, uint8_t* /*codes*/,
                               void* /*cuda_stream*/) const {
  refuse();
}
void CudaEntropyStream::decode_values(const EntropyValues& /*values*/, int64_t /*first_row*/,
                                      int64_t /*rows*/, void* /*out*/, DType /*out_dtype*/,
                                      int64_t /*stride*/, void* /*cuda_stream*/) const {
  refuse();
}
void CudaEntropyStream::check(void* /*cuda_stream*/) const {
  refuse();
}

}  // namespace quantloom
