#include "quantloom/io/aqlm.hpp"

#include <gtest/gtest.h>

#include "quantloom/formats/additive.hpp"
#include "quantloom/rounding/nearest.hpp"
#include "test_matrices.hpp"

namespace quantloom {
namespace {

using testing::decoded_values;
using testing::normal_values;
using testing::same_planes;

PackedTensor rounded(const char* spec, int64_t n, int64_t k) {
  const std::vector<float> w = normal_values(n * k, 5);
  return round_nearest(MatrixView<const float>(w.data(), n, k), format_from_spec(spec)).tensor;
}

TEST(Aqlm, ComesBackAndDecodesAsTheLayoutSays) {
  for (const char* spec : {"additive:2x8:g8", "additive:1x10:g4", "additive:3x3:g2x4", "additive:1x16:g2"}) {
    const int64_t n = 6;
    const int64_t k = 24;
    const PackedTensor packed = rounded(spec, n, k);
    const auto& format = dynamic_cast<const Additive&>(*packed.format);
    auto tensors = to_aqlm(packed);
    ASSERT_EQ(tensors.size(), 3U);
    const Tensor& codes = tensors.at("codes");
    const Tensor& tables = tensors.at("codebooks");
    const Tensor& scales = tensors.at("scales");
    const int64_t og = format.out_group;
    const int64_t g = format.in_group;
    EXPECT_EQ(codes.dtype(), format.bits <= 8 ? DType::i8 : DType::i16);
    EXPECT_EQ(codes.shape(), (std::vector<int64_t>{n / og, k / g, format.codebooks}));
    EXPECT_EQ(tables.shape(), (std::vector<int64_t>{format.codebooks, format.entries(), og, g}));
    EXPECT_EQ(scales.shape(), (std::vector<int64_t>{n / og, 1, 1, 1}));
    // scale * sum over tables of table[code modulo 2^bits]
    const std::vector<float> decoded = decoded_values(packed);
    for (int64_t r = 0; r < n; ++r) {
      for (int64_t c = 0; c < k; ++c) {
        float sum = 0;
        for (int64_t m = 0; m < format.codebooks; ++m) {
          const int64_t at = (r / og * (k / g) + c / g) * format.codebooks + m;
          const int64_t stored = format.bits <= 8 ? codes.values<int8_t>()[at] : codes.values<int16_t>()[at];
          const int64_t code = (stored + 65536) % format.entries();
          sum += float_from_f16(
              tables.values<uint16_t>()[((m * format.entries() + code) * og + r % og) * g + c % g]);
        }
        ASSERT_EQ(decoded[r * k + c], sum * float_from_f16(scales.values<uint16_t>()[r / og]));
      }
    }
    EXPECT_TRUE(same_planes(packed, from_aqlm(tensors)));
    EXPECT_EQ(from_aqlm(tensors).format->to_json(), format.to_json());
  }
}

TEST(Aqlm, HasNumbersWithoutLevels) {
  const PackedTensor packed = rounded("additive:2x5:g4:s2:t3", 6, 24);
  ASSERT_TRUE(packed.planes.contains("codebook_levels"));
  const PackedTensor back = from_aqlm(to_aqlm(packed));
  EXPECT_EQ(back.format->spec(), "additive:2x5:g4");
  EXPECT_EQ(decoded_values(back), decoded_values(packed));
}

TEST(Aqlm, RefusesWhatItCannotHold) {
  for (const char* spec :
       {"additive:2x4:g8:bf16", "additive:2x4:g8:scale16", "additive:2x4:g8:scale8:s1", "uniform:4:g32"}) {
    EXPECT_THROW(to_aqlm(rounded(spec, 4, 32)), Unsupported) << spec;
  }
  EXPECT_THROW(to_aqlm(rounded("additive:2x4:g8", 4, 33)), Unsupported);
  EXPECT_THROW(to_aqlm(rounded("additive:2x4:g2x8", 5, 32)), Unsupported);
  EXPECT_THROW(to_aqlm(rounded("additive:2x4:g8", 0, 32)), Unsupported);
  const auto good = to_aqlm(rounded("additive:2x4:g8", 4, 32));
  const auto with = [&](const std::string& name, Tensor tensor) {
    auto tensors = good;
    tensors[name] = std::move(tensor);
    return tensors;
  };
  EXPECT_THROW(from_aqlm({}), InvalidArgument);
  auto more = good;
  more.emplace("bias", Tensor(DType::f16, {4}));
  EXPECT_THROW(from_aqlm(more), InvalidArgument);
  EXPECT_THROW(from_aqlm(with("codes", Tensor(DType::i16, {4, 4, 2}))), TypeMismatch);
  EXPECT_THROW(from_aqlm(with("codes", Tensor(DType::i8, {4, 4, 3}))), InvalidArgument);
  EXPECT_THROW(from_aqlm(with("codes", Tensor(DType::i8, {4, 8}))), InvalidArgument);
  EXPECT_THROW(from_aqlm(with("scales", Tensor(DType::f16, {4, 1}))), InvalidArgument);
  EXPECT_THROW(from_aqlm(with("scales", Tensor(DType::f32, {4, 1, 1, 1}))), TypeMismatch);
  for (const std::vector<int64_t>& shape : {std::vector<int64_t>{2, 16, 8},
                                            {2, 15, 1, 8},
                                            {9, 16, 1, 8},
                                            {2, 16, 4, 8},
                                            {2, 1, 1, 8},
                                            {2, 16, 0, 8}}) {
    EXPECT_THROW(from_aqlm(with("codebooks", Tensor(DType::f16, shape))), InvalidArgument);
  }
  Tensor codes = Tensor(DType::i8, {4, 4, 2});
  codes.values<int8_t>()[5] = -1;  // 255
  EXPECT_THROW(from_aqlm(with("codes", codes)), InvalidArgument);
  Tensor scales = Tensor(DType::f16, {4, 1, 1, 1});
  scales.values<uint16_t>()[2] = 0x7c00;
  EXPECT_THROW(from_aqlm(with("scales", scales)), InvalidArgument);
}

}  // namespace
}  // namespace quantloom
