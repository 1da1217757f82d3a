#include "rounding/trellis_scales.hpp"

#include <algorithm>

#include "common/math_handles.hpp"
#include "rounding/upper_factor.hpp"

namespace quantloom::cuda {
namespace {

double largest_of(const std::vector<double>& diagonal, const CudaHessian& hessian) {
  return *std::ranges::max_element(diagonal) * static_cast<double>(hessian.tokens());
}

// The Hessian over `largest`, in float32.
DeviceBuffer<float> narrowed(const CudaHessian& hessian, double largest, cudaStream_t stream) {
  const int64_t k = hessian.k();
  DeviceBuffer<float> result(checked_mul(k, k), stream);
  narrow(hessian.sum(stream), 1 / largest, result.data(), k * k, stream);
  return result;
}

// Row-major products of matrices [n, k] with symmetric ones and with each other, column-major in cuBLAS.
class Products {
 public:
  Products(const TrellisTask& task, const BothHessians& hessians)
      : stream_(task.stream), n_(task.w.rows), k_(task.w.cols), hessians_(hessians), blas_(task.stream) {}

  // matrix * H over its largest entry
  DeviceBuffer<float> with_inputs(const float* matrix) const {
    const DeviceBuffer<float> hessian =
        narrowed(hessians_.input, largest_of(hessians_.input_diagonal, hessians_.input), stream_);
    DeviceBuffer<float> product(checked_mul(n_, k_), stream_);
    multiply(kOpN, k_, n_, k_, hessian.data(), k_, matrix, k_, product.data(), k_);
    return product;
  }
  // H_out over its largest entry * matrix
  DeviceBuffer<float> with_outputs(const float* matrix) const {
    const DeviceBuffer<float> hessian =
        narrowed(hessians_.output, largest_of(hessians_.output_diagonal, hessians_.output), stream_);
    DeviceBuffer<float> product(checked_mul(n_, k_), stream_);
    multiply(kOpN, k_, n_, n_, matrix, k_, hessian.data(), n_, product.data(), k_);
    return product;
  }
  // a * b^T [n, n], and a^T * b [k, k]; both symmetric, up to roundings
  DeviceBuffer<float> gram_of_rows(const float* a, const float* b) const {
    DeviceBuffer<float> gram(checked_mul(n_, n_), stream_);
    multiply(kOpT, n_, n_, k_, b, k_, a, k_, gram.data(), n_);
    return gram;
  }
  DeviceBuffer<float> gram_of_columns(const float* a, const float* b) const {
    DeviceBuffer<float> gram(checked_mul(k_, k_), stream_);
    const float one = 1.0F;
    const float zero = 0.0F;
    check_cublas(cublas().sgemm(blas_.handle(), kOpN, kOpT, static_cast<int>(k_), static_cast<int>(k_),
                                static_cast<int>(n_), &one, b, static_cast<int>(k_), a, static_cast<int>(k_),
                                &zero, gram.data(), static_cast<int>(k_)),
                 "products of the scales");
    return gram;
  }

 private:
  void multiply(int transposed, int64_t m, int64_t n, int64_t k, const float* a, int64_t lda, const float* b,
                int64_t ldb, float* c, int64_t ldc) const {
    const float one = 1.0F;
    const float zero = 0.0F;
    check_cublas(cublas().sgemm(blas_.handle(), transposed, kOpN, static_cast<int>(m), static_cast<int>(n),
                                static_cast<int>(k), &one, a, static_cast<int>(lda), b, static_cast<int>(ldb),
                                &zero, c, static_cast<int>(ldc)),
                 "products of the scales");
  }

