// The Hessian on the device. Only the lower triangle is added to; the upper one is copied from it on use.
#include <algorithm>
#include <limits>
#include <mutex>

#include "common/device_pointer.hpp"
#include "common/math_handles.hpp"
#include "common/matrix_checks.hpp"
#include "quantloom/calibration/cuda_hessian.hpp"
#include "quantloom/checked_math.hpp"

namespace quantloom {
namespace {

using cuda::BlasScope;
using cuda::DeviceBuffer;

constexpr int kThreads = 256;
constexpr int64_t kChunkTokens = 1024;  // summed in float32
constexpr int64_t kPanelRows = 2048;    // rows of the sum updated by one product
constexpr int kTile = 32;

// sum[first_row + i][j] += part[i][j] for j <= first_row + i. part [rows, columns], sum [k, k].
__global__ void __launch_bounds__(kThreads)
    add_lower(const float* __restrict__ part, int64_t first_row, int64_t rows, int64_t columns, int64_t k,
              double* __restrict__ sum) {
  for (int64_t i = blockIdx.y; i < rows; i += gridDim.y) {
    const int64_t row = first_row + i;
    for (int64_t j = static_cast<int64_t>(blockIdx.x) * kThreads + threadIdx.x; j <= row;
         j += static_cast<int64_t>(gridDim.x) * kThreads) {
      sum[row * k + j] += static_cast<double>(part[i * columns + j]);
    }
  }
}

// Copies the lower triangle to the upper one, through tiles so that both sides are read and written in rows.
__global__ void __launch_bounds__(kTile * 8) mirror_lower(double* sum, int64_t k) {
  __shared__ double tile[kTile][kTile + 1];
  const int64_t row = static_cast<int64_t>(blockIdx.y) * kTile;
  const int64_t column = static_cast<int64_t>(blockIdx.x) * kTile;
  if (column > row) return;
  for (int i = threadIdx.y; i < kTile; i += 8) {
    const int64_t r = row + i;
    const int64_t c = column + threadIdx.x;
    if (r < k && c < k) tile[i][threadIdx.x] = sum[r * k + c];
  }
  __syncthreads();
  for (int i = threadIdx.y; i < kTile; i += 8) {
    const int64_t r = column + i;
    const int64_t c = row + threadIdx.x;
    if (r < k && c < k && c > r) sum[r * k + c] = tile[threadIdx.x][i];
  }
}

__global__ void __launch_bounds__(kThreads) copy_diagonal(const double* sum, int64_t k, double* diagonal) {
  const int64_t i = static_cast<int64_t>(blockIdx.x) * kThreads + threadIdx.x;
  if (i < k) diagonal[i] = sum[i * k + i];
}

cudaDataType_t library_type(DType dtype) {
  if (dtype == DType::f16) return CUDA_R_16F;
  return dtype == DType::bf16 ? CUDA_R_16BF : CUDA_R_32F;
}

int to_int(int64_t value, const char* argument) {
  if (value > std::numeric_limits<int>::max()) {
    throw InvalidArgument(argument, text_of(value), "a size below 2^31");
  }
  return static_cast<int>(value);
}

}  // namespace

struct CudaHessian::State {
  explicit State(int64_t k_in) : k(k_in) {
    if (k < 0) throw InvalidArgument("k", text_of(k), "0 or more");
    to_int(k, "k");
    check_cuda(cudaGetDevice(&device), "current CUDA device");
    const int64_t bytes = std::max<int64_t>(checked_mul(checked_mul(k, k), sizeof(double)), 1);
    void* memory = nullptr;
    check_cuda(cudaMalloc(&memory, static_cast<size_t>(bytes)), text_of("device memory, ", bytes, " bytes"));
    sum = static_cast<double*>(memory);
    check_cuda(cudaMalloc(&memory, sizeof(uint64_t)), "device memory");
    non_finite = static_cast<uint64_t*>(memory);
    check_cuda(cudaEventCreateWithFlags(&last_work, cudaEventDisableTiming), "event");
    // On the legacy stream, and waited for: work on any stream that follows finds zeros.
    check_cuda(cudaMemset(sum, 0, static_cast<size_t>(bytes)), "fill of device memory");
    check_cuda(cudaMemset(non_finite, 0xff, sizeof(uint64_t)), "fill of device memory");
    check_cuda(cudaStreamSynchronize(nullptr), "fill of device memory");
  }
  ~State() {
    // cudaFree waits for the device.
    static_cast<void>(cudaFree(sum));
    static_cast<void>(cudaFree(non_finite));
    if (last_work != nullptr) static_cast<void>(cudaEventDestroy(last_work));
  }
  State(const State&) = delete;
  State& operator=(const State&) = delete;

