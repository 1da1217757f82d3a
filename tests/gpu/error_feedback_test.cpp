// Error feedback on the device against the CPU. Sums are taken in another order, so that a value next to the
// middle between two codes may take the other one, and then the rest of its row goes another way.
#include "quantloom/rounding/error_feedback.hpp"

#include <gtest/gtest.h>

#include <array>
#include <cmath>

#include "quantloom/formats/bit_packing.hpp"
#include "rounding/feedback_cases.hpp"
#include "rounding_cases.hpp"

namespace quantloom {
namespace {

using feedback_cases::correlated_hessian;
using feedback_cases::correlated_inputs;
using feedback_cases::normal_matrix;

constexpr std::array<DType, 3> kFloatTypes = {DType::f32, DType::f16, DType::bf16};

class ErrorFeedbackCuda : public ::testing::Test {
 protected:
  void SetUp() override {
    if (!has_cuda_device()) GTEST_SKIP() << "no CUDA device in this machine";
  }
};

class ErrorFeedbackCudaWidths : public ErrorFeedbackCuda, public ::testing::WithParamInterface<int> {};

CudaErrorFeedbackOptions as_cuda(const ErrorFeedbackOptions& options) {
  CudaErrorFeedbackOptions result;
  result.damping = options.damping;
  result.damping_ladder = options.damping_ladder;
  result.act_order = options.act_order;
  result.static_groups = options.static_groups;
  result.block = options.block;
  result.scale_search = options.scale_search;
  result.measure_losses = options.measure_losses;
  return result;
}

struct Pair {
  Rounded cpu;
  Rounded cuda;
};

Pair round_both(const TwinMatrix& w, const std::shared_ptr<const Format>& format, const Hessian& hessian,
                const ErrorFeedbackOptions& options) {
  Pair pair;
  pair.cpu = round_error_feedback(w.host(), format, hessian, options);
  const CudaHessian on_device(hessian);
  const int64_t n = w.host().rows();
  const int64_t k = w.host().cols();
  PackedTensor packed = poisoned_planes(
      format, n, k, walk_needs_group_index(*format, k, options.act_order, options.static_groups));
  pair.cuda.report = round_error_feedback_cuda(w.device(), packed, on_device, as_cuda(options), nullptr);
  pair.cuda.tensor = to_host(packed);
  return pair;
}

int64_t equal_codes(const PackedTensor& a, const PackedTensor& b, int bits) {
  const int64_t words = packed_words(a.k, bits);
  std::vector<uint8_t> left(static_cast<size_t>(a.k));
  std::vector<uint8_t> right(left);
  int64_t equal = 0;
  for (int64_t r = 0; r < a.n; ++r) {
    const auto row = [&](const PackedTensor& packed) {
      const Tensor& plane = packed.plane("codes");
      return plane.values<uint32_t>().subspan(static_cast<size_t>(r * words), static_cast<size_t>(words));
    };
    unpack_bits(row(a), bits, 0, left);
    unpack_bits(row(b), bits, 0, right);
    for (size_t c = 0; c < left.size(); ++c) equal += static_cast<int64_t>(left[c] == right[c]);
  }
  return equal;
}

bool same_plane(const PackedTensor& a, const PackedTensor& b, const std::string& name) {
  if (a.planes.contains(name) != b.planes.contains(name)) return false;
  if (!a.planes.contains(name)) return true;
  PackedTensor left{a.format, a.n, a.k, {{name, a.plane(name)}}};
  PackedTensor right{b.format, b.n, b.k, {{name, b.plane(name)}}};
  return difference(left, right).empty();
}

// Adds up over many matrices.
struct Agreement {
  int64_t codes = 0;
  int64_t equal = 0;
  double cpu_loss = 0;
  double cuda_loss = 0;

