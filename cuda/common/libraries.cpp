#include "common/libraries.hpp"

#include <dlfcn.h>

#include <filesystem>
#include <initializer_list>
#include <memory>
#include <mutex>
#include <span>
#include <string>
#include <utility>
#include <vector>

#include "quantloom/error.hpp"
#include "quantloom/kernels/cuda_check.hpp"
#include "quantloom/kernels/cuda_libraries.hpp"

namespace quantloom::cuda {
namespace {

std::mutex library_mutex;  // guards the folders, and the opening of libraries

std::vector<std::string>& extra_folders() {
  static std::vector<std::string> folders;
  return folders;
}

// A shared library, never closed: kernels of it may run until the process ends.
class Library {
 public:
  // `names` in order of preference.
  Library(std::string_view title, std::initializer_list<const char*> names) : title_(title) {
    for (const char* name : names) {
      if (open(name, RTLD_NOLOAD)) return;
    }
    std::vector<std::string> prefixes = {"", "/usr/local/cuda/lib64/"};
    for (const std::string& folder : extra_folders()) prefixes.push_back(folder + "/");
    std::string tried;
    std::string reason;
    for (const std::string& prefix : prefixes) {
      for (const char* name : names) {
        if (open((prefix + name).c_str(), 0)) return;
        const char* text = dlerror();
        if (text != nullptr && reason.empty()) reason = text;
      }
      tried += (tried.empty() ? "" : ", ") + (prefix.empty() ? "the loader's search path" : prefix);
    }
    std::string wanted;
    for (const char* name : names) wanted += (wanted.empty() ? "" : " or ") + std::string(name);
    throw Unsupported(std::string(title_) + ": found no " + wanted + " in " + tried + "; install CUDA's " +
                      std::string(title_) + " or add its folder to LD_LIBRARY_PATH (" + reason + ")");
  }

  template <class Function>
  void find(Function*& function, const char* name) const {
    function = reinterpret_cast<Function*>(dlsym(handle_, name));
    if (function == nullptr) {
      throw Unsupported(std::string(title_) + ": " + path_ + " has no function " + name +
                        ", expected a library of CUDA 12 or 13");
    }
  }

 private:
  bool open(const char* path, int flags) {
    handle_ = dlopen(path, RTLD_NOW | RTLD_LOCAL | flags);
    path_ = path;
    return handle_ != nullptr;
  }

