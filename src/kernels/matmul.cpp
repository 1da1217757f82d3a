#include "quantloom/kernels/matmul.hpp"

#include <algorithm>
#include <functional>
#include <limits>
#include <numeric>

#include "kernels/prepared_bcq.hpp"
#include "kernels/prepared_outliers.hpp"
#include "kernels/prepared_rows.hpp"
#include "kernels/prepared_strips.hpp"
#include "kernels/prepared_trellis.hpp"
#include "kernels/strip_job.hpp"
#include "quantloom/formats/bcq.hpp"
#include "quantloom/formats/outliers.hpp"
#include "quantloom/formats/spqr.hpp"
#include "quantloom/formats/vector_codebook.hpp"
#include "quantloom/parallel.hpp"

namespace quantloom {
namespace kernels {
namespace {

// Strips in one piece of work: few for a single tile, which runs at the speed of memory, so that all threads
// get some; more for several tiles, so that the activations of one stay in the second-level cache.
constexpr int64_t kPieceStrips = 4;
constexpr int64_t kPieceStripsOfManyTiles = 16;
// Tokens whose activations are held at once.
constexpr int64_t kBatchTokens = 512;
// Below this many bytes of weights times tiles, another thread costs more than it brings.
constexpr int64_t kBytesPerThread = int64_t{1} << 16;

int tile_for(int64_t tokens) {
  if (tokens >= 5) return kMaxTileTokens;
  return tokens >= 3 ? 4 : static_cast<int>(tokens);
}

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

void pack_exact(const FloatMatrix& x, int64_t first, int64_t tokens, const PreparedStrips& w,
                PackedTile& out) {
  const int tile = out.tile;
  out.x.resize(static_cast<size_t>(w.padded_columns * tile));
  if (w.has_zeros) out.group_sum.resize(w.groups.size() * static_cast<size_t>(tile));
  std::vector<float> row(static_cast<size_t>(w.columns));
  std::vector<float> token(static_cast<size_t>(w.padded_columns));
  for (int64_t t = 0; t < tokens; ++t) {
    float* values = tile == 1 ? out.x.data() : token.data();
    read_token(x, first + t, w.source, row.data(), values);
    if (w.code_unit != 1.0F) {
      for (int64_t c = 0; c < w.padded_columns; ++c) values[c] *= w.code_unit;
    }
    if (tile > 1) {
      for (int64_t c = 0; c < w.padded_columns; ++c) out.x[static_cast<size_t>(c * tile + t)] = values[c];
    }
    if (!w.has_zeros) continue;
    int64_t column = 0;
    for (size_t g = 0; g < w.groups.size(); ++g) {
      const int64_t end =
          column + w.groups[g].full_blocks * kBlockColumns + w.groups[g].tail_steps * w.step_columns;
      double sum = 0.0;
      for (; column < end; ++column) sum += static_cast<double>(values[column]);
      out.group_sum[g * static_cast<size_t>(tile) + static_cast<size_t>(t)] = static_cast<float>(sum);
    }
  }
}

void pack_int8(const FloatMatrix& x, int64_t first, int64_t tokens, const PreparedStrips& w,
               PackedTile& out) {
  const int tile = out.tile;
  const int64_t blocks = w.block_count();
  out.codes.resize(static_cast<size_t>(w.padded_columns / 4 * tile));
  out.scale.resize(static_cast<size_t>(blocks * tile));
  out.start.resize(static_cast<size_t>(blocks * tile));
  if (w.has_zeros) out.code_sum.resize(static_cast<size_t>(blocks * tile));
  std::vector<float> row(static_cast<size_t>(w.columns));
  std::vector<float> token(static_cast<size_t>(w.padded_columns));
  std::vector<int32_t> codes(static_cast<size_t>(w.padded_columns / 4));
  std::vector<float> scales(static_cast<size_t>(blocks));
  std::vector<int32_t> sums(static_cast<size_t>(blocks));
  for (int64_t t = 0; t < tokens; ++t) {
    read_token(x, first + t, w.source, row.data(), token.data());
    const int64_t bad = quantize_token(token.data(), w.groups.data(), static_cast<int64_t>(w.groups.size()),
                                       static_cast<int>(w.step_columns),
                                       reinterpret_cast<int8_t*>(codes.data()), scales.data(), sums.data());
    if (bad >= 0) {
      const int64_t column = w.source.empty() ? bad : w.source[static_cast<size_t>(bad)];
      throw NumericError(text_of("x: got ", token[static_cast<size_t>(bad)], " for token ", first + t,
                                 ", input ", column, ", expected finite values for int8 activations"));
    }
    for (int64_t d = 0; d < w.padded_columns / 4; ++d) {
      out.codes[static_cast<size_t>(d * tile + t)] = codes[static_cast<size_t>(d)];
    }
    for (int64_t b = 0; b < blocks; ++b) {
      const auto at = static_cast<size_t>(b * tile + t);
      const auto from = static_cast<size_t>(b);
      out.scale[at] = scales[from] * w.code_unit;
      if (w.has_zeros) {
        out.code_sum[at] = static_cast<float>(sums[from]);
      } else {
        out.start[at] = -static_cast<int32_t>(w.center) * sums[from];
      }
    }
  }
}

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

void multiply_batch(const FloatMatrix& x, int64_t first_token, int64_t token_count, const PreparedStrips& w,
                    MatrixView<float> y, Activations activations, int threads) {
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
    const int64_t first = first_token + i * kMaxTileTokens;
    if (activations == Activations::int8) {
      pack_int8(x, first, tokens_of(i), w, tile);
    } else {
      pack_exact(x, first, tokens_of(i), w, tile);
    }
  });

