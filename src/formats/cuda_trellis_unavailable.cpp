// Stands in for trellis coding on CUDA devices in a CPU-only build.
#include "quantloom/error.hpp"
#include "quantloom/formats/trellis_cuda.hpp"

namespace quantloom {
namespace {

[[noreturn]] void refuse(std::string_view function) {
  throw Unsupported(std::string(function) +
                    ": this build of quantloom holds no CUDA kernels; build it where nvcc is found");
}

}  // namespace

struct CudaTrellisCodebook::State {};

CudaTrellisCodebook::CudaTrellisCodebook(const TrellisCodebook& /*codebook*/, void* /*stream*/) {
  refuse("CudaTrellisCodebook");
}
const uint16_t* CudaTrellisCodebook::weights() const {
  refuse("CudaTrellisCodebook");
}
int CudaTrellisCodebook::weights_per_step() const {
  refuse("CudaTrellisCodebook");
}
int CudaTrellisCodebook::device() const {
  refuse("CudaTrellisCodebook");
}

TrellisWorkspace trellis_workspace_cuda(const TrellisShape& /*shape*/, TrellisSearch /*search*/,
                                        int64_t /*count*/) {
  refuse("trellis_workspace_cuda");
}

void encode_rings_cuda(const CudaTrellisCodebook& /*codebook*/, const CudaRings& /*rings*/,
                       TrellisSearch /*search*/, void* /*workspace*/, int64_t /*workspace_bytes*/,
                       void* /*stream*/) {
  refuse("encode_rings_cuda");
}

void decode_rings_cuda(const CudaTrellisCodebook& /*codebook*/, const uint32_t* /*words*/, int64_t /*count*/,
                       const TrellisShape& /*shape*/, void* /*weights*/, DType /*dtype*/, void* /*stream*/) {
  refuse("decode_rings_cuda");
}

void gather_tiles_cuda(const CudaMatrix& /*matrix*/, float /*factor*/, float* /*targets*/, void* /*stream*/) {
  refuse("gather_tiles_cuda");
}

void decode_tiles_cuda(const CudaTrellisCodebook& /*codebook*/, const uint32_t* /*words*/,
                       const TrellisShape& /*shape*/, const CudaMatrix& /*matrix*/, void* /*stream*/) {
  refuse("decode_tiles_cuda");
}

}  // namespace quantloom
