#include "quantloom/io/exl3.hpp"

#include <gtest/gtest.h>

#include <algorithm>
#include <cstring>

#include "io/file_bytes.hpp"
#include "quantloom/formats/outliers.hpp"
#include "quantloom/formats/trellis.hpp"
#include "quantloom/formats/uniform.hpp"
#include "quantloom/random.hpp"

namespace quantloom {
namespace {

using test::bytes_of;
using test::message_of;
using TensorMap = std::map<std::string, Tensor>;

constexpr uint32_t kMcg = 0xCBAC1FED;
constexpr uint32_t kMul1 = 0x83DCD12D;

Tensor random_shorts(std::vector<int64_t> shape, uint64_t seed) {
  Tensor tensor(DType::i16, std::move(shape));
  const CounterRandom random(seed);
  const auto values = tensor.values<uint16_t>();
  for (size_t i = 0; i < values.size(); ++i) values[i] = static_cast<uint16_t>(random.bits(i));
  return tensor;
}

Tensor random_scales(int64_t count, uint64_t seed) {
  Tensor tensor(DType::f16, {count});
  const CounterRandom random(seed);
  const auto values = tensor.values<uint16_t>();
  for (size_t i = 0; i < values.size(); ++i) {
    values[i] = f16_from_float(static_cast<float>(random.normal(i)));
  }
  return tensor;
}

Tensor marker(uint32_t multiplier, std::vector<int64_t> shape = {}) {
  Tensor tensor(DType::i32, std::move(shape));
  tensor.values<uint32_t>()[0] = multiplier;
  return tensor;
}

// A layer of random bits: any of them is a valid one.
TensorMap random_layer(int64_t n, int64_t k, int64_t half_bits, std::string_view codebook, uint64_t seed) {
  TensorMap tensors = {{"trellis", random_shorts({k / 16, n / 16, 8 * half_bits}, seed)},
                       {"suh", random_scales(k, seed + 1)},
                       {"svh", random_scales(n, seed + 2)}};
  if (codebook == "mcg") tensors.emplace("mcg", marker(kMcg));
  if (codebook == "mul1") tensors.emplace("mul1", marker(kMul1));
  return tensors;
}

std::vector<float> decoded(const PackedTensor& packed) {
  std::vector<float> values(static_cast<size_t>(packed.n * packed.k));
  dequantize(packed, {values.data(), packed.n, packed.k}, 1);
  return values;
}

// One tile whose words are multiples of 2654435761, its first states, and its weights by codebook: those of
// the first three outputs of input 0, and a hash of all in the order of the file's rows (inputs).
struct Vector {
  int bits;
  uint32_t states[3];
  struct {
    uint16_t row[3];
    uint32_t hash;
  } by_codebook[3];
};
constexpr Vector kVectors[] = {
    {1,
     {0x9B11, 0x3622, 0x6C44},
     {{{0xC3A6, 0x4237, 0x38E8}, 0xB78ECCA0},
      {{0xBAC0, 0x3783, 0x3CA2}, 0xB954EF54},
      {{0xB1E8, 0xBDA3, 0x3D2A}, 0xD99CFD16}}},
    {2,
     {0x6C42, 0xB109, 0xC427},
     {{{0xBA10, 0x4162, 0x3B36}, 0xB44BCB1F},
      {{0x3DA8, 0x3A9A, 0xB43C}, 0xCDC3D6A1},
      {{0xB45C, 0xB334, 0x3B3D}, 0xD5087DF7}}},
    {3,
     {0x44C4, 0x2627, 0x313C},
     {{{0xB558, 0x401F, 0xBFE8}, 0xD5BA8CFD},
      {{0x3D30, 0xAF40, 0x3372}, 0x49D43928},
      {{0xB5A9, 0x3982, 0x3851}, 0x2329F784}}},
    {4,
     {0x6209, 0x209E, 0x09E3},
     {{{0x3FA6, 0xB1D4, 0xBD44}, 0xB6D07C11},
      {{0x3215, 0x41CC, 0xAE20}, 0x936785E4},
      {{0x34A0, 0xBB45, 0x34A0}, 0x7DA15037}}},
    {5,
     {0x7513, 0xA278, 0x4F1B},
     {{{0xC06E, 0x3D2C, 0x9100}, 0x40BA4E64},
      {{0xB84B, 0x3C99, 0xB4F6}, 0x94509715},
      {{0x3317, 0x39B9, 0x3D6F}, 0x3A56C973}}},
    {6,
     {0x4C27, 0x09E3, 0x78DD},
     {{{0x401E, 0xB5E6, 0xA854}, 0xF2BD4BDB},
      {{0x3CB9, 0xB546, 0xBC04}, 0x7225A124},
      {{0x3A6E, 0xBEAB, 0xA065}, 0xF8FAE48B}}},
    {7,
     {0x5C4F, 0x278D, 0xC6EF},
     {{{0xBCBF, 0xB812, 0xAC0C}, 0x3F506FE6},
      {{0xB6D0, 0x3DB4, 0x2C9C}, 0x5F034A59},
      {{0xAA4C, 0x3E5B, 0x3B30}, 0x6F35AB70}}},
    {8,
     {0x409E, 0x9E37, 0x3779},
     {{{0xB55E, 0x3E62, 0x39C3}, 0xE0D17019},
      {{0xC07E, 0x3BF4, 0xB940}, 0xADE87366},
      {{0x380C, 0x3888, 0xBB1B}, 0xD899BFAD}}},
};

TEST(Exl3, DecodesKnownTiles) {
  const std::string names[] = {"3inst", "mcg", "mul1"};
  for (const Vector& vector : kVectors) {
    for (size_t c = 0; c < 3; ++c) {
      SCOPED_TRACE(names[c] + ", " + std::to_string(vector.bits) + " bits");
      // All 64 tiles of the smallest matrix are this one. The file has 16-bit halves of a word low one first.
      TensorMap tensors = random_layer(128, 128, 2 * vector.bits, names[c], 1);
      const auto shorts = tensors.at("trellis").values<uint16_t>();
      const auto words = static_cast<size_t>(8 * vector.bits);
      for (size_t i = 0; i < shorts.size(); ++i) {
        const auto word = static_cast<uint32_t>((i / 2 % words + 1) * 2654435761U);
        shorts[i] = static_cast<uint16_t>(i % 2 == 0 ? word : word >> 16);
      }
      const PackedTensor packed = from_exl3(tensors);
      const auto& format = dynamic_cast<const Trellis&>(*packed.format);
      EXPECT_EQ(format.codebook.name, names[c]);
      std::vector<uint32_t> states(256);
      const auto codes = packed.plane("codes").values<uint32_t>();
      unpack_rings(format.shape(), {codes.data(), 1, std::ssize(codes) / 64}, {states.data(), 1, 256});
      for (size_t i = 0; i < 3; ++i) EXPECT_EQ(states[i], vector.states[i]) << i;
      // The same tile without scales and rotation.
      PackedTensor plain{std::make_shared<const Trellis>(vector.bits, names[c], 0), 16, 16, {}};
      Tensor tile(DType::i32, {1, 1, std::ssize(codes) / 64});
      std::copy_n(codes.begin(), tile.element_count(), tile.values<uint32_t>().begin());
      Tensor ones(DType::f16, {16});
      std::ranges::fill(ones.values<uint16_t>(), f16_from_float(1));
      plain.planes = {{"codes", tile}, {"input_scales", ones}, {"output_scales", ones}};
      const std::vector<float> w = decoded(plain);
      uint32_t hash = 0;
      for (size_t input = 0; input < 16; ++input) {
        for (size_t output = 0; output < 16; ++output) {
          const uint16_t bits = f16_from_float(w[output * 16 + input]);
          hash = 31 * hash + bits;
          if (input == 0 && output < 3) {
            EXPECT_EQ(bits, vector.by_codebook[c].row[output]);
          }
        }
      }
      EXPECT_EQ(hash, vector.by_codebook[c].hash);
    }
  }
}

TEST(Exl3, RoundTripsBitForBit) {
  uint64_t seed = 1;
  for (const std::string name : {"3inst", "mcg", "mul1"}) {
    for (int64_t half_bits = 2; half_bits <= 16; ++half_bits) {
      if (half_bits % 2 == 1 && name != "mul1") continue;
      SCOPED_TRACE(name + ", half bits " + std::to_string(half_bits));
      const TensorMap tensors = random_layer(256, 128, half_bits, name, seed++);
      const PackedTensor packed = from_exl3(tensors);
      EXPECT_EQ(packed.n, 256);
      EXPECT_EQ(packed.k, 128);
      const TensorMap back = to_exl3(packed);
      ASSERT_EQ(back.size(), tensors.size());
      for (const auto& [key, tensor] : tensors) {
        EXPECT_EQ(back.at(key).dtype(), tensor.dtype()) << key;
        EXPECT_EQ(back.at(key).shape(), tensor.shape()) << key;
        EXPECT_EQ(bytes_of(back.at(key)), bytes_of(tensor)) << key;
      }
    }
  }
}

TEST(Exl3, PadsAndCuts) {
  const TensorMap tensors = random_layer(256, 384, 5, "mul1", 7);
  const PackedTensor whole = from_exl3(tensors);
  const PackedTensor cut = from_exl3(tensors, {.n = 200, .k = 257});
  EXPECT_EQ(cut.n, 200);
  EXPECT_EQ(cut.k, 257);
  const std::vector<float> a = decoded(whole);
  const std::vector<float> b = decoded(cut);
  for (size_t r = 0; r < 200; ++r) {
    for (size_t c = 0; c < 257; ++c) ASSERT_EQ(b[r * 257 + c], a[r * 384 + c]) << r << ' ' << c;
  }
  const TensorMap back = to_exl3(cut);
  EXPECT_EQ(bytes_of(back.at("trellis")), bytes_of(tensors.at("trellis")));
  for (const auto& [key, count] : std::map<std::string, size_t>{{"suh", 257}, {"svh", 200}}) {
    const auto written = back.at(key).values<uint16_t>();
    const auto given = tensors.at(key).values<uint16_t>();
    ASSERT_EQ(written.size(), given.size());
    for (size_t i = 0; i < written.size(); ++i) EXPECT_EQ(written[i], i < count ? given[i] : 0) << key << i;
  }
  // Every decoded weight is the same when the files that were written are read again.
  EXPECT_EQ(decoded(from_exl3(back, {.n = 200, .k = 257})), b);
}

TEST(Exl3, ReadsSignsOfOldFiles) {
  TensorMap tensors = random_layer(128, 256, 6, "3inst", 11);
  tensors.erase("suh");
  tensors.emplace("su", random_shorts({16}, 12));
  const PackedTensor packed = from_exl3(tensors, {.n = -1, .k = 250});
  const auto bits = tensors.at("su").values<uint16_t>();
  const auto scales = packed.plane("input_scales").values<uint16_t>();
  ASSERT_EQ(scales.size(), 250U);
  for (size_t i = 0; i < scales.size(); ++i) {
    EXPECT_EQ(float_from_f16(scales[i]), (bits[i / 16] >> i % 16 & 1) != 0 ? -1.0F : 1.0F) << i;
  }
  tensors.emplace("suh", random_scales(256, 1));
  EXPECT_NE(message_of<Error>([&] { from_exl3(tensors); }).find("suh and su"), std::string::npos);
}

TEST(Exl3, ReadsMemoryThatIsAlignedToNumbersOf16Bits) {
  const TensorMap tensors = random_layer(128, 128, 3, "mul1", 3);
  const Tensor& codes = tensors.at("trellis");
  std::vector<uint16_t> storage(static_cast<size_t>(codes.element_count()) + 2);
  uint16_t* odd = storage.data() + (reinterpret_cast<uintptr_t>(storage.data()) % 4 == 0 ? 1 : 0);
  std::memcpy(odd, codes.bytes(), static_cast<size_t>(codes.byte_count()));
  TensorMap moved = tensors;
  moved["trellis"] = Tensor(DType::i16, codes.shape(), odd, nullptr);
  EXPECT_EQ(decoded(from_exl3(moved)), decoded(from_exl3(tensors)));
}

TEST(Exl3, RefusesTensorsThatAreNone) {
  const TensorMap good = random_layer(128, 256, 4, "mul1", 5);
  EXPECT_NO_THROW(from_exl3(good));
  const auto message = [&](auto change, Exl3Settings settings = {}) {
    TensorMap tensors = good;
    change(tensors);
    return message_of<Error>([&] { from_exl3(tensors, settings); });
  };
  struct Case {
    std::function<void(TensorMap&)> change;
    std::string words;
  };
  const std::vector<Case> cases = {
      {[](TensorMap& t) { t.erase("trellis"); }, "trellis"},
      {[](TensorMap& t) { t.erase("svh"); }, "svh"},
      {[](TensorMap& t) { t["scale"] = marker(1); }, "scale"},
      {[](TensorMap& t) {
         t["trellis"] = Tensor(DType::i32, {16, 8, 32});
       },
       "int32"},
      {[](TensorMap& t) {
         t["trellis"] = Tensor(DType::i16, {16, 8 * 32});
       },
       "[16, 256]"},
      {[](TensorMap& t) {
         t["trellis"] = Tensor(DType::i16, {15, 8, 32});
       },
       "[15, 8, 32]"},
      {[](TensorMap& t) {
         t["trellis"] = Tensor(DType::i16, {16, 9, 32});
       },
       "[16, 9, 32]"},
      {[](TensorMap& t) {
         t["trellis"] = Tensor(DType::i16, {0, 8, 32});
       },
       "[0, 8, 32]"},
      {[](TensorMap& t) {
         t["trellis"] = Tensor(DType::i16, {16, 8, 8});
       },
       "[16, 8, 8]"},
      {[](TensorMap& t) {
         t["trellis"] = Tensor(DType::i16, {16, 8, 36});
       },
       "[16, 8, 36]"},
      {[](TensorMap& t) {
         t["trellis"] = Tensor(DType::i16, {16, 8, 136});
       },
       "[16, 8, 136]"},
      {[](TensorMap& t) { t["suh"] = random_scales(128, 1); }, "[128]"},
      {[](TensorMap& t) { t["svh"] = Tensor(DType::f32, {128}); }, "float32"},
      {[](TensorMap& t) {
         t["suh"] = random_scales(256, 1);
         t["suh"].values<uint16_t>()[9] = 0x7C00;
       },
       "inf at element 9"},
      {[](TensorMap& t) { t["mul1"] = marker(0xAD9A2EC5); }, "AD9A2EC5"},
      {[](TensorMap& t) { t["mul1"] = Tensor(DType::i32, {2}); }, "[2]"},
      {[](TensorMap& t) { t["mul1"] = Tensor(DType::i64, {}); }, "int64"},
      {[](TensorMap& t) { t["mcg"] = marker(kMcg); }, "mcg and mul1"},
      {[](TensorMap& t) {
         t.erase("mul1");
         t["mcg"] = marker(0xFF7A83E5);
       },
       "FF7A83E5"},
      {[](TensorMap& t) {
         t.erase("mul1");
         t["trellis"] = Tensor(DType::i16, {16, 8, 40});
       },
       "half bits"},
      {[](TensorMap& t) {
         t.erase("suh");
         t["su"] = random_shorts({8}, 1);
       },
       "su"},
  };
  for (const Case& c : cases) EXPECT_NE(message(c.change).find(c.words), std::string::npos) << c.words;
  for (const Exl3Settings& settings : {Exl3Settings{.n = 129, .k = -1}, Exl3Settings{.n = 0, .k = -1},
                                       Exl3Settings{.n = -1, .k = 128}, Exl3Settings{.n = -2, .k = -1}}) {
    EXPECT_THROW(from_exl3(good, settings), InvalidArgument);
  }
  EXPECT_NO_THROW(from_exl3(good, {.n = 1, .k = 129}));
  TensorMap vector = good;
  vector["mul1"] = marker(kMul1, {1});
  EXPECT_NO_THROW(from_exl3(vector));
}

TEST(Exl3, RefusesFormatsThatItCannotHold) {
  for (const auto& [spec, words] : std::map<std::string, std::string>{
           {"trellis:2:mcg-FF7A83E5", "FF7A83E5"},
           {"trellis:2:mul1-AD9A2EC5", "AD9A2EC5"},
           {"trellis:2:1mad", "1mad"},
           {"trellis:2:hyb", "hyb"},
           {"trellis:2:rptc:l12", "rptc"},
           {"trellis:2:mul1:l18", "18"},
           {"trellis:2:mul1:plain", "plain"},
           {"trellis:2.5:mcg", "half bits"},
           {"trellis:2.5:3inst", "half bits"},
           {"uniform:4", "uniform:4"},
           {"outliers:1%:trellis:2", "outliers"},
       }) {
    EXPECT_NE(exl3_refusal(*format_from_spec(spec)).find(words), std::string::npos) << spec;
  }
  for (const std::string spec :
       {"trellis:1", "trellis:2.5:mul1", "trellis:8:3inst", "trellis:3:mcg", "trellis:4:mcg-CBAC1FED"}) {
    EXPECT_EQ(exl3_refusal(*format_from_spec(spec)), "") << spec;
  }
  PackedTensor packed = from_exl3(random_layer(128, 128, 4, "mul1", 1));
  packed.format = std::make_shared<const Trellis>(2, "mul1-AD9A2EC5");
  EXPECT_THROW(to_exl3(packed), Unsupported);
  const auto format = std::make_shared<const Trellis>(2);
  PackedTensor empty{format, 0, 5, {}};
  for (const PlaneSpec& plane : format->planes(0, 5)) {
    empty.planes.emplace(plane.name, Tensor(plane.dtype, plane.shape));
  }
  EXPECT_THROW(to_exl3(empty), Unsupported);
}

}  // namespace
}  // namespace quantloom
