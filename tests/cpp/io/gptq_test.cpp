#include "quantloom/io/gptq.hpp"

#include <algorithm>

#include "io/file_bytes.hpp"
#include "io/random_packed.hpp"

namespace quantloom {
namespace {

using test::bytes_of;
using test::message_of;
using test::random_uniform;
using TensorMap = std::map<std::string, Tensor>;

constexpr int kWidths[] = {2, 3, 4, 8};
constexpr GptqVersion kVersions[] = {GptqVersion::v1, GptqVersion::v2};

// The layout's definition, bit by bit: code of input i and output o in column o of qweight.
int slow_weight(const Tensor& qweight, int bits, int64_t i, int64_t o) {
  int value = 0;
  for (int b = 0; b < bits; ++b) {
    const int64_t bit = i * bits + b;
    const uint32_t word = qweight.values<uint32_t>()[bit / 32 * qweight.shape()[1] + o];
    value |= static_cast<int>(word >> (bit % 32) & 1U) << b;
  }
  return value;
}
int slow_zero(const Tensor& qzeros, int bits, int64_t group, int64_t o) {
  int value = 0;
  for (int b = 0; b < bits; ++b) {
    const int64_t bit = o * bits + b;
    const uint32_t word = qzeros.values<uint32_t>()[group * qzeros.shape()[1] + bit / 32];
    value |= static_cast<int>(word >> (bit % 32) & 1U) << b;
  }
  return value;
}

std::vector<float> decoded(const PackedTensor& packed) {
  std::vector<float> values(static_cast<size_t>(packed.n * packed.k));
  dequantize(packed, {values.data(), packed.n, packed.k}, 1);
  return values;
}

GptqSettings settings_of(const Uniform& format, GptqVersion version) {
  return {format.bits, format.group_size == Uniform::kPerChannel ? -1 : format.group_size, format.symmetric,
          version};
}

TEST(Gptq, RoundTripsAndDecodesAsDefined) {
  uint64_t seed = 1;
  for (const int bits : kWidths) {
    for (const GptqVersion version : kVersions) {
      for (const bool symmetric : {true, false}) {
        for (const int64_t group_size : {int64_t{32}, int64_t{24}, int64_t{128}, Uniform::kPerChannel}) {
          for (const auto& [n, k] : std::vector<std::pair<int64_t, int64_t>>{{32, 32}, {32, 96}, {96, 160}}) {
            for (const bool permuted : {false, true}) {
              if (permuted && (group_size == Uniform::kPerChannel || group_size >= k)) continue;
              const auto format = std::make_shared<const Uniform>(bits, group_size, symmetric,
                                                                  seed % 2 == 0 ? DType::f16 : DType::bf16);
              const PackedTensor packed =
                  random_uniform(format, n, k, seed++, version == GptqVersion::v1 ? 1 : 0, permuted);
              const TensorMap tensors = to_gptq(packed, version);
              const int64_t groups = format->group_count(k);
              EXPECT_EQ(tensors.at("qweight").shape(), (std::vector<int64_t>{k * bits / 32, n}));
              EXPECT_EQ(tensors.at("qzeros").shape(), (std::vector<int64_t>{groups, n * bits / 32}));
              EXPECT_EQ(tensors.at("scales").shape(), (std::vector<int64_t>{groups, n}));
              EXPECT_EQ(tensors.at("scales").dtype(), format->scale_dtype);
              const std::vector<float> values = decoded(packed);
              for (int64_t o = 0; o < n; ++o) {
                for (int64_t i = 0; i < k; ++i) {
                  const int64_t g = tensors.at("g_idx").values<int32_t>()[i];
                  const uint16_t scale_bits = tensors.at("scales").values<uint16_t>()[g * n + o];
                  const float scale = format->scale_dtype == DType::f16 ? float_from_f16(scale_bits)
                                                                        : float_from_bf16(scale_bits);
                  const int zero =
                      slow_zero(tensors.at("qzeros"), bits, g, o) + (version == GptqVersion::v1 ? 1 : 0);
                  const int code = slow_weight(tensors.at("qweight"), bits, i, o);
                  ASSERT_EQ(values[o * k + i], scale * static_cast<float>(code - zero));
                }
              }
              const PackedTensor back = from_gptq(tensors, settings_of(*format, version));
              EXPECT_EQ(back.format->spec(), format->spec());
              ASSERT_EQ(back.planes.size(), packed.planes.size());
              for (const auto& [name, plane] : packed.planes) {
                ASSERT_EQ(bytes_of(plane), bytes_of(back.plane(name))) << name;
              }
            }
          }
        }
      }
    }
  }
}

TEST(Gptq, SymmetricZerosAreTheKnownWords) {
  const std::map<std::pair<int, GptqVersion>, uint32_t> words = {
      {{2, GptqVersion::v1}, 0x55555555}, {{2, GptqVersion::v2}, 0xAAAAAAAA},
      {{4, GptqVersion::v1}, 0x77777777}, {{4, GptqVersion::v2}, 0x88888888},
      {{8, GptqVersion::v1}, 0x7F7F7F7F}, {{8, GptqVersion::v2}, 0x80808080}};
  for (const auto& [key, word] : words) {
    const auto format = std::make_shared<const Uniform>(key.first, 32);
    const TensorMap tensors = to_gptq(random_uniform(format, 32, 64, 3), key.second);
    for (const uint32_t got : tensors.at("qzeros").values<uint32_t>()) ASSERT_EQ(got, word);
  }
  // Three bits: the fields 3 and 4, as one stream of 96 bits.
  const auto format = std::make_shared<const Uniform>(3, 32);
  const TensorMap v1 = to_gptq(random_uniform(format, 32, 32, 3), GptqVersion::v1);
  EXPECT_EQ(v1.at("qzeros").values<uint32_t>()[0], 0xDB6DB6DBU);
  EXPECT_EQ(v1.at("qzeros").values<uint32_t>()[1], 0xB6DB6DB6U);
  EXPECT_EQ(v1.at("qzeros").values<uint32_t>()[2], 0x6DB6DB6DU);
  const TensorMap v2 = to_gptq(random_uniform(format, 32, 32, 3), GptqVersion::v2);
  EXPECT_EQ(v2.at("qzeros").values<uint32_t>()[0], 0x24924924U);
}

// A file of codes 0, 1, ..., 31 (mod 8) of 3 bits: fields 10 and 21 cross words.
TEST(Gptq, ThreeBitFieldsThatStraddleWords) {
  const auto format = std::make_shared<const Uniform>(3, 32);
  PackedTensor packed = random_uniform(format, 32, 32, 1);
  std::vector<uint8_t> codes(32);
  for (int i = 0; i < 32; ++i) codes[i] = static_cast<uint8_t>(i % 8);
  codes[10] = 6;  // 110: 10 on top of word 0, 1 at the bottom of word 1
  codes[21] = 5;  // 101: 1 on top of word 1, 10 at the bottom of word 2
  pack_bits(codes, 3, packed.planes.at("codes").values<uint32_t>().first(3));
  const TensorMap tensors = to_gptq(packed, GptqVersion::v1);
  const auto words = tensors.at("qweight").values<uint32_t>();
  EXPECT_EQ(words[0] >> 30, 2U);
  EXPECT_EQ(words[32] & 1U, 1U);
  EXPECT_EQ(words[32] >> 31, 1U);
  EXPECT_EQ(words[64] & 3U, 2U);
  EXPECT_EQ(words[0] & 0x3fffffffU, 0010765432107654321U << 3 & 0x3fffffffU);
}

// Whole-word arithmetic moves zero points between the versions, carries included.
TEST(Gptq, VersionsDifferByOnePerField) {
  for (const auto& [bits, ones] :
       std::map<int, uint32_t>{{2, 0x55555555}, {4, 0x11111111}, {8, 0x01010101}}) {
    const auto format = std::make_shared<const Uniform>(bits, 32, false);
    const PackedTensor packed = random_uniform(format, 64, 64, 5, 1);
    const TensorMap v1 = to_gptq(packed, GptqVersion::v1);
    const TensorMap v2 = to_gptq(packed, GptqVersion::v2);
    for (int64_t i = 0; i < v1.at("qzeros").element_count(); ++i) {
      ASSERT_EQ(v1.at("qzeros").values<uint32_t>()[i] + ones, v2.at("qzeros").values<uint32_t>()[i]);
    }
  }
}

TEST(Gptq, DetectsMislabelledFiles) {
  for (const int bits : kWidths) {
    const auto format = std::make_shared<const Uniform>(bits, 32);
    const PackedTensor packed = random_uniform(format, 32, 64, 3);
    for (const GptqVersion version : kVersions) {
      const GptqVersion other = version == GptqVersion::v1 ? GptqVersion::v2 : GptqVersion::v1;
      const std::string message = message_of<InvalidArgument>(
          [&] { from_gptq(to_gptq(packed, version), settings_of(*format, other)); });
      EXPECT_NE(message.find("mislabelled"), std::string::npos) << message;
      TensorMap broken = to_gptq(packed, version);
      broken.at("qzeros").values<uint32_t>()[1] ^= 1U;
      const std::string wrong =
          message_of<InvalidArgument>([&] { from_gptq(broken, settings_of(*format, version)); });
      EXPECT_NE(wrong.find("qzeros"), std::string::npos) << wrong;
      EXPECT_EQ(wrong.find("mislabelled"), std::string::npos) << wrong;
    }
  }
}

TEST(Gptq, RefusesZeroPointsThatWrapInVersion1) {
  const auto format = std::make_shared<const Uniform>(4, 32, false);
  const PackedTensor packed = random_uniform(format, 32, 64, 3, 0);
  const std::string message = message_of<Unsupported>([&] { to_gptq(packed, GptqVersion::v1); });
  EXPECT_NE(message.find("zero point 0"), std::string::npos) << message;
  const TensorMap v2 = to_gptq(packed, GptqVersion::v2);
  const std::string wraps =
      message_of<InvalidArgument>([&] { from_gptq(v2, settings_of(*format, GptqVersion::v1)); });
  EXPECT_NE(wraps.find("qzeros"), std::string::npos) << wraps;
}

TEST(Gptq, RefusesWhatTheLayoutCannotHold) {
  const auto refuse = [](int bits, int64_t group_size, DType dtype, int64_t n, int64_t k) {
    const auto format = std::make_shared<const Uniform>(bits, group_size, true, dtype);
    return message_of<Unsupported>([&] { to_gptq(random_uniform(format, n, k, 1), GptqVersion::v1); });
  };
  for (const int bits : {1, 5, 6, 7}) {
    EXPECT_NE(refuse(bits, 32, DType::f16, 32, 32).find(std::to_string(bits)), std::string::npos);
  }
  EXPECT_NE(refuse(4, Uniform::kPerTensor, DType::f16, 32, 32).find("per tensor"), std::string::npos);
  EXPECT_NE(refuse(4, 32, DType::f32, 32, 32).find("float32"), std::string::npos);
  EXPECT_NE(refuse(4, 32, DType::f16, 33, 32).find("33"), std::string::npos);
  EXPECT_NE(refuse(4, 32, DType::f16, 32, 40).find("40"), std::string::npos);
}

TEST(Gptq, RefusesBadFilesNamingTheTensor) {
  const auto format = std::make_shared<const Uniform>(4, 32);
  const TensorMap good = to_gptq(random_uniform(format, 32, 64, 3), GptqVersion::v1);
  const GptqSettings settings = settings_of(*format, GptqVersion::v1);
  const auto with = [&](const std::string& name, Tensor tensor) {
    TensorMap tensors = good;
    tensors[name] = std::move(tensor);
    return tensors;
  };
  const auto bad_shape = [&](const std::string& name, const TensorMap& tensors) {
    const std::string message = message_of<InvalidArgument>([&] { from_gptq(tensors, settings); });
    EXPECT_NE(message.find(name), std::string::npos) << message;
  };
  const auto bad_dtype = [&](const std::string& name) {
    Tensor tensor(DType::i16, good.at(name).shape());
    const std::string message = message_of<TypeMismatch>([&] { from_gptq(with(name, tensor), settings); });
    EXPECT_NE(message.find(name), std::string::npos) << message;
  };
  for (const std::string name : {"qweight", "qzeros", "scales", "g_idx"}) {
    bad_dtype(name);
    bad_shape(name, with(name, Tensor(good.at(name).dtype(), {3})));
    bad_shape(name, with(name, Tensor(good.at(name).dtype(), {})));
    TensorMap missing = good;
    missing.erase(name);
    if (name == "g_idx") {
      EXPECT_FALSE(from_gptq(missing, settings).planes.contains("group_index"));
    } else {
      bad_shape(name, missing);
    }
  }
  bad_shape("bias", with("bias", Tensor(DType::f16, {32})));
  bad_shape("qweight", with("qweight", Tensor(DType::i32, {7, 32})));
  bad_shape("qweight", with("qweight", Tensor(DType::i32, {8, 33})));
  bad_shape("qweight", with("qweight", Tensor(DType::i32, {int64_t{1} << 40, 0})));
  bad_shape("qweight", with("qweight", Tensor(DType::i32, {0, int64_t{1} << 40})));
  bad_shape("scales", with("scales", Tensor(DType::f16, {1, 32})));
  Tensor infinite(DType::f16, {2, 32});
  infinite.values<uint16_t>()[5] = 0x7c00;
  bad_shape("scales", with("scales", infinite));
  const auto group_index = [&](std::initializer_list<int32_t> first) {
    Tensor g_idx(DType::i32, {64});
    for (int i = 0; i < 64; ++i) g_idx.values<int32_t>()[i] = i / 32;
    std::copy(first.begin(), first.end(), g_idx.values<int32_t>().begin());
    return g_idx;
  };
  bad_shape("group_index", with("g_idx", group_index({2})));
  bad_shape("group_index", with("g_idx", group_index({-1})));
  bad_shape("group_index", with("g_idx", group_index({1})));  // 33 columns in group 1
  for (const GptqSettings& wrong : {GptqSettings{4, 0}, GptqSettings{4, -2}}) {
    EXPECT_NE(message_of<InvalidArgument>([&] { from_gptq(good, wrong); }).find("group_size"),
              std::string::npos);
  }
  EXPECT_NE(message_of<Unsupported>([&] { from_gptq(good, {5, 32}); }).find("5"), std::string::npos);
  GptqSettings no_version = settings;
  no_version.version = static_cast<GptqVersion>(3);
  message_of<InvalidArgument>([&] { from_gptq(good, no_version); });
}

}  // namespace
}  // namespace quantloom
