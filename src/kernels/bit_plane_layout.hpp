// Sizes and facts of a matrix of binary coding as the CUDA kernels read it; see PreparedPlanes.
#pragma once

#include "formats/bit_plane_order.hpp"
#include "quantloom/formats/bcq.hpp"
#include "quantloom/kernels/matmul_cuda.hpp"

namespace quantloom {

struct BitPlaneLayout {
  int planes = 1;
  bool offset = false;
  DType scale_dtype = DType::f16;
  int64_t n = 0;
  int64_t k = 0;
  int64_t group_count = 1;     // at least 1
  int64_t format_columns = 1;  // columns of a group in the format
  int64_t group_columns = 32;  // the same, padded: a multiple of 32
  bool gathered = false;       // columns change places: there is a plane "source"
  int64_t row_blocks = 1;      // of 64 rows, at least 1
  int64_t column_blocks = 0;   // of 128 columns

  int64_t padded_k() const { return column_blocks * bit_planes::kBlockColumns; }
  // Scales of a row and group, one for each plane, and its offset.
  int parameters() const { return planes + (offset ? 1 : 0); }
  int64_t words() const {
    return checked_mul(checked_mul(row_blocks, column_blocks), int64_t{bit_planes::kPlaneWords} * planes);
  }
};

// The binary coding of a format, or null.
inline const Bcq* as_bcq(const Format& format) {
  return dynamic_cast<const Bcq*>(&format);
}

// Throws Unsupported for a matrix too large for the kernels.
BitPlaneLayout bit_plane_layout(const Bcq& format, int64_t n, int64_t k, bool with_group_index);
std::vector<PlaneSpec> bit_plane_planes(const BitPlaneLayout& layout, bool with_group_index);

// The scalar reference: into the order of the kernels.
PreparedPlanes prepare_bit_planes(const PackedTensor& packed);
PackedTensor unprepare_bit_planes(const PreparedPlanes& prepared);

}  // namespace quantloom
