// Stands in for products of coded weights on CUDA devices in a CPU-only build.
#include "quantloom/error.hpp"
#include "quantloom/kernels/coded_product.hpp"

namespace quantloom {
namespace {

[[noreturn]] void refuse() {
  throw Unsupported(
      "CudaCodedTensor: this build of quantloom holds no CUDA kernels; build it where nvcc is found");
}

}  // namespace

struct CudaCodedTensor::State {};

CudaCodedTensor::CudaCodedTensor(const CodedTensor& /*tensor*/, void* /*stream*/) {
  refuse();
}
int64_t CudaCodedTensor::n() const {
  refuse();
}
int64_t CudaCodedTensor::k() const {
  refuse();
}
int64_t CudaCodedTensor::byte_count() const {
  refuse();
}
std::string CudaCodedTensor::kernel(int64_t /*m*/, DType /*dtype*/,
                                    const CudaMatmulOptions& /*options*/) const {
  refuse();
}
int64_t CudaCodedTensor::workspace(int64_t /*m*/, DType /*dtype*/,
                                   const CudaMatmulOptions& /*options*/) const {
  refuse();
}
void CudaCodedTensor::matmul(const CudaMatmulArguments& /*arguments*/,
                             const CudaMatmulOptions& /*options*/) const {
  refuse();
}
void CudaCodedTensor::dequantize(int64_t /*first_row*/, int64_t /*rows*/, void* /*out*/, DType /*dtype*/,
                                 int64_t /*stride*/, void* /*stream*/) const {
  refuse();
}

}  // namespace quantloom
