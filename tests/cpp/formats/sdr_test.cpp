#include "quantloom/formats/sdr.hpp"

#include <gtest/gtest.h>

#include <cmath>
#include <cstring>
#include <limits>

#include "quantloom/activations/quantized_activations.hpp"
#include "quantloom/formats/bit_packing.hpp"
#include "quantloom/formats/uniform.hpp"
#include "quantloom/kernels/matmul.hpp"
#include "quantloom/rounding/error_feedback.hpp"
#include "quantloom/rounding/nearest.hpp"
#include "test_matrices.hpp"

namespace quantloom {
namespace {

using testing::decoded_values;
using testing::normal_values;

MatrixView<const float> view(const std::vector<float>& values, int64_t n, int64_t k) {
  return {values.data(), n, k};
}

std::vector<int> codes_of(const PackedTensor& packed, int64_t row, int bits) {
  const int64_t words = packed.plane("codes").shape()[1];
  std::vector<uint8_t> codes(static_cast<size_t>(packed.k));
  unpack_bits(packed.plane("codes").values<uint32_t>().subspan(static_cast<size_t>(row * words),
                                                               static_cast<size_t>(words)),
              bits, 0, codes);
  std::vector<int> result;
  for (const uint8_t code : codes) result.push_back(code >= 1 << (bits - 1) ? code - (1 << bits) : code);
  return result;
}

std::vector<uint8_t> shifts_of(const PackedTensor& packed, int64_t row, const Sdr& format) {
  const int64_t words = packed.plane("shifts").shape()[1];
  std::vector<uint8_t> shifts(static_cast<size_t>(format.group_count(packed.k)));
  unpack_bits(packed.plane("shifts").values<uint32_t>().subspan(static_cast<size_t>(row * words),
                                                                static_cast<size_t>(words)),
              format.shift_bits(), 0, shifts);
  return shifts;
}

// The closed form, in integers and division alone.
struct Cut {
  int shift;
  std::vector<int> codes;
};
Cut closed_form(const std::vector<int>& integers, int bits) {
  int largest = 0;
  for (const int q : integers) largest = std::max(largest, std::abs(q));
  int length = 0;
  for (int m = largest; m > 0; m /= 2) ++length;
  Cut cut{std::max(0, length - (bits - 1)), {}};
  for (const int q : integers) {
    const int unit = 1 << cut.shift;
    int below = q >= 0 ? q / unit : -((-q + unit - 1) / unit);
    const int rest = q - below * unit;
    if (2 * rest > unit || (2 * rest == unit && below % 2 != 0)) ++below;
    cut.codes.push_back(std::min(std::max(below, -(1 << (bits - 1))), (1 << (bits - 1)) - 1));
  }
  return cut;
}

// A million groups of integers: each row holds 127 in a group of its own, so that its scale is exact.
TEST(Sdr, EqualsTheClosedFormOnAMillionGroups) {
  constexpr int64_t kGroups = 100000;
  constexpr int64_t kRow = 1000;  // groups in a row
  const CounterRandom random(17);
  uint64_t at = 0;
  int64_t groups = 0;
  std::vector<int64_t> seen(8);
  for (const int64_t size : {8, 16, 32, 64, 128}) {
    for (const int bits : {4, 3}) {
      const int64_t n = kGroups / kRow;
      const int64_t k = (kRow + 1) * size;
      std::vector<float> w(static_cast<size_t>(n * k));
      for (int64_t r = 0; r < n; ++r) {
        for (int64_t g = 0; g <= kRow; ++g) {
          // Groups of all magnitudes, zeros among them.
          const auto most = static_cast<uint64_t>(1) << random.below(at++, 8);
          for (int64_t c = 0; c < size; ++c) {
            const auto q =
                static_cast<int64_t>(random.below(at++, 2 * most - 1)) - static_cast<int64_t>(most - 1);
            w[static_cast<size_t>(r * k + g * size + c)] = static_cast<float>(q) * 0.25F;
          }
        }
        w[static_cast<size_t>(r * k + kRow * size)] = 127 * 0.25F;
      }
      const auto format = std::make_shared<const Sdr>(bits, size);
      const PackedTensor packed = round_nearest(view(w, n, k), format, {.threads = 2}).tensor;
      for (int64_t r = 0; r < n; ++r) {
        ASSERT_EQ(float_from_f16(packed.plane("scales").values<uint16_t>()[static_cast<size_t>(r)]), 0.25F);
        const std::vector<int> codes = codes_of(packed, r, bits);
        const std::vector<uint8_t> shifts = shifts_of(packed, r, *format);
        for (int64_t g = 0; g < kRow; ++g, ++groups) {
          std::vector<int> integers;
          for (int64_t c = 0; c < size; ++c) {
            integers.push_back(static_cast<int>(4 * w[static_cast<size_t>(r * k + g * size + c)]));
          }
          const Cut expected = closed_form(integers, bits);
          ASSERT_EQ(shifts[static_cast<size_t>(g)], expected.shift);
          ASSERT_TRUE(std::equal(expected.codes.begin(), expected.codes.end(), codes.begin() + g * size));
          ++seen[static_cast<size_t>(expected.shift)];
        }
      }
    }
  }
  EXPECT_EQ(groups, 1000000);
  for (int shift = 0; shift <= 5; ++shift) EXPECT_GT(seen[static_cast<size_t>(shift)], 1000) << shift;
}

TEST(Sdr, BitsAreThoseOfTheFormula) {
  for (const auto& [size, published] :
       {std::pair<int64_t, double>{8, 4.375}, {16, 4.19}, {32, 4.10}, {64, 4.05}, {128, 4.03}}) {
    const Sdr format(4, size);
    EXPECT_EQ(format.shift_bits(), 3);
    EXPECT_NEAR(format.average_bits(4096), published, 0.0055) << size;
    const std::vector<float> w = normal_values(4 * 4096, 3);
    const PackedTensor packed = round_nearest(view(w, 4, 4096), std::make_shared<const Sdr>(format)).tensor;
    EXPECT_DOUBLE_EQ(packed.bits_per_weight(), format.average_bits(4096)) << size;
  }
}

TEST(Sdr, DecodesItsPlanes) {
  const int64_t n = 37;
  const int64_t k = 91;
  for (const char* spec : {"sdr:4:g16", "sdr:2:g8:bf16", "sdr:7:g24:f32", "sdr:3:g200"}) {
    const auto format = format_from_spec(spec);
    const auto& sdr = dynamic_cast<const Sdr&>(*format);
    std::vector<float> w = normal_values(n * k, 11);
    for (int64_t c = 0; c < k; ++c) w[static_cast<size_t>(5 * k + c)] = 0;  // a row of zeros
    const Rounded rounded = round_nearest(view(w, n, k), format);
    validate(rounded.tensor);
    const std::vector<float> decoded = decoded_values(rounded.tensor);
    for (int64_t r = 0; r < n; ++r) {
      const auto bits =
          rounded.tensor.plane("scales").dtype() == DType::f32
              ? rounded.tensor.plane("scales").values<float>()[static_cast<size_t>(r)]
          : sdr.scale_dtype == DType::f16
              ? float_from_f16(rounded.tensor.plane("scales").values<uint16_t>()[static_cast<size_t>(r)])
              : float_from_bf16(rounded.tensor.plane("scales").values<uint16_t>()[static_cast<size_t>(r)]);
      std::vector<int> base;
      for (int64_t c = 0; c < k; ++c) {
        const float steps = w[static_cast<size_t>(r * k + c)] / bits;
        base.push_back(static_cast<int>(std::clamp(std::nearbyint(steps), -127.0F, 127.0F)));
      }
      const std::vector<int> codes = codes_of(rounded.tensor, r, sdr.bits);
      const std::vector<uint8_t> shifts = shifts_of(rounded.tensor, r, sdr);
      for (int64_t c = 0; c < k; ++c) {
        const int64_t g = c / sdr.columns_per_group(k);
        const int64_t begin = g * sdr.columns_per_group(k);
        const int64_t end = std::min(k, begin + sdr.columns_per_group(k));
        const Cut cut = closed_form({base.begin() + begin, base.begin() + end}, sdr.bits);
        ASSERT_EQ(codes[static_cast<size_t>(c)], cut.codes[static_cast<size_t>(c - begin)]) << spec;
        ASSERT_EQ(shifts[static_cast<size_t>(g)], cut.shift) << spec;
        const float value = bits * static_cast<float>(codes[static_cast<size_t>(c)] * (1 << cut.shift));
        ASSERT_EQ(decoded[static_cast<size_t>(r * k + c)], value) << spec;
      }
    }
  }
}

TEST(Sdr, ConvertsToUniformBitForBit) {
  const std::vector<float> w = normal_values(23 * 200, 5);
  Hessian hessian(200);
  const std::vector<float> x = normal_values(500 * 200, 6);
  hessian.add(view(x, 500, 200));
  for (const char* spec : {"sdr:4:g16", "sdr:3:g32:bf16", "sdr:7:g8:f32", "sdr:4:g48"}) {
    for (const bool scattered : {false, true}) {
      ErrorFeedbackOptions options;
      options.static_groups = !scattered;
      const PackedTensor packed =
          round_error_feedback(view(w, 23, 200), format_from_spec(spec), hessian, options).tensor;
      EXPECT_EQ(packed.planes.contains("group_index"), scattered);
      validate(packed);
      for (const bool by_groups : {false, true}) {
        const PackedTensor uniform = sdr_to_uniform(packed, by_groups);
        validate(uniform);
        EXPECT_EQ(decoded_values(uniform), decoded_values(packed)) << spec;
      }
    }
  }
  EXPECT_THROW(
      sdr_to_uniform(round_nearest(view(w, 23, 200), format_from_spec("uniform:4:g16")).tensor, true),
      InvalidArgument);
}

TEST(Sdr, FeedbackAndScaleSearchErrLess) {
  const int64_t n = 64;
  const int64_t k = 128;
  std::vector<float> x = normal_values(600 * k, 8);
  for (int64_t t = 0; t < 600; ++t) {
    for (int64_t j = 1; j < k; ++j)
      x[static_cast<size_t>(t * k + j)] += 0.8F * x[static_cast<size_t>(t * k + j - 1)];
  }
  Hessian hessian(k);
  hessian.add(view(x, 600, k));
  const std::vector<float> w = normal_values(n * k, 9);
  const auto format = format_from_spec("sdr:4:g32");
  const auto loss = [&](const Rounded& rounded) { return rounded.report.proxy_loss; };
  NearestOptions options;
  options.hessian = &hessian;
  const double nearest = loss(round_nearest(view(w, n, k), format, options));
  options.scale_search = ScaleSearch{.steps = 20, .smallest = 0.4};
  const double searched = loss(round_nearest(view(w, n, k), format, options));
  const Rounded fed = round_error_feedback(view(w, n, k), format, hessian, {});
  EXPECT_LT(searched, 0.99 * nearest);
  EXPECT_LT(loss(fed), 0.7 * nearest);
  EXPECT_NEAR(fed.report.proxy_loss_nearest, nearest, 1e-9 * nearest);
  // The same bytes whatever the threads.
  ErrorFeedbackOptions three;
  three.threads = 3;
  EXPECT_TRUE(
      testing::same_planes(fed.tensor, round_error_feedback(view(w, n, k), format, hessian, three).tensor));
}

TEST(Sdr, MultipliesFloatsAndIntegers) {
  const int64_t n = 45;
  const int64_t k = 300;
  const int64_t m = 7;
  const std::vector<float> w = normal_values(n * k, 21);
  const std::vector<float> x = normal_values(m * k, 22);
  for (const char* spec : {"sdr:4:g8", "sdr:4:g16", "sdr:4:g32", "sdr:3:g96:f32", "sdr:6:g64", "sdr:2:g7"}) {
    const PackedTensor packed = round_nearest(view(w, n, k), format_from_spec(spec)).tensor;
    const auto prepared = prepare(packed);
    std::vector<float> expected(static_cast<size_t>(m * n));
    matmul_reference(view(x, m, k), packed, {expected.data(), m, n});
    std::vector<float> y(expected.size());
    matmul(view(x, m, k), *prepared, {y.data(), m, n});
    for (size_t i = 0; i < y.size(); ++i) ASSERT_NEAR(y[i], expected[i], 1e-3) << spec;
    for (const char* activations : {"int8:token", "int8:token:asym", "sdr4:g32:b16"}) {
      const ActivationFormat format = activation_format_from_spec(activations);
      EXPECT_TRUE(matmul_is_integer(*prepared, format)) << spec << " " << activations;
      std::vector<float> rounded(x.size());
      round_activations(view(x, m, k), format, {rounded.data(), m, k});
      matmul_reference(view(rounded, m, k), packed, {expected.data(), m, n});
      matmul(view(x, m, k), *prepared, {y.data(), m, n}, format);
      for (size_t i = 0; i < y.size(); ++i)
        ASSERT_NEAR(y[i], expected[i], 1e-3) << spec << " " << activations;
    }
  }
}

TEST(Sdr, RefusesWhatItDoesNotUnderstand) {
  for (const char* spec : {"sdr", "sdr:1", "sdr:8", "sdr:4:g0", "sdr:4:channel", "sdr:4:tensor",
                           "sdr:4:g8:g8", "sdr:4:asym", "sdr:x"}) {
    EXPECT_THROW(format_from_spec(spec), InvalidArgument) << spec;
  }
  EXPECT_EQ(format_from_spec("sdr:4")->spec(), "sdr:4:g16");
  const std::string good = Sdr(4, 16).to_json();
  EXPECT_EQ(good,
            R"({"base_bits":8,"bits":4,"format":"sdr","group_size":16,"scale_dtype":"float16","version":1})");
  EXPECT_EQ(format_from_json(good)->to_json(), good);
  for (const auto& [from, to] :
       std::vector<std::pair<std::string, std::string>>{{"\"base_bits\":8", "\"base_bits\":16"},
                                                        {"\"bits\":4", "\"bits\":8"},
                                                        {"16", "0"},
                                                        {"float16", "int8"},
                                                        {"\"version\":1", "\"version\":2"}}) {
    std::string text = good;
    text.replace(text.find(from), from.size(), to);
    EXPECT_ANY_THROW(format_from_json(text)) << text;
  }
  const std::vector<float> w = normal_values(4 * 40, 2);
  PackedTensor packed = round_nearest(view(w, 4, 40), format_from_spec("sdr:4:g16")).tensor;
  packed.planes.at("shifts").values<uint32_t>()[1] = 5;  // 3 bits hold it, no group has it
  EXPECT_THROW(validate(packed), InvalidArgument);
  packed.planes.at("shifts").values<uint32_t>()[1] = 1U << 9;  // behind the third group
  EXPECT_THROW(validate(packed), InvalidArgument);
  const auto format = std::make_shared<const Sdr>(4, 16);
  EXPECT_THROW(format->column_encoder(format, 4, 40, {}), InvalidArgument);
  std::vector<float> large(32, 1e7F);
  EXPECT_THROW(round_nearest(view(large, 2, 16), format), NumericError);
  EXPECT_NO_THROW(round_nearest(view(large, 2, 16), format_from_spec("sdr:4:g16:f32")));
}

}  // namespace
}  // namespace quantloom
