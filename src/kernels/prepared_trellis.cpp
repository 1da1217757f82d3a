#include "kernels/prepared_trellis.hpp"

#include <algorithm>
#include <new>

#include "formats/trellis_basis.hpp"
#include "formats/trellis_codes.hpp"
#include "kernels/strip_job.hpp"
#include "quantloom/parallel.hpp"

namespace quantloom::kernels {
namespace {

using trellis::kTileSide;

// Tokens that are brought into the basis at once, and that share one decoding of the weights.
constexpr int64_t kBatchTokens = 512;
constexpr int64_t kPieceTokens = 256;
// Up to so many tokens the inputs of a strip are cut, so that there is work for many threads.
constexpr int64_t kCutTokens = 32;
// Pieces that a matrix is cut into, unless pieces of fewer tiles along the inputs came of it.
constexpr int64_t kPieces = 64;
constexpr int64_t kLeastTiles = 32;
// Below this many bytes of weights for each token, another thread costs more than it brings.
constexpr int64_t kBytesPerThread = int64_t{1} << 14;

// How the inputs of a strip are cut; of the matrix alone, so that sums do not depend on tokens or threads.
struct Cuts {
  explicit Cuts(const PreparedTrellis& w)
      : tiles(w.padded_columns / kTileSide),
        count(std::clamp<int64_t>(ceil_div(kPieces, w.strip_count()), 1,
                                  std::max<int64_t>(1, tiles / kLeastTiles))) {}
  // A whole number of blocks.
  int64_t first_tile(int64_t cut) const {
    return std::min(tiles, ceil_div(tiles, kTrellisBlockTiles) * cut / count * kTrellisBlockTiles);
  }
  int64_t tiles;
  int64_t count;
};

TrellisMatrix matrix_of(const PreparedTrellis& w) {
  TrellisMatrix matrix;
  matrix.words = reinterpret_cast<const uint32_t*>(w.words.data());
  matrix.tile_columns = w.padded_columns / kTileSide;
  matrix.code = w.format->codebook.code;
  matrix.multiplier = w.format->codebook.multiplier;
  matrix.table = w.table.data();
  matrix.pairs = w.pairs.data();
  matrix.ring = w.format->shape();
  return matrix;
}

// Numbers aligned to cache lines, as the loops want them, with no values yet.
class Workspace {
 public:
  explicit Workspace(int64_t count)
      : data_(static_cast<float*>(
            ::operator new(static_cast<size_t>(checked_mul(count, int64_t{sizeof(float)})), kAlignment))) {}
  float* data() const { return data_.get(); }

 private:
  static constexpr std::align_val_t kAlignment{64};
  struct Free {
    void operator()(float* p) const { ::operator delete(p, kAlignment); }
  };
  std::unique_ptr<float, Free> data_;
};

// A batch of tokens as int8 codes with a scale for each block of inputs, as the loops want them.
class IntegerTokens {
 public:
  IntegerTokens(int64_t tokens, int64_t columns)
      : columns_(columns),
        blocks_(ceil_div(columns, kBlockColumns)),
        codes_(static_cast<size_t>(checked_mul(tokens, columns))),
        scales_(static_cast<size_t>(checked_mul(tokens, blocks_))),
        sums_(scales_.size()) {}

  // `row`: of x, for the error.
  void round(const float* values, int64_t token, int64_t row) {
    const GroupPlan plan{static_cast<int32_t>(columns_ / kBlockColumns),
                         static_cast<int32_t>(columns_ % kBlockColumns / kTileSide)};
    std::vector<int8_t> codes(static_cast<size_t>(columns_));
    const int64_t bad = quantize_token(values, &plan, 1, kTileSide, codes.data(),
                                       scales_.data() + token * blocks_, sums_.data() + token * blocks_);
    if (bad >= 0) {
      throw NumericError(text_of("x: got ", values[bad], " for token ", row, ", scaled and rotated input ",
                                 bad, ", expected values that stay finite for int8 activations"));
    }
    int32_t* out = codes_.data() + token * columns_;
    for (int64_t c = 0; c < columns_; ++c) {
      const auto byte = static_cast<uint8_t>(codes[static_cast<size_t>(c)]);
      out[c] = static_cast<int32_t>(byte * 0x01010101U);
    }
  }
  void fill(TrellisJob& job, int64_t first_token) const {
    job.codes = codes_.data() + first_token * columns_;
    job.code_scale = scales_.data() + first_token * blocks_;
    job.code_sum = sums_.data() + first_token * blocks_;
  }
  // Of all inputs of a token.
  float sum(int64_t token) const {
    float total = 0;
    for (int64_t b = token * blocks_; b < (token + 1) * blocks_; ++b) {
      const auto i = static_cast<size_t>(b);
      total += scales_[i] * static_cast<float>(sums_[i]);
    }
    return total;
  }

