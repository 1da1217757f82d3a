#include "common/math_handles.hpp"

#include <map>
#include <mutex>
#include <vector>

namespace quantloom::cuda {
namespace {

// Enough for the largest kernels of cuBLAS on sm_90.
constexpr int64_t kWorkspaceBytes = int64_t{32} << 20;

template <class Handle>
class Pool {
 public:
  // Null if none is free.
  Handle take(int device) {
    const std::scoped_lock lock(mutex_);
    std::vector<Handle>& free = free_[device];
    if (free.empty()) return nullptr;
    const Handle handle = free.back();
    free.pop_back();
    return handle;
  }
  void give_back(int device, Handle handle) noexcept {
    const std::scoped_lock lock(mutex_);
    try {
      free_[device].push_back(handle);
    } catch (const std::bad_alloc&) {
      // The handle is lost; the next scope makes another.
    }
  }

 private:
  std::mutex mutex_;
  std::map<int, std::vector<Handle>> free_;
};

// Never destroyed: at the end of the process the CUDA driver may be gone before static objects are.
template <class Handle>
Pool<Handle>& pool() {
  static auto* const handles = new Pool<Handle>;
  return *handles;
}

int current_device() {
  int device = 0;
  check_cuda(cudaGetDevice(&device), "current CUDA device");
  return device;
}

}  // namespace

BlasScope::BlasScope(cudaStream_t stream) : device_(current_device()), workspace_(kWorkspaceBytes, stream) {
  const Cublas& api = cublas();
  handle_ = pool<CublasHandle>().take(device_);
  if (handle_ == nullptr) check_cublas(api.create(&handle_), "cublasCreate");
  int status = api.set_stream(handle_, stream);
  // After the stream: setting that resets the workspace.
  if (status == kLibrarySuccess) {
    status = api.set_workspace(handle_, workspace_.data(), static_cast<size_t>(kWorkspaceBytes));
  }
  if (status == kLibrarySuccess) status = api.set_math_mode(handle_, kDefaultMath);
  if (status != kLibrarySuccess) {
    static_cast<void>(api.destroy(handle_));
    check_cublas(status, "settings of cuBLAS");
  }
}

BlasScope::~BlasScope() {
  pool<CublasHandle>().give_back(device_, handle_);
}

SolverScope::SolverScope(cudaStream_t stream) : device_(current_device()) {
  const Cusolver& api = cusolver();
  handle_ = pool<CusolverHandle>().take(device_);
  if (handle_ == nullptr) check_cusolver(api.create(&handle_), "cusolverDnCreate");
  const int status = api.set_stream(handle_, stream);
  if (status != kLibrarySuccess) {
    static_cast<void>(api.destroy(handle_));
    check_cusolver(status, "stream of cuSOLVER");
  }
}

SolverScope::~SolverScope() {
  pool<CusolverHandle>().give_back(device_, handle_);
}

}  // namespace quantloom::cuda
