// Stands in for rounding on CUDA devices in a CPU-only build.
#include "quantloom/calibration/cuda_hessian.hpp"
#include "quantloom/rounding/channel_scales.hpp"
#include "quantloom/rounding/cuda.hpp"

namespace quantloom {
namespace {

[[noreturn]] void refuse(std::string_view function) {
  throw Unsupported(std::string(function) +
                    ": this build of quantloom holds no CUDA kernels; build it where nvcc is found");
}

}  // namespace

struct CudaHessian::State {};

CudaHessian::CudaHessian(int64_t /*k*/) {
  refuse("CudaHessian");
}
CudaHessian::CudaHessian(const Hessian& /*hessian*/) {
  refuse("CudaHessian");
}
CudaHessian::~CudaHessian() = default;
CudaHessian::CudaHessian(CudaHessian&& other) noexcept = default;
CudaHessian& CudaHessian::operator=(CudaHessian&& other) noexcept = default;

void CudaHessian::add(const CudaMatrix& /*x*/, void* /*stream*/) {
  refuse("CudaHessian");
}
int64_t CudaHessian::k() const {
  refuse("CudaHessian");
}
int64_t CudaHessian::tokens() const {
  refuse("CudaHessian");
}
int CudaHessian::device() const {
  refuse("CudaHessian");
}
std::vector<double> CudaHessian::diagonal(void* /*stream*/) const {
  refuse("CudaHessian");
}
Hessian CudaHessian::to_cpu(void* /*stream*/) const {
  refuse("CudaHessian");
}
const double* CudaHessian::sum(void* /*stream*/) const {
  refuse("CudaHessian");
}

RoundingReport round_nearest_cuda(const CudaMatrix& /*w*/, PackedTensor& /*packed*/,
                                  const CudaNearestOptions& /*options*/, void* /*stream*/) {
  refuse("round_nearest_cuda");
}

RoundingReport round_error_feedback_cuda(const CudaMatrix& /*w*/, PackedTensor& /*packed*/,
                                         const CudaHessian& /*hessian*/,
                                         const CudaErrorFeedbackOptions& /*options*/, void* /*stream*/) {
  refuse("round_error_feedback_cuda");
}

RoundingReport round_trellis_feedback_cuda(const CudaMatrix& /*w*/, PackedTensor& /*packed*/,
                                           const CudaHessian& /*hessian*/,
                                           const CudaErrorFeedbackOptions& /*options*/,
                                           const TrellisFeedbackOptions& /*trellis*/, void* /*stream*/) {
  refuse("round_trellis_feedback_cuda");
}

ChannelScales search_channel_scales_cuda(std::span<const CudaScaledLayer> /*layers*/,
                                         const CudaHessian& /*hessian*/,
                                         std::span<const double> /*magnitudes*/,
                                         const ChannelScaleOptions& /*options*/, void* /*stream*/) {
  refuse("search_channel_scales_cuda");
}

bool walk_needs_group_index(const Format& /*format*/, int64_t /*k*/, bool /*act_order*/,
                            bool /*static_groups*/) {
  return false;
}

PackedTensor empty_packed_cuda(std::shared_ptr<const Format> /*format*/, int64_t /*n*/, int64_t /*k*/,
                               bool /*with_group_index*/) {
  refuse("empty_packed_cuda");
}

}  // namespace quantloom
