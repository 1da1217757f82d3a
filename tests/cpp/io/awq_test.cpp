#include "quantloom/io/awq.hpp"

#include <gtest/gtest.h>

#include "io/file_bytes.hpp"
#include "io/random_packed.hpp"

namespace quantloom {
namespace {

using test::random_uniform;

// The layout's definition: the nibble of output o in the words [lanes, n/8].
int slow_field(const Tensor& words, int64_t lane, int64_t o) {
  constexpr int kOutputOfNibble[8] = {0, 2, 4, 6, 1, 3, 5, 7};
  const uint32_t word = words.values<uint32_t>()[lane * words.shape()[1] + o / 8];
  for (int nibble = 0; nibble < 8; ++nibble) {
    if (kOutputOfNibble[nibble] == o % 8) return static_cast<int>(word >> (4 * nibble) & 0xFU);
  }
  return -1;
}

TEST(Awq, RoundTripsAndDecodesAsDefined) {
  uint64_t seed = 1;
  for (const bool symmetric : {true, false}) {
    for (const int64_t group_size : {int64_t{8}, int64_t{32}, Uniform::kPerChannel}) {
      for (const auto& [n, k] : std::vector<std::pair<int64_t, int64_t>>{{8, 32}, {24, 96}, {40, 160}}) {
        SCOPED_TRACE(text_of("group ", group_size, " [", n, ", ", k, "]"));
        const auto format = std::make_shared<const Uniform>(4, group_size, symmetric);
        const PackedTensor packed = random_uniform(format, n, k, ++seed);
        const auto arrays = to_awq(packed);
        const int64_t groups = format->group_count(k);
        ASSERT_EQ(arrays.at("qweight").shape(), (std::vector<int64_t>{k, n / 8}));
        ASSERT_EQ(arrays.at("qzeros").shape(), (std::vector<int64_t>{groups, n / 8}));
        ASSERT_EQ(arrays.at("scales").shape(), (std::vector<int64_t>{groups, n}));
        std::vector<float> decoded(static_cast<size_t>(n * k));
        dequantize(packed, {decoded.data(), n, k}, 1);
        const auto scales = arrays.at("scales").values<uint16_t>();
        for (int64_t o = 0; o < n; ++o) {
          for (int64_t i = 0; i < k; ++i) {
            const int64_t g = i / format->columns_per_group(k);
            const int code = slow_field(arrays.at("qweight"), i, o);
            const int zero = slow_field(arrays.at("qzeros"), g, o);
            const float value = float_from_f16(scales[g * n + o]) * static_cast<float>(code - zero);
            ASSERT_EQ(value, decoded[o * k + i]) << "row " << o << ", column " << i;
          }
        }
        const PackedTensor back = from_awq(arrays, group_size == Uniform::kPerChannel ? -1 : group_size);
        EXPECT_EQ(static_cast<const Uniform&>(*back.format).symmetric, false);
        std::vector<float> again(decoded.size());
        dequantize(back, {again.data(), n, k}, 1);
        EXPECT_EQ(again, decoded);
        const auto twice = to_awq(back);
        for (const auto& [name, tensor] : arrays) {
          EXPECT_EQ(test::bytes_of(tensor), test::bytes_of(twice.at(name))) << name;
        }
      }
    }
  }
}

// A word of known order: outputs 0 to 7 hold the codes 0 to 7.
TEST(Awq, KnownWord) {
  Tensor qweight(DType::i32, {1, 1});
  qweight.values<uint32_t>()[0] = 0x75316420U;
  Tensor qzeros(DType::i32, {1, 1});
  Tensor scales(DType::f16, {1, 8});
  for (uint16_t& scale : scales.values<uint16_t>()) scale = f16_from_float(1);
  const PackedTensor packed = from_awq({{"qweight", qweight}, {"qzeros", qzeros}, {"scales", scales}}, -1);
  std::vector<float> decoded(8);
  dequantize(packed, {decoded.data(), 8, 1}, 1);
  EXPECT_EQ(decoded, (std::vector<float>{0, 1, 2, 3, 4, 5, 6, 7}));
}

TEST(Awq, RefusesWhatTheLayoutCannotHold) {
  const auto packed = [](int bits, int64_t group, bool symmetric, DType dtype, int64_t n, int64_t k,
                         bool permuted = false) {
    return random_uniform(std::make_shared<const Uniform>(bits, group, symmetric, dtype), n, k, 3, 0,
                          permuted);
  };
  EXPECT_NO_THROW(to_awq(packed(4, 32, false, DType::f16, 8, 64)));
  EXPECT_THROW(to_awq(packed(3, 32, false, DType::f16, 8, 64)), Unsupported);
  EXPECT_THROW(to_awq(packed(4, 32, false, DType::bf16, 8, 64)), Unsupported);
  EXPECT_THROW(to_awq(packed(4, 32, false, DType::f16, 12, 64)), Unsupported);
  EXPECT_THROW(to_awq(packed(4, 32, false, DType::f16, 8, 65)), Unsupported);
  EXPECT_THROW(to_awq(packed(4, 32, false, DType::f16, 8, 64, true)), Unsupported);
  EXPECT_THROW(to_awq(packed(4, Uniform::kPerTensor, true, DType::f16, 8, 64)), Unsupported);
}

TEST(Awq, RefusesContradictingArrays) {
  const auto good = to_awq(random_uniform(std::make_shared<const Uniform>(4, 32, false), 8, 64, 5));
  EXPECT_NO_THROW(from_awq(good, 32));
  EXPECT_THROW(from_awq(good, 16), InvalidArgument);
  EXPECT_THROW(from_awq(good, -1), InvalidArgument);
  EXPECT_THROW(from_awq(good, 0), InvalidArgument);
  for (const std::string name : {"qweight", "qzeros", "scales"}) {
    auto lacking = good;
    lacking.erase(name);
    EXPECT_THROW(from_awq(lacking, 32), InvalidArgument) << name;
    auto retyped = good;
    retyped.at(name) = Tensor(DType::u8, good.at(name).shape());
    EXPECT_THROW(from_awq(retyped, 32), TypeMismatch) << name;
  }
  auto more = good;
  more.emplace("g_idx", Tensor(DType::i32, {64}));
  EXPECT_THROW(from_awq(more, 32), InvalidArgument);
}

}  // namespace
}  // namespace quantloom
