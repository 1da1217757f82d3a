#include "quantloom/kv_cache/kv_attention.hpp"

#include <algorithm>
#include <cmath>
#include <limits>
#include <memory>

#include "kv_cache/kv_checks.hpp"
#include "kv_cache/kv_rotation.hpp"
#include "kv_cache/kv_rows.hpp"
#include "quantloom/checked_math.hpp"
#include "quantloom/matrix_view.hpp"
#include "quantloom/parallel.hpp"

namespace quantloom {
namespace {

constexpr int64_t kBlockTokens = 64;
// Tokens whose softmax one thread forms before results are merged.
constexpr int64_t kPieceTokens = 512;
// Below this many stored elements for all pieces, another thread costs more than it brings.
constexpr int64_t kElementsPerThread = int64_t{1} << 15;
// Queries that share the decoded keys and values of a piece: those of the heads of a KV head come first.
constexpr int64_t kMostRows = 64;

// Some queries of one KV head of one sequence, and a run of tokens they meet.
struct Piece {
  int64_t sequence;
  int64_t kv_head;
  int64_t first_row;  // query token * (heads of a KV head) + head among them
  int64_t rows;
  int64_t first_token;
  int64_t tokens;
  int64_t place;  // of the first row's results
};

void run_piece(const KVCache& cache, const KVTokens& q, float scale, const Piece& piece, float* sums,
               kv_cache::SoftmaxRow* state, int64_t stride) {
  const int64_t dim = q.head_dim;
  const int64_t group = q.heads / cache.shape().kv_heads;
  std::vector<float> memory(
      static_cast<size_t>(piece.rows * stride + 2 * kBlockTokens * dim + 2 * kv_cache::kRowPadding + 16));
  // Aligned to 64 bytes, which the loops over queries and sums count on.
  void* start = memory.data();
  size_t space = memory.size() * sizeof(float);
  auto* queries = static_cast<float*>(std::align(64, 1, start, space));
  float* keys = queries + piece.rows * stride;
  float* values = keys + kBlockTokens * dim + kv_cache::kRowPadding;
  std::vector<int64_t> limits(static_cast<size_t>(piece.rows));
  std::vector<int64_t> visible(static_cast<size_t>(piece.rows));
  for (int64_t r = 0; r < piece.rows; ++r) {
    const int64_t token = (piece.first_row + r) / group;
    const int64_t head = piece.kv_head * group + (piece.first_row + r) % group;
    float* row = queries + r * stride;
    kv_cache::widen_row(q.dtype, q.row(piece.sequence, head, token), dim, row);
    for (int64_t d = 0; d < dim; ++d) row[d] *= scale;
    limits[static_cast<size_t>(r)] = cache.length(piece.sequence) - q.tokens + token + 1;
    state[r] = {-std::numeric_limits<float>::infinity(), 0};
  }
  const int64_t seen = std::max<int64_t>(limits.back(), 0);
  const int64_t end = std::min(piece.first_token + piece.tokens, seen);
  for (int64_t t = piece.first_token; t < end; t += kBlockTokens) {
    const int64_t count = std::min(kBlockTokens, end - t);
    cache.read(KVSide::keys, piece.sequence, piece.kv_head, t, count, keys);
    cache.read(KVSide::values, piece.sequence, piece.kv_head, t, count, values);
    // Meets zeros of the queries, and lanes of sums that nobody reads: any finite number does.
    std::fill_n(keys + count * dim, kv_cache::kRowPadding, 0.0F);
    std::fill_n(values + count * dim, kv_cache::kRowPadding, 0.0F);
    for (size_t r = 0; r < limits.size(); ++r) visible[r] = limits[r] - t;
    kv_cache::attend_block(queries, piece.rows, stride, visible.data(), keys, values, count, dim, state,
                           sums);
  }
}

}  // namespace

void attend(const KVCache& cache, const KVTokens& queries, float scale, float* out, int threads) {
  kv_cache::require_queries(cache.shape(), queries, scale, out);
  const int64_t dim = queries.head_dim;
  const int64_t kv_heads = cache.shape().kv_heads;
  const int64_t group = queries.heads / kv_heads;
  const int64_t rows = queries.tokens * group;
  const int64_t stride = checked_pad(dim, kv_cache::kRowPadding);
  Tensor rotated;
  KVTokens q = queries;
  if (cache.format().hadamard) {
    rotated = kv_cache::rotate_tokens(queries, true);
    q = kv_cache::view_of(rotated);
  }
  // Many queries are pieces enough: they pass over all tokens, and no results of parts are kept.
  const int64_t run = rows <= kMostRows ? kPieceTokens : std::numeric_limits<int64_t>::max();
  const auto parts_of = [&](int64_t s) { return rows <= kMostRows ? ceil_div(cache.length(s), run) : 1; };
  // The parts of one result follow each other.
  std::vector<Piece> pieces;
  int64_t places = 0;
  for (int64_t s = 0; s < queries.sequences; ++s) {
    for (int64_t h = 0; h < kv_heads; ++h) {
      for (int64_t first = 0; first < rows; first += kMostRows) {
        const int64_t count = std::min(kMostRows, rows - first);
        for (int64_t part = 0; part < parts_of(s); ++part) {
          const int64_t t = part * run;
          pieces.push_back({s, h, first, count, t, std::min(run, cache.length(s) - t), places});
          places += count;
        }
      }
    }
  }
  int64_t elements = 0;
  for (const Piece& piece : pieces) elements += piece.tokens * dim;
  const int team =
      static_cast<int>(std::clamp<int64_t>(elements / kElementsPerThread, 1, resolve_threads(threads)));
  std::fill_n(out, queries.sequences * rows * kv_heads * dim, 0.0F);
  std::vector<kv_cache::SoftmaxRow> state(static_cast<size_t>(places));
  Tensor sums(DType::f32, {places, stride});
  const auto total = sums.values<float>();
  parallel_for(std::ssize(pieces), team, [&](int64_t i) {
    const Piece& piece = pieces[static_cast<size_t>(i)];
    run_piece(cache, q, scale, piece, total.data() + piece.place * stride, state.data() + piece.place,
              stride);
  });
  for (size_t i = 0; i < pieces.size();) {
    const Piece& piece = pieces[i];
    const int64_t parts = parts_of(piece.sequence);
    for (int64_t r = 0; r < piece.rows; ++r) {
      const auto at = [&](int64_t part) { return piece.place + part * piece.rows + r; };
      float largest = -std::numeric_limits<float>::infinity();
      for (int64_t p = 0; p < parts; ++p)
        largest = std::max(largest, state[static_cast<size_t>(at(p))].largest);
      const int64_t token = (piece.first_row + r) / group;
      const int64_t head = piece.kv_head * group + (piece.first_row + r) % group;
      float* row = out + ((piece.sequence * queries.tokens + token) * queries.heads + head) * dim;
      double sum = 0;
      for (int64_t p = 0; p < parts; ++p) {
        const kv_cache::SoftmaxRow& part = state[static_cast<size_t>(at(p))];
        if (part.sum == 0) continue;
        const float weight = std::exp(part.largest - largest);
        sum += static_cast<double>(weight) * static_cast<double>(part.sum);
        const float* from = total.data() + at(p) * stride;
        for (int64_t d = 0; d < dim; ++d) row[d] += weight * from[d];
      }
      if (sum == 0) continue;
      for (int64_t d = 0; d < dim; ++d) row[d] = static_cast<float>(static_cast<double>(row[d]) / sum);
    }
    i += static_cast<size_t>(parts);
  }
}

void attend_reference(const KVCache& cache, const KVTokens& queries, float scale, double* out) {
  kv_cache::require_queries(cache.shape(), queries, scale, out);
  const int64_t dim = queries.head_dim;
  const int64_t group = queries.heads / cache.shape().kv_heads;
  Tensor rotated;
  KVTokens q = queries;
  if (cache.format().hadamard) {
    rotated = kv_cache::rotate_tokens(queries, true);
    q = kv_cache::view_of(rotated);
  }
  for (int64_t s = 0; s < q.sequences; ++s) {
    const int64_t length = cache.length(s);
    std::vector<float> keys(static_cast<size_t>(length * dim));
    std::vector<float> values(keys.size());
    for (int64_t h = 0; h < q.heads; ++h) {
      cache.read_reference(KVSide::keys, s, h / group, 0, length, keys.data());
      cache.read_reference(KVSide::values, s, h / group, 0, length, values.data());
      for (int64_t i = 0; i < q.tokens; ++i) {
        std::vector<float> query(static_cast<size_t>(dim));
        FloatMatrix(q.row(s, h, i), q.dtype, 1, dim, dim).read(0, 0, dim, query.data());
        const int64_t seen = std::max<int64_t>(0, length - q.tokens + i + 1);
        std::vector<double> weights(static_cast<size_t>(seen));
        double largest = -std::numeric_limits<double>::infinity();
        for (size_t t = 0; t < weights.size(); ++t) {
          double sum = 0;
          for (size_t d = 0; d < query.size(); ++d) {
            sum += static_cast<double>(query[d]) * static_cast<double>(keys[t * query.size() + d]);
          }
          weights[t] = sum * static_cast<double>(scale);
          largest = std::max(largest, weights[t]);
        }
        double total = 0;
        for (double& weight : weights) total += weight = std::exp(weight - largest);
        double* row = out + ((s * q.tokens + i) * q.heads + h) * dim;
        std::fill_n(row, dim, 0.0);
        for (size_t t = 0; t < weights.size(); ++t) {
          for (int64_t d = 0; d < dim; ++d) {
            row[d] +=
                weights[t] / total * static_cast<double>(values[t * query.size() + static_cast<size_t>(d)]);
          }
        }
      }
    }
  }
}

}  // namespace quantloom
