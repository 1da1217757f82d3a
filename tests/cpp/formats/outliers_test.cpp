#include "quantloom/formats/outliers.hpp"

#include <gtest/gtest.h>

#include <cmath>

#include "quantloom/formats/uniform.hpp"
#include "quantloom/kernels/matmul.hpp"
#include "quantloom/rounding/error_feedback.hpp"
#include "quantloom/rounding/nearest.hpp"
#include "test_matrices.hpp"

namespace quantloom {
namespace {

using testing::decoded_values;
using testing::normal_values;
using testing::same_planes;

MatrixView<const float> view(const std::vector<float>& values, int64_t n, int64_t k) {
  return {values.data(), n, k};
}

// Heavy tails: cubes of normal values.
std::vector<float> cubes(int64_t count, uint64_t seed) {
  auto values = normal_values(count, seed);
  for (float& value : values) value = value * value * value;
  return values;
}

const char* const kDense[] = {"uniform:4:g32:sym", "uniform:3:channel:asym:bf16", "uniform:2:tensor:sym",
                              "codebook:nf4:g16", "vector_codebook:64x4:g32"};

TEST(Outliers, DescribesItself) {
  const auto dense = format_from_spec("uniform:4:g128");
  EXPECT_EQ(Outliers(dense, 0.5).spec(), "outliers:0.5%:uniform:4:g128:sym");
  EXPECT_EQ(Outliers(dense, int64_t{12}).spec(), "outliers:n12:uniform:4:g128:sym");
  EXPECT_EQ(Outliers(dense, int64_t{12}).to_json(),
            R"({"count":12,"dense":)" + dense->to_json() + R"(,"format":"outliers","version":1})");
  for (const char* spec : {"outliers:0.5%:uniform:4:g128:sym", "outliers:n7:codebook:nf4:g64",
                           "outliers:0.003%:vector_codebook:2x16x4:g32:bf16"}) {
    const auto format = format_from_spec(spec);
    EXPECT_EQ(format->spec(), spec);
    EXPECT_EQ(format_from_json(format->to_json())->to_json(), format->to_json());
  }
  for (const char* bad :
       {"outliers", "outliers:1%", "outliers:1:uniform:4", "outliers:0%:uniform:4", "outliers:100%:uniform:4",
        "outliers:nan%:uniform:4", "outliers:-1%:uniform:4", "outliers:n-1:uniform:4", "outliers:n:uniform:4",
        "outliers:%:uniform:4", "outliers:1%:outliers:1%:uniform:4", "outliers:1%:uniform:9",
        "outliers:1%%:uniform:4"}) {
    EXPECT_THROW(format_from_spec(bad), InvalidArgument) << bad;
  }
  const std::string json = Outliers(dense, int64_t{12}).to_json();
  const auto changed = [&](const std::string& from, const std::string& to) {
    std::string text = json;
    return text.replace(text.find(from), from.size(), to);
  };
  for (const std::string& bad : {changed("12", "-1"), changed("12", "1.5"), changed("\"count\":12,", ""),
                                 changed("\"bits\":4", "\"bits\":9"), changed(dense->to_json(), "4"),
                                 changed(dense->to_json(), json)}) {
    EXPECT_THROW(format_from_json(bad), InvalidArgument) << bad;
  }
  EXPECT_THROW(Outliers(nullptr, 1.0), InvalidArgument);
  EXPECT_THROW(Outliers(dense, NAN), InvalidArgument);
  EXPECT_THROW(Outliers(std::make_shared<const Outliers>(dense, 1.0), 1.0), InvalidArgument);
  EXPECT_THROW(static_cast<void>(Outliers(dense, int64_t{9}).planes(2, 4)), InvalidArgument);
}

TEST(Outliers, AreTheLargestWeightsAndAlmostExact) {
  for (const char* dense : kDense) {
    for (const auto& [n, k, percent] : std::vector<std::tuple<int64_t, int64_t, double>>{
             {1, 1, 50}, {67, 96, 1}, {5, 130, 10}, {64, 64, 0.01}, {3, 0, 5}, {0, 3, 5}}) {
      SCOPED_TRACE(text_of(dense, " [", n, ", ", k, "] ", percent, "%"));
      auto w = cubes(n * k, static_cast<uint64_t>(n + k));
      if (n == 67) {  // ties: the first ones
        for (size_t i = 0; i < w.size(); i += 50) w[i] = i % 100 == 0 ? 77.0F : -77.0F;
      }
      const auto format = std::make_shared<const Outliers>(format_from_spec(dense), percent);
      const auto count = static_cast<int64_t>(percent * static_cast<double>(n * k) / 100);
      const Rounded rounded = round_nearest(view(w, n, k), format);
      validate(rounded.tensor);
      EXPECT_EQ(rounded.tensor.plane("outlier_values").element_count(), count);
      std::vector<int64_t> order(w.size());
      for (size_t i = 0; i < order.size(); ++i) order[i] = static_cast<int64_t>(i);
      std::ranges::stable_sort(order, [&](int64_t a, int64_t b) {
        return std::abs(w[static_cast<size_t>(a)]) > std::abs(w[static_cast<size_t>(b)]);
      });
      order.resize(static_cast<size_t>(count));
      std::ranges::sort(order);
      const auto offsets = rounded.tensor.plane("outlier_offsets").values<int32_t>();
      const auto columns = rounded.tensor.plane("outlier_columns").values<uint16_t>();
      std::vector<int64_t> stored;
      for (int64_t row = 0; row + 1 < std::ssize(offsets); ++row) {
        for (int32_t i = offsets[static_cast<size_t>(row)]; i < offsets[static_cast<size_t>(row) + 1]; ++i) {
          stored.push_back(row * k + columns[static_cast<size_t>(i)]);
        }
      }
      EXPECT_EQ(stored, order);

      // The dense part is what the dense format makes of the matrix with zeros in their place.
      auto without = w;
      for (const int64_t at : order) without[static_cast<size_t>(at)] = 0;
      const PackedTensor expected = round_nearest(view(without, n, k), format_from_spec(dense)).tensor;
      EXPECT_TRUE(same_planes(dense_part(rounded.tensor), expected));
      const auto decoded = decoded_values(rounded.tensor);
      const auto dense_decoded = decoded_values(expected);
      for (size_t i = 0; i < w.size(); ++i) {
        if (std::ranges::binary_search(order, static_cast<int64_t>(i))) {
          EXPECT_EQ(decoded[i], dense_decoded[i] + float_from_f16(f16_from_float(w[i] - dense_decoded[i])));
        } else {
          EXPECT_EQ(decoded[i], dense_decoded[i]);
        }
      }
      for (const int threads : {1, 2, 4}) {
        EXPECT_TRUE(
            same_planes(round_nearest(view(w, n, k), format, {.threads = threads}).tensor, rounded.tensor));
      }
    }
  }
}

TEST(Outliers, ErrLessOnHeavyTailsAlsoWithFeedback) {
  constexpr int64_t kRows = 48;
  constexpr int64_t kCols = 128;
  const auto w = cubes(kRows * kCols, 3);
  const auto plain = round_nearest(view(w, kRows, kCols), format_from_spec("uniform:3:g64"));
  const auto format = format_from_spec("outliers:2%:uniform:3:g64");
  const auto rounded =
      round_nearest(view(w, kRows, kCols), format, {.scale_search = ScaleSearch{.steps = 9}});
  EXPECT_LT(rounded.report.mean_squared_error, 0.3 * plain.report.mean_squared_error);
  Hessian hessian(kCols);
  hessian.add(view(normal_values(400 * kCols, 4), 400, kCols));
  for (const char* dense : kDense) {
    ErrorFeedbackOptions options;
    options.act_order = true;
    const auto with = std::make_shared<const Outliers>(format_from_spec(dense), 2.0);
    const Rounded feedback = round_error_feedback(view(w, kRows, kCols), with, hessian, options);
    validate(feedback.tensor);
    EXPECT_LT(feedback.report.proxy_loss, feedback.report.proxy_loss_nearest) << dense;
  }
}

TEST(Outliers, RefusesHostilePlanesAndUnfittedFormats) {
  const auto w = cubes(8 * 32, 3);
  const auto format = std::make_shared<const Outliers>(format_from_spec("uniform:4:g16"), 10.0);
  const PackedTensor packed = round_nearest(view(w, 8, 32), format).tensor;
  const auto refused = [&](const char* name, const auto& change) {
    PackedTensor copy = packed;
    Tensor plane(packed.plane(name).dtype(), packed.plane(name).shape());
    std::memcpy(plane.bytes(), packed.plane(name).bytes(), static_cast<size_t>(plane.byte_count()));
    change(plane);
    copy.planes.at(name) = plane;
    try {
      validate(copy);
      ADD_FAILURE() << "accepted a bad " << name;
    } catch (const InvalidArgument& error) {
      EXPECT_NE(std::string(error.what()).find(name), std::string::npos) << error.what();
    }
  };
  refused("outlier_offsets", [](Tensor& t) { t.values<int32_t>()[0] = -1; });
  refused("outlier_offsets", [](Tensor& t) { t.values<int32_t>()[8] = 26; });
  refused("outlier_offsets", [](Tensor& t) { t.values<int32_t>()[3] = 1 << 30; });
  refused("outlier_columns", [](Tensor& t) { t.values<uint16_t>()[24] = 32; });
  refused("outlier_columns", [](Tensor& t) { std::ranges::fill(t.values<uint16_t>(), uint16_t{3}); });
  refused("outlier_values", [](Tensor& t) { t.values<uint16_t>()[2] = 0x7C00; });
  refused("scales", [](Tensor& t) { t.values<uint16_t>()[2] = 0x7C00; });
  const auto counted = std::make_shared<const Outliers>(format_from_spec("uniform:4:g16"), int64_t{3});
  EXPECT_THROW(round_nearest(view(w, 8, 32), counted), InvalidArgument);
  std::vector<float> huge(w);
  huge[5] = 1e6F;
  EXPECT_THROW(round_nearest(view(huge, 8, 32),
                             std::make_shared<const Outliers>(format_from_spec("uniform:4:g16:f32"), 1.0)),
               NumericError);
}

TEST(Outliers, ProductsEqualTheReference) {
  for (const char* dense : kDense) {
    for (const auto& [n, k, m] : std::vector<std::tuple<int64_t, int64_t, int64_t>>{
             {1, 1, 1}, {33, 96, 3}, {130, 70, 1}, {7, 64, 40}, {3, 0, 2}, {4, 8, 0}}) {
      SCOPED_TRACE(text_of(dense, " [", n, ", ", k, "], ", m, " tokens"));
      const auto w = cubes(n * k, 17);
      const auto format = std::make_shared<const Outliers>(format_from_spec(dense), 5.0);
      const PackedTensor packed = round_nearest(view(w, n, k), format).tensor;
      const auto x = normal_values(m * k, 18);
      std::vector<float> expected(static_cast<size_t>(m * n), NAN);
      matmul_reference(view(x, m, k), packed, {expected.data(), m, n});
      const auto prepared = prepare(packed);
      std::vector<float> one(expected.size(), NAN);
      matmul(view(x, m, k), *prepared, {one.data(), m, n}, {.threads = 1});
      double largest = 1e-3;
      for (const float value : expected) largest = std::max(largest, std::abs(static_cast<double>(value)));
      for (size_t i = 0; i < one.size(); ++i) ASSERT_NEAR(one[i], expected[i], 1e-5 * largest) << i;
      std::vector<float> other(expected.size(), NAN);
      matmul(view(x, m, k), *prepared, {other.data(), m, n}, {.threads = 3});
      EXPECT_EQ(one, other);
    }
  }
  const auto w = cubes(16 * 64, 17);
  const PackedTensor packed =
      round_nearest(view(w, 16, 64), format_from_spec("outliers:3%:uniform:4:g32")).tensor;
  const auto x = normal_values(2 * 64, 18);
  std::vector<float> expected(32);
  std::vector<float> y(32);
  matmul_reference(view(x, 2, 64), packed, {expected.data(), 2, 16});
  matmul(view(x, 2, 64), *prepare(packed), {y.data(), 2, 16}, {.activations = Activations::int8});
  double error = 0;
  double norm = 0;
  for (size_t i = 0; i < y.size(); ++i) {
    error += std::pow(static_cast<double>(y[i]) - expected[i], 2);
    norm += std::pow(static_cast<double>(expected[i]), 2);
  }
  EXPECT_LT(std::sqrt(error / norm), 0.02);
}

}  // namespace
}  // namespace quantloom
