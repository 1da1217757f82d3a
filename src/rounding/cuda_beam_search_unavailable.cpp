// Stands in for beam search on CUDA devices in a CPU-only build.
#include "quantloom/rounding/cuda_beam_search.hpp"

namespace quantloom {
namespace {

[[noreturn]] void refuse(std::string_view function) {
  throw Unsupported(std::string(function) +
                    ": this build of quantloom holds no CUDA kernels; build it where nvcc is found");
}

}  // namespace

std::shared_ptr<const Additive> fit_additive_cuda(const Additive& /*format*/, const CudaMatrix& /*w*/,
                                                  const AdditiveFitOptions& /*options*/, void* /*stream*/) {
  refuse("fit_additive_cuda");
}
void search_codes_cuda(const CudaMatrix& /*w*/, PackedTensor& /*packed*/, const CudaHessian& /*hessian*/,
                       const CodeSearchOptions& /*options*/, std::span<const int64_t> /*row_groups*/,
                       void* /*stream*/) {
  refuse("search_codes_cuda");
}
void refit_tables_cuda(const CudaMatrix& /*w*/, PackedTensor& /*packed*/, const CudaHessian& /*hessian*/,
                       const RefitOptions& /*options*/, void* /*stream*/) {
  refuse("refit_tables_cuda");
}
CudaBeamSearched round_beam_search_cuda(const CudaMatrix& /*w*/, PackedTensor& /*packed*/,
                                        const CudaHessian& /*hessian*/, const BeamSearchOptions& /*options*/,
                                        const CudaHessian* /*held_out*/, void* /*stream*/) {
  refuse("round_beam_search_cuda");
}

}  // namespace quantloom
