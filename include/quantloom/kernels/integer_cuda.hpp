// Products of integers on a CUDA device: y = x W^T + bias for activations that are rounded to integers of at
// most 8 bits and weights of at most 8 bits, on integer tensor cores.
//
// What is taken. Weights: `uniform` of 2 to 8 bits, symmetric or not, per channel, per tensor or in groups of
// a multiple of 32 consecutive columns; `sdr`; those without groups also with outliers in the columns of the
// activations' static outliers (keep_columns in Python). Activations: one scale for each token or for all, 2
// to 8 bits, symmetric or not, or significant digits of integers of 8 bits; with static outliers. Devices of
// compute capability 9.0.
//
// The codes of both are multiplied exactly, in int32; sums are scaled in float32 and rounded once. With
// groups, the exact sums of each run of min(128, 64 or 32 that divide the group) columns are scaled and added
// to one float32 sum, in the order of columns, each by a fused multiplication and addition: an error of at
// most G 2^-24 times the sum of the runs' magnitudes, for G runs. The CPU's product adds the same runs in the
// same order, but scales each by token and group with two roundings. Outliers of activations are multiplied
// as float16 with W in float16. A token's result does not depend on the others, unless they share a dynamic
// scale.
#pragma once

#include <optional>
#include <string>
#include <vector>

#include "quantloom/activations/activation_format.hpp"
#include "quantloom/kernels/matmul_cuda.hpp"

namespace quantloom {

// A matrix of weights in "integer order": the planes of the packed tensor but its codes, as they are, and
//   integers         int8 [2 * tiles, blocks, 64, 128], tiles = ceil(n/128), blocks = ceil(k/128):
//                    code - center, for sdr code * 2^shift, in slabs of 64 rows, swizzled
//                    (src/activations/integer_order.hpp)
//                    Without outlier columns, uniform of up to 4 bits, and any in groups, instead:
//                    int8 [2 * tiles, blocks, bytes of a record], half a byte to a code of up to 4 bits, with
//                    the scales of groups (src/kernels/register_order.hpp)
//   rows             int32 [128 * tiles, 4]: the bits of the float32 scale, the sum of the integers, the zero
//                    point - center, 0; with groups 1 and the bits of the float32 sum of the row of W
//   outlier_index    int32 [ceil(k/32) + outlier columns], with those only: outlier_index()
//   outlier_weights  float16 [2 * tiles, outlier_blocks, 64, 64], likewise: W at those inputs, in the
//                    order of the integers
// with center = 2^(bits-1).
struct IntegerPlanes : PreparedPlanes {
  // Inputs whose activations stay as they are: the static outliers of the activations' format.
  std::vector<int32_t> outlier_columns = {};
};

// nullopt if integers of `format` can be multiplied; otherwise the reason why not. Looks at the description
// alone; where outliers of W lie is found when planes are prepared.
std::optional<std::string> why_not_integers(const Format& format);
// Their planes. Throws Unsupported if there is a reason why not.
std::vector<PlaneSpec> integer_planes(const Format& format, int64_t n, int64_t k, int64_t outlier_columns,
                                      bool with_group_index);
// Throws InvalidArgument, naming the plane, unless the planes are those of integer_planes(), and outlier
// columns rise from 0 to k - 1.
void validate_integers(const IntegerPlanes& prepared);

// The scalar reference, from planes on the CPU to planes on the CPU, and its inverse (bit for bit). Throws
// Unsupported if there is a reason why not, or if W has outliers but not in each row at `outlier_columns`.
IntegerPlanes prepare_integers(const PackedTensor& packed, std::vector<int32_t> outlier_columns);
PackedTensor unprepare_integers(const IntegerPlanes& prepared);
// The same on the device; waits for the device if there are outlier columns. `prepared` comes with its
// columns and with planes to be filled.
void prepare_integers_cuda(const PackedTensor& packed, IntegerPlanes& prepared, void* stream);
void unprepare_integers_cuda(const IntegerPlanes& prepared, PackedTensor& packed, void* stream);

struct CudaIntegerOptions {
  // Lets the kernels start before the previous one in the stream has ended, see CudaMatmulOptions.
  bool overlap = false;
  // For measurements and tests: the sizes of a tile, "tokens x rows x parts" and, unless it is 1, "x tiles",
  // such as "256x2x1"; empty: those that suit.
  std::string tile = {};
};

// nullopt if matmul_integers_cuda() would run; otherwise the reason why not. Looks at the current device.
std::optional<std::string> why_not_matmul_integers_cuda(const Format& format,
                                                        const ActivationFormat& activations, int64_t k,
                                                        DType dtype);
// The tile sizes that "" stands for, and all that take k inputs.
std::string integer_tile(int64_t m, int64_t n, int64_t k);
std::vector<std::string> integer_tiles(int64_t k);
// The same for weights in the order that their format has: "tokens x slabs of 64 rows x tiles that share
// tokens x warpgroups that share a slab" in register order.
std::string integer_tile(const IntegerPlanes& w, int64_t m);
std::vector<std::string> integer_tiles(const IntegerPlanes& w);

// Bytes of device memory, 256-byte aligned, that the product needs as workspace: the rounded activations.
int64_t matmul_integers_cuda_workspace(const IntegerPlanes& w, int64_t m, DType dtype,
                                       const ActivationFormat& activations);

// Rounds x and multiplies; arguments as of matmul_cuda(). A token with a value that is not finite gives NaN.
// Throws Unsupported where why_not_matmul_integers_cuda() has a reason, InvalidArgument / TypeMismatch for
// bad arguments, before anything is launched.
void matmul_integers_cuda(const IntegerPlanes& w, const CudaMatmulArguments& arguments,
                          const ActivationFormat& activations, const CudaIntegerOptions& options = {});

}  // namespace quantloom
