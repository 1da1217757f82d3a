// Codes in integer order and the terms of tokens, against the CPU's codes.
#include "activations/token_rounding.hpp"

#include <gtest/gtest.h>

#include <cmath>
#include <cstring>

#include "activation_values.hpp"
#include "cuda_streams.hpp"
#include "quantloom/activations/cuda_activations.hpp"

namespace quantloom {
namespace {

class TokenRounding : public ::testing::Test {
 protected:
  void SetUp() override {
    if (!has_cuda_device()) GTEST_SKIP() << "no CUDA device in this machine";
  }
};
// Few launches: this suite also runs under compute-sanitizer.
class TokenRoundingSmall : public TokenRounding {};

constexpr uint8_t kPoison = 0xA5;

struct Found {
  std::vector<std::byte> codes;
  std::vector<std::byte> terms;
  std::vector<std::byte> outliers;
};

// The format without its outliers is what the launcher takes; their columns go as places.
Found run(const ActivationValues& x, const ActivationFormat& format, const std::vector<int32_t>& columns,
          bool sums, bool overlap, cudaStream_t stream) {
  const auto outliers = static_cast<int64_t>(columns.size());
  const int64_t code_bytes = integers::order_bytes(x.m, x.k);
  const int64_t outlier_bytes = integers::order_bytes(x.m, 2 * outliers);
  const auto codes = device_bytes(code_bytes);
  const auto terms = device_bytes(16 * x.m);
  const auto values = device_bytes(outlier_bytes);
  check_cuda(cudaMemset(codes.get(), kPoison, static_cast<size_t>(code_bytes)), "poison");
  check_cuda(cudaMemset(terms.get(), kPoison, static_cast<size_t>(16 * x.m)), "poison");
  check_cuda(cudaMemset(values.get(), kPoison, static_cast<size_t>(outlier_bytes)), "poison");
  const std::vector<int32_t> index = outlier_index(columns, x.k);
  const auto device_index = device_bytes(4 * std::ssize(index));
  if (!index.empty()) upload(index.data(), device_index.get(), 4 * std::ssize(index));
  settle();
  cuda::IntegerTokens out;
  out.codes = reinterpret_cast<int8_t*>(codes.get());
  out.terms = reinterpret_cast<integers::TokenTerms*>(terms.get());
  out.sums = sums;
  if (format.has_outliers()) {
    out.outlier_index = device_index.get();
    out.outlier_values = values.get();
    out.outliers = outliers;
  }
  cuda::round_tokens(x.on_device(), format, out, stream, overlap);
  // A second launch that overlaps with the first one's end writes the same.
  if (overlap) cuda::round_tokens(x.on_device(), format, out, stream, overlap);
  check_cuda(cudaStreamSynchronize(stream), "rounding");
  return {download(codes.get(), code_bytes), download(terms.get(), 16 * x.m),
          download(values.get(), outlier_bytes)};
}

void expect_equal_to_cpu(const ActivationValues& x, const char* spec, bool overlap = false,
                         bool sums = true) {
  if (sums) expect_equal_to_cpu(x, spec, overlap, false);
  SCOPED_TRACE(text_of(spec, " [", x.m, ", ", x.k, "] ", name_of(x.dtype), " stride ", x.stride, " offset ",
                       x.offset, sums ? " sums" : ""));
  const ActivationFormat format = activation_format_from_spec(spec);
  const std::vector<int32_t> columns = format.outlier_columns.value_or(std::vector<int32_t>());
  const QuantizedActivations expected = quantize_activations(x.on_host(), format);
  const Stream stream;
  const Found found = run(x, format, columns, sums, overlap, stream);
  const int64_t padded_rows = ceil_div(x.m, int64_t{cuda::kTokenRows}) * cuda::kTokenRows;
  const int64_t row_blocks = ceil_div(x.k, int64_t{integers::kBlockBytes});
  const auto* const codes = expected.planes.at("codes").values<int8_t>().data();
  const auto scales = expected.planes.at("scales").values<float>();
  const int64_t slab_rows = ceil_div(x.m, int64_t{integers::kSlabRows}) * integers::kSlabRows;
  for (int64_t t = 0; t < slab_rows; ++t) {
    for (int64_t c = 0; c < row_blocks * integers::kBlockBytes; ++c) {
      const auto got =
          static_cast<int8_t>(found.codes[static_cast<size_t>(integers::place_of(t, c, row_blocks))]);
      const int8_t wanted = t < x.m && c < x.k ? codes[t * x.k + c]
                            : t < padded_rows  ? int8_t{0}
                                               : static_cast<int8_t>(kPoison);
      ASSERT_EQ(got, wanted) << "token " << t << ", input " << c;
    }
  }
  for (int64_t t = 0; t < x.m; ++t) {
    integers::TokenTerms terms;
    std::memcpy(&terms, found.terms.data() + 16 * t, 16);
    const auto at = static_cast<size_t>(scales.size() == 1 ? 0 : t);
    const int zero = format.symmetric ? 0 : expected.planes.at("zeros").values<int8_t>()[at];
    int32_t sum = 0;
    for (int64_t c = 0; c < x.k && sums; ++c) sum += codes[t * x.k + c] - zero;
    ASSERT_EQ(terms.scale, scales[at]) << "token " << t;
    ASSERT_EQ(terms.zero, zero) << "token " << t;
    ASSERT_EQ(terms.sum, sum) << "token " << t;
  }
  if (!format.has_outliers()) return;
  const auto outliers = static_cast<int64_t>(columns.size());
  const int64_t blocks = ceil_div(2 * outliers, int64_t{integers::kBlockBytes});
  const auto kept = expected.planes.at("outlier_values").values<float>();
  for (int64_t t = 0; t < slab_rows; ++t) {
    for (int64_t c = 0; c < blocks * integers::kBlockBytes / 2; ++c) {
      uint16_t got = 0;
      std::memcpy(&got, found.outliers.data() + integers::place_of(t, 2 * c, blocks), 2);
      uint16_t wanted = t < padded_rows ? 0 : kPoison * 0x101;
      if (t < x.m && c < outliers) {
        const float value = kept[static_cast<size_t>(t * outliers + c)];
        wanted = f16_from_float(value);
      }
      ASSERT_EQ(got, wanted) << "token " << t << ", outlier " << c;
    }
  }
}

constexpr DType kFloats[] = {DType::f16, DType::bf16, DType::f32};
constexpr const char* kSpecs[] = {"int8:token",
                                  "int8:token:asym",
                                  "int6:token",
                                  "int4:token:asym",
                                  "int4:token",
                                  "int2:token",
                                  "int8:tensor:static=0.02",
                                  "int4:tensor:asym:static=0.3,-3",
                                  "int8:tensor:static=1e-35",
                                  "int8:token:outliers=2:columns=0,3,64,65,66,67,68,69,70,71,127,140",
                                  "int6:token:asym:outliers=2:columns=5",
                                  "int8:token:outliers=2:columns="};

TEST_F(TokenRoundingSmall, EqualTheCpu) {
  uint64_t seed = 0;
  for (const DType dtype : kFloats) {
    for (const char* spec : kSpecs) {
      expect_equal_to_cpu(activation_values(18, 200, dtype, ++seed), spec);
      expect_equal_to_cpu(activation_values(7, 201, dtype, ++seed, 2, 1), spec);
    }
  }
}

TEST_F(TokenRoundingSmall, TakesNoTokensAndNoInputs) {
  for (const DType dtype : kFloats) {
    expect_equal_to_cpu(activation_values(0, 5, dtype, 1), "int8:token");
    expect_equal_to_cpu(activation_values(3, 0, dtype, 1), "int8:token:asym");
    expect_equal_to_cpu(activation_values(1, 1, dtype, 1), "int8:token");
  }
}

// Rows that a block keeps in 2, 4 and 8 vectors for each thread, and those that it reads twice; many tokens
// and few.
TEST_F(TokenRounding, EqualTheCpuForAllLengths) {
  uint64_t seed = 100;
  for (const DType dtype : kFloats) {
    for (const int64_t k : {127, 1024, 4096, 8200, 14336, 16400, 28672, 40000}) {
      for (const char* spec :
           {"int8:token", "int8:token:asym", "int4:token:outliers=3:columns=1,77,100,126"}) {
        expect_equal_to_cpu(activation_values(k > 9000 ? 5 : 19, k, dtype, ++seed), spec);
      }
      expect_equal_to_cpu(activation_values(3, k, dtype, ++seed, 1, 3), "int8:token");
    }
    for (const int64_t m : {600, 1500}) {
      expect_equal_to_cpu(activation_values(m, 1030, dtype, ++seed), "int8:token");
      expect_equal_to_cpu(activation_values(m, 1024, dtype, ++seed), "int8:token:outliers=3:columns=0,1023");
    }
  }
}

TEST_F(TokenRounding, EqualTheCpuInWholeBlocks) {
  uint64_t seed = 400;
  for (const DType dtype : {DType::f16, DType::bf16}) {
    for (const int64_t k : {128, 640, 4096, 14336, 20480, 32768, 32896}) {
      for (const int64_t m : {1, 21}) {
        for (const char* spec : {"int8:token", "int4:token", "int8:token:outliers=2:columns=0,3,64,127"}) {
          expect_equal_to_cpu(activation_values(m, k, dtype, ++seed), spec, m > 1);
        }
      }
    }
    expect_equal_to_cpu(activation_values(600, 4096, dtype, ++seed), "int8:token");
  }
}

TEST_F(TokenRounding, OverlapsWithTheKernelBeforeIt) {
  expect_equal_to_cpu(activation_values(300, 4096, DType::f16, 7), "int8:token", true);
}

// Range and quotients at the ends of float32.
TEST_F(TokenRounding, TakesTheLargestAndTheSmallestValues) {
  for (const DType dtype : {DType::f32, DType::bf16}) {
    const int64_t k = dtype == DType::f32 ? 64 : 128;
    const float largest = dtype == DType::f32 ? 0x1.fffffep126F : 0x1.fep126F;
    ActivationValues x = activation_values(6, k, dtype, 9);
    for (int64_t c = 0; c < k; ++c) {
      const auto step = static_cast<float>(c % 9 - 4);
      x.put(0, c, step * 0x1p124F);
      x.put(1, c, step * (dtype == DType::f32 ? 0x1p-147F : 0x1p-131F));
      x.put(2, c, step * 0x1p-128F);
      x.put(3, c, c == 5 ? largest : step * 0x1p-140F);
      x.put(4, c, c % 2 == 0 ? largest : -largest);
      x.put(5, c, -0.0F);
    }
    for (const char* spec : {"int8:token", "int8:token:asym", "int2:token", "int4:token:asym",
                             "int8:tensor:static=1.2e-38", "int8:tensor:static=1e38"}) {
      expect_equal_to_cpu(x, spec);
    }
  }
}

TEST_F(TokenRoundingSmall, GivesNaNToTokensThatCannotBeRounded) {
  for (const DType dtype : kFloats) {
    for (const char* spec : {"int8:token", "int4:token:asym", "int8:tensor:static=0.5"}) {
      const int64_t k = dtype == DType::bf16 ? 128 : 70;
      ActivationValues x = activation_values(5, k, dtype, 3);
      x.put(0, 69, std::numeric_limits<float>::infinity());
      x.put(2, 0, std::numeric_limits<float>::quiet_NaN());
      x.put(3, 8, -std::numeric_limits<float>::infinity());
      const ActivationFormat format = activation_format_from_spec(spec);
      const Stream stream;
      const Found found = run(x, format, {}, false, false, stream);
      for (int64_t t = 0; t < 5; ++t) {
        integers::TokenTerms terms;
        std::memcpy(&terms, found.terms.data() + 16 * t, 16);
        EXPECT_EQ(std::isnan(terms.scale), t == 0 || t == 2 || t == 3) << spec << " token " << t;
        for (int64_t c = 0; c < k && std::isnan(terms.scale); ++c) {
          ASSERT_EQ(found.codes[static_cast<size_t>(integers::place_of(t, c, 1))], std::byte{0});
        }
      }
    }
  }
}

}  // namespace
}  // namespace quantloom
