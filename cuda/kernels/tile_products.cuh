// The products of matrices in fragment order, by the names they have in the kernel table. Templates over a
// decoder are compiled in translation units of their own, one for each decoder.
#pragma once

#include "kernels/product_arguments.cuh"

namespace quantloom::cuda {

// "tiles": weights and activations pass through shared memory; tensor cores (mma.sync), sm_80 and later.
// float16 and bfloat16, any m. Weights are scaled in the activations' type: a weight is rounded once where
// its scale is of that type, else twice. `workspace`: 256-byte aligned, of tiles_workspace() bytes.
// launch.splits: parts that each tile's columns are cut into, 0 to fill the device evenly.
int64_t tiles_workspace(const FragmentMatrix& w, int m, int splits);
template <class Decoder>
void launch_tiles(const ProductLaunch& launch, void* workspace);

// "tiles_wgmma": the same on warpgroup products (wgmma), where runs_wgmma(). Same arguments and workspace.
// True if the current device is of compute capability 9.0 and this build has code for its own instructions.
bool runs_wgmma();
template <class Decoder>
void launch_tiles_wgmma(const ProductLaunch& launch, void* workspace);

// "decode": the matrix is decoded to launch.dtype (float16, bfloat16, float32) in the workspace, and
// multiplied by cuBLASLt with float32 sums; at most 256 MiB of it at a time. `workspace`: 256-byte aligned,
// of decoded_workspace() bytes. launch.splits: parts that the rows are decoded in, at least; 0 for as few as
// there may be.
int64_t decoded_workspace(const FragmentMatrix& w, int m, DType dtype);
template <class Decoder>
void launch_decoded(const ProductLaunch& launch, void* workspace);

// How launch_decoded() goes about it, and where things lie in its workspace: decoded rows, a copy of their
// bias, gathered activations, what cuBLASLt asks for.
struct DecodedPlan {
  int64_t rows = 0;  // decoded at a time, a multiple of 64
  int64_t bias = 0;
  int64_t gathered = 0;
  int64_t library = 0;
  int64_t bytes = 0;
};
// Throws Unsupported if cuBLASLt cannot be opened.
DecodedPlan decoded_plan(const FragmentMatrix& w, int m, DType dtype, int splits);
// The product of rows [first, first + plan.rows) alone.
ProductLaunch part_of_rows(const ProductLaunch& launch, int64_t first, int64_t rows, int bits);
// `part`: those of its rows lie decoded at the beginning of the workspace. `first_part`: activations are not
// gathered yet.
void multiply_decoded(const ProductLaunch& part, const DecodedPlan& plan, bool first_part, void* workspace);

// Row-major values [n, stride] of `dtype`, stride >= 64 * w.column_blocks and a multiple of 8, in fragment
// order's columns: those of padding are undefined. Each value is rounded once to float32, then to `dtype`.
template <class Decoder>
void launch_decode_fragments(const FragmentMatrix& w, void* out, int64_t stride, DType dtype, bool overlap,
                             cudaStream_t stream);

}  // namespace quantloom::cuda
