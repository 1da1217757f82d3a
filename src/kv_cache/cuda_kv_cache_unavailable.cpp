// Stands in for caches in memory of CUDA devices in a CPU-only build.
#include "quantloom/error.hpp"
#include "quantloom/kv_cache/cuda_kv_cache.hpp"

namespace quantloom {

struct CudaKVCache::State {};

namespace {

[[noreturn]] void refuse() {
  throw Unsupported(
      "CudaKVCache: this build of quantloom holds no CUDA kernels; build it where nvcc is found");
}

}  // namespace

// No object exists whose members could be called.
CudaKVCache::CudaKVCache(KVFormat /*format*/, KVShape /*shape*/, int64_t /*capacity*/,
                         std::shared_ptr<const KVTables> /*tables*/, void* /*stream*/) {
  refuse();
}
CudaKVCache::CudaKVCache(std::unique_ptr<State> /*state*/) {
  refuse();
}
CudaKVCache::~CudaKVCache() = default;
CudaKVCache::CudaKVCache(CudaKVCache&&) noexcept = default;
CudaKVCache& CudaKVCache::operator=(CudaKVCache&&) noexcept = default;
CudaKVCache CudaKVCache::clone(void* /*stream*/) const {
  refuse();
}

const KVFormat& CudaKVCache::format() const {
  refuse();
}
const KVLayout& CudaKVCache::layout() const {
  refuse();
}
const KVShape& CudaKVCache::shape() const {
  refuse();
}
int64_t CudaKVCache::length(int64_t /*sequence*/) const {
  refuse();
}
int64_t CudaKVCache::coded(KVSide /*side*/, int64_t /*sequence*/) const {
  refuse();
}
void CudaKVCache::reserve(int64_t /*tokens*/, void* /*stream*/) {
  refuse();
}
void CudaKVCache::append(const KVTokens& /*keys*/, const KVTokens& /*values*/,
                         std::span<const int64_t> /*starts*/, const CudaKVAppend& /*options*/) {
  refuse();
}
void CudaKVCache::reorder(std::span<const int64_t> /*sources*/, void* /*stream*/) {
  refuse();
}
void CudaKVCache::clear(void* /*stream*/) {
  refuse();
}
void CudaKVCache::read(KVSide /*side*/, int64_t /*sequence*/, int64_t /*first*/, int64_t /*count*/,
                       void* /*out*/, DType /*dtype*/, void* /*stream*/) const {
  refuse();
}
void CudaKVCache::attend(const KVTokens& /*queries*/, float /*scale*/, void* /*out*/,
                         void* /*stream*/) const {
  refuse();
}
KVUsage CudaKVCache::usage() const {
  refuse();
}
std::vector<std::byte> CudaKVCache::record(int64_t /*sequence*/, int64_t /*page*/, int64_t /*head*/) const {
  refuse();
}

}  // namespace quantloom