  void add(const Pair& pair, int bits) {
    codes += pair.cpu.tensor.n * pair.cpu.tensor.k;
    equal += equal_codes(pair.cpu.tensor, pair.cuda.tensor, bits);
    // Each matrix counts alike.
    if (pair.cpu.report.proxy_loss > 0) {
      cpu_loss += 1;
      cuda_loss += pair.cuda.report.proxy_loss / pair.cpu.report.proxy_loss;
    }
  }
  void expect_close() const {
    EXPECT_GE(static_cast<double>(equal), 0.99 * static_cast<double>(codes));
    EXPECT_NEAR(cuda_loss, cpu_loss, 1e-3 * cpu_loss);
  }
};

void expect_same_report(const RoundingReport& cpu, const RoundingReport& cuda) {
  EXPECT_EQ(cuda.method, cpu.method);
  EXPECT_EQ(cuda.scale_search, cpu.scale_search);
  EXPECT_EQ(cuda.act_order, cpu.act_order);
  EXPECT_EQ(cuda.static_groups, cpu.static_groups);
  EXPECT_EQ(cuda.damping, cpu.damping);
  EXPECT_EQ(cuda.damping_tried, cpu.damping_tried);
  EXPECT_EQ(cuda.dead_columns, cpu.dead_columns);
  EXPECT_EQ(cuda.tokens, cpu.tokens);
  EXPECT_NEAR(cuda.proxy_loss_nearest, cpu.proxy_loss_nearest, 1e-5 * cpu.proxy_loss_nearest);
  EXPECT_NEAR(cuda.proxy_loss, cpu.proxy_loss, 0.02 * cpu.proxy_loss);
  EXPECT_NEAR(cuda.mean_squared_error, cpu.mean_squared_error, 0.02 * cpu.mean_squared_error);
}

TEST_P(ErrorFeedbackCudaWidths, AgreesWithTheCpuForStaticGroups) {
  Agreement agreement;
  uint64_t seed = 1000;
  for (const auto& [n, k] : {std::array<int64_t, 2>{1, 1}, {5, 16}, {33, 100}, {70, 389}, {64, 256}}) {
    for (const int64_t group :
         {int64_t{16}, int64_t{128}, int64_t{50}, Uniform::kPerChannel, Uniform::kPerTensor}) {
      for (const bool symmetric : {true, false}) {
        ++seed;
        const auto format =
            std::make_shared<const Uniform>(GetParam(), group, symmetric, kFloatTypes[seed / 3 % 3]);
        const TwinMatrix w(normal_matrix(n, k, seed), n, k, kFloatTypes[seed % 3],
                           static_cast<int64_t>(seed % 4));
        ErrorFeedbackOptions options;
        options.act_order = seed % 5 != 0;
        options.block = std::array<int64_t, 4>{128, 64, 37, 1000}[seed % 4];
        if (seed % 2 == 0) options.scale_search = ScaleSearch{20, 0.5, 2.0};
        const Pair pair = round_both(w, format, correlated_hessian(4 * k, k, seed), options);
        SCOPED_TRACE(text_of(format->spec(), " ", n, " x ", k, " seed ", seed));
        expect_same_report(pair.cpu.report, pair.cuda.report);
        EXPECT_TRUE(same_plane(pair.cpu.tensor, pair.cuda.tensor, "scales"));
        EXPECT_TRUE(same_plane(pair.cpu.tensor, pair.cuda.tensor, "zeros"));
        EXPECT_FALSE(pair.cuda.tensor.planes.contains("group_index"));
        agreement.add(pair, GetParam());
      }
    }
  }
  agreement.expect_close();
}

TEST_P(ErrorFeedbackCudaWidths, AgreesWithTheCpuForGroupsFittedOnTheWalk) {
  Agreement agreement;
  uint64_t seed = 2000;
  for (const auto& [n, k] : {std::array<int64_t, 2>{5, 16}, {33, 100}, {70, 389}}) {
    for (const int64_t group : {int64_t{1}, int64_t{16}, int64_t{24}, int64_t{128}, int64_t{200}}) {
      for (const bool symmetric : {true, false}) {
        ++seed;
        const auto format =
            std::make_shared<const Uniform>(GetParam(), group, symmetric, kFloatTypes[seed / 3 % 3]);
        const TwinMatrix w(normal_matrix(n, k, seed), n, k, kFloatTypes[seed % 3]);
        ErrorFeedbackOptions options;
        options.static_groups = false;
        options.act_order = seed % 3 != 0;
        if (seed % 2 == 0) options.scale_search = ScaleSearch{20, 0.5, 2.0};
        const Pair pair = round_both(w, format, correlated_hessian(4 * k, k, seed), options);
        SCOPED_TRACE(text_of(format->spec(), " ", n, " x ", k, " seed ", seed));
        expect_same_report(pair.cpu.report, pair.cuda.report);
        EXPECT_TRUE(same_plane(pair.cpu.tensor, pair.cuda.tensor, "group_index"));
        EXPECT_NO_THROW(validate(pair.cuda.tensor));
        agreement.add(pair, GetParam());
      }
    }
  }
  agreement.expect_close();
}

INSTANTIATE_TEST_SUITE_P(Bits, ErrorFeedbackCudaWidths, ::testing::Range(1, 9));

TEST_F(ErrorFeedbackCuda, AgreesWithTheCpuForCodebooks) {
  Agreement agreement;
  uint64_t seed = 3000;
  for (const char* spec : {"codebook:nf4:g64", "codebook:nf4:channel", "codebook:nf4:tensor:f32"}) {
    for (const bool static_groups : {true, false}) {
      ++seed;
      const TwinMatrix w(normal_matrix(70, 200, seed), 70, 200, kFloatTypes[seed % 3]);
      ErrorFeedbackOptions options;
      options.static_groups = static_groups;
      if (seed % 2 == 0) options.scale_search = ScaleSearch{20, 0.5, 2.0};
      const Pair pair = round_both(w, format_from_spec(spec), correlated_hessian(800, 200, seed), options);
      SCOPED_TRACE(text_of(spec, " seed ", seed));
      expect_same_report(pair.cpu.report, pair.cuda.report);
      EXPECT_TRUE(same_plane(pair.cpu.tensor, pair.cuda.tensor, "codebook"));
      EXPECT_TRUE(same_plane(pair.cpu.tensor, pair.cuda.tensor, "group_index"));
      agreement.add(pair, 4);
    }
  }
  agreement.expect_close();
}

TEST_F(ErrorFeedbackCuda, SetsDeadColumnsToZero) {
  const int64_t n = 40;
  const int64_t k = 150;
  std::vector<float> x = correlated_inputs(500, k, 5);
  for (int64_t t = 0; t < 500; ++t) {
    for (const int64_t dead : {0, 31, 32, 149}) x[static_cast<size_t>(t * k + dead)] = 0;
  }
  Hessian hessian(k);
  hessian.add(feedback_cases::view(x, 500, k));
  const TwinMatrix w(normal_matrix(n, k, 6), n, k, DType::f16);
  const auto format = std::make_shared<const Uniform>(4, 32, false);
  for (const bool static_groups : {true, false}) {
    ErrorFeedbackOptions options;
    options.static_groups = static_groups;
    const Pair pair = round_both(w, format, hessian, options);
    expect_same_report(pair.cpu.report, pair.cuda.report);
    EXPECT_EQ(pair.cuda.report.dead_columns, 4);
    std::vector<float> decoded(static_cast<size_t>(n * k));
    dequantize(pair.cuda.tensor, MatrixView<float>(decoded.data(), n, k));
    for (int64_t r = 0; r < n; ++r) {
      for (const int64_t dead : {0, 31, 32, 149}) EXPECT_EQ(decoded[static_cast<size_t>(r * k + dead)], 0);
    }
  }
}

TEST_F(ErrorFeedbackCuda, ClimbsTheLadder) {
  const TwinMatrix w(normal_matrix(3, 2, 6), 3, 2, DType::f32);
  const auto format = std::make_shared<const Uniform>(4, 32);
  const std::array<double, 4> nearly = {1, 1.5, 1.5, 1};
  const Hessian indefinite(MatrixView<const double>(nearly.data(), 2, 2), 1);
  const Pair pair = round_both(w, format, indefinite, {});
  EXPECT_EQ(pair.cuda.report.damping_tried, (std::vector<double>{0.01, 0.03, 0.1, 0.3, 1.0}));
  EXPECT_EQ(pair.cuda.report.damping_tried, pair.cpu.report.damping_tried);

  const std::array<double, 4> hopeless = {1, 5, 5, 1};
  const Hessian never(MatrixView<const double>(hopeless.data(), 2, 2), 1);
  const CudaHessian on_device(never);
  PackedTensor packed = poisoned_planes(format, 3, 2);
  const PackedTensor before = to_host(packed);
  const std::string text = message_of<NumericError>(
      [&] { round_error_feedback_cuda(w.device(), packed, on_device, {}, nullptr); });
  EXPECT_NE(text.find("not positive definite"), std::string::npos) << text;
  EXPECT_EQ(text, message_of<NumericError>([&] { round_error_feedback(w.host(), format, never); }));
  EXPECT_EQ(difference(before, to_host(packed)), "");
}

TEST_F(ErrorFeedbackCuda, RefusesUnusableHessiansWithTheCpusWords) {
  const TwinMatrix w(normal_matrix(3, 3, 6), 3, 3, DType::f32);
  const auto format = std::make_shared<const Uniform>(4, 32);
  const std::vector<std::array<double, 9>> sums = {
      {0, 0, 0, 0, 0, 0, 0, 0, 0},     // all dead
      {1, 0, 0, 0, -2, 0, 0, 0, 1},    // a negative diagonal entry
      {1, 0, 0.5, 0, 1, 0, 0.5, 0, 0}  // a correlation with a dead input
  };
  for (const auto& sum : sums) {
    const Hessian hessian(MatrixView<const double>(sum.data(), 3, 3), 1);
    const CudaHessian on_device(hessian);
    PackedTensor packed = poisoned_planes(format, 3, 3);
    const std::string text = message_of<NumericError>(
        [&] { round_error_feedback_cuda(w.device(), packed, on_device, {}, nullptr); });
    EXPECT_NE(text, "");
    EXPECT_EQ(text, message_of<NumericError>([&] { round_error_feedback(w.host(), format, hessian); }));
  }
}

TEST_F(ErrorFeedbackCuda, RefusesWrongArguments) {
  const TwinMatrix w(normal_matrix(8, 64, 6), 8, 64, DType::f32);
  const auto format = std::make_shared<const Uniform>(4, 32);
  const CudaHessian hessian(correlated_hessian(200, 64, 3));
  PackedTensor packed = poisoned_planes(format, 8, 64);
  CudaErrorFeedbackOptions options;
  options.damping = -1;
  EXPECT_THROW(round_error_feedback_cuda(w.device(), packed, hessian, options, nullptr), InvalidArgument);
  options = {};
  options.block = 0;
  EXPECT_THROW(round_error_feedback_cuda(w.device(), packed, hessian, options, nullptr), InvalidArgument);
  options = {};
  options.static_groups = false;  // without a plane group_index
  EXPECT_THROW(round_error_feedback_cuda(w.device(), packed, hessian, options, nullptr), InvalidArgument);
  const CudaHessian other(65);
  EXPECT_THROW(round_error_feedback_cuda(w.device(), packed, other, {}, nullptr), InvalidArgument);
  const CudaHessian empty(64);
  EXPECT_THROW(round_error_feedback_cuda(w.device(), packed, empty, {}, nullptr), InvalidArgument);
}

TEST_F(ErrorFeedbackCuda, IsDeterministic) {
  const TwinMatrix w(normal_matrix(200, 700, 6), 200, 700, DType::bf16);
  const auto format = std::make_shared<const Uniform>(3, 128, false);
  const CudaHessian hessian(correlated_hessian(1500, 700, 3));
  std::vector<PackedTensor> results;
  std::vector<double> losses;
  for (int repeat = 0; repeat < 4; ++repeat) {
    PackedTensor packed = poisoned_planes(format, 200, 700);
    losses.push_back(round_error_feedback_cuda(w.device(), packed, hessian, {}, nullptr).proxy_loss);
    results.push_back(to_host(packed));
  }
  for (size_t i = 1; i < results.size(); ++i) {
    EXPECT_EQ(difference(results[0], results[i]), "");
    EXPECT_EQ(losses[0], losses[i]);
  }
}

// Blocks, and their updates by cuBLAS, at a size where many follow one another; also much less loss than
// nearest rounding has.
TEST_F(ErrorFeedbackCuda, AgreesWithTheCpuOnALargerLayer) {
  const int64_t n = 256;
  const int64_t k = 1536;
  const TwinMatrix w(normal_matrix(n, k, 6), n, k, DType::f16);
  const auto format = std::make_shared<const Uniform>(4, 128);
  const Hessian hessian = correlated_hessian(2 * k, k, 8);
  const Pair pair = round_both(w, format, hessian, {});
  expect_same_report(pair.cpu.report, pair.cuda.report);
  Agreement agreement;
  agreement.add(pair, 4);
  EXPECT_GE(static_cast<double>(agreement.equal), 0.97 * static_cast<double>(agreement.codes));
  EXPECT_NEAR(agreement.cuda_loss, agreement.cpu_loss, 1e-3 * agreement.cpu_loss);
  EXPECT_LT(pair.cuda.report.proxy_loss, 0.8 * pair.cuda.report.proxy_loss_nearest);
}

TEST_F(ErrorFeedbackCuda, MeasuresHeldOutLosses) {
  const TwinMatrix w(normal_matrix(30, 96, 6), 30, 96, DType::f32);
  const auto format = std::make_shared<const Uniform>(4, 32);
  const Hessian hessian = correlated_hessian(400, 96, 8);
  const Hessian held_out = correlated_hessian(300, 96, 9);
  const CudaHessian device_hessian(hessian);
  const CudaHessian device_held_out(held_out);
  ErrorFeedbackOptions options;
  options.held_out = &held_out;
  const RoundingReport cpu = round_error_feedback(w.host(), format, hessian, options).report;
  CudaErrorFeedbackOptions cuda_options;
  cuda_options.held_out = &device_held_out;
  PackedTensor packed = poisoned_planes(format, 30, 96);
  const RoundingReport cuda =
      round_error_feedback_cuda(w.device(), packed, device_hessian, cuda_options, nullptr);
  EXPECT_NEAR(cuda.held_out_loss, cpu.held_out_loss, 0.02 * cpu.held_out_loss);
  EXPECT_NEAR(cuda.held_out_loss_nearest, cpu.held_out_loss_nearest, 1e-5 * cpu.held_out_loss_nearest);
  cuda_options.measure_losses = false;
  const RoundingReport without =
      round_error_feedback_cuda(w.device(), packed, device_hessian, cuda_options, nullptr);
  EXPECT_TRUE(std::isnan(without.proxy_loss) && std::isnan(without.held_out_loss));
  EXPECT_EQ(without.mean_squared_error, cuda.mean_squared_error);
}

}  // namespace
}  // namespace quantloom
