// How far a rounded matrix is from its original: tr(E H E^T) as the inner product of E H with E, in float64
// throughout, a band of rows at a time.
#include <limits>

#include "common/block_sum.cuh"
#include "common/math_handles.hpp"
#include "rounding/rounds.hpp"

namespace quantloom::cuda {
namespace {

constexpr int kThreads = 256;
constexpr int64_t kBandRows = 1024;
constexpr int64_t kBlocks = kErrorBlocks;  // partial sums

__global__ void __launch_bounds__(kThreads)
    dot_kernel(const double* a, const double* b, int64_t count, double* partial) {
  double sum = 0;
  for (int64_t at = static_cast<int64_t>(blockIdx.x) * kThreads + threadIdx.x; at < count;
       at += static_cast<int64_t>(gridDim.x) * kThreads) {
    sum += a[at] * b[at];
  }
  const double whole = block_sum<kThreads>(sum);
  if (threadIdx.x == 0) partial[blockIdx.x] = whole;
}

}  // namespace

PackedTensor scratch_planes(std::shared_ptr<const Format> format, int64_t n, int64_t k, cudaStream_t stream) {
  PackedTensor packed{std::move(format), n, k, {}};
  for (const PlaneSpec& spec : packed.format->planes(n, k)) {
    if (spec.optional) continue;
    const int64_t bytes = checked_mul(checked_product(spec.shape), size_of(spec.dtype));
    auto buffer = std::make_shared<DeviceBuffer<std::byte>>(bytes, stream);
    void* memory = buffer->data();
    packed.planes.emplace(spec.name, Tensor(spec.dtype, spec.shape, memory, std::move(buffer), Device::cuda));
  }
  return packed;
}

Losses measure_losses(const CudaMatrix& w, const PackedTensor& packed,
                      std::span<const CudaHessian* const> hessians, cudaStream_t stream) {
  const auto errors_of = [&](int64_t first_row, int64_t rows, double* errors, double* partial) {
    measure_errors(w, packed, first_row, rows, errors, partial, stream);
  };
  return measure_losses(w.rows, w.cols, errors_of, hessians, stream);
}

Losses measure_losses(int64_t n, int64_t k, const ErrorBands& errors_of,
                      std::span<const CudaHessian* const> hessians, cudaStream_t stream) {
  Losses losses;
  losses.proxy_losses.assign(hessians.size(), 0.0);
  const BlasScope blas(stream);
  const int64_t band = std::min(n, kBandRows);
  const int64_t bands = ceil_div(n, band);
  const DeviceBuffer<double> errors(checked_mul(band, k), stream);
  const DeviceBuffer<double> products(hessians.empty() ? 1 : checked_mul(band, k), stream);
  // For each quantity, kBlocks partial sums of each band, then its sum.
  const int64_t quantities = 1 + static_cast<int64_t>(hessians.size());
  const int64_t parts = bands * kBlocks;
  DeviceBuffer<double> partial(quantities * parts, stream);
  const DeviceBuffer<double> sums(quantities, stream);
  partial.fill_bytes(0);
  std::vector<const double*> hessian_sums;
  for (const CudaHessian* hessian : hessians) hessian_sums.push_back(hessian->sum(stream));
  const double one = 1.0;
  const double zero = 0.0;
  for (int64_t b = 0; b < bands; ++b) {
    const int64_t rows = std::min(band, n - b * band);
    errors_of(b * band, rows, errors.data(), partial.data() + b * kBlocks);
    for (size_t h = 0; h < hessians.size(); ++h) {
      // Column-major, (E H)^T = H E^T.
      check_cublas(
          cublas().dgemm(blas.handle(), kOpN, kOpN, static_cast<int>(k), static_cast<int>(rows),
                         static_cast<int>(k), &one, hessian_sums[h], static_cast<int>(k), errors.data(),
                         static_cast<int>(k), &zero, products.data(), static_cast<int>(k)),
          "products of the losses");
      dot_kernel<<<kBlocks, kThreads, 0, stream>>>(
          products.data(), errors.data(), rows * k,
          partial.data() + (1 + static_cast<int64_t>(h)) * parts + b * kBlocks);
      check_cuda(cudaGetLastError(), "launch of dot");
    }
  }
  for (int64_t q = 0; q < quantities; ++q) {
    sum_values(partial.data() + q * parts, parts, sums.data() + q, stream);
  }
  std::vector<double> host(static_cast<size_t>(quantities));
  download(sums.data(), host.data(), quantities, stream);
  losses.mean_squared_error = host[0] / (static_cast<double>(n) * static_cast<double>(k));
  for (size_t h = 0; h < hessians.size(); ++h) {
    losses.proxy_losses[h] = host[h + 1] / static_cast<double>(hessians[h]->tokens());
  }
  return losses;
}

}  // namespace quantloom::cuda
