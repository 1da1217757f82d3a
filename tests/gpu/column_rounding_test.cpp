// Binary coding and bilevel grids on the device against the CPU, and the search for scales by output error.
#include <gtest/gtest.h>

#include <array>
#include <cmath>
#include <limits>

#include "quantloom/formats/bcq.hpp"
#include "quantloom/formats/codebook.hpp"
#include "quantloom/formats/spqr.hpp"
#include "quantloom/rounding/channel_scales.hpp"
#include "quantloom/rounding/error_feedback.hpp"
#include "quantloom/rounding/nearest.hpp"
#include "rounding/feedback_cases.hpp"
#include "rounding_cases.hpp"

namespace quantloom {
namespace {

using feedback_cases::correlated_hessian;
using feedback_cases::normal_matrix;

constexpr std::array<DType, 3> kFloatTypes = {DType::f32, DType::f16, DType::bf16};

class ColumnRoundingCuda : public ::testing::Test {
 protected:
  void SetUp() override {
    if (!has_cuda_device()) GTEST_SKIP() << "no CUDA device in this machine";
  }
};
using ColumnRoundingCudaSmall = ColumnRoundingCuda;

void expect_same_bytes(const TwinMatrix& w, const std::string& spec,
                       const std::optional<ScaleSearch>& search = std::nullopt,
                       const Hessian* hessian = nullptr) {
  SCOPED_TRACE(text_of(spec, " [", w.host().rows(), ", ", w.host().cols(), "]", search ? ", search" : "",
                       hessian != nullptr ? ", Hessian" : ""));
  const auto format = format_from_spec(spec);
  NearestOptions cpu_options;
  cpu_options.scale_search = search;
  cpu_options.hessian = hessian;
  const Rounded cpu = round_nearest(w.host(), format, cpu_options);
  CudaNearestOptions options;
  options.scale_search = search;
  std::optional<CudaHessian> on_device;
  if (hessian != nullptr) options.hessian = &on_device.emplace(*hessian);
  PackedTensor packed = poisoned_planes(format, w.host().rows(), w.host().cols());
  const RoundingReport report = round_nearest_cuda(w.device(), packed, options, nullptr);
  EXPECT_EQ(difference(cpu.tensor, to_host(packed)), "");
  EXPECT_NEAR(report.mean_squared_error, cpu.report.mean_squared_error, 1e-6 * cpu.report.mean_squared_error);
  if (hessian == nullptr) return;
  EXPECT_NEAR(report.proxy_loss, cpu.report.proxy_loss, 1e-5 * cpu.report.proxy_loss);
  EXPECT_NEAR(report.proxy_loss_nearest, cpu.report.proxy_loss_nearest, 1e-5 * cpu.report.proxy_loss_nearest);
}

// As many decoded weights of the two as are equal.
double equal_share(const PackedTensor& a, const PackedTensor& b) {
  std::vector<float> left(static_cast<size_t>(a.n * a.k));
  std::vector<float> right(left);
  dequantize(a, {left.data(), a.n, a.k});
  dequantize(b, {right.data(), b.n, b.k});
  int64_t equal = 0;
  for (size_t i = 0; i < left.size(); ++i) equal += static_cast<int64_t>(left[i] == right[i]);
  return static_cast<double>(equal) / static_cast<double>(std::max<size_t>(left.size(), 1));
}

// On the walk sums are taken in another order, so that a value next to the middle between two codes may take
// the other one; then the rest of its row goes another way.
void expect_close(const TwinMatrix& w, const std::string& spec, const Hessian& hessian,
                  const ErrorFeedbackOptions& options, double share) {
  SCOPED_TRACE(text_of(spec, options.static_groups ? "" : ", on the walk",
                       options.act_order ? "" : ", in order", options.scale_search ? ", search" : ""));
  const auto format = format_from_spec(spec);
  const Rounded cpu = round_error_feedback(w.host(), format, hessian, options);
  const CudaHessian on_device(hessian);
  const int64_t k = w.host().cols();
  PackedTensor packed =
      poisoned_planes(format, w.host().rows(), k,
                      walk_needs_group_index(*format, k, options.act_order, options.static_groups));
  CudaErrorFeedbackOptions own;
  own.act_order = options.act_order;
  own.static_groups = options.static_groups;
  own.scale_search = options.scale_search;
  own.block = options.block;
  const RoundingReport report = round_error_feedback_cuda(w.device(), packed, on_device, own, nullptr);
  const PackedTensor found = to_host(packed);
  EXPECT_NO_THROW(validate(found));
  EXPECT_EQ(found.planes.contains("group_index"), cpu.tensor.planes.contains("group_index"));
  EXPECT_GE(equal_share(cpu.tensor, found), share);
  EXPECT_NEAR(report.proxy_loss, cpu.report.proxy_loss, 0.02 * cpu.report.proxy_loss);
  EXPECT_NEAR(report.proxy_loss_nearest, cpu.report.proxy_loss_nearest, 1e-3 * cpu.report.proxy_loss_nearest);
  // What the report says is what the planes decode to.
  std::vector<float> decoded(static_cast<size_t>(found.n * found.k));
  dequantize(found, {decoded.data(), found.n, found.k});
  const double loss = proxy_loss(w.host(), {decoded.data(), found.n, found.k}, hessian);
  EXPECT_NEAR(report.proxy_loss, loss, 1e-6 * loss);
  if (!options.static_groups) return;
  for (const auto& [name, plane] : found.planes) {
    if (name == "codes" || name == "signs") continue;
    PackedTensor left{format, found.n, k, {{name, plane}}};
    PackedTensor right{format, found.n, k, {{name, cpu.tensor.plane(name)}}};
    EXPECT_EQ(difference(left, right), "");
  }
}

const std::vector<std::string> kSpecs = {"bcq:1:g7",
                                         "bcq:2:g32:offset:f32",
                                         "bcq:3:g40",
                                         "bcq:4:g16:offset:bf16",
                                         "bcq:3:channel:r0",
                                         "bcq:5:g64:r3",
                                         "bcq:4:g32:r1:greedy",
                                         "spqr:3:g16:s3:z3:b16",
                                         "spqr:2:g20:s4:z4:b7",
                                         "spqr:4:g64:s8:z6:b64",
                                         "spqr:1:g9:s1:z2:b1"};

TEST_F(ColumnRoundingCuda, NearestMakesTheCpusBytes) {
  uint64_t seed = 1;
  for (const std::string& spec : kSpecs) {
    for (const auto& [n, k] : {std::array<int64_t, 2>{0, 5}, {4, 0}, {1, 1}, {17, 129}, {70, 333}}) {
      ++seed;
      const TwinMatrix w(normal_matrix(n, k, seed), n, k, kFloatTypes[seed % 3],
                         static_cast<int64_t>(seed % 4));
      expect_same_bytes(w, spec);
      if (n == 0 || k == 0) continue;
      const Hessian hessian = correlated_hessian(300, k, seed);
      expect_same_bytes(w, spec, std::nullopt, &hessian);
      expect_same_bytes(w, spec, ScaleSearch{9, 0.4, 2.0});
      expect_same_bytes(w, spec, ScaleSearch{9, 0.4, 2.0}, &hessian);
    }
  }
}

TEST_F(ColumnRoundingCuda, EightPlanes) {
  const TwinMatrix w(normal_matrix(5, 40, 77), 5, 40, DType::f32);
  expect_same_bytes(w, "bcq:8:g40");
  expect_same_bytes(w, "bcq:6:g20:offset:f32");
}

TEST_F(ColumnRoundingCuda, FeedbackIsCloseToTheCpus) {
  uint64_t seed = 300;
  for (const std::string spec :
       {"bcq:3:g64", "bcq:2:g40:offset", "spqr:3:g16:s3:z3:b16", "spqr:4:g50:s4:z4:b64"}) {
    for (const bool static_groups : {true, false}) {
      for (const bool act_order : {true, false}) {
        for (const bool searched : {false, true}) {
          ++seed;
          const TwinMatrix w(normal_matrix(64, 200, seed), 64, 200, kFloatTypes[seed % 3]);
          const Hessian hessian = correlated_hessian(500, 200, seed);
          ErrorFeedbackOptions options;
          options.static_groups = static_groups;
          options.act_order = act_order;
          if (searched) options.scale_search = ScaleSearch{8, 0.5, 2.0};
          expect_close(w, spec, hessian, options, static_groups ? 0.95 : 0.6);
        }
      }
    }
  }
}

TEST_F(ColumnRoundingCuda, SearchesByOutputError) {
  uint64_t seed = 500;
  for (const std::string spec : {"uniform:4:g128:asym", "uniform:3:g32:sym", "uniform:2:channel:asym",
                                 "codebook:nf4:g64", "bcq:3:g40", "spqr:3:g32:s4:z4:b16"}) {
    ++seed;
    SCOPED_TRACE(spec);
    const auto format = format_from_spec(spec);
    const TwinMatrix w(normal_matrix(48, 200, seed), 48, 200, kFloatTypes[seed % 3]);
    const Hessian hessian = correlated_hessian(500, 200, seed);
    NearestOptions cpu_options;
    cpu_options.scale_search = ScaleSearch{10, 0.55, 2.0, true};
    cpu_options.hessian = &hessian;
    const Rounded cpu = round_nearest(w.host(), format, cpu_options);
    const CudaHessian on_device(hessian);
    CudaNearestOptions options;
    options.scale_search = cpu_options.scale_search;
    options.hessian = &on_device;
    PackedTensor packed = poisoned_planes(format, 48, 200);
    const RoundingReport report = round_nearest_cuda(w.device(), packed, options, nullptr);
    // Only factors whose errors agree in float32 may change places.
    EXPECT_GE(equal_share(cpu.tensor, to_host(packed)), 0.97);
    EXPECT_NEAR(report.proxy_loss, cpu.report.proxy_loss, 1e-3 * cpu.report.proxy_loss);
    EXPECT_NEAR(report.proxy_loss_nearest, cpu.report.proxy_loss_nearest,
                1e-5 * cpu.report.proxy_loss_nearest);
    ErrorFeedbackOptions feedback;
    feedback.scale_search = cpu_options.scale_search;
    feedback.static_groups = false;
    expect_close(w, spec, hessian, feedback, 0.5);
    options.hessian = nullptr;
    EXPECT_THROW(round_nearest_cuda(w.device(), packed, options, nullptr), InvalidArgument);
  }
}

TEST_F(ColumnRoundingCuda, NamesGridsThatOverflow) {
  std::vector<float> values = normal_matrix(20, 64, 9);
  values[13 * 64 + 40] = 1e30F;
  const TwinMatrix w(values, 20, 64, DType::f32);
  for (const std::string spec : {"bcq:2:g32", "spqr:3:g16:s3:z3:b16"}) {
    const auto format = format_from_spec(spec);
    const std::string expected = message_of<NumericError>([&] { round_nearest(w.host(), format); });
    PackedTensor packed = poisoned_planes(format, 20, 64);
    EXPECT_FALSE(expected.empty());
    EXPECT_EQ(message_of<NumericError>([&] { round_nearest_cuda(w.device(), packed, {}, nullptr); }),
              expected);
  }
}

TEST_F(ColumnRoundingCuda, KeepsTheCpusOutliers) {
  uint64_t seed = 700;
  for (const std::string spec : {"outliers:1%:uniform:3:g32:asym", "outliers:0.5%:bcq:2:g20:offset",
                                 "outliers:7%:spqr:3:g16:s3:z3:b16", "outliers:90%:codebook:nf4:tensor"}) {
    for (const auto& [n, k] : {std::array<int64_t, 2>{0, 5}, {4, 0}, {1, 1}, {17, 129}, {70, 333}}) {
      ++seed;
      std::vector<float> values = normal_matrix(n, k, seed);
      if (seed % 2 == 0) {  // ties, and of magnitudes: the first ones count
        for (float& value : values) value = std::round(value * 2) / 2;
      }
      const TwinMatrix w(values, n, k, kFloatTypes[seed % 3], static_cast<int64_t>(seed % 4));
      expect_same_bytes(w, spec);
      if (n == 0 || k == 0) continue;
      const Hessian hessian = correlated_hessian(300, k, seed);
      expect_same_bytes(w, spec, ScaleSearch{9, 0.4, 2.0}, &hessian);
    }
  }
  std::vector<float> values(40, 1.0F);
  values[23] = 1e6F;
  const TwinMatrix w(values, 2, 20, DType::f32);
  PackedTensor packed = poisoned_planes(format_from_spec("outliers:3%:uniform:4:g20"), 2, 20);
  const std::string message =
      message_of<NumericError>([&] { round_nearest_cuda(w.device(), packed, {}, nullptr); });
  EXPECT_NE(message.find("outlier of row 1, column 3"), std::string::npos) << message;
}

struct OutlierCase {
  std::string spec;
  OutlierSearch search;
};

void expect_close_outliers(const OutlierCase& given, int64_t n, int64_t k, bool static_groups, bool searched,
                           uint64_t seed) {
  SCOPED_TRACE(text_of(given.spec, static_groups ? "" : ", on the walk", searched ? ", search" : ""));
  const auto format = format_from_spec(given.spec);
  const TwinMatrix w(normal_matrix(n, k, seed), n, k, kFloatTypes[seed % 3]);
  const Hessian hessian = correlated_hessian(3 * k, k, seed);
  ErrorFeedbackOptions options;
  options.static_groups = static_groups;
  options.outliers = given.search;
  if (searched) options.scale_search = ScaleSearch{8, 0.5, 2.0};
  const Rounded cpu = round_error_feedback(w.host(), format, hessian, options);
  const CudaHessian on_device(hessian);
  PackedTensor packed =
      poisoned_planes(format, n, k, walk_needs_group_index(*format, k, options.act_order, static_groups));
  CudaErrorFeedbackOptions own;
  own.static_groups = static_groups;
  own.outliers = given.search;
  own.scale_search = options.scale_search;
  const RoundingReport report = round_error_feedback_cuda(w.device(), packed, on_device, own, nullptr);
  const PackedTensor found = to_host(packed);
  EXPECT_NO_THROW(validate(found));
  const auto count = static_cast<double>(cpu.report.outliers);
  EXPECT_NEAR(static_cast<double>(report.outliers), count, 0.02 * count + 4);
  EXPECT_EQ(found.plane("outlier_values").element_count(), report.outliers);
  if (given.search.percent) {
    EXPECT_LE(report.outliers,
              static_cast<int64_t>(*given.search.percent * static_cast<double>(n * k) / 100));
  }
  if (given.search.bits) {
    EXPECT_LE(found.bits_per_weight(), *given.search.bits);
  }
  if (std::isfinite(cpu.report.outlier_threshold)) {
    EXPECT_NEAR(report.outlier_threshold, cpu.report.outlier_threshold, 0.05 * cpu.report.outlier_threshold);
  } else {
    EXPECT_EQ(report.outlier_threshold, cpu.report.outlier_threshold);
  }
  EXPECT_NEAR(report.proxy_loss, cpu.report.proxy_loss, 0.05 * cpu.report.proxy_loss);
  EXPECT_NEAR(report.proxy_loss_nearest, cpu.report.proxy_loss_nearest, 0.05 * cpu.report.proxy_loss_nearest);
  std::vector<float> decoded(static_cast<size_t>(n * k));
  dequantize(found, {decoded.data(), n, k});
  const double loss = proxy_loss(w.host(), {decoded.data(), n, k}, hessian);
  EXPECT_NEAR(report.proxy_loss, loss, 1e-6 * loss);
}

TEST_F(ColumnRoundingCuda, FindsOutliersAsOnTheCpu) {
  uint64_t seed = 800;
  const std::vector<OutlierCase> cases = {{"spqr:3:g16:s3:z3:b16", {.percent = 1.0}},
                                          {"spqr:2:g32:s3:z3:b16", {.bits = 4.0}},
                                          {"uniform:3:g40:asym", {.percent = 2.0}},
                                          {"uniform:2:channel", {.threshold = 0.2}},
                                          {"codebook:nf3:g64", {.percent = 0.0}}};
  for (const OutlierCase& given : cases) {
    for (const bool static_groups : {true, false}) {
      for (const bool searched : {true, false}) {
        expect_close_outliers(given, 96, 200, static_groups, searched, ++seed);
      }
    }
  }
  const Hessian hessian = correlated_hessian(100, 20, 1);
  const CudaHessian on_device(hessian);
  const TwinMatrix w(normal_matrix(4, 20, 2), 4, 20, DType::f32);
  CudaErrorFeedbackOptions options;
  options.outliers = OutlierSearch{.percent = 1.0};
  PackedTensor signs = poisoned_planes(format_from_spec("bcq:2:g20"), 4, 20);
  EXPECT_THROW(round_error_feedback_cuda(w.device(), signs, on_device, options, nullptr), InvalidArgument);
  PackedTensor kept = poisoned_planes(format_from_spec("outliers:1%:uniform:4:g20"), 4, 20);
  EXPECT_THROW(round_error_feedback_cuda(w.device(), kept, on_device, {}, nullptr), Unsupported);
  options.outliers = OutlierSearch{.bits = 1.0};
  PackedTensor dense = poisoned_planes(format_from_spec("uniform:4:g20"), 4, 20);
  EXPECT_THROW(round_error_feedback_cuda(w.device(), dense, on_device, options, nullptr), InvalidArgument);
}

TEST_F(ColumnRoundingCudaSmall, Outliers) {
  const TwinMatrix w(normal_matrix(5, 41, 8), 5, 41, DType::bf16, 1);
  expect_same_bytes(w, "outliers:5%:uniform:3:g16");
  for (const bool static_groups : {true, false}) {
    expect_close_outliers({"spqr:3:g20:s3:z3:b16", {.percent = 3.0}}, 37, 60, static_groups, true, 9);
  }
}

void expect_same_scales(const std::vector<std::string>& specs, int64_t n, int64_t k, int steps,
                        uint64_t seed) {
  const Hessian hessian = correlated_hessian(3 * k, k, seed);
  const CudaHessian on_device(hessian);
  std::vector<double> magnitudes = hessian.diagonal();
  for (double& magnitude : magnitudes) magnitude = std::sqrt(magnitude);
  std::vector<TwinMatrix> matrices;
  for (size_t i = 0; i < specs.size(); ++i) {
    matrices.emplace_back(normal_matrix(n, k, seed + i), n, k, kFloatTypes[i % 3], static_cast<int64_t>(i));
  }
  std::vector<ScaledLayer> layers;
  std::vector<CudaScaledLayer> own;
  for (size_t i = 0; i < specs.size(); ++i) {
    layers.push_back({matrices[i].host(), format_from_spec(specs[i])});
    own.push_back({matrices[i].device(), layers.back().format});
  }
  ChannelScaleOptions options;
  options.steps = steps;
  const ChannelScales cpu = search_channel_scales(layers, hessian, magnitudes, options);
  const ChannelScales cuda = search_channel_scales_cuda(own, on_device, magnitudes, options, nullptr);
  ASSERT_EQ(cuda.losses.size(), cpu.losses.size());
  for (size_t i = 0; i < cpu.losses.size(); ++i) {
    EXPECT_NEAR(cuda.losses[i], cpu.losses[i], 1e-5 * cpu.losses[i]) << i;
  }
  EXPECT_EQ(cuda.exponent, cpu.exponent);
  EXPECT_EQ(cuda.codes, cpu.codes);
}

TEST_F(ColumnRoundingCuda, SearchesTheCpusChannelScales) {
  expect_same_scales({"uniform:3:g32:asym"}, 70, 160, 20, 21);
  expect_same_scales({"uniform:4:tensor:sym", "codebook:nf4:g64", "uniform:2:channel"}, 33, 130, 7, 22);
  expect_same_scales({"bcq:3:g40", "spqr:3:g16:s3:z3:b16"}, 40, 120, 5, 23);
  const TwinMatrix w(normal_matrix(4, 32, 24), 4, 32, DType::f32);
  const CudaHessian hessian(correlated_hessian(100, 32, 24));
  const std::vector<double> magnitudes(32, 1.0);
  const auto search = [&](const std::string& spec, std::span<const double> given, int steps) {
    const std::vector<CudaScaledLayer> layers = {{w.device(), format_from_spec(spec)}};
    ChannelScaleOptions options;
    options.steps = steps;
    return search_channel_scales_cuda(layers, hessian, given, options, nullptr);
  };
  EXPECT_THROW(search("vector_codebook:16x2", magnitudes, 3), Unsupported);
  EXPECT_THROW(search("uniform:4:g32", std::vector<double>(31, 1.0), 3), InvalidArgument);
  EXPECT_THROW(search("uniform:4:g32", magnitudes, 0), InvalidArgument);
  EXPECT_THROW(search_channel_scales_cuda({}, hessian, magnitudes, {}, nullptr), InvalidArgument);
}

TEST_F(ColumnRoundingCudaSmall, ChannelScales) {
  expect_same_scales({"uniform:3:g16:asym", "bcq:2:g20"}, 5, 41, 3, 31);
}

TEST_F(ColumnRoundingCudaSmall, Nearest) {
  const Hessian hessian = correlated_hessian(100, 41, 3);
  for (const std::string spec :
       {"bcq:2:g7:offset", "bcq:5:channel:r2", "spqr:3:g16:s3:z3:b4", "spqr:4:g10:s5:z5:b3"}) {
    const TwinMatrix w(normal_matrix(5, 41, 3), 5, 41, DType::f16, 3);
    expect_same_bytes(w, spec);
    expect_same_bytes(w, spec, ScaleSearch{3, 0.5, 2.0}, &hessian);
  }
}

TEST_F(ColumnRoundingCudaSmall, Feedback) {
  const Hessian hessian = correlated_hessian(400, 90, 5);
  const TwinMatrix w(normal_matrix(37, 90, 6), 37, 90, DType::f32, 2);
  for (const std::string spec : {"bcq:2:g40", "spqr:3:g20:s3:z3:b16", "uniform:3:g40:asym"}) {
    for (const bool static_groups : {true, false}) {
      ErrorFeedbackOptions options;
      options.static_groups = static_groups;
      options.scale_search = ScaleSearch{3, 0.5, 2.0, true};
      expect_close(w, spec, hessian, options, 0.5);
    }
  }
}

}  // namespace
}  // namespace quantloom
