#include <cmath>
#include <sstream>

#include "common/math_handles.hpp"
#include "quantloom/error.hpp"
#include "rounding/upper_factor.hpp"

namespace quantloom::cuda {
namespace {

constexpr int kThreads = 256;
constexpr int64_t kPanel = 1024;  // columns inverted at a time
constexpr int64_t kRowAlignment = 32;

// Kinds of entries that no Hessian can have, in the order in which the CPU finds them within a row.
constexpr int kNotFinite = 0;
constexpr int kNegative = 1;
constexpr int kBesideDead = 2;
constexpr int kKinds = 3;

dim3 grid_for(int64_t rows, int64_t columns) {
  return dim3(static_cast<unsigned>(std::clamp<int64_t>(ceil_div(columns, kThreads), 1, 64)),
              static_cast<unsigned>(std::clamp<int64_t>(rows, 1, 65535)));
}

// Takes the least (i * kKinds + kind) * k + j.
__global__ void __launch_bounds__(kThreads)
    find_unusable(const double* sum, int64_t k, unsigned long long* key) {
  unsigned long long found = kNoneFound;
  for (int64_t i = blockIdx.y; i < k; i += gridDim.y) {
    const double diagonal = sum[i * k + i];
    for (int64_t j = static_cast<int64_t>(blockIdx.x) * kThreads + threadIdx.x; j < k;
         j += static_cast<int64_t>(gridDim.x) * kThreads) {
      const double entry = sum[i * k + j];
      int kind = kKinds;
      if (!isfinite(entry)) {
        kind = kNotFinite;
      } else if (i == j && entry < 0) {
        kind = kNegative;
      } else if (diagonal == 0 && (entry != 0 || sum[j * k + i] != 0)) {
        kind = kBesideDead;
      }
      if (kind < kKinds) {
        const auto at = static_cast<unsigned long long>((i * kKinds + kind) * k + j);
        found = min(found, at);
      }
    }
  }
  if (found != kNoneFound) atomicMin(key, found);
}

// The lower triangle of the damped matrix, rows and columns in reversed order; row-major, which column-major
// libraries see as an upper triangle.
__global__ void __launch_bounds__(kThreads) build_reversed(const double* sum, const int32_t* order, int64_t k,
                                                           double mean, double damping, double* out) {
  for (int64_t r = blockIdx.y; r < k; r += gridDim.y) {
    const double* source = sum + static_cast<int64_t>(order[k - 1 - r]) * k;
    for (int64_t c = static_cast<int64_t>(blockIdx.x) * kThreads + threadIdx.x; c <= r;
         c += static_cast<int64_t>(gridDim.x) * kThreads) {
      const double entry = source[order[k - 1 - c]];
      out[r * k + c] = c < r ? entry / mean : (entry > 0 ? entry / mean : 1.0) + damping;
    }
  }
}

// One on the diagonal of columns [first, first + count) of the identity; panel [count, rows], zeroed.
__global__ void __launch_bounds__(kThreads)
    set_ones(double* panel, int64_t first, int64_t count, int64_t rows) {
  const int64_t j = static_cast<int64_t>(blockIdx.x) * kThreads + threadIdx.x;
  if (j < count) panel[j * rows + first + j] = 1.0;
}

// Row r of the inverted triangle is panel row r - first; it becomes row k - 1 - r of U, read backwards.
__global__ void __launch_bounds__(kThreads)
    flip_rows(const double* panel, int64_t first, int64_t count, int64_t rows, int64_t k, int64_t stride,
              float* upper, int* bad) {
  bool good = true;
  for (int64_t at = blockIdx.y; at < count; at += gridDim.y) {
    const int64_t i = k - 1 - (first + at);
    for (int64_t j = static_cast<int64_t>(blockIdx.x) * kThreads + threadIdx.x; j < stride;
         j += static_cast<int64_t>(gridDim.x) * kThreads) {
      float value = 0.0F;
      if (j >= i && j < k) {
        value = static_cast<float>(panel[at * rows + (k - 1 - j)]);
        good = good && isfinite(value) && (j != i || value > 0);
      }
      upper[i * stride + j] = value;
    }
  }
  if (!good) atomicOr(bad, 1);
}

struct SolverParams {
  SolverParams() { check_cusolver(cusolver().create_params(&params), "cusolverDnCreateParams"); }
  ~SolverParams() { static_cast<void>(cusolver().destroy_params(params)); }
  SolverParams(const SolverParams&) = delete;
  SolverParams& operator=(const SolverParams&) = delete;
  CusolverParams params = nullptr;
};

std::vector<double> times(std::vector<double> values, double factor) {
  for (double& value : values) value *= factor;
  return values;
}

}  // namespace

bool cholesky(double* a, int64_t k, cudaStream_t stream) {
  const SolverScope solver(stream);
  const SolverParams params;
  size_t device_bytes = 0;
  size_t host_bytes = 0;
  check_cusolver(cusolver().xpotrf_buffer_size(solver.handle(), params.params, kFillUpper, k, CUDA_R_64F, a,
                                               k, CUDA_R_64F, &device_bytes, &host_bytes),
                 "workspace of the factorization");
  const DeviceBuffer<std::byte> workspace(static_cast<int64_t>(device_bytes), stream);
  std::vector<std::byte> host_workspace(host_bytes);
  DeviceBuffer<int> info(1, stream);
  info.fill_bytes(0);
  check_cusolver(
      cusolver().xpotrf(solver.handle(), params.params, kFillUpper, k, CUDA_R_64F, a, k, CUDA_R_64F,
                        workspace.data(), device_bytes, host_workspace.data(), host_bytes, info.data()),
      "factorization of the Hessian");
  int result = 0;
  download(info.data(), &result, 1, stream);
  if (result < 0) throw Error(text_of("factorization of the Hessian: cuSOLVER refused argument ", -result));
  return result == 0;
}

void solve_cholesky(const double* factor, int64_t k, double* values, cudaStream_t stream) {
  const BlasScope blas(stream);
  const double one = 1.0;
  // Row-major L is, column-major, the upper triangle L^T.
  for (const int transposed : {kOpT, kOpN}) {
    check_cublas(
        cublas().dtrsm(blas.handle(), kSideLeft, kFillUpper, transposed, kDiagNonUnit, static_cast<int>(k), 1,
                       &one, factor, static_cast<int>(k), values, static_cast<int>(k)),
        "solution with the factor");
  }
}

void require_usable(const CudaHessian& hessian, const std::vector<double>& diagonal, cudaStream_t stream,
                    std::string_view argument) {
  const int64_t k = hessian.k();
  if (k == 0) return;
  const double* sum = hessian.sum(stream);
  DeviceBuffer<uint64_t> key(1, stream);
  key.fill_bytes(0xff);
  find_unusable<<<grid_for(k, k), kThreads, 0, stream>>>(sum, k,
                                                         reinterpret_cast<unsigned long long*>(key.data()));
  check_cuda(cudaGetLastError(), "launch of find_unusable");
  uint64_t found = 0;
  download(key.data(), &found, 1, stream);
  if (found != kNoneFound) {
    const auto j = static_cast<int64_t>(found) % k;
    const auto row_and_kind = static_cast<int64_t>(found) / k;
    const int64_t i = row_and_kind / kKinds;
    double entry = 0;
    download(sum + i * k + j, &entry, 1, stream);
    const std::string where =
        text_of(argument, ": got ", entry, " at row ", i, ", column ", j, ", expected ");
    if (row_and_kind % kKinds == kNotFinite) throw NumericError(where + "finite values");
    if (row_and_kind % kKinds == kNegative) throw NumericError(where + "a diagonal of zero or more");
    throw NumericError(where + text_of("0 because the diagonal entry of row ", i, " is 0"));
  }
  if (std::none_of(diagonal.begin(), diagonal.end(), [](double entry) { return entry > 0; })) {
    throw NumericError(text_of(argument, ": got a diagonal of zeros, expected at least one ",
                               argument == "hessian" ? "input" : "entry", " that is not always 0"));
  }
}

UpperFactor::UpperFactor(const CudaHessian& hessian, const std::vector<double>& diagonal,
                         const int32_t* order, double damping, std::span<const double> ladder,
                         cudaStream_t stream)
    : UpperFactor(hessian.sum(stream), times(diagonal, static_cast<double>(hessian.tokens())), order, damping,
                  ladder, stream) {}

UpperFactor::UpperFactor(const double* sum, std::span<const double> diagonal, const int32_t* order,
                         double damping, std::span<const double> ladder, cudaStream_t stream,
                         std::string_view argument)
    : k_(std::ssize(diagonal)),
      stride_(checked_pad(k_, kRowAlignment)),
      upper_(checked_mul(k_, stride_), stream) {
  int64_t live = 0;
  double total = 0;
  for (const double entry : diagonal) {
    total += entry;
    live += static_cast<int64_t>(entry > 0);
  }
  const double mean = live > 0 ? total / static_cast<double>(live) : 1.0;
  DeviceBuffer<double> factor(checked_mul(k_, k_), stream);
  factor.fill_bytes(0);  // the libraries may touch the triangle that they do not use
  damping_tried_.push_back(damping);
  if (factorize(sum, order, mean, damping, factor.data(), stream)) return;
  for (const double value : ladder) {
    if (value <= damping) continue;
    damping_tried_.push_back(value);
    if (factorize(sum, order, mean, value, factor.data(), stream)) return;
  }
  std::ostringstream list;
  for (const double value : damping_tried_) list << (list.tellp() > 0 ? ", " : "") << value;
  throw NumericError(text_of(argument, ": got a matrix that is not positive definite with damping ",
                             list.str(),
                             ", expected one that is; more calibration tokens or more damping help"));
}

bool UpperFactor::factorize(const double* sum, const int32_t* order, double mean, double damping,
                            double* factor, cudaStream_t stream) {
  if (k_ == 0) return true;
  build_reversed<<<grid_for(k_, k_), kThreads, 0, stream>>>(sum, order, k_, mean, damping, factor);
  check_cuda(cudaGetLastError(), "launch of build_reversed");
  if (!cholesky(factor, k_, stream)) return false;

  // Row-major, factor is L with L L^T = the matrix. Row r of L^-1 is, column-major, column r of the inverse
  // of the upper triangle L^T: it ends at row r, so that a panel of columns needs the leading triangle only.
  const BlasScope blas(stream);
  const int64_t width = std::min(kPanel, k_);
  const DeviceBuffer<double> panel(checked_mul(width, k_), stream);
  DeviceBuffer<int> bad(1, stream);
  bad.fill_bytes(0);
  const double one = 1.0;
  for (int64_t first = 0; first < k_; first += width) {
    const int64_t count = std::min(width, k_ - first);
    const int64_t rows = first + count;
    check_cuda(cudaMemsetAsync(panel.data(), 0, static_cast<size_t>(count * rows) * sizeof(double), stream),
               "fill of device memory");
    set_ones<<<static_cast<unsigned>(ceil_div(count, kThreads)), kThreads, 0, stream>>>(panel.data(), first,
                                                                                        count, rows);
    check_cuda(cudaGetLastError(), "launch of set_ones");
    check_cublas(cublas().dtrsm(blas.handle(), kSideLeft, kFillUpper, kOpN, kDiagNonUnit,
                                static_cast<int>(rows), static_cast<int>(count), &one, factor,
                                static_cast<int>(k_), panel.data(), static_cast<int>(rows)),
                 "inversion of the factor");
    flip_rows<<<grid_for(count, stride_), kThreads, 0, stream>>>(panel.data(), first, count, rows, k_,
                                                                 stride_, upper_.data(), bad.data());
    check_cuda(cudaGetLastError(), "launch of flip_rows");
  }
  int result = 0;
  download(bad.data(), &result, 1, stream);
  return result == 0;
}

}  // namespace quantloom::cuda
