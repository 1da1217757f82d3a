#include "quantloom/formats/uniform.hpp"

#include <gtest/gtest.h>

#include <cmath>
#include <limits>
#include <vector>

#include "quantloom/formats/bit_packing.hpp"
#include "test_matrices.hpp"

namespace quantloom {
namespace {

TEST(Uniform, EveryExampleReadsBackFromSpecAndJson) {
  for (const FormatEntry& entry : format_table()) {
    for (const std::string& example : entry.examples) {
      const auto format = format_from_spec(example);
      EXPECT_EQ(format->spec(), example);
      EXPECT_EQ(format->name(), entry.name);
      const auto again = format_from_json(format->to_json());
      EXPECT_EQ(again->spec(), example);
      EXPECT_EQ(again->to_json(), format->to_json());
    }
  }
}

TEST(Uniform, DescribesItself) {
  EXPECT_EQ(Uniform(4, 128).to_json(),
            R"({"bits":4,"format":"uniform","group_size":128,"scale_dtype":"float16","symmetric":true,)"
            R"("version":1,"zero_point":8})");
  EXPECT_EQ(Uniform(1, Uniform::kPerChannel, true, DType::bf16).to_json(),
            R"({"bits":1,"format":"uniform","group_size":"channel","scale_dtype":"bfloat16",)"
            R"("symmetric":true,"version":1,"zero_point":0.5})");
  EXPECT_EQ(Uniform(3, Uniform::kPerTensor, false, DType::f32).to_json(),
            R"({"bits":3,"format":"uniform","group_size":"tensor","scale_dtype":"float32",)"
            R"("symmetric":false,"version":1,"zero_point":"stored"})");
}

TEST(Uniform, ShortFormHasDefaultsAndTakesItsPartsInAnyOrder) {
  EXPECT_EQ(format_from_spec("uniform:4")->spec(), "uniform:4:g128:sym");
  EXPECT_EQ(format_from_spec("uniform:4:asym")->spec(), "uniform:4:g128:asym");
  EXPECT_EQ(format_from_spec("uniform:3:bf16:asym:g64")->spec(), "uniform:3:g64:asym:bf16");
  EXPECT_EQ(format_from_spec("uniform:8:channel:f16")->spec(), "uniform:8:channel:sym");
}

TEST(Uniform, RefusesShortFormsItDoesNotUnderstand) {
  for (const char* spec : {"",
                           ":",
                           "uniform",
                           "uniform:",
                           "uniform:0",
                           "uniform:9",
                           "uniform:-4",
                           "uniform:+4",
                           "uniform:04",
                           "uniform:4.0",
                           "uniform: 4",
                           "uniform:4:",
                           "uniform:4::",
                           "uniform:4:g",
                           "uniform:4:g0",
                           "uniform:4:g-1",
                           "uniform:4:g12x",
                           "uniform:4:g128:g128",
                           "uniform:4:g128:channel",
                           "uniform:4:sym:asym",
                           "uniform:4:f16:f16",
                           "uniform:4:f64",
                           "uniform:4:g99999999999999999999",
                           "Uniform:4",
                           "uniform:4:G128",
                           "uniform4",
                           "nonesuch:4",
                           "uniform:4:g128:sym:f16:extra",
                           "uniform:4\n",
                           "uniform:\xff\xfe"}) {
    try {
      format_from_spec(spec);
      ADD_FAILURE() << "accepted " << spec;
    } catch (const InvalidArgument& error) {
      for (const char* c = error.what(); *c != 0; ++c) ASSERT_TRUE(*c >= ' ' && *c <= '~');
    }
  }
}

TEST(Uniform, RefusesHostileDescriptions) {
  const std::string good = Uniform(4, 128).to_json();
  const auto replaced = [&](const std::string& from, const std::string& to) {
    std::string text = good;
    const size_t at = text.find(from);
    EXPECT_NE(at, std::string::npos) << from;
    return text.replace(at, from.size(), to);
  };
  std::vector<std::string> bad = {
      "",
      "null",
      "[]",
      "4",
      "\"uniform\"",
      "{",
      "{}",
      good + "x",
      good + good,
      std::string(100000, '['),
      std::string("\0", 1),
      "\xff\xfe",
      R"({"format":"uniform"})",
      R"({"format":4})",
      R"({"format":"nonesuch"})",
      replaced("\"bits\":4", "\"bits\":0"),
      replaced("\"bits\":4", "\"bits\":9"),
      replaced("\"bits\":4", "\"bits\":4.0"),
      replaced("\"bits\":4", "\"bits\":\"4\""),
      replaced("\"bits\":4", "\"bits\":-4"),
      replaced("\"bits\":4", "\"bits\":4294967300"),
      replaced("\"bits\":4", "\"bits\":18446744073709551612"),
      replaced("\"bits\":4", "\"bits\":1e400"),
      replaced("\"bits\":4", "\"bits\":null"),
      replaced("\"bits\":4", "\"bits\":true"),
      replaced("\"bits\":4", "\"bits\":[4]"),
      replaced("\"bits\":4,", ""),
      replaced("\"bits\":4,", "\"bits\":4,\"bits\":4,"),
      replaced("\"bits\":4,", "\"bits\":3,\"bits\":4,"),
      replaced("\"bits\":4,", "\"bits\":4,\"extra\":1,"),
      replaced("\"bits\":4,", "\"Bits\":4,"),
      replaced("\"group_size\":128", "\"group_size\":0"),
      replaced("\"group_size\":128", "\"group_size\":-1"),
      replaced("\"group_size\":128", "\"group_size\":-2"),
      replaced("\"group_size\":128", "\"group_size\":\"row\""),
      replaced("\"group_size\":128", "\"group_size\":9223372036854775808"),
      replaced("\"group_size\":128", "\"group_size\":{}"),
      replaced("float16", "float64"),
      replaced("\"float16\"", "16"),
      replaced("true", "1"),
      replaced("true", "\"yes\""),
      replaced("true", "false"),
      replaced("\"version\":1", "\"version\":2"),
      replaced("\"version\":1", "\"version\":0"),
      replaced("\"version\":1", "\"version\":\"1\""),
      replaced("\"zero_point\":8", "\"zero_point\":7"),
      replaced("\"zero_point\":8", "\"zero_point\":8.0"),
      replaced("\"zero_point\":8", "\"zero_point\":\"stored\""),
      replaced("\"zero_point\":8", "\"zero_point\":[8]"),
      replaced("\"zero_point\":8", "\"zero_point\":\"\xff\""),
      replaced("\"format\":\"uniform\"", "\"format\":\"uniform\",\"format\":\"nonesuch\""),
  };
  for (const std::string& json : bad) {
    try {
      format_from_json(json);
      ADD_FAILURE() << "accepted " << json.substr(0, 300);
    } catch (const InvalidArgument& error) {
      ASSERT_LT(std::string(error.what()).size(), 1000U);
      for (const char* c = error.what(); *c != 0; ++c) ASSERT_TRUE(*c >= ' ' && *c <= '~') << error.what();
    }
  }
  EXPECT_EQ(format_from_json(good)->to_json(), good);
}

TEST(Uniform, ConstructorNamesTheFieldThatIsOutOfRange) {
  EXPECT_THROW(Uniform(0, 128), InvalidArgument);
  EXPECT_THROW(Uniform(9, 128), InvalidArgument);
  EXPECT_THROW(Uniform(4, 0), InvalidArgument);
  EXPECT_THROW(Uniform(4, -3), InvalidArgument);
  EXPECT_THROW(Uniform(4, 128, true, DType::f64), TypeMismatch);
  EXPECT_THROW(Uniform(4, 128, true, DType::i8), TypeMismatch);
}

TEST(Uniform, CountsEveryStoredBit) {
  struct Case {
    const char* spec;
    int64_t n, k, bits;
  };
  for (const Case& each : std::vector<Case>{
           {"uniform:4:g128:sym", 64, 256, 64 * (256 * 4 + 2 * 16)},
           {"uniform:3:g128:asym", 64, 256, 64 * (256 * 3 + 2 * 16) + 2 * 64 * 3},
           {"uniform:3:g100:asym:f32", 5, 150, 5 * (15 * 32 + 2 * 32) + 2 * 32},
           {"uniform:2:tensor:asym", 10, 16, 10 * 32 + 16 + 32},
           {"uniform:8:channel:sym:bf16", 7, 5, 7 * (2 * 32 + 16)},
       }) {
    int64_t bits = 0;
    for (const PlaneSpec& plane : format_from_spec(each.spec)->planes(each.n, each.k)) {
      if (!plane.optional) bits += 8 * size_of(plane.dtype) * checked_product(plane.shape);
    }
    EXPECT_EQ(bits, each.bits) << each.spec;
  }
}

// Every code under every finite float16 scale against the formula, through the float32 product.
TEST(Uniform, DecodesEveryCodeUnderEveryFloat16Scale) {
  constexpr int64_t kScales = 65536;
  for (int bits = 1; bits <= 8; ++bits) {
    for (const bool symmetric : {true, false}) {
      const auto format = std::make_shared<const Uniform>(bits, Uniform::kPerChannel, symmetric);
      const int64_t k = int64_t{1} << bits;
      PackedTensor packed{format, kScales, k, {}};
      for (const PlaneSpec& plane : format->planes(kScales, k)) {
        if (!plane.optional) packed.planes.emplace(plane.name, Tensor(plane.dtype, plane.shape));
      }
      std::vector<uint8_t> codes(static_cast<size_t>(k));
      for (int64_t c = 0; c < k; ++c) codes[c] = static_cast<uint8_t>(c);
      std::vector<uint8_t> zeros(kScales);
      const auto words = static_cast<size_t>(packed_words(k, bits));
      for (int64_t r = 0; r < kScales; ++r) {
        packed.planes.at("scales").values<uint16_t>()[r] = static_cast<uint16_t>(r);
        pack_bits(codes, bits, packed.planes.at("codes").values<uint32_t>().subspan(r * words, words));
        zeros[r] = static_cast<uint8_t>(r * 37 % k);
      }
      if (!symmetric) pack_bits(zeros, bits, packed.planes.at("zeros").values<uint32_t>());
      std::vector<float> row(static_cast<size_t>(k));
      for (int64_t r = 0; r < kScales; ++r) {
        const float scale = float_from_f16(static_cast<uint16_t>(r));
        if (!std::isfinite(scale)) continue;
        format->decode(packed, r, MatrixView<float>(row.data(), 1, k));
        const double zero = !symmetric ? zeros[r] : (bits == 1 ? 0.5 : std::ldexp(1.0, bits - 1));
        for (int64_t c = 0; c < k; ++c) {
          // An 11-bit scale times a 9-bit level is exact in float32.
          ASSERT_EQ(static_cast<double>(row[c]), static_cast<double>(scale) * (static_cast<double>(c) - zero))
              << bits << " bits, scale " << r << ", code " << c;
        }
      }
      EXPECT_THROW(validate(packed), InvalidArgument);  // some of the scales are not finite
    }
  }
}

PackedTensor example(const std::shared_ptr<const Format>& format, int64_t n, int64_t k) {
  PackedTensor packed{format, n, k, {}};
  for (const PlaneSpec& plane : format->planes(n, k)) {
    if (!plane.optional) packed.planes.emplace(plane.name, Tensor(plane.dtype, plane.shape));
  }
  return packed;
}

template <class Change>
void expect_refused(const std::shared_ptr<const Format>& format, const char* named, Change change) {
  PackedTensor packed = example(format, 5, 11);
  validate(packed);
  change(packed);
  std::vector<float> out(55);
  try {
    dequantize(packed, MatrixView<float>(out.data(), 5, 11), 1);
    ADD_FAILURE() << "accepted a bad plane " << named;
  } catch (const InvalidArgument& error) {
    EXPECT_NE(std::string(error.what()).find(named), std::string::npos) << error.what();
  }
}

TEST(Uniform, RefusesPlanesThatDoNotDecodeSafely) {
  const auto format = format_from_spec("uniform:3:g4:asym");
  const auto set_index = [](PackedTensor& packed, std::vector<int32_t> values) {
    Tensor index(DType::i32, {static_cast<int64_t>(values.size())});
    std::copy(values.begin(), values.end(), index.values<int32_t>().begin());
    packed.planes.insert_or_assign("group_index", index);
  };
  PackedTensor good = example(format, 5, 11);
  set_index(good, {2, 1, 0, 2, 1, 0, 2, 1, 0, 0, 1});
  EXPECT_NO_THROW(validate(good));
  for (const uint16_t scale : std::vector<uint16_t>{0x7c00, 0xfc00, 0x7e00, 0x7c01}) {
    expect_refused(format, "scales",
                   [&](PackedTensor& p) { p.planes.at("scales").values<uint16_t>()[7] = scale; });
  }
  expect_refused(format, "codes",
                 [](PackedTensor& p) { p.planes.at("codes").values<uint32_t>()[9] = 1U << 31; });
  expect_refused(format, "codes", [](PackedTensor& p) { p.planes.at("codes").values<uint32_t>()[1] = 2; });
  expect_refused(format, "zeros",
                 [](PackedTensor& p) { p.planes.at("zeros").values<uint32_t>()[2] = 1U << 15; });
  expect_refused(format, "zeros", [](PackedTensor& p) { p.planes.erase("zeros"); });
  expect_refused(format, "codes", [](PackedTensor& p) { p.planes.erase("codes"); });
  expect_refused(format, "extra", [](PackedTensor& p) { p.planes.emplace("extra", Tensor(DType::u8, {1})); });
  expect_refused(format, "scales", [](PackedTensor& p) {
    p.planes.at("scales") = Tensor(DType::bf16, {5, 3});
  });
  expect_refused(format, "scales", [](PackedTensor& p) {
    p.planes.at("scales") = Tensor(DType::f16, {3, 5});
  });
  expect_refused(format, "scales", [](PackedTensor& p) { p.planes.at("scales") = Tensor(DType::f16, {15}); });
  const std::vector<std::vector<int32_t>> bad_groups = {
      {0, 0, 0, 0, 1, 1, 1, 1, 2, 2, 3},         {0, 0, 0, 0, 1, 1, 1, 1, 2, 2, -1},
      {0, 0, 0, 0, 0, 1, 1, 1, 2, 2, 2},         {0, 0, 0, 0, 1, 1, 1, 1, 2, 2},
      {0, 0, 0, 0, 1, 1, 1, 1, 2, 2, INT32_MIN}, {0, 0, 0, 0, 1, 1, 1, 1, 2, 2, INT32_MAX}};
  for (const auto& groups : bad_groups) {
    expect_refused(format, "group_index", [&](PackedTensor& p) { set_index(p, groups); });
  }
  const auto per_channel = format_from_spec("uniform:3:channel:sym");
  expect_refused(per_channel, "group_index",
                 [&](PackedTensor& p) { set_index(p, std::vector<int32_t>(11, 0)); });
  expect_refused(format, "shape", [](PackedTensor& p) { p.n = -5; });
  expect_refused(format, "plane", [](PackedTensor& p) { p.n = 6; });
  expect_refused(format, "size", [](PackedTensor& p) { p.k = INT64_MAX; });
}

TEST(Uniform, DecodesToStridedRowsAndLeavesTheRestAlone) {
  const auto format = format_from_spec("uniform:5:g7:asym:bf16");
  PackedTensor packed = example(format, 6, 23);
  const CounterRandom random(11);
  for (auto& scale : packed.planes.at("scales").values<uint16_t>()) scale = 0x3f80;
  const auto words = static_cast<size_t>(packed_words(23, 5));
  for (size_t r = 0; r < 6; ++r) {
    std::vector<uint8_t> codes(23);
    for (size_t c = 0; c < 23; ++c) codes[c] = static_cast<uint8_t>(random.below(r * 23 + c, 32));
    pack_bits(codes, 5, packed.planes.at("codes").values<uint32_t>().subspan(r * words, words));
  }
  const auto whole = testing::decoded_values(packed);
  std::vector<float> strided(6 * 30, -99.0F);
  dequantize(packed, MatrixView<float>(strided.data() + 2, 6, 23, 30), 2);
  for (int64_t r = 0; r < 6; ++r) {
    for (int64_t c = 0; c < 30; ++c) {
      const bool inside = c >= 2 && c < 25;
      ASSERT_EQ(strided[r * 30 + c], inside ? whole[r * 23 + c - 2] : -99.0F);
    }
  }
  std::vector<float> part(2 * 23);
  format->decode(packed, 3, MatrixView<float>(part.data(), 2, 23));
  EXPECT_TRUE(std::equal(part.begin(), part.end(), whole.begin() + 3 * 23));
  EXPECT_THROW(dequantize(packed, MatrixView<float>(strided.data(), 6, 22)), InvalidArgument);
  EXPECT_THROW(dequantize(packed, MatrixView<float>(strided.data(), 6, 23), -1), InvalidArgument);
}

}  // namespace
}  // namespace quantloom
