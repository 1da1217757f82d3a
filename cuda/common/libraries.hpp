// cuBLAS, cuBLASLt and cuSOLVER, opened at run time on first use: neither the library nor a program that
// links it needs them to be installed, and a process that has loaded a copy (PyTorch does) shares that one.
//
// The few functions, types and constants that are used are declared here in the form of their binary
// interface, which is the same in CUDA 12 and 13, so that no header of theirs is needed to build. Where those
// headers are found, tests/gpu/libraries_test.cpp compares every constant and signature with them.
// Matrices are column-major, as these libraries have them.
#pragma once

#include <cuda_runtime_api.h>
#include <library_types.h>

#include <cstddef>
#include <cstdint>
#include <string_view>

namespace quantloom::cuda {

// cublasStatus_t and cusolverStatus_t.
inline constexpr int kLibrarySuccess = 0;

// cublasOperation_t, cublasFillMode_t, cublasSideMode_t, cublasDiagType_t, cublasMath_t.
inline constexpr int kOpN = 0;
inline constexpr int kOpT = 1;
inline constexpr int kFillLower = 0;
inline constexpr int kFillUpper = 1;
inline constexpr int kSideLeft = 0;
inline constexpr int kSideRight = 1;
inline constexpr int kDiagNonUnit = 0;
inline constexpr int kDefaultMath = 0;
inline constexpr int kPedanticMath = 2;
// cublasComputeType_t, cublasGemmAlgo_t.
inline constexpr int kCompute32F = 68;
inline constexpr int kCompute64F = 70;
inline constexpr int kGemmDefault = -1;

// cublasLtMatmulDescAttributes_t (value type), cublasLtMatrixLayoutAttribute_t, cublasLtOrder_t,
// cublasLtMatmulPreferenceAttributes_t, cublasLtEpilogue_t.
inline constexpr int kMatmulTransA = 3;       // int32_t
inline constexpr int kMatmulTransB = 4;       // int32_t
inline constexpr int kMatmulEpilogue = 7;     // uint32_t
inline constexpr int kMatmulBiasPointer = 8;  // const void*
inline constexpr int kLayoutOrder = 1;        // int32_t
inline constexpr int kOrderColumn = 0;
inline constexpr int kOrderRow = 1;
inline constexpr int kPreferenceMaxWorkspaceBytes = 1;  // uint64_t
inline constexpr int kPreferenceReductionSchemes = 3;   // uint32_t, a mask of kReduction...
inline constexpr uint32_t kReductionInComputeType = 2;  // or none
inline constexpr int kPreferenceMinAlignmentA = 5;      // uint32_t, bytes
inline constexpr int kPreferenceMinAlignmentB = 6;
inline constexpr int kPreferenceMinAlignmentC = 7;
inline constexpr int kPreferenceMinAlignmentD = 8;
inline constexpr uint32_t kEpilogueDefault = 1;
inline constexpr uint32_t kEpilogueBias = 4;

using CublasHandle = struct cublasContext*;
using CublasLtHandle = struct cublasLtContext*;
using CusolverHandle = struct cusolverDnContext*;
using CusolverParams = struct cusolverDnParams*;
// Opaque objects that the Lt functions create and destroy.
using MatmulDesc = struct cublasLtMatmulDescOpaque_t*;
using MatrixLayout = struct cublasLtMatrixLayoutOpaque_t*;
using MatmulPreference = struct cublasLtMatmulPreferenceOpaque_t*;

struct MatmulAlgorithm {
  uint64_t data[8];
};

struct MatmulHeuristic {
  MatmulAlgorithm algorithm;
  size_t workspace_size;
  int state;  // the other members are valid only if this is kLibrarySuccess
  float waves_count;
  int reserved[4];
};

struct Cublas {
  int (*create)(CublasHandle* handle);
  int (*destroy)(CublasHandle handle);
  int (*set_stream)(CublasHandle handle, cudaStream_t stream);
  int (*set_workspace)(CublasHandle handle, void* workspace, size_t bytes);
  int (*set_math_mode)(CublasHandle handle, int mode);
  int (*gemm_ex)(CublasHandle handle, int trans_a, int trans_b, int m, int n, int k, const void* alpha,
                 const void* a, cudaDataType_t a_type, int lda, const void* b, cudaDataType_t b_type, int ldb,
                 const void* beta, void* c, cudaDataType_t c_type, int ldc, int compute_type, int algorithm);
  int (*sgemm)(CublasHandle handle, int trans_a, int trans_b, int m, int n, int k, const float* alpha,
               const float* a, int lda, const float* b, int ldb, const float* beta, float* c, int ldc);
  int (*dgemm)(CublasHandle handle, int trans_a, int trans_b, int m, int n, int k, const double* alpha,
               const double* a, int lda, const double* b, int ldb, const double* beta, double* c, int ldc);
  int (*ssyrk)(CublasHandle handle, int fill, int trans, int n, int k, const float* alpha, const float* a,
               int lda, const float* beta, float* c, int ldc);
  int (*dsyrk)(CublasHandle handle, int fill, int trans, int n, int k, const double* alpha, const double* a,
               int lda, const double* beta, double* c, int ldc);
  int (*dtrsm)(CublasHandle handle, int side, int fill, int trans, int diagonal, int m, int n,
               const double* alpha, const double* a, int lda, double* b, int ldb);
};

struct CublasLt {
  int (*create)(CublasLtHandle* handle);
  int (*destroy)(CublasLtHandle handle);
  int (*matmul_desc_create)(MatmulDesc* desc, int compute_type, cudaDataType_t scale_type);
  int (*matmul_desc_destroy)(MatmulDesc desc);
  int (*matmul_desc_set)(MatmulDesc desc, int attribute, const void* value, size_t bytes);
  int (*layout_create)(MatrixLayout* layout, cudaDataType_t type, uint64_t rows, uint64_t cols, int64_t ld);
  int (*layout_destroy)(MatrixLayout layout);
  int (*layout_set)(MatrixLayout layout, int attribute, const void* value, size_t bytes);
  int (*preference_create)(MatmulPreference* preference);
  int (*preference_destroy)(MatmulPreference preference);
  int (*preference_set)(MatmulPreference preference, int attribute, const void* value, size_t bytes);
  int (*heuristic)(CublasLtHandle handle, MatmulDesc desc, MatrixLayout a, MatrixLayout b, MatrixLayout c,
                   MatrixLayout d, MatmulPreference preference, int wanted, MatmulHeuristic* results,
                   int* found);
  int (*matmul)(CublasLtHandle handle, MatmulDesc desc, const void* alpha, const void* a,
                MatrixLayout a_layout, const void* b, MatrixLayout b_layout, const void* beta, const void* c,
                MatrixLayout c_layout, void* d, MatrixLayout d_layout, const MatmulAlgorithm* algorithm,
                void* workspace, size_t workspace_bytes, cudaStream_t stream);
};

struct Cusolver {
  int (*create)(CusolverHandle* handle);
  int (*destroy)(CusolverHandle handle);
  int (*set_stream)(CusolverHandle handle, cudaStream_t stream);
  int (*create_params)(CusolverParams* params);
  int (*destroy_params)(CusolverParams params);
  int (*xpotrf_buffer_size)(CusolverHandle handle, CusolverParams params, int fill, int64_t n,
                            cudaDataType_t a_type, const void* a, int64_t lda, cudaDataType_t compute_type,
                            size_t* device_bytes, size_t* host_bytes);
  int (*xpotrf)(CusolverHandle handle, CusolverParams params, int fill, int64_t n, cudaDataType_t a_type,
                void* a, int64_t lda, cudaDataType_t compute_type, void* device_buffer, size_t device_bytes,
                void* host_buffer, size_t host_bytes, int* info);
};

// Each opens its library on the first call, from any thread, in this order: a copy that the process has
// loaded, the loader's search path, /usr/local/cuda/lib64, the folders of set_cuda_library_folders(). Throws
// Unsupported naming the library and the places if none holds it; a later call tries again.
const Cublas& cublas();
const CublasLt& cublas_lt();
const Cusolver& cusolver();

// Throw Error "<what>: <library> status <number> (<meaning>)" unless `status` is kLibrarySuccess.
void check_cublas(int status, std::string_view what);
void check_cusolver(int status, std::string_view what);

}  // namespace quantloom::cuda
