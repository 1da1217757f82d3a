#include "transforms/hadamard_dense_stream.hpp"
#include "transforms/hadamard_dense_stream_launch.cuh"

namespace quantloom::cuda {
namespace {

// Powers from kPower to kLast.
template <class T, int kHalves, int kPower, int kLast>
bool launch_power(HadamardSize size, const HadamardArguments& a, const DeviceFacts& device,
                  cudaStream_t stream) {
  if (size.power == kPower) {
    return launch_dense_stream_kernel<T, kHalves, kPower>(size.order, a, device, stream);
  }
  if constexpr (kPower < kLast) return launch_power<T, kHalves, kPower + 1, kLast>(size, a, device, stream);
  return false;
}

}  // namespace

template <class T>
bool launch_dense_stream(HadamardSize size, const HadamardArguments& a, const DeviceFacts& device,
                         cudaStream_t stream) {
  constexpr bool kHalf = sizeof(T) == 2;
  if (size.order <= 16) return launch_power < T, 2, 4, kHalf ? 11 : 10 > (size, a, device, stream);
  if (size.order <= 24) return launch_power<T, 3, 4, 10>(size, a, device, stream);
  if (size.order <= 32) return launch_power<T, 4, 4, 10>(size, a, device, stream);
  if constexpr (kHalf) {
    if (size.order <= 64) return launch_power<T, 8, 4, 9>(size, a, device, stream);
    if (size.order <= 112) return launch_power<T, 14, 6, 8>(size, a, device, stream);
    if (size.order <= 176) return launch_power<T, 22, 6, 7>(size, a, device, stream);
  }
  return false;
}

template bool launch_dense_stream<__half>(HadamardSize, const HadamardArguments&, const DeviceFacts&,
                                          cudaStream_t);
template bool launch_dense_stream<__nv_bfloat16>(HadamardSize, const HadamardArguments&, const DeviceFacts&,
                                                 cudaStream_t);
template bool launch_dense_stream<float>(HadamardSize, const HadamardArguments&, const DeviceFacts&,
                                         cudaStream_t);

}  // namespace quantloom::cuda
