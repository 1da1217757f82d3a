// The product of a decoded matrix, by cuBLASLt.
#include <algorithm>
#include <map>
#include <mutex>
#include <tuple>
#include <type_traits>

#include "common/check.cuh"
#include "common/libraries.hpp"
#include "kernels/dense_product.cuh"
#include "kernels/overlap.cuh"
#include "kernels/tile_products.cuh"
#include "kernels/tile_support.cuh"
#include "quantloom/checked_math.hpp"

namespace quantloom::cuda {
namespace {

constexpr int kThreads = 256;
constexpr int64_t kDecodedBytes = int64_t{256} << 20;  // of decoded rows at a time
constexpr int kGatheredTokens = 8192;                  // tokens whose columns are put in order at a time
constexpr size_t kCachedAlgorithms = 512;

// Columns of `tokens` rows from `first` on in the order of the matrix; 16 bytes to a thread.
template <class T>
__global__ void __launch_bounds__(kThreads)
    gather_columns(const __grid_constant__ ProductArguments p, T* out, int first, int tokens) {
  constexpr int kColumns = 16 / sizeof(T);
  wait_for_previous();
  const int64_t pieces = static_cast<int64_t>(p.w.column_blocks) * (64 / kColumns);
  const int64_t i = static_cast<int64_t>(blockIdx.x) * kThreads + threadIdx.x;
  const int64_t token = i / pieces;
  const int64_t column = i % pieces * kColumns;
  if (token >= tokens) return;
  const T* row = static_cast<const T*>(p.x) + (first + token) * p.x_stride;
  alignas(16) T values[kColumns];
#pragma unroll
  for (int c = 0; c < kColumns; ++c) {
    const int64_t source = p.w.source[column + c];
    values[c] = source >= 0 && source < p.w.k ? row[source] : T(0.0F);
  }
  *reinterpret_cast<uint4*>(out + i * kColumns) = *reinterpret_cast<const uint4*>(values);
}

template <class T>
void launch_gather(const ProductLaunch& launch, void* out, int first, int tokens) {
  const int64_t threads =
      int64_t{launch.arguments.w.column_blocks} * 4 * static_cast<int64_t>(sizeof(T)) * tokens;
  const int64_t blocks = ceil_div(threads, kThreads);
  if (blocks > 2147483647)
    throw Unsupported(text_of("matmul_cuda: no kernel to gather ", threads, " pieces"));
  LaunchSettings settings(dim3(static_cast<unsigned>(blocks)), dim3(kThreads), launch.stream, false, 1);
  check_cuda(cudaLaunchKernelEx(&settings.config, gather_columns<T>, launch.arguments, static_cast<T*>(out),
                                first, tokens),
             "matmul_cuda: launch of gather_columns");
}

int64_t size_of_value(DType dtype) {
  return dtype == DType::f32 ? 4 : 2;
}

cudaDataType_t library_type(DType dtype) {
  return dtype == DType::f16 ? CUDA_R_16F : dtype == DType::bf16 ? CUDA_R_16BF : CUDA_R_32F;
}

// The largest power of two up to 256 that divides an address and the bytes between rows.
uint32_t alignment_of(const void* pointer, int64_t row_bytes) {
  const uint64_t bits = reinterpret_cast<uintptr_t>(pointer) | static_cast<uint64_t>(row_bytes) | 256U;
  return static_cast<uint32_t>(bits & (~bits + 1));
}

// Objects of cuBLASLt, destroyed with their owner.
class Descriptions {
 public:
  explicit Descriptions(const CublasLt& library) : library_(library) {}
  Descriptions(const Descriptions&) = delete;
  Descriptions& operator=(const Descriptions&) = delete;
  ~Descriptions() {
    if (preference != nullptr) library_.preference_destroy(preference);
    for (MatrixLayout layout : {w, x, y}) {
      if (layout != nullptr) library_.layout_destroy(layout);
    }
    if (product != nullptr) library_.matmul_desc_destroy(product);
  }

  MatmulDesc product = nullptr;
  MatrixLayout w = nullptr;
  MatrixLayout x = nullptr;
  MatrixLayout y = nullptr;
  MatmulPreference preference = nullptr;

