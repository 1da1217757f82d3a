// Runs the loops of strip_job.hpp over many tokens: tiles of activations are packed, then multiplied with
// pieces of the matrix by a team of threads.
#pragma once

#include <functional>
#include <vector>

#include "kernels/strip_job.hpp"
#include "quantloom/matrix_view.hpp"

namespace quantloom::kernels {

// A tile of activations in the order of strip_job.hpp.
struct PackedTile {
  int tile = 1;
  std::vector<float> x;
  std::vector<float> group_sum;
  std::vector<int32_t> codes;
  std::vector<float> scale;
  std::vector<int32_t> start;
  std::vector<float> code_sum;
};

// The matrix as the loops see it, with blocks of kBlockColumns.
StripMatrix strip_matrix(const PreparedStrips& w);

// y [tokens, n] = the product. `pack(first, count, tile)` fills a tile of tile.tile >= count tokens with the
// activations of tokens [first, first + count): integers (codes, scale, start, code_sum) if `int8`, else
// floats. All tiles are packed before y is touched.
void multiply_tiles(const StripMatrix& matrix, const PreparedStrips& w, MatrixView<float> y, bool int8,
                    int threads, const std::function<void(int64_t, int64_t, PackedTile&)>& pack);

// Throws InvalidArgument unless x is [m, k] and y is [m, n], apart from x.
void check_shapes(const FloatMatrix& x, int64_t n, int64_t k, MatrixView<float> y);

}  // namespace quantloom::kernels