 private:
  int64_t columns_;
  int64_t blocks_;
  std::vector<int32_t> codes_;
  std::vector<float> scales_;
  std::vector<int32_t> sums_;
};

// weight = slope * (sum of bytes - 510) + offset, before it is rounded to float16.
struct Line {
  float slope = 1;
  float offset = 0;
};
Line line_of(TrellisCode code) {
  if (code == TrellisCode::one_mad) return {static_cast<float>(1 / 147.800537109375), 0};
  constexpr float kSlope = 1774 * 0x1p-18F;  // kMul1Slope
  return {kSlope, 1534 * kSlope - 10.3828125F};
}

std::vector<float> floats_of(const Tensor& halves) {
  const auto bits = halves.values<uint16_t>();
  std::vector<float> values(bits.size());
  std::ranges::transform(bits, values.begin(), float_from_f16);
  return values;
}

}  // namespace

std::shared_ptr<const PreparedTrellis> prepare_trellis(const PackedTensor& packed, int threads) {
  auto prepared = std::make_shared<PreparedTrellis>();
  PreparedTrellis& w = *prepared;
  w.format = std::dynamic_pointer_cast<const Trellis>(packed.format);
  w.rows = packed.n;
  w.columns = packed.k;
  const Tensor& codes = packed.plane("codes");
  w.padded_columns = codes.shape()[0] * kTileSide;
  w.padded_rows = codes.shape()[1] * kTileSide;
  w.input_scales = floats_of(packed.plane("input_scales"));
  w.output_scales = floats_of(packed.plane("output_scales"));
  if (!w.format->codebook.table.empty()) {
    const Tensor& table = packed.plane("table");
    if (table.shape()[1] == 1) {
      w.table = floats_of(table);
    } else {
      const auto halves = table.values<uint16_t>();
      for (size_t i = 0; i < halves.size(); i += 2) {
        w.pairs.push_back(halves[i] | static_cast<uint32_t>(halves[i + 1]) << 16);
      }
    }
  }
  const int64_t tile_columns = codes.shape()[0];
  const int64_t tile_rows = codes.shape()[1];
  const int64_t ring_words = codes.shape()[2];
  const int64_t strip_words = checked_mul(checked_mul(tile_columns, ring_words), kTrellisLanes);
  w.words = AlignedBytes(checked_mul(checked_mul(strip_words, w.strip_count()), int64_t{sizeof(uint32_t)}));
  const auto from = codes.values<uint32_t>();
  auto* to = reinterpret_cast<uint32_t*>(w.words.data());
  parallel_for(w.strip_count(), threads, [&](int64_t strip) {
    const int64_t lanes = std::min<int64_t>(kTrellisLanes, tile_rows - strip * kTrellisLanes);
    for (int64_t column = 0; column < tile_columns; ++column) {
      const uint32_t* rings = from.data() + (column * tile_rows + strip * kTrellisLanes) * ring_words;
      uint32_t* out = to + strip * strip_words + column * ring_words * kTrellisLanes;
      for (int64_t lane = 0; lane < lanes; ++lane) {
        for (int64_t word = 0; word < ring_words; ++word) {
          out[word * kTrellisLanes + lane] = rings[lane * ring_words + word];
        }
      }
    }
  });
  return prepared;
}

bool takes_int8(const PreparedTrellis& w) {
  const TrellisCode code = w.format->codebook.code;
  return code == TrellisCode::mul1 || code == TrellisCode::one_mad;
}

void multiply_trellis(const FloatMatrix& x, const PreparedTrellis& w, MatrixView<float> y,
                      Activations activations, int threads) {
  if (w.columns == 0) {
    for (int64_t token = 0; token < y.rows(); ++token) std::fill_n(y.row(token), y.cols(), 0.0F);
    return;
  }
  const bool int8 = activations == Activations::int8;
  if (int8) require_finite(x, "x", threads);
  const TrellisMatrix matrix = matrix_of(w);
  const Cuts cuts(w);
  const int64_t strips = w.strip_count();
  const int64_t outputs = strips * kTrellisOutputs;
  const bool rotates = w.format->rotation > 0;
  const int64_t batch = std::min(x.rows(), kBatchTokens);
  const bool cut = batch <= kCutTokens;
  const int64_t sums_of_token = cut ? cuts.count : 1;
  const Workspace inputs(checked_mul(batch, w.padded_columns));
  const Workspace sums(checked_mul(checked_mul(batch, outputs), sums_of_token));
  IntegerTokens integers(int8 ? batch : 0, w.padded_columns);
  for (int64_t first = 0; first < x.rows(); first += kBatchTokens) {
    const int64_t count = std::min(kBatchTokens, x.rows() - first);
    const auto team =
        static_cast<int>(std::clamp<int64_t>(w.words.size() * count / kBytesPerThread, 1, threads));
    parallel_for(count, team, [&](int64_t token) {
      float* values = inputs.data() + token * w.padded_columns;
      x.read(first + token, 0, w.columns, values);
      for (int64_t c = 0; c < w.columns; ++c) values[c] *= w.input_scales[static_cast<size_t>(c)];
      std::fill(values + w.columns, values + w.padded_columns, 0.0F);
      if (rotates) trellis::rotate_columns(MatrixView<float>(values, 1, w.padded_columns));
      if (int8) integers.round(values, token, first + token);
    });
    // A piece is a strip with a cut of its inputs, or with some of the tokens.
    const int64_t parts = cut ? cuts.count : ceil_div(count, kPieceTokens);
    parallel_for(checked_mul(strips, parts), team, [&](int64_t piece) {
      const int64_t part = piece % parts;
      const int64_t token = cut ? 0 : part * kPieceTokens;
      TrellisJob job;
      job.strip = piece / parts;
      job.x = inputs.data() + token * w.padded_columns;
      if (int8) integers.fill(job, token);
      job.tokens = cut ? count : std::min(kPieceTokens, count - token);
      const Workspace workspace(trellis_workspace(job.tokens));
      job.workspace = workspace.data();
      job.y_stride = outputs;
      for (int64_t i = cut ? part : 0; i < (cut ? part + 1 : cuts.count); ++i) {
        job.first_tile = cuts.first_tile(i);
        job.tiles = cuts.first_tile(i + 1) - job.first_tile;
        job.y = sums.data() + ((cut ? i * count : 0) + token) * outputs + job.strip * kTrellisOutputs;
        job.add = !cut && i > 0;
        if (int8) {
          multiply_trellis_tiles_int8(matrix, job);
        } else {
          multiply_trellis_tiles(matrix, job);
        }
      }
    });
    const Line line = int8 ? line_of(w.format->codebook.code) : Line{};
    parallel_for(count, team, [&](int64_t token) {
      float* total = sums.data() + token * outputs;
      for (int64_t i = 1; i < sums_of_token; ++i) {
        const float* more = sums.data() + (i * count + token) * outputs;
        for (int64_t r = 0; r < w.padded_rows; ++r) total[r] += more[r];
      }
      if (int8) {
        const float offset = line.offset * integers.sum(token);
        for (int64_t r = 0; r < w.padded_rows; ++r) total[r] = total[r] * line.slope + offset;
      }
      if (rotates) trellis::rotate_columns(MatrixView<float>(total, 1, w.padded_rows));
      float* out = y.row(first + token);
      for (int64_t r = 0; r < w.rows; ++r) out[r] = w.output_scales[static_cast<size_t>(r)] * total[r];
    });
  }
}

}  // namespace quantloom::kernels
