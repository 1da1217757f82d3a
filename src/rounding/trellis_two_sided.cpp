#include "rounding/trellis_two_sided.hpp"

#include <algorithm>
#include <array>
#include <vector>

#include "formats/trellis_codes.hpp"
#include "quantloom/checked_math.hpp"
#include "quantloom/parallel.hpp"

namespace quantloom {
namespace {

constexpr int64_t kSide = trellis::kTileSide;
using Tile = std::array<std::array<float, kSide>, kSide>;  // [row][column]

// In positions of both orders.
struct Walk {
  MatrixView<const float> weights;  // in their own order
  const WalkSide& input;
  const WalkSide& output;
  ColumnEncoder& encoder;
  // With errors E of the weights: [n, k], E = `along_rows` U_in, and E less what tiles of earlier columns
  // leave in it, a column of tiles at a time, is U_out^T `along_columns`.
  MatrixView<float> along_rows;
  MatrixView<float> along_columns;
};

// tile -= left [kSide rows, count] * upper [count, kSide columns].
void subtract_rows(MatrixView<const float> left, MatrixView<const float> upper, Tile& tile) {
  for (int64_t r = 0; r < kSide; ++r) {
    auto& row = tile[static_cast<size_t>(r)];
    for (int64_t i = 0; i < left.cols(); ++i) {
      const float factor = left(r, i);
      const float* u = upper.row(i);
      for (int64_t c = 0; c < kSide; ++c) row[static_cast<size_t>(c)] -= factor * u[c];
    }
  }
}

// tile -= upper [count, kSide]^T * below [count, kSide].
void subtract_columns(MatrixView<const float> upper, MatrixView<const float> below, Tile& tile) {
  for (int64_t i = 0; i < upper.rows(); ++i) {
    const float* u = upper.row(i);
    const float* error = below.row(i);
    for (int64_t r = 0; r < kSide; ++r) {
      for (int64_t c = 0; c < kSide; ++c)
        tile[static_cast<size_t>(r)][static_cast<size_t>(c)] -= u[r] * error[c];
    }
  }
}

void round_tile(const Walk& walk, int64_t row, int64_t column) {
  const int64_t n_at = walk.output.order[static_cast<size_t>(row)];
  const int64_t k_at = walk.input.order[static_cast<size_t>(column)];
  const MatrixView<const float> in = walk.input.upper;
  const MatrixView<const float> out = walk.output.upper;
  Tile left;
  for (int64_t r = 0; r < kSide; ++r) {
    std::copy_n(walk.weights.row(n_at + r) + k_at, kSide, left[static_cast<size_t>(r)].begin());
  }
  subtract_rows(walk.along_rows.block(row, 0, kSide, column), in.block(0, column, column, kSide), left);
  Tile target = left;
  subtract_columns(out.block(0, row, row, kSide), walk.along_columns.block(0, column, row, kSide), target);

  std::array<float, kSide * kSide> values;
  std::array<float, kSide * kSide> decoded;
  for (size_t r = 0; r < kSide; ++r) {
    for (size_t c = 0; c < kSide; ++c) values[c * kSide + r] = target[r][c];
  }
  walk.encoder.encode(k_at, n_at, {values.data(), kSide, kSide}, {decoded.data(), kSide, kSide});

  for (int64_t r = 0; r < kSide; ++r) {  // along_rows U = left - decoded, for the tile's own triangle U
    float* error = walk.along_rows.row(row + r) + column;
    for (int64_t c = 0; c < kSide; ++c) {
      float value =
          left[static_cast<size_t>(r)][static_cast<size_t>(c)] - decoded[static_cast<size_t>(c * kSide + r)];
      for (int64_t i = 0; i < c; ++i) value -= error[i] * in(column + i, column + c);
      error[c] = value / in(column + c, column + c);
    }
  }
  for (int64_t r = 0; r < kSide; ++r) {  // U^T along_columns = target - decoded
    for (int64_t c = 0; c < kSide; ++c) {
      float value = target[static_cast<size_t>(r)][static_cast<size_t>(c)] -
                    decoded[static_cast<size_t>(c * kSide + r)];
      for (int64_t i = 0; i < r; ++i)
        value -= out(row + i, row + r) * walk.along_columns(row + i, column + c);
      walk.along_columns(row + r, column + c) = value / out(row + r, row + r);
    }
  }
}

}  // namespace

void walk_two_sided(MatrixView<const float> weights, const WalkSide& input, const WalkSide& output,
                    ColumnEncoder& encoder, int threads) {
  const int64_t n = weights.rows();
  const int64_t k = weights.cols();
  const auto count = static_cast<size_t>(checked_mul(n, k));
  std::vector<float> along_rows(count);
  std::vector<float> along_columns(count);
  const Walk walk{weights, input, output, encoder, {along_rows.data(), n, k}, {along_columns.data(), n, k}};
  const int64_t tall = n / kSide;
  const int64_t wide = k / kSide;
  // Tiles of a diagonal depend on those of earlier diagonals only.
  for (int64_t diagonal = 0; diagonal < tall + wide - 1; ++diagonal) {
    const int64_t first = std::max<int64_t>(0, diagonal - wide + 1);
    const int64_t last = std::min(tall - 1, diagonal);
    parallel_for(last - first + 1, threads,
                 [&](int64_t i) { round_tile(walk, (first + i) * kSide, (diagonal - first - i) * kSide); });
  }
}

}  // namespace quantloom