  std::string_view title_;
  std::string path_;
  void* handle_ = nullptr;
};

std::unique_ptr<const Cublas> open_cublas() {
  const Library library("cuBLAS", {"libcublas.so.13", "libcublas.so.12"});
  auto api = std::make_unique<Cublas>();
  library.find(api->create, "cublasCreate_v2");
  library.find(api->destroy, "cublasDestroy_v2");
  library.find(api->set_stream, "cublasSetStream_v2");
  library.find(api->set_workspace, "cublasSetWorkspace_v2");
  library.find(api->set_math_mode, "cublasSetMathMode");
  library.find(api->gemm_ex, "cublasGemmEx");
  library.find(api->sgemm, "cublasSgemm_v2");
  library.find(api->dgemm, "cublasDgemm_v2");
  library.find(api->ssyrk, "cublasSsyrk_v2");
  library.find(api->dsyrk, "cublasDsyrk_v2");
  library.find(api->dtrsm, "cublasDtrsm_v2");
  return api;
}

std::unique_ptr<const CublasLt> open_cublas_lt() {
  const Library library("cuBLASLt", {"libcublasLt.so.13", "libcublasLt.so.12"});
  auto api = std::make_unique<CublasLt>();
  library.find(api->create, "cublasLtCreate");
  library.find(api->destroy, "cublasLtDestroy");
  library.find(api->matmul_desc_create, "cublasLtMatmulDescCreate");
  library.find(api->matmul_desc_destroy, "cublasLtMatmulDescDestroy");
  library.find(api->matmul_desc_set, "cublasLtMatmulDescSetAttribute");
  library.find(api->layout_create, "cublasLtMatrixLayoutCreate");
  library.find(api->layout_destroy, "cublasLtMatrixLayoutDestroy");
  library.find(api->layout_set, "cublasLtMatrixLayoutSetAttribute");
  library.find(api->preference_create, "cublasLtMatmulPreferenceCreate");
  library.find(api->preference_destroy, "cublasLtMatmulPreferenceDestroy");
  library.find(api->preference_set, "cublasLtMatmulPreferenceSetAttribute");
  library.find(api->heuristic, "cublasLtMatmulAlgoGetHeuristic");
  library.find(api->matmul, "cublasLtMatmul");
  return api;
}

std::unique_ptr<const Cusolver> open_cusolver() {
  // cuSOLVER counts its own versions: 12 came with CUDA 13, 11 with CUDA 12.
  const Library library("cuSOLVER", {"libcusolver.so.12", "libcusolver.so.11"});
  auto api = std::make_unique<Cusolver>();
  library.find(api->create, "cusolverDnCreate");
  library.find(api->destroy, "cusolverDnDestroy");
  library.find(api->set_stream, "cusolverDnSetStream");
  library.find(api->create_params, "cusolverDnCreateParams");
  library.find(api->destroy_params, "cusolverDnDestroyParams");
  library.find(api->xpotrf_buffer_size, "cusolverDnXpotrf_bufferSize");
  library.find(api->xpotrf, "cusolverDnXpotrf");
  return api;
}

// The table of a library, opened once; an exception leaves it unopened.
template <class Api>
const Api& opened(std::unique_ptr<const Api> (*open)()) {
  static std::unique_ptr<const Api> api;
  const std::scoped_lock lock(library_mutex);
  if (api == nullptr) api = open();
  return *api;
}

// The numbers of cublasStatus_t and of cusolverStatus_t differ.
constexpr std::pair<int, std::string_view> kCublasMeanings[] = {
    {1, "not initialized"},       {3, "out of memory"},         {7, "invalid value"},
    {8, "architecture mismatch"}, {11, "memory mapping error"}, {13, "execution failed"},
    {14, "internal error"},       {15, "not supported"}};
constexpr std::pair<int, std::string_view> kCusolverMeanings[] = {
    {1, "not initialized"},      {2, "out of memory"},    {3, "invalid value"},  {4, "architecture mismatch"},
    {5, "memory mapping error"}, {6, "execution failed"}, {7, "internal error"}, {9, "not supported"}};

void check(int status, std::string_view library, std::span<const std::pair<int, std::string_view>> meanings,
           std::string_view what) {
  if (status == kLibrarySuccess) return;
  std::string_view text = "unknown";
  for (const auto& [number, meaning] : meanings) {
    if (number == status) text = meaning;
  }
  throw Error(text_of(what, ": ", library, " status ", status, " (", text, ")"));
}

}  // namespace

const Cublas& cublas() {
  return opened(&open_cublas);
}

const CublasLt& cublas_lt() {
  return opened(&open_cublas_lt);
}

const Cusolver& cusolver() {
  return opened(&open_cusolver);
}

void check_cublas(int status, std::string_view what) {
  check(status, "cuBLAS", kCublasMeanings, what);
}

void check_cusolver(int status, std::string_view what) {
  check(status, "cuSOLVER", kCusolverMeanings, what);
}

}  // namespace quantloom::cuda

namespace quantloom {
namespace {

// The file that holds `function`, links resolved: its name tells the version.
template <class Function>
std::string file_of(Function* function) {
  Dl_info info{};
  if (dladdr(reinterpret_cast<const void*>(function), &info) == 0 || info.dli_fname == nullptr) return "";
  std::error_code error;
  const std::filesystem::path path = std::filesystem::canonical(info.dli_fname, error);
  return error ? info.dli_fname : path.string();
}

template <class Open>
CudaLibraryFacts examine(const char* name, const Open& open) {
  try {
    return {name, file_of(open().create), ""};
  } catch (const Error& error) {
    return {name, "", error.what()};
  }
}

}  // namespace

std::vector<CudaLibraryFacts> examine_cuda_libraries() {
  return {examine("cuBLAS", cuda::cublas), examine("cuBLASLt", cuda::cublas_lt),
          examine("cuSOLVER", cuda::cusolver)};
}

void set_cuda_library_folders(std::vector<std::string> folders) {
  const std::scoped_lock lock(cuda::library_mutex);
  cuda::extra_folders() = std::move(folders);
}

}  // namespace quantloom
