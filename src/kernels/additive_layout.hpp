// Sizes and facts of a matrix of additive codes that does not lie in fragment order, as the CUDA kernels read
// it; see PreparedPlanes.
#pragma once

#include "formats/additive_order.hpp"
#include "quantloom/formats/additive.hpp"
#include "quantloom/kernels/matmul_cuda.hpp"

namespace quantloom {

struct AdditiveLayout {
  int codebooks = 1;
  int bits = 1;  // of a code
  int in_group = 1;
  int out_group = 1;
  DType scale_dtype = DType::f16;
  int64_t n = 0;
  int64_t k = 0;
  int64_t row_groups = 0;
  int64_t blocks = 0;         // of a group of rows
  int64_t row_words = 0;      // of a group of rows, in the packed tensor
  int64_t scale_columns = 1;  // that share a scale
  int64_t scale_count = 1;    // of a group of rows
  // In lists by parts of the table (formats/additive_order.hpp); 0: codes lie as in the packed tensor.
  int parts = 0;
  int64_t slices = 0;
  int64_t capacity = 0;  // entries of a row and slice, a multiple of 8

  bool in_parts() const { return parts > 0; }
  int dim() const { return in_group * out_group; }
  int64_t table_values() const { return (int64_t{codebooks} << bits) * dim(); }
  int64_t column_blocks() const { return ceil_div(k, 64); }
  int64_t padded_k() const { return 64 * column_blocks(); }
};

// The format if its matrices have an order of their own; null for others, and for those in fragment order.
const Additive* as_additive(const Format& format);
// Whether matrices of the format lie in fragment order, as those of vector codebooks do.
bool is_in_fragment_order(const Additive& format);

// Throws Unsupported for a matrix too large for the kernels.
AdditiveLayout additive_layout(const Additive& format, int64_t n, int64_t k);
std::vector<PlaneSpec> additive_planes(const AdditiveLayout& layout);

// Of formats that store numbers as codes into levels: the planes of codes and levels, which prepared planes
// have as they are beside the numbers themselves. Empty for others.
std::vector<PlaneSpec> level_planes(const Format& format, int64_t n, int64_t k);
// The planes without those, of the same matrix without levels.
PreparedPlanes without_levels(const PreparedPlanes& prepared);
// The format without levels.
std::shared_ptr<const Additive> without_levels(const Additive& format);

// The scalar reference: into the order of the kernels, and back.
PreparedPlanes prepare_additive(const PackedTensor& packed);
PackedTensor unprepare_additive(const PreparedPlanes& prepared);

}  // namespace quantloom