  cudaStream_t stream_;
  int64_t n_;
  int64_t k_;
  const BothHessians& hessians_;
  BlasScope blas_;
};

// Scales times 1 + x, with x the minimum of x^T form x - 2 gradient^T x for form = gram o H over its largest
// entry; as they are unless what is stored of x is a gain.
std::vector<uint16_t> refitted(const std::vector<uint16_t>& scales, const float* gram,
                               const CudaHessian& hessian, double largest, const double* gradient,
                               cudaStream_t stream) {
  const int64_t size = hessian.k();
  const double* sum = hessian.sum(stream);
  std::vector<double> steepest(static_cast<size_t>(size));
  download(gradient, steepest.data(), size, stream);
  DeviceBuffer<double> form(checked_mul(size, size), stream);
  weigh_gram(gram, sum, largest, 1 + trellis::kRefitDamping, form.data(), size, stream);
  if (!cholesky(form.data(), size, stream)) return scales;
  DeviceBuffer<double> change = uploaded(steepest, stream);
  solve_cholesky(form.data(), size, change.data(), stream);
  std::vector<double> host(static_cast<size_t>(size));
  download(change.data(), host.data(), size, stream);
  std::vector<uint16_t> result = scales;
  for (size_t i = 0; i < host.size(); ++i) {
    result[i] = trellis::multiplied_scale(scales[i], 1 + host[i]);
    host[i] = trellis::factor_between(scales[i], result[i]) - 1;
  }
  weigh_gram(gram, sum, largest, 1, form.data(), size, stream);
  change.upload(host.data(), size);
  const DeviceBuffer<double> terms(size, stream);
  quadratic_terms(form.data(), change.data(), size, terms.data(), stream);
  std::vector<double> products(static_cast<size_t>(size));
  download(terms.data(), products.data(), size, stream);
  double gain = 0;
  for (size_t i = 0; i < host.size(); ++i) gain += 2 * steepest[i] * host[i] - products[i];
  return gain > 0 ? result : scales;
}

DeviceBuffer<float> errors_of(const TrellisTask& task, const float* decoded) {
  DeviceBuffer<float> errors(checked_mul(task.w.rows, task.w.cols), task.stream);
  subtract_narrow(task.w, decoded, errors.data(), task.stream);
  return errors;
}

}  // namespace

void refit_output_scales(const TrellisTask& task, const CudaHessian& hessian,
                         const std::vector<double>& diagonal, TrellisResult& result) {
  const cudaStream_t stream = task.stream;
  const int64_t n = task.w.rows;
  const int64_t k = task.w.cols;
  const double largest = *std::ranges::max_element(diagonal) * static_cast<double>(hessian.tokens());
  const DeviceBuffer<float> narrowed(checked_mul(k, k), stream);
  const DeviceBuffer<float> product(checked_mul(n, k), stream);
  narrow(hessian.sum(stream), 1 / largest, narrowed.data(), k * k, stream);
  const BlasScope blas(stream);
  const float one = 1.0F;
  const float zero = 0.0F;
  check_cublas(
      cublas().sgemm(blas.handle(), kOpN, kOpN, static_cast<int>(k), static_cast<int>(n), static_cast<int>(k),
                     &one, narrowed.data(), static_cast<int>(k), result.decoded.data(), static_cast<int>(k),
                     &zero, product.data(), static_cast<int>(k)),
      "products of the scales");
  const DeviceBuffer<double> sums(2 * n, stream);
  dot_rows(product.data(), task.w, result.decoded.data(), sums.data(), sums.data() + n, stream);
  std::vector<double> host(static_cast<size_t>(2 * n));
  download(sums.data(), host.data(), 2 * n, stream);
  trellis::Scales scales = result.scales.host;
  for (int64_t r = 0; r < n; ++r) {
    uint16_t& scale = scales.output[static_cast<size_t>(r)];
    scale = trellis::refitted_scale(scale, host[static_cast<size_t>(r)], host[static_cast<size_t>(n + r)]);
  }
  result.scales = DeviceScales(std::move(scales), stream);
}

void refit_input_scales(const TrellisTask& task, const CudaHessian& hessian,
                        const std::vector<double>& diagonal, TrellisResult& result) {
  const cudaStream_t stream = task.stream;
  const int64_t n = task.w.rows;
  const int64_t k = task.w.cols;
  const double largest = largest_of(diagonal, hessian);
  const BlasScope blas(stream);
  const float one = 1.0F;
  const float zero = 0.0F;
  const DeviceBuffer<double> gradient(k, stream);
  {
    const DeviceBuffer<float> errors = errors_of(task, result.decoded.data());
    const DeviceBuffer<float> matrix = narrowed(hessian, largest, stream);
    const DeviceBuffer<float> product(checked_mul(n, k), stream);
    check_cublas(cublas().sgemm(blas.handle(), kOpN, kOpN, static_cast<int>(k), static_cast<int>(n),
                                static_cast<int>(k), &one, matrix.data(), static_cast<int>(k), errors.data(),
                                static_cast<int>(k), &zero, product.data(), static_cast<int>(k)),
                 "products of the scales");
    dot_columns(product.data(), result.decoded.data(), n, k, gradient.data(), stream);
  }
  // Column-major, decoded is [k, n].
  const DeviceBuffer<float> gram(checked_mul(k, k), stream);
  check_cublas(
      cublas().ssyrk(blas.handle(), kFillUpper, kOpN, static_cast<int>(k), static_cast<int>(n), &one,
                     result.decoded.data(), static_cast<int>(k), &zero, gram.data(), static_cast<int>(k)),
      "products of the scales");
  trellis::Scales scales = result.scales.host;
  scales.input = refitted(scales.input, gram.data(), hessian, largest, gradient.data(), stream);
  result.scales = DeviceScales(std::move(scales), stream);
}

void refit_output_scales(const TrellisTask& task, const BothHessians& hessians, TrellisResult& result) {
  const cudaStream_t stream = task.stream;
  const int64_t n = task.w.rows;
  const Products products(task, hessians);
  const DeviceBuffer<float> weighed = products.with_inputs(result.decoded.data());
  const DeviceBuffer<double> sums(2 * n, stream);
  {
    const DeviceBuffer<float> errors = products.with_outputs(errors_of(task, result.decoded.data()).data());
    dot_rows(errors.data(), matrix_of(weighed.data(), n, task.w.cols, task.w.cols), weighed.data(),
             sums.data(), sums.data() + n, stream);
  }
  const DeviceBuffer<float> gram = products.gram_of_rows(weighed.data(), result.decoded.data());
  trellis::Scales scales = result.scales.host;
  scales.output = refitted(scales.output, gram.data(), hessians.output,
                           largest_of(hessians.output_diagonal, hessians.output), sums.data(), stream);
  result.scales = DeviceScales(std::move(scales), stream);
}

void refit_input_scales(const TrellisTask& task, const BothHessians& hessians, TrellisResult& result) {
  const cudaStream_t stream = task.stream;
  const int64_t k = task.w.cols;
  const Products products(task, hessians);
  const DeviceBuffer<float> weighed = products.with_outputs(result.decoded.data());
  const DeviceBuffer<double> gradient(k, stream);
  {
    const DeviceBuffer<float> errors = products.with_inputs(errors_of(task, result.decoded.data()).data());
    dot_columns(errors.data(), weighed.data(), task.w.rows, k, gradient.data(), stream);
  }
  const DeviceBuffer<float> gram = products.gram_of_columns(weighed.data(), result.decoded.data());
  trellis::Scales scales = result.scales.host;
  scales.input = refitted(scales.input, gram.data(), hessians.input,
                          largest_of(hessians.input_diagonal, hessians.input), gradient.data(), stream);
  result.scales = DeviceScales(std::move(scales), stream);
}

double two_sided_loss(const TrellisTask& task, const BothHessians& hessians, const float* decoded) {
  const cudaStream_t stream = task.stream;
  const int64_t n = task.w.rows;
  const int64_t k = task.w.cols;
  const Products products(task, hessians);
  const DeviceBuffer<float> errors = errors_of(task, decoded);
  const DeviceBuffer<float> rows = products.with_inputs(errors.data());
  const DeviceBuffer<float> columns = products.with_outputs(errors.data());
  const DeviceBuffer<double> sums(2 * n, stream);
  dot_rows(rows.data(), matrix_of(columns.data(), n, k, k), columns.data(), sums.data(), sums.data() + n,
           stream);
  std::vector<double> host(static_cast<size_t>(n));
  download(sums.data(), host.data(), n, stream);
  double loss = 0;
  for (const double of_row : host) loss += of_row;
  return loss * *std::ranges::max_element(hessians.input_diagonal) *
         *std::ranges::max_element(hessians.output_diagonal);
}

}  // namespace quantloom::cuda