  const StripMatrix matrix = strip_matrix(w);
  const int64_t strips = w.strip_count();
  const int64_t piece_strips = tile_count > 1 ? kPieceStripsOfManyTiles : kPieceStrips;
  const int64_t pieces = ceil_div(strips, piece_strips);
  parallel_for(checked_mul(pieces, tile_count), team, [&](int64_t task) {
    const int64_t i = task / pieces;
    const int64_t first = task % pieces * piece_strips;
    const int64_t last = std::min(first + piece_strips, strips);
    const PackedTile& packed = tiles[static_cast<size_t>(i)];
    float* out = y.row(first_token + i * kMaxTileTokens);
    if (activations == Activations::int8) {
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

}  // namespace
}  // namespace kernels

std::shared_ptr<const PreparedTensor> prepare(const PackedTensor& packed, int threads) {
  resolve_threads(threads);
  if (packed.format == nullptr) throw InvalidArgument("packed", "no format", "a packed tensor with a format");
  const bool with_outliers = dynamic_cast<const Outliers*>(packed.format.get()) != nullptr;
  const bool by_rows = dynamic_cast<const VectorCodebook*>(packed.format.get()) != nullptr;
  const bool by_signs = dynamic_cast<const Bcq*>(packed.format.get()) != nullptr;
  const bool by_rings = dynamic_cast<const Trellis*>(packed.format.get()) != nullptr;
  if (!with_outliers && !by_rows && !by_signs && !by_rings &&
      dynamic_cast<const GroupedFormat*>(packed.format.get()) == nullptr &&
      dynamic_cast<const Spqr*>(packed.format.get()) == nullptr) {
    throw Unsupported(text_of("prepare: no CPU kernel takes format ", packed.format->spec(),
                              "; kernel_table() lists what the kernels take"));
  }
  for (const auto& [name, plane] : packed.planes) {
    if (plane.device() != Device::cpu) {
      throw Unsupported(
          text_of("prepare: plane ", name, " is on a CUDA device; copy the tensor to the CPU first"));
    }
  }
  validate(packed);
  if (packed.k > std::numeric_limits<int32_t>::max() / 2) {
    throw Unsupported(text_of("prepare: got k = ", packed.k, ", expected at most ",
                              std::numeric_limits<int32_t>::max() / 2));
  }
  if (with_outliers) return kernels::prepare_outliers(packed, prepare(dense_part(packed), threads));
  if (by_rows) return kernels::prepare_rows(packed);
  if (by_signs) return kernels::prepare_bcq(packed, threads);
  if (by_rings) return kernels::prepare_trellis(packed, threads);
  return kernels::prepare_strips(packed, threads);
}

void matmul(const FloatMatrix& x, const PreparedTensor& w, MatrixView<float> y,
            const MatmulOptions& options) {
  const int threads = resolve_threads(options.threads);
  if (const auto* outliers = dynamic_cast<const kernels::PreparedOutliers*>(&w)) {
    matmul(x, *outliers->dense, y, options);
    return kernels::add_outliers(x, *outliers, y, threads);
  }
  const auto* rows = dynamic_cast<const kernels::PreparedRows*>(&w);
  const auto* signs = dynamic_cast<const kernels::PreparedBcq*>(&w);
  const auto* rings = dynamic_cast<const kernels::PreparedTrellis*>(&w);
  const auto* prepared = dynamic_cast<const kernels::PreparedStrips*>(&w);
  if (rows == nullptr && signs == nullptr && rings == nullptr && prepared == nullptr) {
    throw InvalidArgument("w", "a foreign PreparedTensor", "the result of prepare()");
  }
  if (options.activations == Activations::int8 &&
      (rings != nullptr ? !kernels::takes_int8(*rings) : prepared == nullptr || !prepared->table.empty())) {
    throw Unsupported(text_of("matmul: int8 activations need an evenly spaced grid or byte sums, and w is ",
                              rows != nullptr    ? rows->packed.format->spec()
                              : signs != nullptr ? signs->format->spec()
                              : rings != nullptr ? rings->format->spec()
                                                 : prepared->format->spec(),
                              "; use exact activations"));
  }
  kernels::check_shapes(x, w.n(), w.k(), y);
  if (y.rows() == 0 || y.cols() == 0) return;
  if (signs != nullptr) return kernels::multiply_bcq(x, *signs, y, threads);
  if (rows != nullptr) return kernels::multiply_rows(x, *rows, y, threads);
  if (rings != nullptr) return kernels::multiply_trellis(x, *rings, y, options.activations, threads);
  // A single batch is checked as it is rounded, before y is touched.
  if (options.activations == Activations::int8 && x.rows() > kernels::kBatchTokens)
    require_finite(x, "x", threads);
  for (int64_t first = 0; first < x.rows(); first += kernels::kBatchTokens) {
    const int64_t count = std::min(kernels::kBatchTokens, x.rows() - first);
    kernels::multiply_batch(x, first, count, *prepared, y, options.activations, threads);
  }
}

void matmul_reference(const FloatMatrix& x, const PackedTensor& w, MatrixView<float> y) {
  kernels::check_shapes(x, w.n, w.k, y);
  std::vector<float> weights(static_cast<size_t>(checked_mul(w.n, w.k)));
  dequantize(w, {weights.data(), w.n, w.k});
  std::vector<float> token(static_cast<size_t>(w.k));
  for (int64_t t = 0; t < x.rows(); ++t) {
    x.read(t, 0, w.k, token.data());
    for (int64_t row = 0; row < w.n; ++row) {
      double sum = 0.0;
      for (int64_t c = 0; c < w.k; ++c) {
        sum += static_cast<double>(token[static_cast<size_t>(c)]) *
               static_cast<double>(weights[static_cast<size_t>(row * w.k + c)]);
      }
      y(t, row) = static_cast<float>(sum);
    }
  }
}

}  // namespace quantloom
