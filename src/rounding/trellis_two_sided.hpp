// The walk of error feedback along rows and columns at once, for round_trellis_feedback().
#pragma once

#include <cstdint>
#include <span>

#include "quantloom/formats/format.hpp"
#include "quantloom/matrix_view.hpp"

namespace quantloom {

// One side of the walk: the order of its positions, by whole tiles, and the upper triangular factor U of the
// inverse of its Hessian in that order, H^-1 = U^T U.
struct WalkSide {
  std::span<const int64_t> order;
  MatrixView<const float> upper;
};

// Chooses the codes of all tiles of weights [n, k], multiples of 16, by an encoder of tiles. With errors
// E = U_out^T F U_in, tr(H_out E H_in E^T) is the squared norm of F: each tile's codes are the nearest to
// what the tiles before it in both orders leave of the weights if all later ones are free. The same for any
// number of threads.
void walk_two_sided(MatrixView<const float> weights, const WalkSide& input, const WalkSide& output,
                    ColumnEncoder& encoder, int threads);

}  // namespace quantloom
