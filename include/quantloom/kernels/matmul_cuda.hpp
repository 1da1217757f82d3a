// Products straight from packed codes on a CUDA device: y = x W^T + bias for x [m, k], W [n, k], y [m, n].
//
// A PackedTensor is first brought into the order that the kernels read; that is done once, at load. The
// kernels allocate nothing, never synchronize, need no zeroed memory, and add in a fixed order: the same
// call gives the same bytes, and can be captured in a CUDA graph.
#pragma once

#include <optional>
#include <span>
#include <string>
#include <vector>

#include "quantloom/formats/format.hpp"

namespace quantloom {

// A matrix of codes (uniform, codebook, vector_codebook, spqr, each with or without outliers) in "fragment
// order": blocks of 64 rows x 64 columns, in each the codes that one lane of a warp multiplies next to each
// other. Rows and columns are padded to whole blocks, groups to multiples of 16 columns; padding has scale 0.
//   codes        int32 [ceil(n/64), column_blocks, bits, 32, 4]; `bits` of a weight: for vectors those of
//                its codes, of all tables, over dim, rounded up
//   scales       scale_dtype [ceil(n/64), groups, 8, 8]
//   zeros        uint8, as scales: asymmetric grids only
//   codebook     float16 [entries], or [codebooks, entries, dim] for vectors: codebooks only
//   source       int32 [64 * column_blocks], only if columns change places: the input of each column, -1 for
//                padding
//   group_index  as in the packed tensor, where it has one
//   outlier_*    as in the packed tensor, where its format has outliers; columns are inputs, not padded
//   place        int32 [k], only if there are planes source and outlier_*: the padded column of each input
// Codes of spqr, whose column_blocks are an even number, lie in halves of words (src/formats/half_order.hpp);
// in place of scales and zeros it has
//   parameters   uint8 [ceil(n/64), groups, 8, 8 or 16]: codes of the scales of rows i, i + 8, ..., i + 56 of
//                a block, in 4 bits each if both widths of codes fit, else in 8, then those of zero points
//   grids        float16 [ceil(n/block), groups, 4]: a scale grid, then a zero grid
//
// A trellis has its rings in blocks of 64 x 64, rows and columns padded to multiples of 128 with rings of
// zeros, and its other planes as in the packed tensor:
//   codes        int32 [row_blocks, column_blocks, bits, 32, 4] at whole bits: lane 4 g + t of a warp has
//                words g * bits ... of the ring of tile t along the columns, for four tiles of 16 rows;
//                at half bits [row_blocks, column_blocks, 16, words of a ring], with tile 4 i + t that of
//                rows 16 i ...
//
// Binary coding has its signs in blocks of 64 rows x 128 columns, groups padded to multiples of 32 columns:
//   signs        int32 [ceil(n/64), column_blocks, bits, 2, 32, 4]: of each plane, lane 4 g + t of a warp has
//                columns 32 t ... of the rows g + 8 i, i = 0 ... 7
//   scales       scale_dtype [ceil(n/64), groups, bits, 8, 8], and a place more, after the planes', for
//                offsets; source, with 128 * column_blocks, and group_index as above
//
// Additive codes of blocks of one row lie in fragment order, as vectors, if those have 2, 4 or 8 columns and
// codes that fit (`bits` as above). The others have codebook and scales as in the packed tensor, and codes,
// too, unless they are those of one table of more than 128 KiB, of blocks of 8 or 16 columns of one row, with
// one scale a row. These lie in lists (src/formats/additive_order.hpp): for each row and slice of 2048 blocks
// one for each part of the table, of 2^13 entries of 8 weights or 2^12 of 16, with the blocks whose code lies
// in the part; each begins at a multiple of 4 entries.
//   codes        int32 [slices, n, capacity / 2]: entries of 16 bits, the first in the lower half of a word;
//                capacity is min(2048, blocks of a row) + 3 * parts, rounded up to a multiple of 8
//   places       uint8 [slices, n, capacity]: 8 more bits of each. From the lowest bit on, an entry is the
//                code within its part (13 or 12 bits), then the place of the block in its slice (11 bits)
//   lists        int32 [slices, n, parts]: where the list begins, in units of 4 entries (16 bits), then its
//                length
// Scales and tables that are codes into levels are there as numbers, with codes and levels, as in the packed
// tensor, beside them.
struct PreparedPlanes {
  std::shared_ptr<const Format> format;
  int64_t n = 0;
  int64_t k = 0;
  std::map<std::string, Tensor> planes;

