// Products with activations that are rounded to a format.
#include <algorithm>
#include <cmath>
#include <vector>

#include "kernels/prepared_outliers.hpp"
#include "kernels/strip_product.hpp"
#include "quantloom/activations/quantized_activations.hpp"
#include "quantloom/error.hpp"
#include "quantloom/kernels/matmul.hpp"
#include "quantloom/parallel.hpp"

namespace quantloom {
namespace kernels {
namespace {

// How the columns of a matrix are cut so that the inputs of each block share the scales of their tokens.
struct IntegerPlan {
  int64_t block_columns = 0;
  std::vector<GroupPlan> groups;
  std::vector<int64_t> first_column;      // of each block, prepared
  std::vector<int64_t> activation_group;  // of each block
};

// Where the blocks of `block_columns` begin, and a group of activations for each; false if some block has
// inputs of several.
bool cut(const PreparedStrips& w, int64_t group_size, int64_t block_columns, IntegerPlan& plan) {
  plan = {block_columns, {}, {}, {}};
  int64_t column = 0;
  for (const GroupPlan& group : w.groups) {
    const int64_t padded = group.full_blocks * kBlockColumns + group.tail_steps * w.step_columns;
    plan.groups.push_back({static_cast<int32_t>(padded / block_columns),
                           static_cast<int32_t>(padded % block_columns / w.step_columns)});
    for (const int64_t end = column + padded; column < end;) {
      const int64_t last = std::min(column + block_columns, end);
      int64_t own = -1;
      for (int64_t c = column; c < last && group_size > 0; ++c) {
        const int64_t from = w.source.empty() ? c : w.source[static_cast<size_t>(c)];
        if (from < 0) continue;
        if (own >= 0 && own != from / group_size) return false;
        own = from / group_size;
      }
      plan.first_column.push_back(column);
      plan.activation_group.push_back(std::max<int64_t>(own, 0));
      column = last;
    }
  }
  return true;
}

// The plan with the largest blocks; false if there is none.
bool find_plan(const PreparedStrips& w, const ActivationFormat& format, IntegerPlan& plan) {
  if (!w.table.empty()) return false;
  for (int64_t columns = kBlockColumns; columns >= w.step_columns; columns /= 2) {
    if (cut(w, format.group_size, columns, plan)) return true;
  }
  return false;
}

// What is multiplied in place of the codes themselves, to take zero points into account.
enum class Operand : uint8_t {
  codes,
  zeros,  // the zero point of each input's group
  ones,   // 1 for each input, with a scale of 1
};

void pack_integers(const QuantizedActivations& q, Operand operand, int64_t first, int64_t tokens,
                   const PreparedStrips& w, const IntegerPlan& plan, PackedTile& out) {
  const int tile = out.tile;
  const auto blocks = static_cast<int64_t>(plan.first_column.size());
  out.codes.resize(static_cast<size_t>(w.padded_columns / 4 * tile));
  out.scale.resize(static_cast<size_t>(blocks * tile));
  out.start.resize(static_cast<size_t>(blocks * tile));
  if (w.has_zeros) out.code_sum.resize(static_cast<size_t>(blocks * tile));
  const auto codes = q.planes.at("codes").values<int8_t>();
  const auto scales = q.planes.at("scales").values<float>();
  const auto zeros = q.format.symmetric ? std::span<const int8_t>() : q.planes.at("zeros").values<int8_t>();
  const auto shifts =
      q.format.has_shifts() ? q.planes.at("shifts").values<uint8_t>() : std::span<const uint8_t>();
  const int64_t groups = q.format.group_count(q.k);
  const bool own_scales = q.format.scope == ActivationScope::group;
  const bool shared = q.format.scope == ActivationScope::tensor;
  std::vector<int32_t> words(static_cast<size_t>(w.padded_columns / 4));
  auto* const bytes = reinterpret_cast<int8_t*>(words.data());
  for (int64_t t = 0; t < tokens; ++t) {
    const int64_t token = first + t;
    const auto scale_at = [&](int64_t group) {
      return static_cast<size_t>(shared ? 0 : own_scales ? token * groups + group : token);
    };
    for (int64_t b = 0; b < blocks; ++b) {
      const int64_t begin = plan.first_column[static_cast<size_t>(b)];
      const int64_t end = b + 1 < blocks ? plan.first_column[static_cast<size_t>(b + 1)] : w.padded_columns;
      const int64_t group = plan.activation_group[static_cast<size_t>(b)];
      const int8_t constant = operand == Operand::ones    ? int8_t{1}
                              : operand == Operand::zeros ? zeros[scale_at(group)]
                                                          : int8_t{0};
      int32_t sum = 0;
      for (int64_t c = begin; c < end; ++c) {
        const int64_t from = w.source.empty() ? c : w.source[static_cast<size_t>(c)];
        int8_t code = 0;
        if (from >= 0) {
          code = operand == Operand::codes ? codes[static_cast<size_t>(token * q.k + from)] : constant;
        }
        bytes[c] = code;
        sum += code;
      }
      float scale = operand == Operand::ones ? 1.0F : scales[scale_at(group)];
      if (!shifts.empty()) scale = std::ldexp(scale, shifts[static_cast<size_t>(token * groups + group)]);
      const auto at = static_cast<size_t>(b * tile + t);
      out.scale[at] = scale * w.code_unit;
      if (w.has_zeros) {
        out.code_sum[at] = static_cast<float>(sum);
      } else {
        out.start[at] = -static_cast<int32_t>(w.center) * sum;
      }
    }
    for (size_t d = 0; d < words.size(); ++d)
      out.codes[d * static_cast<size_t>(tile) + static_cast<size_t>(t)] = words[d];
  }
}

// Tokens whose packed activations are held at once.
constexpr int64_t kBatchTokens = 512;

// y += the outliers' products, in the order of their columns; weights [columns, n].
void add_columns(const QuantizedActivations& q, int64_t first, std::span<const int32_t> columns,
                 std::span<const float> weights, MatrixView<float> y, int threads) {
  const auto values = q.planes.at("outlier_values").values<float>();
  parallel_for(y.rows(), threads, [&](int64_t t) {
    float* row = y.row(t);
    for (size_t i = 0; i < columns.size(); ++i) {
      const float value = values[static_cast<size_t>(first + t) * columns.size() + i];
      const float* weight = weights.data() + i * static_cast<size_t>(y.cols());
      for (int64_t r = 0; r < y.cols(); ++r) row[r] += value * weight[r];
    }
  });
}

void multiply_integers(const QuantizedActivations& q, const PreparedStrips& w, const IntegerPlan& plan,
                       MatrixView<float> y, int threads) {
  StripMatrix matrix = strip_matrix(w);
  matrix.groups = plan.groups.data();
  matrix.block_columns = static_cast<int>(plan.block_columns);
  const auto multiply = [&](Operand operand, int64_t first, MatrixView<float> out) {
    multiply_tiles(matrix, w, out, true, threads, [&](int64_t token, int64_t count, PackedTile& tile) {
      pack_integers(q, operand, first + token, count, w, plan, tile);
    });
  };
  const bool own_scales = q.format.scope == ActivationScope::group;
  // Without groups all that a zero point needs are the sums of the rows of W.
  std::vector<float> sums;
  if (!q.format.symmetric && !own_scales) {
    sums.resize(static_cast<size_t>(w.rows));
    multiply(Operand::ones, 0, {sums.data(), 1, w.rows});
  }
  // Outliers are multiplied with decoded weights.
  const auto columns =
      q.format.has_outliers() ? q.planes.at("outlier_columns").values<int32_t>() : std::span<const int32_t>();
  const std::vector<float> weights = decode_columns(w, columns, threads);
  std::vector<float> shares;
  for (int64_t first = 0; first < q.m; first += kBatchTokens) {
    const int64_t count = std::min(kBatchTokens, q.m - first);
    const MatrixView<float> out = y.block(first, 0, count, y.cols());
    multiply(Operand::codes, first, out);
    if (!columns.empty()) add_columns(q, first, columns, weights, out, threads);
    if (q.format.symmetric) continue;
    if (own_scales) {
      shares.resize(static_cast<size_t>(checked_mul(count, w.rows)));
      multiply(Operand::zeros, first, {shares.data(), count, w.rows});
    }
    for (int64_t t = 0; t < count; ++t) {
      float* row = out.row(t);
      if (own_scales) {
        for (int64_t r = 0; r < w.rows; ++r) row[r] -= shares[static_cast<size_t>(t * w.rows + r)];
        continue;
      }
      const auto at = static_cast<size_t>(q.format.scope == ActivationScope::tensor ? 0 : first + t);
      const float offset = q.planes.at("scales").values<float>()[at] *
                           static_cast<float>(q.planes.at("zeros").values<int8_t>()[at]);
      for (int64_t r = 0; r < w.rows; ++r) row[r] -= offset * sums[static_cast<size_t>(r)];
    }
  }
}

}  // namespace
}  // namespace kernels

bool matmul_is_integer(const PreparedTensor& w, const ActivationFormat& activations) {
  require_valid(activations);
  if (const auto* outliers = dynamic_cast<const kernels::PreparedOutliers*>(&w)) {
    return matmul_is_integer(*outliers->dense, activations);
  }
  const auto* strips = dynamic_cast<const kernels::PreparedStrips*>(&w);
  kernels::IntegerPlan plan;
  return strips != nullptr && kernels::find_plan(*strips, activations, plan);
}

void matmul(const FloatMatrix& x, const PreparedTensor& w, MatrixView<float> y,
            const ActivationFormat& activations, int threads) {
  const int team = resolve_threads(threads);
  require_valid(activations);
  kernels::check_shapes(x, w.n(), w.k(), y);
  const auto* strips = dynamic_cast<const kernels::PreparedStrips*>(&w);
  kernels::IntegerPlan plan;
  if (strips != nullptr && kernels::find_plan(*strips, activations, plan)) {
    const QuantizedActivations q = quantize_activations(x, activations, threads);
    if (y.rows() == 0 || y.cols() == 0) return;
    return kernels::multiply_integers(q, *strips, plan, y, team);
  }
  std::vector<float> values(static_cast<size_t>(checked_mul(x.rows(), x.cols())));
  const MatrixView<float> rounded(values.data(), x.rows(), x.cols());
  round_activations(x, activations, rounded, threads);
  if (const auto* outliers = dynamic_cast<const kernels::PreparedOutliers*>(&w)) {
    matmul(x, *outliers->dense, y, activations, threads);
    return kernels::add_outliers(rounded, *outliers, y, team);
  }
  matmul(rounded, w, y, {.activations = Activations::exact, .threads = threads});
}

}  // namespace quantloom