 private:
  const CublasLt& library_;
};

std::mutex cache_mutex;  // guards handles and algorithms

// The handle of the current device; kept until the process ends, as kernels may run until then.
CublasLtHandle handle_of(const CublasLt& library, int device) {
  static std::map<int, CublasLtHandle> handles;
  const std::scoped_lock lock(cache_mutex);
  CublasLtHandle& handle = handles[device];
  if (handle == nullptr) check_cublas(library.create(&handle), "matmul_cuda: cublasLtCreate");
  return handle;
}

using AlgorithmKey = std::tuple<int, int64_t, int64_t, int64_t, int64_t, int64_t, int64_t, DType, bool,
                                uint32_t, uint32_t, uint32_t>;

std::map<AlgorithmKey, MatmulAlgorithm>& algorithms() {
  static std::map<AlgorithmKey, MatmulAlgorithm> cache;
  return cache;
}

MatmulAlgorithm algorithm_for(const CublasLt& library, CublasLtHandle handle, int device,
                              const DenseProduct& product, Descriptions& descriptions) {
  const int64_t size = size_of_value(product.dtype);
  const uint32_t w_alignment = alignment_of(product.w, product.w_stride * size);
  const uint32_t x_alignment = alignment_of(product.x, product.x_stride * size);
  const uint32_t y_alignment = alignment_of(product.y, product.y_stride * size);
  const AlgorithmKey key{device,           product.n,        product.k,
                         product.m,        product.w_stride, product.x_stride,
                         product.y_stride, product.dtype,    product.bias != nullptr,
                         w_alignment,      x_alignment,      y_alignment};
  {
    const std::scoped_lock lock(cache_mutex);
    const auto found = algorithms().find(key);
    if (found != algorithms().end()) return found->second;
  }
  const uint64_t workspace = kLibraryBytes;
  check_cublas(library.preference_create(&descriptions.preference), "matmul_cuda: cublasLt preference");
  const auto prefer = [&](int attribute, const auto& value) {
    check_cublas(library.preference_set(descriptions.preference, attribute, &value, sizeof(value)),
                 "matmul_cuda: cublasLt preference");
  };
  prefer(kPreferenceMaxWorkspaceBytes, workspace);
  // Parts of k are added in float32, and in a fixed order.
  prefer(kPreferenceReductionSchemes, kReductionInComputeType);
  prefer(kPreferenceMinAlignmentA, w_alignment);
  prefer(kPreferenceMinAlignmentB, x_alignment);
  prefer(kPreferenceMinAlignmentC, y_alignment);
  prefer(kPreferenceMinAlignmentD, y_alignment);
  MatmulHeuristic result{};
  int found = 0;
  check_cublas(library.heuristic(handle, descriptions.product, descriptions.w, descriptions.x, descriptions.y,
                                 descriptions.y, descriptions.preference, 1, &result, &found),
               "matmul_cuda: cublasLtMatmulAlgoGetHeuristic");
  if (found == 0 || result.state != kLibrarySuccess) {
    throw Unsupported(text_of("matmul_cuda: cuBLASLt has no algorithm for m = ", product.m,
                              ", n = ", product.n, ", k = ", product.k));
  }
  const std::scoped_lock lock(cache_mutex);
  if (algorithms().size() >= kCachedAlgorithms) algorithms().clear();
  algorithms().insert_or_assign(key, result.algorithm);
  return result.algorithm;
}

}  // namespace

// cuBLASLt sees the transposes, column by column: y^T [n, m] = W [n, k] x^T [k, m].
void multiply_dense(const DenseProduct& product, void* workspace, cudaStream_t stream) {
  const CublasLt& library = cublas_lt();
  int device = 0;
  check_cuda(cudaGetDevice(&device), "cudaGetDevice");
  const CublasLtHandle handle = handle_of(library, device);
  const cudaDataType_t type = library_type(product.dtype);
  constexpr const char* kWhat = "matmul_cuda: cublasLt descriptions";

  Descriptions descriptions(library);
  check_cublas(library.matmul_desc_create(&descriptions.product, kCompute32F, CUDA_R_32F), kWhat);
  const auto set = [&](int attribute, const auto& value) {
    check_cublas(library.matmul_desc_set(descriptions.product, attribute, &value, sizeof(value)), kWhat);
  };
  set(kMatmulTransA, int32_t{kOpT});
  set(kMatmulTransB, int32_t{kOpN});
  if (product.bias != nullptr) {
    set(kMatmulEpilogue, kEpilogueBias);
    set(kMatmulBiasPointer, product.bias);
  }
  const auto describe = [&](MatrixLayout& layout, int64_t rows, int64_t columns, int64_t stride) {
    check_cublas(library.layout_create(&layout, type, static_cast<uint64_t>(rows),
                                       static_cast<uint64_t>(columns), stride),
                 kWhat);
  };
  describe(descriptions.w, product.k, product.n, product.w_stride);
  describe(descriptions.x, product.k, product.m, product.x_stride);
  describe(descriptions.y, product.n, product.m, product.y_stride);

  const MatmulAlgorithm algorithm = algorithm_for(library, handle, device, product, descriptions);
  const float one = 1.0F;
  const float zero = 0.0F;
  check_cublas(library.matmul(handle, descriptions.product, &one, product.w, descriptions.w, product.x,
                              descriptions.x, &zero, product.y, descriptions.y, product.y, descriptions.y,
                              &algorithm, workspace, static_cast<size_t>(kLibraryBytes), stream),
               "matmul_cuda: cublasLtMatmul");
}

DecodedPlan decoded_plan(const FragmentMatrix& w, int m, DType dtype, int splits) {
  static_cast<void>(cublas_lt());
  const int64_t row_bytes = checked_mul(int64_t{64} * w.column_blocks, size_of_value(dtype));
  const int64_t blocks = std::max<int64_t>(kDecodedBytes / (64 * row_bytes), 1);
  const int64_t parts = std::max<int64_t>(ceil_div(w.row_blocks, blocks), splits);
  DecodedPlan plan;
  plan.rows = 64 * ceil_div(w.row_blocks, parts);
  plan.bias = aligned_bytes(plan.rows * row_bytes);
  plan.gathered = plan.bias + aligned_bytes(plan.rows * size_of_value(dtype));
  plan.library = plan.gathered;
  if (w.source != nullptr) plan.library += aligned_bytes(row_bytes * std::min(m, kGatheredTokens));
  plan.bytes = plan.library + kLibraryBytes;
  return plan;
}

int64_t decoded_workspace(const FragmentMatrix& w, int m, DType dtype) {
  if (m == 0 || w.n == 0 || w.column_blocks == 0) return 0;
  return decoded_plan(w, m, dtype, 0).bytes;
}

ProductLaunch part_of_rows(const ProductLaunch& launch, int64_t first, int64_t rows, int bits) {
  ProductLaunch part = launch;
  ProductArguments& p = part.arguments;
  const auto forward = [](const auto*& pointer, int64_t bytes) {
    if (pointer == nullptr) return;
    pointer = reinterpret_cast<std::remove_reference_t<decltype(pointer)>>(
        reinterpret_cast<uintptr_t>(pointer) + static_cast<uintptr_t>(bytes));
  };
  const int64_t parameters = first * p.w.group_count;
  forward(p.w.codes, first / 64 * p.w.column_blocks * bits * 512);
  forward(p.w.scales, parameters * size_of(p.w.scale_dtype));
  forward(p.w.zeros, parameters);
  forward(p.w.outliers.offsets, first * 4);
  forward(p.bias, first * size_of_value(launch.dtype));
  p.y = static_cast<unsigned char*>(p.y) + first * size_of_value(launch.dtype);
  p.y_stride = std::max(p.y_stride, launch.arguments.w.n);
  p.w.n = std::min(rows, p.w.n - first);
  p.w.row_blocks = static_cast<int>(ceil_div(p.w.n, 64));
  return part;
}

void multiply_decoded(const ProductLaunch& part, const DecodedPlan& plan, bool first_part, void* workspace) {
  const ProductArguments& p = part.arguments;
  auto* const bytes = static_cast<unsigned char*>(workspace);
  const int64_t columns = int64_t{64} * p.w.column_blocks;
  DenseProduct product{p.w.n,  p.w.k, p.m,        workspace, columns, p.x, std::max(p.x_stride, p.w.k),
                       p.bias, p.y,   p.y_stride, part.dtype};
  if (alignment_of(p.bias, 16) < 16) {
    // What cuBLASLt asks of this address is not documented.
    check_cuda(cudaMemcpyAsync(bytes + plan.bias, p.bias, p.w.n * size_of_value(part.dtype),
                               cudaMemcpyDeviceToDevice, part.stream),
               "matmul_cuda: copy of the bias");
    product.bias = bytes + plan.bias;
  }
  if (p.w.source == nullptr) return multiply_dense(product, bytes + plan.library, part.stream);

  product.k = columns;
  product.x = bytes + plan.gathered;
  product.x_stride = columns;
  for (int first = 0; first < p.m; first += kGatheredTokens) {
    const int tokens = std::min(p.m - first, kGatheredTokens);
    // Gathered once if all tokens fit.
    if (first_part || p.m > kGatheredTokens) {
      if (part.dtype == DType::f32) {
        launch_gather<float>(part, bytes + plan.gathered, first, tokens);
      } else if (part.dtype == DType::f16) {
        launch_gather<__half>(part, bytes + plan.gathered, first, tokens);
      } else {
        launch_gather<__nv_bfloat16>(part, bytes + plan.gathered, first, tokens);
      }
    }
    product.m = tokens;
    product.y = static_cast<unsigned char*>(p.y) + int64_t{first} * p.y_stride * size_of_value(part.dtype);
    multiply_dense(product, bytes + plan.library, part.stream);
  }
}

}  // namespace quantloom::cuda
