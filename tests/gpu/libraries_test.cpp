// The declarations of cuda/common/libraries.hpp against the headers of the CUDA toolkit, where those are
// installed, and the opening of the libraries.
#include "common/libraries.hpp"

#include <gtest/gtest.h>

#include <thread>
#include <type_traits>
#include <vector>

#include "device_memory.hpp"

#if __has_include(<cublas_v2.h>) && __has_include(<cublasLt.h>) && __has_include(<cusolverDn.h>)
#include <cublasLt.h>
#include <cublas_v2.h>
#include <cusolverDn.h>
#define QUANTLOOM_HAS_LIBRARY_HEADERS
#endif

namespace quantloom::cuda {
namespace {

#ifdef QUANTLOOM_HAS_LIBRARY_HEADERS
template <class Ours, class Theirs>
constexpr bool kSameInRegisters = std::is_same_v<Ours, Theirs> ||
                                  (std::is_pointer_v<Ours> && std::is_pointer_v<Theirs>) ||
                                  (std::is_same_v<Ours, int> && std::is_enum_v<Theirs> &&
                                   sizeof(Theirs) == 4);

template <class R1, class... P1, class R2, class... P2>
constexpr bool compatible(R1 (*)(P1...), R2 (*)(P2...)) {
  if constexpr (sizeof...(P1) != sizeof...(P2)) {
    return false;
  } else {
    return kSameInRegisters<R1, R2> && (kSameInRegisters<P1, P2> && ...);
  }
}

// `table` has members of the types declared by ours; `function` is the toolkit's.
#define EXPECT_COMPATIBLE(table, member, function) \
  static_assert(compatible(decltype(table::member){}, decltype(&function){}), #function)

EXPECT_COMPATIBLE(Cublas, create, cublasCreate_v2);
EXPECT_COMPATIBLE(Cublas, destroy, cublasDestroy_v2);
EXPECT_COMPATIBLE(Cublas, set_stream, cublasSetStream_v2);
EXPECT_COMPATIBLE(Cublas, set_workspace, cublasSetWorkspace_v2);
EXPECT_COMPATIBLE(Cublas, set_math_mode, cublasSetMathMode);
static_assert(compatible(decltype(Cublas::gemm_ex){},
                         static_cast<cublasStatus_t (*)(
                             cublasHandle_t, cublasOperation_t, cublasOperation_t, int, int, int, const void*,
                             const void*, cudaDataType, int, const void*, cudaDataType, int, const void*,
                             void*, cudaDataType, int, cublasComputeType_t, cublasGemmAlgo_t)>(nullptr)));
EXPECT_COMPATIBLE(Cublas, sgemm, cublasSgemm_v2);
EXPECT_COMPATIBLE(Cublas, dgemm, cublasDgemm_v2);
EXPECT_COMPATIBLE(Cublas, ssyrk, cublasSsyrk_v2);
EXPECT_COMPATIBLE(Cublas, dsyrk, cublasDsyrk_v2);
EXPECT_COMPATIBLE(Cublas, dtrsm, cublasDtrsm_v2);
EXPECT_COMPATIBLE(CublasLt, create, cublasLtCreate);
EXPECT_COMPATIBLE(CublasLt, destroy, cublasLtDestroy);
EXPECT_COMPATIBLE(CublasLt, matmul_desc_create, cublasLtMatmulDescCreate);
EXPECT_COMPATIBLE(CublasLt, matmul_desc_destroy, cublasLtMatmulDescDestroy);
EXPECT_COMPATIBLE(CublasLt, matmul_desc_set, cublasLtMatmulDescSetAttribute);
EXPECT_COMPATIBLE(CublasLt, layout_create, cublasLtMatrixLayoutCreate);
EXPECT_COMPATIBLE(CublasLt, layout_destroy, cublasLtMatrixLayoutDestroy);
EXPECT_COMPATIBLE(CublasLt, layout_set, cublasLtMatrixLayoutSetAttribute);
EXPECT_COMPATIBLE(CublasLt, preference_create, cublasLtMatmulPreferenceCreate);
EXPECT_COMPATIBLE(CublasLt, preference_destroy, cublasLtMatmulPreferenceDestroy);
EXPECT_COMPATIBLE(CublasLt, preference_set, cublasLtMatmulPreferenceSetAttribute);
EXPECT_COMPATIBLE(CublasLt, heuristic, cublasLtMatmulAlgoGetHeuristic);
EXPECT_COMPATIBLE(CublasLt, matmul, cublasLtMatmul);
EXPECT_COMPATIBLE(Cusolver, create, cusolverDnCreate);
EXPECT_COMPATIBLE(Cusolver, destroy, cusolverDnDestroy);
EXPECT_COMPATIBLE(Cusolver, set_stream, cusolverDnSetStream);
EXPECT_COMPATIBLE(Cusolver, create_params, cusolverDnCreateParams);
EXPECT_COMPATIBLE(Cusolver, destroy_params, cusolverDnDestroyParams);
EXPECT_COMPATIBLE(Cusolver, xpotrf_buffer_size, cusolverDnXpotrf_bufferSize);
EXPECT_COMPATIBLE(Cusolver, xpotrf, cusolverDnXpotrf);
#undef EXPECT_COMPATIBLE

static_assert(kLibrarySuccess == CUBLAS_STATUS_SUCCESS && kLibrarySuccess == CUSOLVER_STATUS_SUCCESS);
static_assert(kOpN == CUBLAS_OP_N && kOpT == CUBLAS_OP_T);
static_assert(kFillLower == CUBLAS_FILL_MODE_LOWER && kFillUpper == CUBLAS_FILL_MODE_UPPER);
static_assert(kSideLeft == CUBLAS_SIDE_LEFT && kSideRight == CUBLAS_SIDE_RIGHT);
static_assert(kDiagNonUnit == CUBLAS_DIAG_NON_UNIT);
static_assert(kDefaultMath == CUBLAS_DEFAULT_MATH && kPedanticMath == CUBLAS_PEDANTIC_MATH);
static_assert(kCompute32F == CUBLAS_COMPUTE_32F && kCompute64F == CUBLAS_COMPUTE_64F);
static_assert(kGemmDefault == CUBLAS_GEMM_DEFAULT);
static_assert(kMatmulTransA == CUBLASLT_MATMUL_DESC_TRANSA && kMatmulTransB == CUBLASLT_MATMUL_DESC_TRANSB);
static_assert(kMatmulEpilogue == CUBLASLT_MATMUL_DESC_EPILOGUE);
static_assert(kMatmulBiasPointer == CUBLASLT_MATMUL_DESC_BIAS_POINTER);
static_assert(kLayoutOrder == CUBLASLT_MATRIX_LAYOUT_ORDER);
static_assert(kOrderColumn == CUBLASLT_ORDER_COL && kOrderRow == CUBLASLT_ORDER_ROW);
static_assert(kPreferenceMaxWorkspaceBytes == CUBLASLT_MATMUL_PREF_MAX_WORKSPACE_BYTES);
static_assert(kPreferenceMinAlignmentA == CUBLASLT_MATMUL_PREF_MIN_ALIGNMENT_A_BYTES &&
              kPreferenceMinAlignmentB == CUBLASLT_MATMUL_PREF_MIN_ALIGNMENT_B_BYTES &&
              kPreferenceMinAlignmentC == CUBLASLT_MATMUL_PREF_MIN_ALIGNMENT_C_BYTES &&
              kPreferenceMinAlignmentD == CUBLASLT_MATMUL_PREF_MIN_ALIGNMENT_D_BYTES);
static_assert(kEpilogueDefault == CUBLASLT_EPILOGUE_DEFAULT && kEpilogueBias == CUBLASLT_EPILOGUE_BIAS);
static_assert(sizeof(MatmulAlgorithm) == sizeof(cublasLtMatmulAlgo_t));
static_assert(sizeof(MatmulHeuristic) == sizeof(cublasLtMatmulHeuristicResult_t));
static_assert(offsetof(MatmulHeuristic, workspace_size) ==
              offsetof(cublasLtMatmulHeuristicResult_t, workspaceSize));
static_assert(offsetof(MatmulHeuristic, state) == offsetof(cublasLtMatmulHeuristicResult_t, state));
static_assert(offsetof(MatmulHeuristic, waves_count) ==
              offsetof(cublasLtMatmulHeuristicResult_t, wavesCount));
#endif

TEST(CudaLibraries, NamesTheLibraryAndTheMeaningOfAStatus) {
  EXPECT_NO_THROW(check_cublas(0, "gemm"));
  try {
    check_cublas(15, "gemm");
    FAIL() << "no error";
  } catch (const Error& error) {
    EXPECT_STREQ(error.what(), "gemm: cuBLAS status 15 (not supported)");
  }
  try {
    check_cusolver(7, "factor");
    FAIL() << "no error";
  } catch (const Error& error) {
    EXPECT_STREQ(error.what(), "factor: cuSOLVER status 7 (internal error)");
  }
}

// Works without a GPU too: either the library opens, or the error names it.
TEST(CudaLibraries, OpenOnFirstUseFromManyThreadsOrSayWhatIsMissing) {
  std::vector<std::string> outcomes(8);
  std::vector<std::thread> threads;
  for (std::string& outcome : outcomes) {
    threads.emplace_back([&outcome] {
      try {
        outcome = cublas().gemm_ex != nullptr && cublas_lt().matmul != nullptr && cusolver().xpotrf != nullptr
                      ? "open"
                      : "null";
      } catch (const Unsupported& error) {
        outcome = error.what();
      }
    });
  }
  for (std::thread& thread : threads) thread.join();
  for (const std::string& outcome : outcomes) {
    EXPECT_EQ(outcome, outcomes[0]);
    EXPECT_TRUE(outcome == "open" || outcome.find("found no libcu") != std::string::npos) << outcome;
  }
}

TEST(CudaLibraries, CreateAndDestroyHandles) {
  if (!has_cuda_device()) GTEST_SKIP() << "no CUDA device in this machine";
  CublasHandle blas = nullptr;
  check_cublas(cublas().create(&blas), "create");
  check_cublas(cublas().destroy(blas), "destroy");
  CublasLtHandle lt = nullptr;
  check_cublas(cublas_lt().create(&lt), "create");
  check_cublas(cublas_lt().destroy(lt), "destroy");
  CusolverHandle solver = nullptr;
  check_cusolver(cusolver().create(&solver), "create");
  check_cusolver(cusolver().destroy(solver), "destroy");
}

}  // namespace
}  // namespace quantloom::cuda