  void require_current_device(const char* argument) const {
    int current = 0;
    check_cuda(cudaGetDevice(&current), "current CUDA device");
    if (current != device) {
      throw TypeMismatch(argument, text_of("memory of CUDA device ", device),
                         text_of("memory of the current device, ", current));
    }
  }
  // Work on `stream` from here on follows all work on the sum so far.
  void join(cudaStream_t stream) const {
    check_cuda(cudaStreamWaitEvent(stream, last_work, 0), "order of streams");
  }
  void leave(cudaStream_t stream) { check_cuda(cudaEventRecord(last_work, stream), "order of streams"); }

  // Makes both triangles valid; throws if the tokens held a NaN or Inf. Waits for the stream.
  void finish(cudaStream_t stream) {
    require_current_device("hessian");
    join(stream);
    if (!lower_only) return;
    if (k > 0) {
      const auto side = static_cast<unsigned>(ceil_div(k, kTile));
      mirror_lower<<<dim3(side, side), dim3(kTile, 8), 0, stream>>>(sum, k);
      check_cuda(cudaGetLastError(), "launch of mirror_lower");
      leave(stream);
    }
    cuda::require_none_found(non_finite, std::max<int64_t>(k, 1), "x", " of all tokens added", stream);
    lower_only = false;
  }

