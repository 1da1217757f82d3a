#include "quantloom/io/compressed_tensors.hpp"

#include "io/file_bytes.hpp"
#include "io/random_packed.hpp"

namespace quantloom {
namespace {

using test::bytes_of;
using test::message_of;
using test::random_uniform;
using TensorMap = std::map<std::string, Tensor>;

CompressedTensorsSettings settings_of(const Uniform& format) {
  return {format.bits, format.group_size, format.symmetric, WordPadding::detect};
}

void expect_same(const PackedTensor& a, const PackedTensor& b) {
  EXPECT_EQ(a.format->spec(), b.format->spec());
  ASSERT_EQ(a.planes.size(), b.planes.size());
  for (const auto& [name, plane] : a.planes) {
    EXPECT_EQ(plane.shape(), b.plane(name).shape()) << name;
    ASSERT_EQ(bytes_of(plane), bytes_of(b.plane(name))) << name << " of " << a.format->spec();
  }
}

// Bits [field * bits, ...) of a column of the dense stream.
int slow_zero(const Tensor& zeros, int bits, int64_t row, int64_t group) {
  int value = 0;
  for (int b = 0; b < bits; ++b) {
    const int64_t bit = row * bits + b;
    value |=
        static_cast<int>(zeros.values<uint32_t>()[bit / 32 * zeros.shape()[1] + group] >> (bit % 32) & 1U)
        << b;
  }
  return value;
}

TEST(CompressedTensors, RoundTripsEveryWidthAndShape) {
  uint64_t seed = 1;
  for (int bits = 1; bits <= 8; ++bits) {
    for (const bool symmetric : {true, false}) {
      if (bits == 1 && symmetric) continue;
      for (const int64_t group_size : {int64_t{1}, int64_t{8}, Uniform::kPerChannel, Uniform::kPerTensor}) {
        for (const int64_t n : {0, 1, 5, 33}) {
          for (const int64_t k : {0, 8, 64, 200, 328}) {
            for (const bool permuted : {false, true}) {
              if (permuted && (group_size < 0 || k <= group_size)) continue;
              const DType dtype = std::array{DType::f16, DType::bf16, DType::f32}[seed % 3];
              const auto format = std::make_shared<const Uniform>(bits, group_size, symmetric, dtype);
              const PackedTensor packed = random_uniform(format, n, k, seed++, 0, permuted);
              const TensorMap tensors = to_compressed_tensors(packed);
              EXPECT_EQ(tensors.contains("weight_zero_point"), !symmetric);
              EXPECT_EQ(tensors.contains("weight_g_idx"), permuted);
              CompressedTensorsSettings settings = settings_of(*format);
              // Small matrices look the same in both paddings when no telling bit is set.
              if (32 % bits != 0) settings.padding = WordPadding::dense;
              expect_same(packed, from_compressed_tensors(tensors, settings));
            }
          }
        }
      }
    }
  }
}

TEST(CompressedTensors, StoresWhatTheLayoutPrescribes) {
  const auto format = std::make_shared<const Uniform>(4, 8, false, DType::bf16);
  const PackedTensor packed = random_uniform(format, 5, 24, 1);
  const TensorMap tensors = to_compressed_tensors(packed);
  EXPECT_EQ(tensors.at("weight_packed").shape(), (std::vector<int64_t>{5, 3}));
  EXPECT_EQ(bytes_of(tensors.at("weight_packed")), bytes_of(packed.plane("codes")));
  EXPECT_EQ(tensors.at("weight_scale").shape(), (std::vector<int64_t>{5, 3}));
  EXPECT_EQ(tensors.at("weight_scale").dtype(), DType::bf16);
  EXPECT_EQ(tensors.at("weight_shape").dtype(), DType::i64);
  EXPECT_EQ(tensors.at("weight_shape").values<int64_t>()[0], 5);
  EXPECT_EQ(tensors.at("weight_shape").values<int64_t>()[1], 24);
  EXPECT_EQ(tensors.at("weight_zero_point").shape(), (std::vector<int64_t>{1, 3}));
  for (int64_t g = 0; g < 3; ++g) {
    for (int64_t row = 0; row < 5; ++row) {
      uint8_t zero = 0;
      unpack_bits(packed.plane("zeros").values<uint32_t>().subspan(static_cast<size_t>(g), 1), 4, row,
                  {&zero, 1});
      EXPECT_EQ(slow_zero(tensors.at("weight_zero_point"), 4, row, g), zero);
    }
  }
  const auto channel = std::make_shared<const Uniform>(8, Uniform::kPerChannel);
  EXPECT_EQ(to_compressed_tensors(random_uniform(channel, 5, 24, 1)).at("weight_scale").shape(),
            (std::vector<int64_t>{5, 1}));
  const auto whole = std::make_shared<const Uniform>(8, Uniform::kPerTensor, false);
  const TensorMap one = to_compressed_tensors(random_uniform(whole, 5, 24, 1));
  EXPECT_EQ(one.at("weight_scale").shape(), std::vector<int64_t>{1});
  EXPECT_EQ(one.at("weight_zero_point").dtype(), DType::i8);
}

// Words by hand: 4-bit codes q + 8 of the row q = -8, -7, ..., 7, and a zero point of -3 (stored 5).
TEST(CompressedTensors, KnownWords) {
  Tensor packed(DType::i32, {1, 2});
  packed.values<uint32_t>()[0] = 0x76543210;
  packed.values<uint32_t>()[1] = 0xfedcba98;
  Tensor scale(DType::f32, {1, 1});
  scale.values<float>()[0] = 0.5F;
  Tensor shape(DType::i32, {2});
  shape.values<int32_t>()[0] = 1;
  shape.values<int32_t>()[1] = 16;
  Tensor zero(DType::i32, {1, 1});
  zero.values<uint32_t>()[0] = 5;
  TensorMap tensors = {{"weight_packed", packed}, {"weight_scale", scale}, {"weight_shape", shape}};
  std::vector<float> out(16);
  dequantize(from_compressed_tensors(tensors, {4, 16, true}), {out.data(), 1, 16}, 1);
  for (int i = 0; i < 16; ++i) EXPECT_EQ(out[i], 0.5F * static_cast<float>(i - 8));
  tensors["weight_zero_point"] = zero;
  dequantize(from_compressed_tensors(tensors, {4, 16, false}), {out.data(), 1, 16}, 1);
  for (int i = 0; i < 16; ++i) EXPECT_EQ(out[i], 0.5F * static_cast<float>(i - 8 + 3));
}

// The old layout: floor(32 / bits) fields per word, written here without the library's packer.
Tensor padded_words(const PackedTensor& packed, int bits) {
  const int64_t per_word = 32 / bits;
  Tensor words(DType::i32, {packed.n, ceil_div(packed.k, per_word)});
  std::vector<uint8_t> codes(static_cast<size_t>(packed.k));
  const int64_t dense = packed.plane("codes").shape()[1];
  for (int64_t row = 0; row < packed.n; ++row) {
    unpack_bits(packed.plane("codes").values<uint32_t>().subspan(static_cast<size_t>(row * dense),
                                                                 static_cast<size_t>(dense)),
                bits, 0, codes);
    for (int64_t i = 0; i < packed.k; ++i) {
      words.values<uint32_t>()[row * words.shape()[1] + i / per_word] |= static_cast<uint32_t>(codes[i])
                                                                         << (i % per_word * bits);
    }
  }
  return words;
}

TEST(CompressedTensors, ReadsBothPaddings) {
  uint64_t seed = 1;
  for (int bits = 1; bits <= 8; ++bits) {
    for (const int64_t k : {1, 2, 3, 4, 5, 6, 7, 10, 11, 16, 20, 21, 32, 64, 100, 160, 161, 512}) {
      const auto format = std::make_shared<const Uniform>(bits, Uniform::kPerChannel, bits > 1);
      if (bits == 1) continue;
      const PackedTensor packed = random_uniform(format, 40, k, seed++);
      TensorMap tensors = to_compressed_tensors(packed);
      // Forty random rows set a bit that padded words leave 0, if there is one.
      expect_same(packed, from_compressed_tensors(tensors, settings_of(*format)));
      tensors["weight_packed"] = padded_words(packed, bits);
      CompressedTensorsSettings settings = settings_of(*format);
      settings.padding = WordPadding::padded;
      expect_same(packed, from_compressed_tensors(tensors, settings));
      settings.padding = WordPadding::detect;
      const bool same_columns = tensors["weight_packed"].shape() == packed.plane("codes").shape();
      const bool same_layout = 32 % bits == 0 || k <= 32 / bits;
      if (!same_columns || same_layout) {
        expect_same(packed, from_compressed_tensors(tensors, settings));
      } else {
        // Read as padded, or refused as undecidable; never as something else.
        try {
          expect_same(packed, from_compressed_tensors(tensors, settings));
        } catch (const InvalidArgument& error) {
          EXPECT_NE(std::string(error.what()).find("padding"), std::string::npos);
        }
      }
    }
  }
}

TEST(CompressedTensors, PaddedZeroPoints) {
  const auto format = std::make_shared<const Uniform>(3, 64, false);
  const PackedTensor packed = random_uniform(format, 200, 192, 7);
  TensorMap tensors = to_compressed_tensors(packed);
  tensors["weight_packed"] = padded_words(packed, 3);
  Tensor zeros(DType::i32, {20, 3});
  std::vector<uint8_t> values(200);
  for (int64_t g = 0; g < 3; ++g) {
    unpack_bits(packed.plane("zeros").values<uint32_t>().subspan(static_cast<size_t>(g * 19), 19), 3, 0,
                values);
    for (int64_t i = 0; i < 200; ++i) {
      zeros.values<uint32_t>()[i / 10 * 3 + g] |= static_cast<uint32_t>(values[i]) << (i % 10 * 3);
    }
  }
  tensors["weight_zero_point"] = zeros;
  expect_same(packed, from_compressed_tensors(tensors, settings_of(*format)));
  tensors["weight_zero_point"] =
      to_compressed_tensors(packed).at("weight_zero_point");  // dense beside padded
  message_of<InvalidArgument>([&] { from_compressed_tensors(tensors, settings_of(*format)); });
}

TEST(CompressedTensors, RefusesWhatTheLayoutCannotHold) {
  const auto refuse = [](std::shared_ptr<const Uniform> format) {
    return message_of<Unsupported>([&] { to_compressed_tensors(random_uniform(format, 4, 40, 1)); });
  };
  EXPECT_NE(refuse(std::make_shared<const Uniform>(1, 8)).find("1 bit"), std::string::npos);
  EXPECT_NE(refuse(std::make_shared<const Uniform>(4, 16)).find("16 does not divide 40"), std::string::npos);
}

TEST(CompressedTensors, RefusesBadFilesNamingTheTensor) {
  const auto format = std::make_shared<const Uniform>(4, 16, false);
  const TensorMap good = to_compressed_tensors(random_uniform(format, 8, 64, 3, 0, true));
  const CompressedTensorsSettings settings = settings_of(*format);
  const auto with = [&](const std::string& name, Tensor tensor) {
    TensorMap tensors = good;
    tensors[name] = std::move(tensor);
    return tensors;
  };
  const auto bad = [&](const std::string& name, const TensorMap& tensors) {
    const std::string message =
        message_of<InvalidArgument>([&] { from_compressed_tensors(tensors, settings); });
    EXPECT_NE(message.find(name), std::string::npos) << message;
  };
  for (const std::string name :
       {"weight_packed", "weight_scale", "weight_shape", "weight_zero_point", "weight_g_idx"}) {
    const std::string message = message_of<TypeMismatch>(
        [&] { from_compressed_tensors(with(name, Tensor(DType::u8, good.at(name).shape())), settings); });
    EXPECT_NE(message.find(name), std::string::npos) << message;
    bad(name, with(name, Tensor(good.at(name).dtype(), {3})));
    bad(name, with(name, Tensor(good.at(name).dtype(), {})));
    if (name == "weight_g_idx") continue;
    TensorMap missing = good;
    missing.erase(name);
    bad(name, missing);
  }
  bad("extra", with("extra", Tensor(DType::f16, {1})));
  Tensor shape(DType::i64, {2});
  const auto with_shape = [&](int64_t n, int64_t k) {
    shape = Tensor(DType::i64, {2});
    shape.values<int64_t>()[0] = n;
    shape.values<int64_t>()[1] = k;
    return with("weight_shape", shape);
  };
  bad("weight_shape", with_shape(-1, 64));
  bad("weight_shape", with_shape(8, int64_t{1} << 40));
  bad("weight_packed", with_shape(9, 64));
  bad("weight_packed", with_shape(8, 65));
  Tensor group(DType::i32, {64});
  group.values<int32_t>()[0] = 4;
  bad("group_index", with("weight_g_idx", group));
  Tensor unset(DType::i32, {64});
  std::fill_n(unset.values<int32_t>().begin(), 64, -1);
  EXPECT_FALSE(from_compressed_tensors(with("weight_g_idx", unset), settings).planes.contains("group_index"));

  CompressedTensorsSettings symmetric = settings;
  symmetric.symmetric = true;
  const std::string message = message_of<InvalidArgument>([&] { from_compressed_tensors(good, symmetric); });
  EXPECT_NE(message.find("weight_zero_point"), std::string::npos) << message;
  TensorMap middle = good;
  for (uint32_t& word : middle["weight_zero_point"].values<uint32_t>()) word = 0x88888888;
  EXPECT_FALSE(from_compressed_tensors(middle, symmetric).planes.contains("zeros"));
  message_of<InvalidArgument>([&] { from_compressed_tensors(good, {9, 16, false}); });
  message_of<InvalidArgument>([&] { from_compressed_tensors(good, {4, 0, false}); });
  message_of<Unsupported>([&] { from_compressed_tensors(good, {1, 16, true}); });
}

}  // namespace
}  // namespace quantloom
