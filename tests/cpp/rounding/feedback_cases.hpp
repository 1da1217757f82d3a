// Matrices, Hessians and small formats for the tests of error feedback.
#pragma once

#include <cmath>
#include <limits>
#include <memory>
#include <vector>

#include "quantloom/calibration/hessian.hpp"
#include "quantloom/formats/format.hpp"
#include "quantloom/random.hpp"

namespace quantloom::feedback_cases {

inline std::vector<float> normal_matrix(int64_t rows, int64_t cols, uint64_t seed) {
  const CounterRandom random(seed);
  std::vector<float> values(static_cast<size_t>(rows * cols));
  for (int64_t i = 0; i < rows * cols; ++i)
    values[static_cast<size_t>(i)] = static_cast<float>(random.normal(i));
  return values;
}

inline FloatMatrix view(const std::vector<float>& values, int64_t rows, int64_t cols) {
  return MatrixView<const float>(values.data(), rows, cols);
}

// Inputs of uneven energy that depend on one another, like a trained layer's.
inline std::vector<float> correlated_inputs(int64_t tokens, int64_t k, uint64_t seed) {
  std::vector<float> x = normal_matrix(tokens, k, seed);
  const CounterRandom random(seed + 1);
  for (int64_t t = 0; t < tokens; ++t) {
    float* row = x.data() + t * k;
    const auto shared = static_cast<float>(random.normal(static_cast<uint64_t>(t)));
    for (int64_t j = 0; j < k; ++j) {
      const auto energy =
          static_cast<float>(std::exp(random.normal(static_cast<uint64_t>(tokens + j)) * 0.7));
      const float neighbour = j > 0 ? row[j - 1] : 0.0F;
      row[j] = energy * (row[j] + shared) + 0.5F * neighbour;
    }
  }
  return x;
}

inline Hessian correlated_hessian(int64_t tokens, int64_t k, uint64_t seed) {
  const std::vector<float> x = correlated_inputs(tokens, k, seed);
  Hessian hessian(k);
  hessian.add(view(x, tokens, k), 1);
  return hessian;
}

inline Hessian identity_hessian(int64_t k) {
  std::vector<double> sum(static_cast<size_t>(k * k), 0.0);
  for (int64_t i = 0; i < k; ++i) sum[static_cast<size_t>(i * k + i)] = 1;
  return {MatrixView<const double>(sum.data(), k, k), 1};
}

// A format that takes two columns at once: the nearest of 24 points in the plane, times a scale per row.
class PairFormat final : public Format {
 public:
  static constexpr int kPoints = 24;

  std::string_view name() const override { return "pairs"; }
  std::string spec() const override { return "pairs"; }
  std::string to_json() const override { return "{}"; }
  std::vector<PlaneSpec> planes(int64_t n, int64_t k) const override {
    return {{"codes", DType::u8, {n, k / 2}, false}, {"scales", DType::f32, {n, 1}, false}};
  }
  void validate_values(const PackedTensor&) const override {}
  void decode(const PackedTensor& packed, int64_t first_row, MatrixView<float> out) const override {
    const auto codes = packed.plane("codes").values<uint8_t>();
    const auto scales = packed.plane("scales").values<float>();
    for (int64_t r = 0; r < out.rows(); ++r) {
      const auto row = static_cast<size_t>(first_row + r);
      for (int64_t j = 0; j < packed.k; ++j) {
        const int code = codes[row * static_cast<size_t>(packed.k / 2) + static_cast<size_t>(j / 2)];
        out(r, j) = scales[row] * (j % 2 == 0 ? point_x(code) : point_y(code));
      }
    }
  }
  std::unique_ptr<ColumnEncoder> column_encoder(std::shared_ptr<const Format> self, int64_t n, int64_t k,
                                                std::span<const int32_t>) const override {
    return std::make_unique<Encoder>(std::move(self), n, k);
  }

  // A sunflower: even density in a disc.
  static float point_x(int code) { return radius(code) * std::cos(2.3999632F * static_cast<float>(code)); }
  static float point_y(int code) { return radius(code) * std::sin(2.3999632F * static_cast<float>(code)); }

  // The two smallest distances of (x, y) to points; the code of the nearest.
  static int nearest(double x, double y, double* margin) {
    int best = 0;
    double best_distance = std::numeric_limits<double>::infinity();
    double second = best_distance;
    for (int code = 0; code < kPoints; ++code) {
      const double distance = std::hypot(x - point_x(code), y - point_y(code));
      if (distance < best_distance) {
        second = best_distance;
        best_distance = distance;
        best = code;
      } else if (distance < second) {
        second = distance;
      }
    }
    if (margin != nullptr) *margin = second - best_distance;
    return best;
  }

 private:
  static float radius(int code) { return 0.2F * std::sqrt(static_cast<float>(code) + 0.5F); }

  class Encoder final : public ColumnEncoder {
   public:
    Encoder(std::shared_ptr<const Format> self, int64_t n, int64_t k)
        : k_(k), codes_(DType::u8, {n, k / 2}), scales_(DType::f32, {n, 1}) {
      packed_.format = std::move(self);
      packed_.n = n;
      packed_.k = k;
    }
    int64_t columns_per_step() const override { return 2; }
    int64_t group_count() const override { return 1; }
    int64_t group_size() const override { return k_; }
    bool parameters_span_rows() const override { return false; }
    void fit(int64_t, int64_t first_row, MatrixView<const float> values, std::span<const float>) override {
      for (int64_t r = 0; r < values.cols(); ++r) {
        float largest = 0;
        for (int64_t c = 0; c < values.rows(); ++c) largest = std::max(largest, std::abs(values(c, r)));
        scales_.values<float>()[static_cast<size_t>(first_row + r)] = largest > 0 ? largest : 1.0F;
      }
    }
    void encode(int64_t column, int64_t first_row, MatrixView<const float> values,
                MatrixView<float> decoded) override {
      for (int64_t r = 0; r < values.cols(); ++r) {
        const auto row = static_cast<size_t>(first_row + r);
        const float scale = scales_.values<float>()[row];
        const int code = nearest(double{values(0, r)} / scale, double{values(1, r)} / scale, nullptr);
        codes_.values<uint8_t>()[row * static_cast<size_t>(k_ / 2) + static_cast<size_t>(column / 2)] =
            static_cast<uint8_t>(code);
        decoded(0, r) = scale * point_x(code);
        decoded(1, r) = scale * point_y(code);
      }
    }
    PackedTensor finish(int) override {
      packed_.planes.emplace("codes", codes_);
      packed_.planes.emplace("scales", scales_);
      return packed_;
    }

   private:
    int64_t k_;
    Tensor codes_;
    Tensor scales_;
    PackedTensor packed_;
  };
};

}  // namespace quantloom::feedback_cases