  int64_t k;
  int device = 0;
  int64_t tokens = 0;
  bool lower_only = false;
  double* sum = nullptr;
  uint64_t* non_finite = nullptr;
  cudaEvent_t last_work = nullptr;
};

CudaHessian::CudaHessian(int64_t k) : state_(std::make_unique<State>(k)) {}

CudaHessian::CudaHessian(const Hessian& hessian) : state_(std::make_unique<State>(hessian.k())) {
  const int64_t k = hessian.k();
  if (k > 0) {
    check_cuda(cudaMemcpy(state_->sum, hessian.sum().data(), static_cast<size_t>(k * k) * sizeof(double),
                          cudaMemcpyHostToDevice),
               "copy to the device");
    // A copy from pageable memory may end on the device after the call has returned.
    check_cuda(cudaStreamSynchronize(nullptr), "copy to the device");
  }
  state_->tokens = hessian.tokens();
}

CudaHessian::~CudaHessian() = default;
CudaHessian::CudaHessian(CudaHessian&& other) noexcept = default;
CudaHessian& CudaHessian::operator=(CudaHessian&& other) noexcept = default;

void CudaHessian::add(const CudaMatrix& x, void* stream) {
  State& state = *state_;
  const int64_t k = state.k;
  if (x.cols != k) {
    throw InvalidArgument("x", text_of("shape [", x.rows, ", ", x.cols, "]"),
                          text_of("shape [tokens, ", k, "]"));
  }
  cuda::require_matrix(x, "x");
  state.require_current_device("hessian");
  const int64_t tokens_after = checked_add(state.tokens, x.rows);
  if (x.rows == 0 || k == 0) {
    state.tokens = tokens_after;
    return;
  }
  static_cast<void>(checked_mul(checked_mul(tokens_after, k), 4));  // the keys of find_non_finite
  const int stride = to_int(x.stride, "stride of x");
  const auto cuda_stream = static_cast<cudaStream_t>(stream);
  const BlasScope blas(cuda_stream);
  const int64_t panel = std::min(kPanelRows, k);
  const DeviceBuffer<float> part(checked_mul(panel, k), cuda_stream);
  state.join(cuda_stream);
  cuda::find_non_finite(x, state.tokens, state.non_finite, cuda_stream);
  state.lower_only = true;
  const float one = 1.0F;
  const float zero = 0.0F;
  const cudaDataType_t type = library_type(x.dtype);
  for (int64_t token = 0; token < x.rows; token += kChunkTokens) {
    const auto depth = static_cast<int>(std::min(kChunkTokens, x.rows - token));
    const auto* chunk = static_cast<const std::byte*>(x.data) + token * x.stride * size_of(x.dtype);
    for (int64_t first = 0; first < k; first += panel) {
      const int64_t rows = std::min(panel, k - first);
      const int64_t columns = first + rows;
      // Column-major, X^T is [k, tokens] and part^T = (X^T)[0:columns] (X^T)[first:columns]^T.
      cuda::check_cublas(
          cuda::cublas().gemm_ex(
              blas.handle(), cuda::kOpN, cuda::kOpT, static_cast<int>(columns), static_cast<int>(rows), depth,
              &one, chunk, type, stride, chunk + first * size_of(x.dtype), type, stride, &zero, part.data(),
              CUDA_R_32F, static_cast<int>(columns), cuda::kCompute32F, cuda::kGemmDefault),
          "products of the Hessian");
      const dim3 blocks(static_cast<unsigned>(std::min<int64_t>(ceil_div(columns, kThreads), 64)),
                        static_cast<unsigned>(rows));
      add_lower<<<blocks, kThreads, 0, cuda_stream>>>(part.data(), first, rows, columns, k, state.sum);
      check_cuda(cudaGetLastError(), "launch of add_lower");
    }
  }
  state.tokens = tokens_after;
  state.leave(cuda_stream);
}

int64_t CudaHessian::k() const {
  return state_->k;
}

int64_t CudaHessian::tokens() const {
  return state_->tokens;
}

int CudaHessian::device() const {
  return state_->device;
}

std::vector<double> CudaHessian::diagonal(void* stream) const {
  State& state = *state_;
  if (state.tokens == 0) throw InvalidArgument("hessian", "no tokens", "at least one token");
  const auto cuda_stream = static_cast<cudaStream_t>(stream);
  state.finish(cuda_stream);
  std::vector<double> diagonal(static_cast<size_t>(state.k));
  if (state.k == 0) return diagonal;
  const DeviceBuffer<double> packed(state.k, cuda_stream);
  copy_diagonal<<<static_cast<unsigned>(ceil_div(state.k, kThreads)), kThreads, 0, cuda_stream>>>(
      state.sum, state.k, packed.data());
  check_cuda(cudaGetLastError(), "launch of copy_diagonal");
  cuda::download(packed.data(), diagonal.data(), state.k, cuda_stream);
  for (double& entry : diagonal) entry /= static_cast<double>(state.tokens);
  return diagonal;
}

Hessian CudaHessian::to_cpu(void* stream) const {
  State& state = *state_;
  const auto cuda_stream = static_cast<cudaStream_t>(stream);
  state.finish(cuda_stream);
  if (state.tokens == 0) return Hessian(state.k);
  std::vector<double> sum(static_cast<size_t>(state.k * state.k));
  cuda::download(state.sum, sum.data(), state.k * state.k, cuda_stream);
  return Hessian(MatrixView<const double>(sum.data(), state.k, state.k), state.tokens);
}

const double* CudaHessian::sum(void* stream) const {
  state_->finish(static_cast<cudaStream_t>(stream));
  return state_->sum;
}

}  // namespace quantloom
