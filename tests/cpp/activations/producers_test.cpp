#include "quantloom/activations/producers.hpp"

#include <gtest/gtest.h>

#include <cmath>
#include <cstring>

#include "quantloom/error.hpp"
#include "simd_targets.hpp"
#include "test_matrices.hpp"

namespace quantloom {
namespace {

// Values of a dtype, as it stores them.
struct Stored {
  DType dtype;
  std::vector<std::byte> bytes;
  int64_t rows;
  int64_t cols;

  Stored(const std::vector<float>& values, DType type, int64_t m, int64_t k)
      : dtype(type), bytes(values.size() * static_cast<size_t>(size_of(type)) + 1), rows(m), cols(k) {
    for (size_t i = 0; i < values.size(); ++i) {
      if (type == DType::f32) {
        std::memcpy(bytes.data() + 4 * i, &values[i], 4);
      } else {
        const uint16_t half = type == DType::f16 ? f16_from_float(values[i]) : bf16_from_float(values[i]);
        std::memcpy(bytes.data() + 2 * i, &half, 2);
      }
    }
  }
  FloatMatrix view() const { return {bytes.data(), dtype, rows, cols, cols}; }
  std::vector<double> values() const {
    std::vector<float> row(static_cast<size_t>(cols));
    std::vector<double> all;
    for (int64_t t = 0; t < rows; ++t) {
      view().read(t, 0, cols, row.data());
      all.insert(all.end(), row.begin(), row.end());
    }
    return all;
  }
};

double unit_of(DType dtype) {
  return dtype == DType::f16 ? 0x1p-11 : dtype == DType::bf16 ? 0x1p-8 : 0x1p-24;
}

constexpr DType kFloats[] = {DType::f16, DType::bf16, DType::f32};

TEST(Producers, NormsAgreeWithFloat64) {
  for (const DType dtype : kFloats) {
    for (const auto& [m, k] : {std::pair<int64_t, int64_t>{1, 1}, {3, 7}, {5, 64}, {17, 301}, {2, 4096}}) {
      std::vector<float> values = testing::normal_values(m * k, static_cast<uint64_t>(k));
      for (float& value : values) value = 3 * value + 0.5F;
      const Stored x(values, dtype, m, k);
      const std::vector<float> weight = testing::normal_values(k, 2);
      const std::vector<float> bias = testing::normal_values(k, 3);
      const std::vector<double> exact = x.values();
      for (const bool layer : {false, true}) {
        for (const bool add_one : {false, true}) {
          if (layer && add_one) continue;
          ActivationProducer producer;
          producer.kind = layer ? ProducerKind::layer_norm : ProducerKind::rms_norm;
          producer.weight = weight;
          if (layer) producer.bias = bias;
          producer.add_one = add_one;
          producer.epsilon = 1e-5F;
          std::vector<float> out(values.size(), -1.0F);
          produce_activations(x.view(), producer, MatrixView<float>(out.data(), m, k));
          for (int64_t t = 0; t < m; ++t) {
            double mean = 0;
            for (int64_t c = 0; c < k && layer; ++c) mean += exact[static_cast<size_t>(t * k + c)];
            mean /= static_cast<double>(k);
            double squares = 0;
            for (int64_t c = 0; c < k; ++c) {
              squares += std::pow(exact[static_cast<size_t>(t * k + c)] - mean, 2);
            }
            const double factor = 1 / std::sqrt(squares / static_cast<double>(k) + double{1e-5F});
            for (int64_t c = 0; c < k; ++c) {
              const auto at = static_cast<size_t>(c);
              const double wanted =
                  (exact[static_cast<size_t>(t * k + c)] - mean) * factor * (weight[at] + (add_one ? 1 : 0)) +
                  (layer ? bias[at] : 0.0F);
              ASSERT_NEAR(out[static_cast<size_t>(t * k + c)], wanted,
                          1.01 * unit_of(dtype) * std::abs(wanted) + 2e-5)
                  << name_of(dtype) << " [" << t << ", " << c << "] layer " << layer;
            }
          }
        }
      }
    }
  }
}

TEST(Producers, GatedActivationsAgreeWithFloat64) {
  for (const DType dtype : kFloats) {
    constexpr int64_t kRows = 9;
    constexpr int64_t kCols = 301;
    std::vector<float> gates = testing::normal_values(kRows * kCols, 4);
    for (size_t i = 0; i < gates.size(); ++i) gates[i] *= i % 7 == 0 ? 40.0F : 2.0F;
    gates[1] = 0;
    gates[2] = 300;
    gates[3] = -300;
    const Stored gate(gates, dtype, kRows, kCols);
    const Stored up(testing::normal_values(kRows * kCols, 5), dtype, kRows, kCols);
    ActivationProducer producer;
    producer.kind = ProducerKind::silu_mul;
    producer.up = up.view();
    std::vector<float> out(gates.size());
    produce_activations(gate.view(), producer, MatrixView<float>(out.data(), kRows, kCols));
    const std::vector<double> g = gate.values();
    const std::vector<double> u = up.values();
    for (size_t i = 0; i < out.size(); ++i) {
      const double wanted = g[i] / (1 + std::exp(-g[i])) * u[i];
      // Far below 0 the exponent t = x / ln 2 is itself rounded.
      const double relative = 2.1 * unit_of(dtype) + 6e-7 + 6e-8 * std::abs(g[i]);
      // Below x = -88, sigmoid(x) stays at 2^-127.
      const double least = dtype == DType::f16 ? 0x1p-24 : 0x1p-127 * 300;
      ASSERT_NEAR(out[i], wanted, relative * std::abs(wanted) + 2 * least * (1 + std::abs(u[i]))) << g[i];
    }
  }
}

TEST(Producers, GiveTheSameBytesOnEveryInstructionSetAndWithAnyTeam) {
  constexpr int64_t kRows = 70;
  constexpr int64_t kCols = 611;
  const Stored x(testing::normal_values(kRows * kCols, 6), DType::f16, kRows, kCols);
  for (const ProducerKind kind : {ProducerKind::rms_norm, ProducerKind::layer_norm, ProducerKind::silu_mul}) {
    ActivationProducer producer;
    producer.kind = kind;
    if (kind == ProducerKind::silu_mul) producer.up = x.view();
    std::vector<float> expected(static_cast<size_t>(kRows * kCols));
    produce_activations(x.view(), producer, MatrixView<float>(expected.data(), kRows, kCols), 1);
    for (const int64_t target : hwy::SupportedAndGeneratedTargets()) {
      hwy::SetSupportedTargetsForTest(target);
      hwy::GetChosenTarget().Update(hwy::SupportedTargets());
      for (const int threads : {1, 2, 4}) {
        std::vector<float> out(expected.size());
        produce_activations(x.view(), producer, MatrixView<float>(out.data(), kRows, kCols), threads);
        EXPECT_EQ(std::memcmp(out.data(), expected.data(), 4 * out.size()), 0) << target << " " << threads;
      }
    }
    hwy::SetSupportedTargetsForTest(0);
    hwy::GetChosenTarget().Update(hwy::SupportedTargets());
  }
}

TEST(Producers, RefuseWrongArguments) {
  const std::vector<float> values(12);
  const MatrixView<const float> x(values.data(), 3, 4);
  std::vector<float> out(12);
  const MatrixView<float> to(out.data(), 3, 4);
  const std::vector<float> five(5);
  ActivationProducer producer;
  producer.weight = five;
  EXPECT_THROW(produce_activations(x, producer, to), InvalidArgument);
  producer.weight = {};
  producer.bias = std::span(values).first(4);
  EXPECT_THROW(produce_activations(x, producer, to), InvalidArgument);
  producer.bias = {};
  producer.epsilon = -1;
  EXPECT_THROW(produce_activations(x, producer, to), InvalidArgument);
  producer.epsilon = 0;
  EXPECT_THROW(produce_activations(x, producer, MatrixView<float>(out.data(), 4, 3)), InvalidArgument);
  producer.kind = ProducerKind::silu_mul;
  EXPECT_THROW(produce_activations(x, producer, to), InvalidArgument);
  const std::vector<uint16_t> halves(12);
  producer.up = FloatMatrix(halves.data(), DType::f16, 3, 4, 4);
  EXPECT_THROW(produce_activations(x, producer, to), TypeMismatch);
}

}  // namespace
}  // namespace quantloom
