#include "quantloom/activations/producers.hpp"

#include <algorithm>
#include <cmath>
#include <vector>

#include "activations/producer_rows.hpp"
#include "quantloom/checked_math.hpp"
#include "quantloom/parallel.hpp"

namespace quantloom {
namespace {

constexpr int64_t kPieceTokens = 8;
constexpr int64_t kValuesPerThread = int64_t{1} << 14;

void require_vector(std::span<const float> vector, int64_t k, const char* argument) {
  if (vector.empty() || std::ssize(vector) == k) return;
  throw InvalidArgument(argument, text_of(vector.size(), " elements"), text_of(k, " elements"));
}

void require_producer(const FloatMatrix& x, const ActivationProducer& producer) {
  if (producer.kind == ProducerKind::silu_mul) {
    const FloatMatrix& up = producer.up;
    if (up.dtype() != x.dtype()) throw TypeMismatch("up", name_of(up.dtype()), name_of(x.dtype()));
    if (up.rows() != x.rows() || up.cols() != x.cols()) {
      throw InvalidArgument("up", text_of("shape [", up.rows(), ", ", up.cols(), "]"),
                            text_of("[", x.rows(), ", ", x.cols(), "], as the gate"));
    }
    return;
  }
  require_vector(producer.weight, x.cols(), "weight");
  require_vector(producer.bias, x.cols(), "bias");
  if (!producer.bias.empty() && producer.kind != ProducerKind::layer_norm) {
    throw InvalidArgument("bias", "some", "none but for layer_norm");
  }
  if (!(producer.epsilon >= 0 && std::isfinite(producer.epsilon))) {
    throw InvalidArgument("epsilon", text_of(producer.epsilon), "a finite number, 0 or more");
  }
}

void round_to(DType dtype, float* row, int64_t count) {
  if (dtype == DType::f16) {
    for (int64_t i = 0; i < count; ++i) row[i] = float_from_f16(f16_from_float(row[i]));
  } else if (dtype == DType::bf16) {
    for (int64_t i = 0; i < count; ++i) row[i] = float_from_bf16(bf16_from_float(row[i]));
  }
}

}  // namespace

void produce_activations(const FloatMatrix& x, const ActivationProducer& producer, MatrixView<float> out,
                         int threads) {
  const int64_t k = x.cols();
  require_producer(x, producer);
  if (out.rows() != x.rows() || out.cols() != k) {
    throw InvalidArgument("out", text_of("shape [", out.rows(), ", ", out.cols(), "]"),
                          text_of("[", x.rows(), ", ", k, "], as x"));
  }
  std::vector<float> weight(producer.weight.begin(), producer.weight.end());
  if (producer.kind != ProducerKind::silu_mul) {
    if (weight.empty()) weight.assign(static_cast<size_t>(k), producer.add_one ? 0.0F : 1.0F);
    if (producer.add_one) {
      for (float& w : weight) w += 1.0F;
    }
  }
  const int64_t values = checked_mul(x.rows(), k);
  const auto team =
      static_cast<int>(std::clamp<int64_t>(values / kValuesPerThread, 1, resolve_threads(threads)));
  parallel_for(ceil_div(x.rows(), kPieceTokens), team, [&](int64_t piece) {
    std::vector<float> row(static_cast<size_t>(k));
    for (int64_t t = piece * kPieceTokens; t < std::min((piece + 1) * kPieceTokens, x.rows()); ++t) {
      x.read(t, 0, k, row.data());
      float* const to = out.row(t);
      if (producer.kind == ProducerKind::silu_mul) {
        activations::silu_row(row.data(), k, to);
        round_to(x.dtype(), to, k);
        producer.up.read(t, 0, k, row.data());
        for (int64_t c = 0; c < k; ++c) to[c] *= row[static_cast<size_t>(c)];
      } else {
        activations::normalize_row(row.data(), k, weight.data(),
                                   producer.bias.empty() ? nullptr : producer.bias.data(), producer.epsilon,
                                   producer.kind == ProducerKind::layer_norm, to);
      }
      round_to(x.dtype(), to, k);
    }
  });
}

}  // namespace quantloom
