#include "quantloom/kernels/matmul.hpp"

#include <algorithm>
#include <functional>
#include <limits>
#include <numeric>

#include "kernels/prepared_bcq.hpp"
#include "kernels/prepared_lookups.hpp"
#include "kernels/prepared_outliers.hpp"
#include "kernels/prepared_rows.hpp"
#include "kernels/prepared_strips.hpp"
#include "kernels/prepared_trellis.hpp"
#include "kernels/strip_product.hpp"
#include "quantloom/formats/additive.hpp"
#include "quantloom/formats/bcq.hpp"
#include "quantloom/formats/outliers.hpp"
#include "quantloom/formats/sdr.hpp"
#include "quantloom/formats/spqr.hpp"
#include "quantloom/formats/vector_codebook.hpp"
#include "quantloom/parallel.hpp"

namespace quantloom {
namespace kernels {
namespace {

// Tokens whose activations are held at once.
constexpr int64_t kBatchTokens = 512;

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

void multiply_batch(const FloatMatrix& x, int64_t first_token, int64_t token_count, const PreparedStrips& w,
                    MatrixView<float> y, Activations activations, int threads) {
  const bool int8 = activations == Activations::int8;
  const auto pack = [&](int64_t first, int64_t count, PackedTile& tile) {
    if (int8) {
      pack_int8(x, first_token + first, count, w, tile);
    } else {
      pack_exact(x, first_token + first, count, w, tile);
    }
  };
  multiply_tiles(strip_matrix(w), w, y.block(first_token, 0, token_count, y.cols()), int8, threads, pack);
}

}  // namespace
}  // namespace kernels

std::shared_ptr<const PreparedTensor> prepare(const PackedTensor& packed, int threads) {
  resolve_threads(threads);
  if (packed.format == nullptr) throw InvalidArgument("packed", "no format", "a packed tensor with a format");
  const bool with_outliers = dynamic_cast<const Outliers*>(packed.format.get()) != nullptr;
  const bool by_rows = dynamic_cast<const VectorCodebook*>(packed.format.get()) != nullptr ||
                       dynamic_cast<const Additive*>(packed.format.get()) != nullptr;
  const bool by_signs = dynamic_cast<const Bcq*>(packed.format.get()) != nullptr;
  const bool by_rings = dynamic_cast<const Trellis*>(packed.format.get()) != nullptr;
  if (!with_outliers && !by_rows && !by_signs && !by_rings &&
      dynamic_cast<const GroupedFormat*>(packed.format.get()) == nullptr &&
      dynamic_cast<const Spqr*>(packed.format.get()) == nullptr &&
      dynamic_cast<const Sdr*>(packed.format.get()) == nullptr) {
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
  if (kernels::takes_lookups(*packed.format)) return kernels::prepare_lookups(packed, threads);
  if (by_rows) return kernels::prepare_rows(packed);
  if (by_signs) return kernels::prepare_bcq(packed, threads);
  if (by_rings) return kernels::prepare_trellis(packed, threads);
  if (const auto* digits = dynamic_cast<const Sdr*>(packed.format.get())) {
    // Shifts as scales where that takes fewer bytes than codes that are shifted at load.
    return kernels::prepare_strips(sdr_to_uniform(packed, digits->bits <= 4 && digits->group_size >= 32),
                                   threads);
  }
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
  const auto* lookups = dynamic_cast<const kernels::PreparedLookups*>(&w);
  const auto* signs = dynamic_cast<const kernels::PreparedBcq*>(&w);
  const auto* rings = dynamic_cast<const kernels::PreparedTrellis*>(&w);
  const auto* prepared = dynamic_cast<const kernels::PreparedStrips*>(&w);
  if (rows == nullptr && lookups == nullptr && signs == nullptr && rings == nullptr && prepared == nullptr) {
    throw InvalidArgument("w", "a foreign PreparedTensor", "the result of prepare()");
  }
  if (options.activations == Activations::int8 &&
      (rings != nullptr ? !kernels::takes_int8(*rings) : prepared == nullptr || !prepared->table.empty())) {
    throw Unsupported(text_of("matmul: int8 activations need an evenly spaced grid or byte sums, and w is ",
                              rows != nullptr      ? rows->packed.format->spec()
                              : lookups != nullptr ? lookups->format->spec()
                              : signs != nullptr   ? signs->format->spec()
                              : rings != nullptr   ? rings->format->spec()
                                                   : prepared->format->spec(),
                              "; use exact activations"));
  }
  kernels::check_shapes(x, w.n(), w.k(), y);
  if (y.rows() == 0 || y.cols() == 0) return;
  if (signs != nullptr) return kernels::multiply_bcq(x, *signs, y, threads);
  if (rows != nullptr) return kernels::multiply_rows(x, *rows, y, threads);
  if (lookups != nullptr) return kernels::multiply_lookups(x, *lookups, y, threads);
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
