// Sizes and facts of a matrix in fragment order, from its format.
#pragma once

#include "formats/fragment_order.hpp"
#include "quantloom/kernels/matmul_cuda.hpp"

namespace quantloom {

struct FragmentLayout {
  int bits = 0;       // of a weight: a lane's unit of 32 weights comes in so many words
  int dim = 1;        // weights of a code
  int code_bits = 0;  // of a code in the packed planes, of all tables together; at most dim * bits
  int tables = 1;     // of vectors, whose entries add up
  fragments::CodeOrder code_order = fragments::CodeOrder::bytes;
  DType scale_dtype = DType::f16;
  bool asymmetric = false;  // has a plane of zero points
  bool per_tensor = false;
  int64_t table_entries = 0;  // of a codebook, scalar or of vectors, else 0
  int64_t n = 0;
  int64_t k = 0;
  int64_t group_count = 0;     // at least 1
  int64_t format_columns = 0;  // columns of a group in the format
  int64_t group_columns = 0;   // the same, padded: a multiple of 16
  bool outliers = false;       // has planes of outliers
  bool gathered = false;       // columns change places: there is a plane "source"
  // Format spqr: bytes of codes of a lane's eight scales and zero points in a group, and rows and number of
  // the grids that they lie on; else 0.
  int parameter_bytes = 0;
  int64_t grid_rows = 0;
  int64_t grid_count = 0;
  int64_t row_blocks = 0;  // at least 1
  int64_t column_blocks = 0;

  bool bilevel() const { return parameter_bytes > 0; }
  // Outliers know their inputs, not the padded columns: there is a plane "place".
  bool placed() const { return outliers && gathered; }
  int64_t padded_k() const { return column_blocks * 64; }
  int64_t code_words() const;  // of the plane "codes"
};

// Throws Unsupported if no CUDA kernel takes the format.
FragmentLayout fragment_layout(const Format& format, int64_t n, int64_t k, bool with_group_index);

}  // namespace quantloom