  // Throws InvalidArgument if the plane is missing.
  const Tensor& plane(std::string_view name) const;
  bool has(const std::string& name) const { return planes.contains(name); }
};

// The planes that prepare_cuda() fills. `with_group_index`: the packed tensor has a plane group_index. Throws
// Unsupported if no CUDA kernel takes the format.
std::vector<PlaneSpec> prepared_planes(const Format& format, int64_t n, int64_t k, bool with_group_index);
// Throws InvalidArgument, naming the plane, unless the planes are those of prepared_planes().
void validate(const PreparedPlanes& prepared);

// The scalar reference, from planes on the CPU to planes on the CPU, and its inverse (bit for bit).
PreparedPlanes prepare_fragments(const PackedTensor& packed);
PackedTensor unprepare_fragments(const PreparedPlanes& prepared);
// The same on the device. `prepared` comes with format, n, k and planes of prepared_planes() to be filled.
// The plane "source" depends on group_index alone: where both exist, it is filled through the CPU by
// fragment_source() and uploaded by the caller.
void prepare_cuda(const PackedTensor& packed, PreparedPlanes& prepared, void* stream);
void unprepare_cuda(const PreparedPlanes& prepared, PackedTensor& packed, void* stream);
// The plane "source" (empty if columns stay in place), from the plane group_index on the CPU or none.
std::vector<int32_t> fragment_source(const Format& format, int64_t k, std::span<const int32_t> group_index);

struct CudaMatmulOptions {
  // Lets the kernel start before the previous one in the stream has ended, and load weights meanwhile
  // (programmatic dependent launch, sm_90 and later). The previous kernel must not write the planes.
  bool overlap = false;
  // The kernel by its name in the table; empty: the one that the table picks.
  std::string kernel = {};
  // For measurements: parts that each tile is cut into along k or, in the streaming kernels, the blocks of
  // threads that share a block of rows. 0: chosen by shape.
  int splits = 0;
  // For measurements and tests: whether the streaming kernels multiply one token on integers, where they can
  // (uniform formats of 1 to 3 bits, groups of whole multiples of 64 columns, k in multiples of 128 that
  // leave room in shared memory). Unset: where it is faster. Activations are then rounded to 2^-23 of the
  // largest of their 128 columns or less, and one that is not finite makes NaN, not infinity.
  std::optional<bool> digits = std::nullopt;
};

// nullopt if matmul_cuda() would run; otherwise the reason why not, in words. Looks at the arguments and at
// the current device; does no work.
std::optional<std::string> why_not_matmul_cuda(const Format& format, int64_t m, DType dtype,
                                               const CudaMatmulOptions& options = {});
// The name, as in the table, of the kernel that matmul_cuda() would run. Throws Unsupported if none would.
std::string matmul_cuda_kernel(const PreparedPlanes& w, int64_t m, DType dtype,
                               const CudaMatmulOptions& options = {});
// Bytes of device memory, 256-byte aligned, that matmul_cuda() needs as workspace; may be 0.
int64_t matmul_cuda_workspace(const PreparedPlanes& w, int64_t m, DType dtype,
                              const CudaMatmulOptions& options = {});

struct CudaMatmulArguments {
  const void* x = nullptr;     // [m, k] of dtype, elements of a row next to each other
  int64_t x_stride = 0;        // elements between rows
  const void* bias = nullptr;  // [n] of dtype, or null
  void* y = nullptr;           // [m, n] of dtype; must not overlap x
  int64_t y_stride = 0;
  int64_t m = 0;
  DType dtype = DType::f16;  // float16 or bfloat16
  void* workspace = nullptr;
  int64_t workspace_bytes = 0;
  void* stream = nullptr;  // a cudaStream_t
};

// All memory on the current device. float32 accumulation; the result is rounded once, but with a bias the
// kernels "decode" and "trellis_dense" (cuBLASLt) round before they add it, too. Of the kernels of trellis
// codes, "trellis_stream" takes activations with 16 bits of the largest of up to 512 of them (3inst, mcg: 22
// bits), and weights without their last rounding to float16, "trellis_exact" 22 bits and the weights as they
// are; "trellis_panels" and "trellis_tiles" round rotated activations to float16, the latter sums as well;
// "trellis_dense" rounds weights to float16 before their second rotation. An activation that is not finite
// makes NaN. So it does in "bit_planes" with one token, whose activations are rounded to 2^-21 of the largest
// of 128 columns or less. Throws Unsupported where no kernel takes the format, dtype or device,
// InvalidArgument / TypeMismatch for bad arguments, before anything is launched.
void matmul_cuda(const PreparedPlanes& w, const CudaMatmulArguments& arguments,
                 const CudaMatmulOptions& options = {});

// Decodes to `out` [n, stride] of `dtype` (float16, bfloat16, float32) on the current device: column c of the
// padded columns holds input source[c], or input c where there is no plane "source"; columns of padding are
// undefined. `stride` >= all padded columns and a multiple of 8 elements, `out` aligned to 16 bytes. Values
// are those of dequantize(), rounded to `dtype`; where there is an outlier, the dense value is rounded first.
// Asynchronous, as matmul_cuda(); throws as it does.
void decode_fragments_cuda(const PreparedPlanes& w, void* out, DType dtype, int64_t stride, void* stream);

}  // namespace quantloom
