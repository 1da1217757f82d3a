#include "kernels/strip_product.hpp"

#include <algorithm>
#include <functional>

#include "quantloom/error.hpp"
#include "quantloom/parallel.hpp"

namespace quantloom::kernels {
namespace {

// Strips in one piece of work: few for a single tile, which runs at the speed of memory, so that all threads
// get some; more for several tiles, so that the activations of one stay in the second-level cache.
constexpr int64_t kPieceStrips = 4;
constexpr int64_t kPieceStripsOfManyTiles = 16;
// Below this many bytes of weights times tiles, another thread costs more than it brings.
constexpr int64_t kBytesPerThread = int64_t{1} << 16;

int tile_for(int64_t tokens) {
  if (tokens >= 5) return kMaxTileTokens;
  return tokens >= 3 ? 4 : static_cast<int>(tokens);
}

// True if the rows of x and y share bytes.
bool overlap(const FloatMatrix& x, MatrixView<float> y) {
  if (x.rows() == 0 || x.cols() == 0) return false;
  const auto* x_begin = static_cast<const std::byte*>(x.data());
  const std::byte* x_end = x_begin + ((x.rows() - 1) * x.stride() + x.cols()) * size_of(x.dtype());
  const auto* y_begin = reinterpret_cast<const std::byte*>(y.data());
  const auto* y_end = reinterpret_cast<const std::byte*>(y.row(y.rows() - 1) + y.cols());
  const std::less<const std::byte*> before;
  return before(x_begin, y_end) && before(y_begin, x_end);
}

}  // namespace

StripMatrix strip_matrix(const PreparedStrips& w) {
  StripMatrix matrix;
  matrix.stream = reinterpret_cast<const uint8_t*>(w.stream.data());
  matrix.strip_bytes = w.strip_bytes;
  matrix.rows = w.rows;
  matrix.groups = w.groups.data();
  matrix.group_count = static_cast<int64_t>(w.groups.size());
  matrix.container_bits = w.container_bits;
  matrix.scale_dtype = w.format->scale_dtype;
  matrix.has_zeros = w.has_zeros;
  matrix.real_zeros = w.real_zeros;
  matrix.center = w.center;
  matrix.table = w.table.empty() ? nullptr : w.table.data();
  return matrix;
}

void multiply_tiles(const StripMatrix& matrix, const PreparedStrips& w, MatrixView<float> y, bool int8,
                    int threads, const std::function<void(int64_t, int64_t, PackedTile&)>& pack) {
  const int64_t token_count = y.rows();
  const int64_t tile_count = ceil_div(token_count, kMaxTileTokens);
  const int64_t work = w.stream.size() * tile_count;
  const auto team = static_cast<int>(std::clamp<int64_t>(work / kBytesPerThread, 1, threads));

  std::vector<PackedTile> tiles(static_cast<size_t>(tile_count));
  const auto tokens_of = [&](int64_t i) {
    return std::min<int64_t>(kMaxTileTokens, token_count - i * kMaxTileTokens);
  };
  parallel_for(tile_count, team, [&](int64_t i) {
    PackedTile& tile = tiles[static_cast<size_t>(i)];
    tile.tile = tile_for(tokens_of(i));
    pack(i * kMaxTileTokens, tokens_of(i), tile);
  });

  const int64_t strips = w.strip_count();
  const int64_t piece_strips = tile_count > 1 ? kPieceStripsOfManyTiles : kPieceStrips;
  const int64_t pieces = ceil_div(strips, piece_strips);
  parallel_for(checked_mul(pieces, tile_count), team, [&](int64_t task) {
    const int64_t i = task / pieces;
    const int64_t first = task % pieces * piece_strips;
    const int64_t last = std::min(first + piece_strips, strips);
    const PackedTile& packed = tiles[static_cast<size_t>(i)];
    float* out = y.row(i * kMaxTileTokens);
    if (int8) {
      Int8Tile tile;
      tile.tile = packed.tile;
      tile.tokens = static_cast<int>(tokens_of(i));
      tile.x = packed.codes.data();
      tile.scale = packed.scale.data();
      tile.start = packed.start.data();
      tile.code_sum = packed.code_sum.data();
      tile.y = out;
      tile.y_stride = y.stride();
      multiply_strips_int8(matrix, tile, first, last);
    } else {
      ExactTile tile;
      tile.tile = packed.tile;
      tile.tokens = static_cast<int>(tokens_of(i));
      tile.x = packed.x.data();
      tile.group_sum = packed.group_sum.data();
      tile.y = out;
      tile.y_stride = y.stride();
      multiply_strips_exact(matrix, tile, first, last);
    }
  });
}

void check_shapes(const FloatMatrix& x, int64_t n, int64_t k, MatrixView<float> y) {
  if (x.cols() != k) {
    throw InvalidArgument("x", text_of("shape [", x.rows(), ", ", x.cols(), "]"),
                          text_of("[m, k = ", k, "]"));
  }
  if (y.rows() != x.rows() || y.cols() != n) {
    throw InvalidArgument("y", text_of("shape [", y.rows(), ", ", y.cols(), "]"),
                          text_of("[m, n] = [", x.rows(), ", ", n, "]"));
  }
  if (y.rows() == 0 || y.cols() == 0) return;
  if (y.data() == nullptr) throw InvalidArgument("y", "a null pointer", "memory for m * n values");
  if (y.stride() < y.cols()) {
    throw InvalidArgument("y", text_of("stride ", y.stride()), text_of("at least n = ", n));
  }
  if (overlap(x, y)) throw InvalidArgument("y", "memory that x lies in", "memory apart from x");
}

}  // namespace quantloom::kernels
