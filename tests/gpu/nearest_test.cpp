// Nearest rounding on the device against the CPU: the same bytes.
#include "quantloom/rounding/nearest.hpp"

#include <gtest/gtest.h>

#include <array>
#include <cmath>
#include <limits>

#include "quantloom/formats/codebook.hpp"
#include "rounding/feedback_cases.hpp"
#include "rounding_cases.hpp"

namespace quantloom {
namespace {

using feedback_cases::correlated_hessian;
using feedback_cases::normal_matrix;

constexpr std::array<DType, 3> kFloatTypes = {DType::f32, DType::f16, DType::bf16};

class NearestCuda : public ::testing::Test {
 protected:
  void SetUp() override {
    if (!has_cuda_device()) GTEST_SKIP() << "no CUDA device in this machine";
  }
};

class NearestCudaWidths : public NearestCuda, public ::testing::WithParamInterface<int> {};

std::shared_ptr<const Format> uniform(int bits, int64_t group, bool symmetric, DType scale_dtype) {
  return std::make_shared<const Uniform>(bits, group, symmetric, scale_dtype);
}

void expect_same_bytes(const TwinMatrix& w, const std::shared_ptr<const Format>& format,
                       const std::optional<ScaleSearch>& search = std::nullopt,
                       const Hessian* hessian = nullptr) {
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
  EXPECT_EQ(difference(cpu.tensor, to_host(packed)), "")
      << format->spec() << " " << w.host().rows() << " x " << w.host().cols();
  EXPECT_NEAR(report.mean_squared_error, cpu.report.mean_squared_error,
              1e-12 * cpu.report.mean_squared_error);
  EXPECT_EQ(report.method, cpu.report.method);
  EXPECT_EQ(report.scale_search, cpu.report.scale_search);
  EXPECT_EQ(report.tokens, cpu.report.tokens);
  EXPECT_EQ(std::isnan(report.proxy_loss), hessian == nullptr);
  if (hessian == nullptr) return;
  EXPECT_NEAR(report.proxy_loss, cpu.report.proxy_loss, 1e-5 * cpu.report.proxy_loss);
  EXPECT_NEAR(report.proxy_loss_nearest, cpu.report.proxy_loss_nearest, 1e-5 * cpu.report.proxy_loss_nearest);
}

TEST_P(NearestCudaWidths, MakesTheCpusBytes) {
  uint64_t seed = 1;
  for (const auto& [n, k] : {std::array<int64_t, 2>{1, 1}, {3, 5}, {17, 129}, {40, 200}, {130, 333}}) {
    for (const int64_t group :
         {int64_t{1}, int64_t{7}, int64_t{32}, int64_t{128}, Uniform::kPerChannel, Uniform::kPerTensor}) {
      for (const bool symmetric : {true, false}) {
        ++seed;
        const TwinMatrix w(normal_matrix(n, k, seed), n, k, kFloatTypes[seed % 3],
                           static_cast<int64_t>(seed % 4));
        expect_same_bytes(w, uniform(GetParam(), group, symmetric, kFloatTypes[seed / 3 % 3]));
      }
    }
  }
}

TEST_P(NearestCudaWidths, SearchesTheCpusScales) {
  uint64_t seed = 100;
  for (const int64_t group : {int64_t{5}, int64_t{64}, Uniform::kPerChannel, Uniform::kPerTensor}) {
    for (const bool symmetric : {true, false}) {
      for (const int steps : {1, 7, 40, 65}) {
        ++seed;
        const int64_t n = 33;
        const int64_t k = 150;
        const TwinMatrix w(normal_matrix(n, k, seed), n, k, kFloatTypes[seed % 3]);
        const auto format = uniform(GetParam(), group, symmetric, kFloatTypes[seed / 3 % 3]);
        const ScaleSearch search{steps, 0.3, 2.0};
        expect_same_bytes(w, format, search);
        const Hessian hessian = correlated_hessian(300, k, seed);
        expect_same_bytes(w, format, search, &hessian);
      }
    }
  }
}

INSTANTIATE_TEST_SUITE_P(Bits, NearestCudaWidths, ::testing::Range(1, 9));

TEST_F(NearestCuda, RoundsToCodebooks) {
  uint64_t seed = 300;
  for (const char* spec :
       {"codebook:nf4:g64", "codebook:nf4:g7:bf16", "codebook:nf4:channel:f32", "codebook:nf4:tensor"}) {
    const std::shared_ptr<const Format> format = format_from_spec(spec);
    for (const auto& [n, k] : {std::array<int64_t, 2>{1, 1}, {17, 129}, {130, 333}, {0, 5}}) {
      ++seed;
      const TwinMatrix w(normal_matrix(n, k, seed), n, k, kFloatTypes[seed % 3]);
      expect_same_bytes(w, format);
      if (n > 0) expect_same_bytes(w, format, ScaleSearch{40, 0.5, 2.0});
    }
  }
  // Tables of every width, some with fewer entries than codes, some without 0.
  for (int bits = 1; bits <= 8; ++bits) {
    for (const int entries : {2, (1 << bits) - 1, 1 << bits}) {
      if (entries < 2 || entries > 1 << bits) continue;
      std::vector<float> table;
      for (int i = 0; i < entries; ++i) table.push_back(static_cast<float>(i - entries / 3) * 0.125F);
      if (bits % 2 == 0) table[static_cast<size_t>(entries / 3)] = 0.0625F;
      const auto format = std::make_shared<const Codebook>(table, 32, DType::f16, bits);
      std::vector<float> values = normal_matrix(20, 100, ++seed);
      for (size_t c = 0; c < 40; ++c) values[c] = 0;
      expect_same_bytes(TwinMatrix(values, 20, 100, DType::f32), format, ScaleSearch{12, 0.5, 2.0});
    }
  }
}

// pow() of the device may differ from the host's in the last bit: nearly equal factors may change places.
TEST_F(NearestCuda, SearchesOtherNormsUpToTies) {
  const int64_t n = 100;
  const int64_t k = 256;
  const TwinMatrix w(normal_matrix(n, k, 7), n, k, DType::f32);
  const auto format = uniform(3, 64, true, DType::f32);
  NearestOptions cpu_options;
  cpu_options.scale_search = ScaleSearch{40, 0.4, 2.4};
  const Rounded cpu = round_nearest(w.host(), format, cpu_options);
  CudaNearestOptions options;
  options.scale_search = cpu_options.scale_search;
  PackedTensor packed = poisoned_planes(format, n, k);
  round_nearest_cuda(w.device(), packed, options, nullptr);
  const PackedTensor host = to_host(packed);
  const auto expected = cpu.tensor.plane("scales").values<float>();
  const auto got = host.plane("scales").values<float>();
  int64_t different = 0;
  for (size_t i = 0; i < expected.size(); ++i) different += static_cast<int64_t>(expected[i] != got[i]);
  EXPECT_LE(different, 4) << "of " << expected.size();
}

TEST_F(NearestCuda, TakesValuesFromSubnormalToTheEndsOfTheRange) {
  for (const double exponent : {-140.0, -30.0, 0.0, 14.0, 100.0}) {
    for (const bool symmetric : {true, false}) {
      std::vector<float> values = normal_matrix(20, 100, 11);
      for (float& value : values) value = static_cast<float>(value * std::exp2(exponent));
      for (size_t c = 0; c < 32; ++c) values[c] = 0;  // a group of zeros
      expect_same_bytes(TwinMatrix(values, 20, 100, DType::f32), uniform(4, 32, symmetric, DType::f32));
      expect_same_bytes(TwinMatrix(values, 20, 100, DType::bf16), uniform(1, 32, symmetric, DType::bf16));
    }
  }
}

TEST_F(NearestCuda, TakesEmptyMatrices) {
  for (const auto& [n, k] : {std::array<int64_t, 2>{0, 0}, {0, 7}, {7, 0}}) {
    for (const int64_t group : {int64_t{32}, Uniform::kPerTensor}) {
      const auto format = uniform(3, group, false, DType::f16);
      const Rounded cpu = round_nearest(FloatMatrix(nullptr, DType::f32, n, k, k), format);
      PackedTensor packed = poisoned_planes(format, n, k);
      round_nearest_cuda({nullptr, DType::f32, n, k, k}, packed, {}, nullptr);
      EXPECT_EQ(difference(cpu.tensor, to_host(packed)), "") << n << " x " << k;
    }
  }
}

TEST_F(NearestCuda, RefusesBadValuesWithTheCpusWords) {
  const auto format = uniform(4, 32, true, DType::f16);
  for (const float bad : {std::numeric_limits<float>::infinity(), -std::numeric_limits<float>::infinity(),
                          std::numeric_limits<float>::quiet_NaN()}) {
    for (const DType dtype : kFloatTypes) {
      TwinMatrix w(normal_matrix(30, 70, 3), 30, 70, dtype, 2);
      w.replace(17, 69, bad);
      w.replace(29, 0, bad);
      PackedTensor packed = poisoned_planes(format, 30, 70);
      const PackedTensor before = to_host(packed);
      const std::string text =
          message_of<NumericError>([&] { round_nearest_cuda(w.device(), packed, {}, nullptr); });
      EXPECT_NE(text.find("w: got "), std::string::npos) << text;
      EXPECT_NE(text.find(" at row 17, column 69, expected finite values"), std::string::npos) << text;
      EXPECT_EQ(difference(before, to_host(packed)), "");
    }
  }
  TwinMatrix large(normal_matrix(30, 70, 3), 30, 70, DType::f32);
  large.replace(12, 40, 3e6F);
  PackedTensor packed = poisoned_planes(format, 30, 70);
  const PackedTensor before = to_host(packed);
  const std::string text =
      message_of<NumericError>([&] { round_nearest_cuda(large.device(), packed, {}, nullptr); });
  EXPECT_NE(text.find("scale of row 12, group 1: got "), std::string::npos) << text;
  EXPECT_EQ(text, message_of<NumericError>([&] { round_nearest(large.host(), format); }));
  EXPECT_EQ(difference(before, to_host(packed)), "");
}

TEST_F(NearestCuda, RefusesWrongArguments) {
  const auto format = uniform(4, 32, true, DType::f16);
  const TwinMatrix w(normal_matrix(8, 64, 3), 8, 64, DType::f32);
  PackedTensor packed = poisoned_planes(format, 8, 64);
  PackedTensor narrow = poisoned_planes(format, 8, 63);
  EXPECT_THROW(round_nearest_cuda(w.device(), narrow, {}, nullptr), InvalidArgument);
  PackedTensor on_host = to_host(packed);
  EXPECT_THROW(round_nearest_cuda(w.device(), on_host, {}, nullptr), TypeMismatch);
  CudaMatrix host_matrix = w.device();
  const std::vector<float> host_values(8 * 64);
  host_matrix.data = host_values.data();
  EXPECT_THROW(round_nearest_cuda(host_matrix, packed, {}, nullptr), TypeMismatch);
  CudaMatrix short_rows = w.device();
  short_rows.stride = 63;
  EXPECT_THROW(round_nearest_cuda(short_rows, packed, {}, nullptr), InvalidArgument);
  const CudaHessian other(65);
  CudaNearestOptions options;
  options.hessian = &other;
  EXPECT_THROW(round_nearest_cuda(w.device(), packed, options, nullptr), InvalidArgument);
  const CudaHessian without_tokens(64);
  options.hessian = &without_tokens;
  EXPECT_THROW(round_nearest_cuda(w.device(), packed, options, nullptr), InvalidArgument);
  PackedTensor pairs{std::make_shared<const feedback_cases::PairFormat>(), 8, 64, {}};
  EXPECT_NE(
      message_of<Unsupported>([&] { round_nearest_cuda(w.device(), pairs, {}, nullptr); }).find("pairs"),
      std::string::npos);
}

TEST_F(NearestCuda, RunsOnAStreamOfTheCaller) {
  cudaStream_t stream = nullptr;
  check_cuda(cudaStreamCreateWithFlags(&stream, cudaStreamNonBlocking), "stream");
  const auto format = uniform(4, 128, false, DType::f16);
  const TwinMatrix w(normal_matrix(300, 500, 3), 300, 500, DType::f16);
  PackedTensor packed = poisoned_planes(format, 300, 500);
  check_cuda(cudaDeviceSynchronize(), "poison");
  round_nearest_cuda(w.device(), packed, {}, stream);
  EXPECT_EQ(difference(round_nearest(w.host(), format).tensor, to_host(packed)), "");
  check_cuda(cudaStreamDestroy(stream), "stream");
}

}  // namespace
}  // namespace quantloom
