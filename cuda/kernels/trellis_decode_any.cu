// Rows of trellises that the decoders of whole bits do not take: bits in halves, tables, other windows.
#include "kernels/trellis_dense.cuh"

namespace quantloom::cuda {

void launch_trellis_decode_any(const TrellisDense& dense, cudaStream_t stream) {
  launch_exact_rows<RingStage>(dense, stream);
}

void launch_trellis_dense_any(const TrellisDense& dense, cudaStream_t stream) {
  launch_rounded_rows<StagedRows, RingStage>(dense, stream);
}

}  // namespace quantloom::cuda
