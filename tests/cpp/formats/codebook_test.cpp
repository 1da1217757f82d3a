#include "quantloom/formats/codebook.hpp"

#include <gtest/gtest.h>

#include <functional>
#include <limits>
#include <numbers>
#include <numeric>

#include "formats/codebook_reference.hpp"
#include "formats/encoder_driver.hpp"
#include "quantloom/rounding/nearest.hpp"

namespace quantloom {
namespace {

using testing::code_at;
using testing::consecutive_groups;
using testing::encode;
using testing::Encoded;
using testing::random_table;
using testing::scale_at;
using testing::shuffled_groups;

std::vector<float> ramp(size_t entries) {
  std::vector<float> table(entries);
  std::iota(table.begin(), table.end(), -static_cast<float>(entries) / 2);
  return table;
}

template <class Refused, class Call>
std::string message_of(const Call& call) {
  try {
    call();
  } catch (const Refused& error) {
    const std::string text = error.what();
    EXPECT_LT(text.size(), 1000U);
    for (const char c : text) EXPECT_TRUE(c >= ' ' && c <= '~') << text;
    return text;
  }
  ADD_FAILURE() << "accepted";
  return "";
}

// The value whose probability under `cdf` is p.
double quantile(const std::function<double(double)>& cdf, double p) {
  double low = -100;
  double high = 100;
  for (int i = 0; i < 200; ++i) {
    const double middle = (low + high) / 2;
    (cdf(middle) < p ? low : high) = middle;
  }
  return low;
}

// How QLoRA derives its table: 2^(bits-1) + 1 quantiles above and 2^(bits-1) below zero, evenly spaced in
// probability between one half and just under one, over the largest.
std::vector<double> quantile_table(int bits, const std::function<double(double)>& cdf) {
  const int half = 1 << (bits - 1);
  const double end = 1 - (1.0 / (4 * half) + 1.0 / (4 * half - 2)) / 2;
  std::vector<double> table = {0};
  for (int i = 1; i <= half; ++i) table.push_back(quantile(cdf, 0.5 + (end - 0.5) * i / half));
  for (int i = 1; i < half; ++i) table.push_back(-quantile(cdf, 0.5 + (end - 0.5) * i / (half - 1)));
  const double largest = *std::max_element(table.begin(), table.end());
  for (double& value : table) value /= largest;
  std::sort(table.begin(), table.end());
  return table;
}

TEST(Codebook, KnownTablesAreWhatTheirDefinitionsSay) {
  const auto expect_near = [](const char* name, const std::vector<double>& expected) {
    const Codebook format(name);
    ASSERT_EQ(format.table.size(), expected.size());
    for (size_t i = 0; i < expected.size(); ++i) {
      EXPECT_EQ(format.table[i], float_from_f16(f16_from_float(static_cast<float>(expected[i]))))
          << name << ", entry " << i;
    }
  };
  const auto normal = [](double x) { return std::erfc(-x / std::numbers::sqrt2) / 2; };
  const auto student5 = [](double x) {
    const double angle = std::atan(x / std::sqrt(5.0));
    const double cosine = std::cos(angle);
    return 0.5 + (angle + std::sin(angle) * cosine * (1 + 2.0 / 3.0 * cosine * cosine)) / std::numbers::pi;
  };
  expect_near("nf4", quantile_table(4, normal));
  expect_near("nf3", quantile_table(3, normal));
  expect_near("sf4", quantile_table(4, student5));
  std::vector<double> e2m1 = {0, 0.5, -0.5};  // subnormal
  for (int exponent = 0; exponent < 3; ++exponent) {
    for (const double mantissa : {1.0, 1.5}) {
      e2m1.push_back(std::ldexp(mantissa, exponent));
      e2m1.push_back(-std::ldexp(mantissa, exponent));
    }
  }
  std::sort(e2m1.begin(), e2m1.end());
  expect_near("fp4", e2m1);
  for (const CodebookTable& known : codebook_tables()) {
    const Codebook format(known.values);
    EXPECT_EQ(format.table_name, known.name);
    EXPECT_EQ(format.bits, known.name == "nf3" ? 3 : 4);
    EXPECT_EQ(format.to_json(), Codebook(known.name).to_json());
    EXPECT_EQ(format_from_spec(text_of("codebook:", known.name))->to_json(), format.to_json());
  }
}

TEST(Codebook, DescribesItself) {
  EXPECT_EQ(Codebook("nf4").to_json(),
            R"({"bits":4,"format":"codebook","group_size":64,"scale_dtype":"float16","table":"nf4",)"
            R"("version":1})");
  EXPECT_EQ(Codebook("nf4").spec(), "codebook:nf4:g64");
  const Codebook custom(std::vector<float>{-1, -0.3F, 0.25F}, Codebook::kPerTensor, DType::f32);
  EXPECT_EQ(custom.bits, 2);
  EXPECT_EQ(custom.to_json(),
            R"({"bits":2,"format":"codebook","group_size":"tensor","scale_dtype":"float32",)"
            R"("table":[-1.0,-0.300048828125,0.25],"version":1})");
  const std::string spec = custom.spec();
  EXPECT_TRUE(spec.starts_with("codebook:custom2-") && spec.ends_with(":tensor:f32")) << spec;
  EXPECT_EQ(spec.size(), std::string("codebook:custom2-01234567:tensor:f32").size());
  EXPECT_NE(Codebook(std::vector<float>{-1, -0.3F, 0.5F}).spec().substr(0, 25), spec.substr(0, 25));
  EXPECT_NE(message_of<InvalidArgument>([&] { format_from_spec(spec); }).find("by its values"),
            std::string::npos);
  // A name stands for a table at its own width.
  const Codebook wide("nf4", 64, DType::f16, 5);
  EXPECT_TRUE(wide.table_name.empty());
  EXPECT_TRUE(wide.spec().starts_with("codebook:custom5-"));
}

TEST(Codebook, DescriptionsOfAllTablesReadBack) {
  for (size_t entries = 2; entries <= 256; ++entries) {
    const Codebook format(random_table(entries, entries, 3000), 32, DType::bf16);
    EXPECT_GE(1 << format.bits, static_cast<int>(entries));
    EXPECT_LT(1 << (format.bits - 1), static_cast<int>(entries));
    const auto again = std::dynamic_pointer_cast<const Codebook>(format_from_json(format.to_json()));
    EXPECT_EQ(again->table, format.table);
    EXPECT_EQ(again->to_json(), format.to_json());
    EXPECT_EQ(again->spec(), format.spec());
  }
  const Codebook extremes(std::vector<float>{-65504, -0x1p-24F, -0.0F, 0x1p-24F, 65504}, 1, DType::f32, 8);
  EXPECT_EQ(format_from_json(extremes.to_json())->to_json(), extremes.to_json());
  EXPECT_FALSE(std::signbit(extremes.table[2]));
  EXPECT_EQ(extremes.bits, 8);
}

TEST(Codebook, ShortFormHasDefaultsAndTakesItsPartsInAnyOrder) {
  EXPECT_EQ(format_from_spec("codebook:nf4")->spec(), "codebook:nf4:g64");
  EXPECT_EQ(format_from_spec("codebook:nf3:bf16:g32")->spec(), "codebook:nf3:g32:bf16");
  EXPECT_EQ(format_from_spec("codebook:fp4:channel:f16")->spec(), "codebook:fp4:channel");
  EXPECT_EQ(format_from_spec("codebook:sf4:tensor:f32")->spec(), "codebook:sf4:tensor:f32");
  for (const char* spec :
       {"codebook", "codebook:", "codebook:4", "codebook:nf5", "codebook:NF4",
        "codebook:nf4:", "codebook:nf4:g0", "codebook:nf4:g-1", "codebook:nf4:sym", "codebook:nf4:g64:g64",
        "codebook:nf4:f16:f16", "codebook:nf4:f64", "codebook:custom4", "codebook:nf4:nf4", "codebook:nf4\n",
        "codebook:\xff", "codebooks:nf4", "codebook:g64:nf4"}) {
    SCOPED_TRACE(spec);
    message_of<InvalidArgument>([&] { format_from_spec(spec); });
  }
}

TEST(Codebook, RefusesHostileDescriptions) {
  const std::string good =
      R"({"bits":2,"format":"codebook","group_size":64,"scale_dtype":"float16","table":[-1.0,0.0,2.0],)"
      R"("version":1})";
  EXPECT_EQ(format_from_json(good)->to_json(), good);
  const auto replaced = [](std::string text, const std::string& from, const std::string& to) {
    const size_t at = text.find(from);
    EXPECT_NE(at, std::string::npos) << from;
    return text.replace(at, from.size(), to);
  };
  const auto table = [&](const std::string& to) { return replaced(good, "[-1.0,0.0,2.0]", to); };
  std::string long_table = "[0";
  for (int i = 1; i < 257; ++i) long_table += text_of(",", i);
  const std::vector<std::string> bad = {
      table("null"),
      table("3"),
      table("{}"),
      table("[]"),
      table("[1.0]"),
      table("\"nf4\""),  // of 4 bits
      table("\"nf5\""),
      table("\"\""),
      table("\"\xff\""),
      table("\"custom2\""),
      table("[1.0,0.0,2.0]"),
      table("[0.0,0.0,2.0]"),
      table("[0.0,-0.0,2.0]"),
      table("[-1.0,0.0,\"2\"]"),
      table("[-1.0,0.0,null]"),
      table("[-1.0,0.0,true]"),
      table("[-1.0,0.0,[2.0]]"),
      table("[-1.0,0.0,0.1]"),
      table("[-1.0,0.0,65505]"),
      table("[-1.0,0.0,65520]"),
      table("[-1.0,0.0,1e30]"),
      table("[-1.0,0.0,1e400]"),
      table("[-1.0,0.0,1e-30]"),
      table("[-1.0,0.0,NaN]"),
      table("[-1.0,0.0,18446744073709551615]"),
      table("[-1.0,0.0,2.0,3.0,4.0]"),  // more than 2 bits number
      replaced(table(long_table + "]"), "\"bits\":2", "\"bits\":8"),
      replaced(good, "\"bits\":2", "\"bits\":1"),
      replaced(good, "\"bits\":2", "\"bits\":9"),
      replaced(good, "\"bits\":2", "\"bits\":2.0"),
      replaced(good, "\"bits\":2", "\"bits\":\"2\""),
      replaced(good, "\"bits\":2,", ""),
      replaced(good, "\"bits\":2,", "\"bits\":2,\"bits\":2,"),
      replaced(good, "\"bits\":2,", "\"bits\":2,\"symmetric\":true,"),
      replaced(good, "64", "0"),
      replaced(good, "64", "\"row\""),
      replaced(good, "float16", "float64"),
      replaced(good, "\"version\":1", "\"version\":2"),
      replaced(good, "codebook", "codebooks"),
      replaced(Codebook("nf4").to_json(), "\"bits\":4", "\"bits\":5"),
  };
  for (const std::string& json : bad) {
    SCOPED_TRACE(json.substr(0, 200));
    message_of<InvalidArgument>([&] { format_from_json(json); });
  }
  EXPECT_EQ(format_from_json(table("[-1,-0.0,2]"))->to_json(), good);
  // Values that a name stands for get it.
  const Codebook nf3("nf3");
  const Codebook wide("nf3", 64, DType::f16, 4);
  EXPECT_EQ(format_from_json(replaced(wide.to_json(), "\"bits\":4", "\"bits\":3"))->to_json(), nf3.to_json());
}

TEST(Codebook, ConstructorNamesTheArgumentThatIsOutOfRange) {
  const auto refused = [](const char* argument, const std::vector<float>& table,
                          std::optional<int> bits = std::nullopt) {
    const std::string text = message_of<InvalidArgument>([&] { Codebook(table, 64, DType::f16, bits); });
    EXPECT_TRUE(text.starts_with(argument)) << text;
  };
  refused("table", {});
  refused("table", {1});
  refused("table", ramp(257));
  refused("table", {1, 1});
  refused("table", {1, -1});
  refused("table", {1, 1.0001F});  // the same in float16
  refused("table", {-0.0F, 0.0F});
  refused("table", {0, 1e-9F});
  refused("table", {0, NAN});
  refused("table", {NAN, 0});
  refused("table", {0, HUGE_VALF});
  refused("table", {-65520, 0});
  refused("bits", ramp(16), 3);
  refused("bits", ramp(16), 9);
  refused("bits", ramp(16), 0);
  EXPECT_NO_THROW(Codebook(ramp(256)));
  EXPECT_NO_THROW(Codebook(std::vector<float>{-65519, 0}));
  EXPECT_THROW(Codebook("nf5"), InvalidArgument);
  EXPECT_THROW(Codebook("nf4", 0), InvalidArgument);
  EXPECT_THROW(Codebook("nf4", 64, DType::f64), TypeMismatch);
}

TEST(Codebook, CountsEveryStoredBit) {
  struct Case {
    const char* spec;
    int64_t n, k, bits;
  };
  for (const Case& each : std::vector<Case>{
           {"codebook:nf4:g64", 64, 256, 64 * (256 * 4 + 4 * 16) + 16 * 16},
           {"codebook:nf3:g100:f32", 5, 150, 5 * (15 * 32 + 2 * 32) + 8 * 16},
           {"codebook:fp4:tensor", 10, 16, 10 * 64 + 16 + 15 * 16},
       }) {
    int64_t bits = 0;
    for (const PlaneSpec& plane : format_from_spec(each.spec)->planes(each.n, each.k)) {
      if (!plane.optional) bits += 8 * size_of(plane.dtype) * checked_product(plane.shape);
    }
    EXPECT_EQ(bits, each.bits) << each.spec;
  }
}

PackedTensor example(const std::shared_ptr<const Codebook>& format, int64_t n, int64_t k) {
  PackedTensor packed{format, n, k, {}};
  for (const PlaneSpec& plane : format->planes(n, k)) {
    if (!plane.optional) packed.planes.emplace(plane.name, Tensor(plane.dtype, plane.shape));
  }
  const auto table = packed.planes.at("codebook").values<uint16_t>();
  std::transform(format->table.begin(), format->table.end(), table.begin(), f16_from_float);
  return packed;
}

// Every code under every finite float16 scale against the formula, through the float32 product.
TEST(Codebook, DecodesEveryCodeUnderEveryFloat16Scale) {
  constexpr int64_t kScales = 65536;
  for (int bits = 1; bits <= 8; ++bits) {
    const size_t entries = (size_t{1} << bits) - (bits > 1 ? 1 : 0);
    const auto format =
        std::make_shared<const Codebook>(random_table(entries, 77), Codebook::kPerChannel, DType::f16, bits);
    const auto k = static_cast<int64_t>(entries);
    PackedTensor packed = example(format, kScales, k);
    std::vector<uint8_t> codes(entries);
    std::iota(codes.begin(), codes.end(), uint8_t{0});
    const auto words = static_cast<size_t>(packed_words(k, bits));
    for (int64_t r = 0; r < kScales; ++r) {
      packed.planes.at("scales").values<uint16_t>()[r] = static_cast<uint16_t>(r);
      pack_bits(codes, bits, packed.planes.at("codes").values<uint32_t>().subspan(r * words, words));
    }
    std::vector<float> row(entries);
    for (int64_t r = 0; r < kScales; ++r) {
      const float scale = float_from_f16(static_cast<uint16_t>(r));
      if (!std::isfinite(scale)) continue;
      format->decode(packed, r, MatrixView<float>(row.data(), 1, k));
      for (size_t c = 0; c < entries; ++c) {
        // The product of two 11-bit numbers is exact in float32.
        ASSERT_EQ(static_cast<double>(row[c]), static_cast<double>(scale) * format->table[c])
            << bits << " bits, scale " << r << ", code " << c;
      }
    }
    EXPECT_THROW(validate(packed), InvalidArgument);  // some of the scales are not finite
  }
}

TEST(Codebook, RefusesPlanesThatDoNotDecodeSafely) {
  const auto format = std::make_shared<const Codebook>(std::vector<float>{-2, -0.5F, 0.25F, 1, 3}, 4);
  const auto expect_refused = [&](const char* named, const std::function<void(PackedTensor&)>& change) {
    PackedTensor packed = example(format, 5, 11);
    validate(packed);
    change(packed);
    std::vector<float> out(55);
    const std::string text =
        message_of<InvalidArgument>([&] { dequantize(packed, MatrixView<float>(out.data(), 5, 11), 1); });
    EXPECT_NE(text.find(named), std::string::npos) << text;
  };
  for (const uint16_t bits : std::vector<uint16_t>{0x7e00, 0xfe00, 0x7c00, 0x3401, 0x0000, 0xb400}) {
    expect_refused("codebook", [&](PackedTensor& p) {
      p.planes.at("codebook").values<uint16_t>()[2] = bits;  // 0.25 is 0x3400
    });
  }
  expect_refused("codebook", [](PackedTensor& p) { p.planes.erase("codebook"); });
  expect_refused("codebook", [](PackedTensor& p) { p.planes.at("codebook") = Tensor(DType::f16, {4}); });
  expect_refused("codebook", [](PackedTensor& p) { p.planes.at("codebook") = Tensor(DType::f16, {8}); });
  expect_refused("codebook", [](PackedTensor& p) { p.planes.at("codebook") = Tensor(DType::bf16, {5}); });
  for (const uint32_t code : {5U, 6U, 7U}) {  // beyond the table's five entries
    expect_refused("row 3, column 9",
                   [&](PackedTensor& p) { p.planes.at("codes").values<uint32_t>()[2 * 3] = code << 27; });
    expect_refused("row 4, column 10", [&](PackedTensor& p) {  // across two words
      p.planes.at("codes").values<uint32_t>()[2 * 4] = code << 30;
      p.planes.at("codes").values<uint32_t>()[2 * 4 + 1] = code >> 2;
    });
  }
  expect_refused("plane codes",
                 [](PackedTensor& p) { p.planes.at("codes").values<uint32_t>()[9] = 1U << 31; });
  for (const uint16_t scale : std::vector<uint16_t>{0x7c00, 0xfc00, 0x7e00}) {
    expect_refused("scales", [&](PackedTensor& p) { p.planes.at("scales").values<uint16_t>()[7] = scale; });
  }
  expect_refused("zeros", [](PackedTensor& p) { p.planes.emplace("zeros", Tensor(DType::i32, {3, 1})); });
  expect_refused("group_index", [](PackedTensor& p) {
    p.planes.emplace("group_index", Tensor(DType::i32, {11}));  // all in one group of four
  });
}

void expect_equal(const Encoded& encoded, const reference::CodebookCodes& expected, const Codebook& format) {
  const PackedTensor& packed = encoded.packed;
  validate(packed);
  for (int64_t r = 0; r < packed.n; ++r) {
    for (int64_t c = 0; c < packed.k; ++c) {
      ASSERT_EQ(code_at(packed.plane("codes"), format.bits, r, c), expected.codes[r * packed.k + c])
          << r << ", " << c;
    }
  }
  const Tensor& scales = packed.plane("scales");
  ASSERT_EQ(static_cast<size_t>(scales.element_count()), expected.scales.size());
  for (int64_t i = 0; i < scales.element_count(); ++i) ASSERT_EQ(scale_at(scales, i), expected.scales[i]);
  const auto decoded = testing::decoded_values(packed);
  for (size_t i = 0; i < decoded.size(); ++i) {
    ASSERT_EQ(decoded[i], expected.decoded[i]) << i;
    ASSERT_EQ(encoded.decoded[i], expected.decoded[i]) << i;
  }
}

TEST(CodebookEncoder, EqualsTheReferenceForAllKindsOfTables) {
  uint64_t seed = 1;
  for (int bits = 1; bits <= 8; ++bits) {
    for (const int64_t group_size :
         {int64_t{1}, int64_t{3}, int64_t{16}, int64_t{128}, Codebook::kPerChannel, Codebook::kPerTensor}) {
      for (const DType dtype : {DType::f16, DType::bf16, DType::f32}) {
        const CounterRandom random(++seed);
        const size_t entries = 2 + random.below(5, (size_t{1} << bits) - 1);
        const auto format = std::make_shared<const Codebook>(
            random_table(entries, seed, seed % 4 == 0 ? 100.0F : 1.0F), group_size, dtype, bits);
        const auto n = static_cast<int64_t>(random.below(0, 140));
        const auto k = static_cast<int64_t>(1 + random.below(1, 150));
        SCOPED_TRACE(text_of(format->spec(), " [", n, ", ", k, "]"));
        const auto w = testing::normal_values(n * k, seed);
        const auto groups = consecutive_groups(*format, k);
        const float shrink = seed % 2 == 0 ? 1.0F : 0.83F;
        const auto expected = reference::quantize(w, n, k, *format, groups, shrink);
        const auto slab = static_cast<int64_t>(1 + random.below(2, 100));
        expect_equal(encode(format, w, n, k, groups, seed % 2 == 0, slab, shrink), expected, *format);
        const auto shuffled = shuffled_groups(*format, k, seed);
        if (group_size <= 0) continue;
        expect_equal(encode(format, w, n, k, shuffled, true, slab, shrink),
                     reference::quantize(w, n, k, *format, shuffled, shrink), *format);
      }
    }
  }
}

// No entry is nearer than the one chosen, and a tie goes to the lower one: by looking at all of them.
TEST(CodebookEncoder, ChoosesTheNearestEntry) {
  for (uint64_t seed = 1; seed <= 64; ++seed) {
    const CounterRandom random(seed);
    auto table = random_table(2 + random.below(0, 255), seed);
    table.back() = 1;  // the scale of a group whose largest magnitude is 1
    const auto format = std::make_shared<const Codebook>(table, Codebook::kPerChannel, DType::f32);
    std::vector<float> w = {1};
    for (size_t i = 0; i + 1 < format->table.size(); ++i) {
      const float middle = (format->table[i] + format->table[i + 1]) / 2;
      w.insert(w.end(), {middle, std::nextafter(middle, -2.0F), std::nextafter(middle, 2.0F)});
      w.push_back(static_cast<float>(2 * random.uniform(i + 1) - 1));
    }
    const auto k = static_cast<int64_t>(w.size());
    const auto encoded = encode(format, w, 1, k, std::vector<int32_t>(w.size(), 0), false, 1, 1);
    EXPECT_EQ(encoded.packed.plane("scales").values<float>()[0], 1);
    for (int64_t c = 0; c < k; ++c) {
      size_t nearest = 0;
      for (size_t i = 1; i < format->table.size(); ++i) {
        const auto distance = [&](size_t j) {
          return std::abs(static_cast<double>(w[c]) - format->table[j]);
        };
        if (distance(i) < distance(nearest)) nearest = i;
      }
      ASSERT_EQ(code_at(encoded.packed.plane("codes"), format->bits, 0, c), static_cast<int>(nearest))
          << w[c] << " among " << format->table.size();
    }
  }
}

// Worked out by hand.
TEST(CodebookEncoder, FollowsTheRuleOnSmallCases) {
  struct Case {
    std::vector<float> table;
    std::vector<float> row;
    float scale;
    std::vector<int> codes;
    DType dtype = DType::f16;
  };
  const std::vector<Case> cases = {
      // 8 / 4: scale 2, midpoints in units of weights -5, -1, 3.
      {{-4, -1, 0, 3}, {8, -8, -5, -4.75F, -1, -0.5F, 3, 3.25F}, 2, {3, 0, 0, 1, 1, 2, 2, 3}},
      // The largest magnitude of the table may be on one side only: the other clips.
      {{0, 0.5F, 1, 2}, {-4, 4, 3, 1, 1.5F}, 2, {0, 3, 2, 1, 1}},
      {{-1, -0.5F}, {3, -3, -2.25F, -2}, 3, {1, 0, 0, 1}},
      // All zero: scale 1 if the table has a zero, else as small as can be.
      {{-1, 0, 1}, {0, -0.0F}, 1, {1, 1}},
      {{-1, 1}, {0, -0.0F}, 0x1p-24F, {0, 0}},
      {{-1, 1}, {0, -0.0F}, 0x1p-126F, {0, 0}, DType::bf16},
      {{1, 2}, {0, 0}, 0x1p-126F, {0, 0}, DType::f32},
      // Scales below the smallest are raised to it.
      {{-1, 0, 1}, {1e-9F, -1e-9F}, 0x1p-24F, {1, 1}},
      // The scale 1 / 3 is rounded before it divides: down in float16, to 0.333251953125.
      {{0, 3}, {1, 0.4999F, 0.499877F}, 0.333251953125F, {1, 1, 0}},
  };
  for (const Case& each : cases) {
    const auto format = std::make_shared<const Codebook>(each.table, Codebook::kPerChannel, each.dtype);
    SCOPED_TRACE(format->to_json());
    const auto k = static_cast<int64_t>(each.row.size());
    const auto encoded =
        encode(format, each.row, 1, k, std::vector<int32_t>(each.row.size(), 0), false, 1, 1);
    EXPECT_EQ(scale_at(encoded.packed.plane("scales"), 0), each.scale);
    for (int64_t c = 0; c < k; ++c) {
      EXPECT_EQ(code_at(encoded.packed.plane("codes"), format->bits, 0, c), each.codes[c]) << c;
    }
  }
}

// Error feedback may drive its working copy anywhere; the codes stay inside the table.
TEST(CodebookEncoder, EncodesAnyValue) {
  constexpr float kMax = std::numeric_limits<float>::max();
  for (int bits = 1; bits <= 8; ++bits) {
    const size_t entries = bits == 1 ? 2 : (size_t{1} << bits) - 1;
    const auto format = std::make_shared<const Codebook>(random_table(entries, 5), 1, DType::f16, bits);
    const auto encoder = format->column_encoder(format, 1, 1, {});
    const float fitted = 0.01F;
    encoder->fit(0, 0, MatrixView<const float>(&fitted, 1, 1), {});
    for (const float value : {kMax, -kMax, HUGE_VALF, -HUGE_VALF, NAN, 1e30F, -1e30F, 1e-45F}) {
      float decoded = 0;
      encoder->encode(0, 0, MatrixView<const float>(&value, 1, 1), MatrixView<float>(&decoded, 1, 1));
      EXPECT_LE(std::abs(decoded), 0.0101F) << bits << " bits, " << value;
      validate(encoder->finish(1));
    }
  }
}

TEST(CodebookEncoder, RefusesScalesThatDoNotFitTheirType) {
  const std::vector<float> w = {1, 2, 3, 1e6F};
  const auto round = [&](const std::vector<float>& table, DType dtype, float factor) {
    std::vector<float> values = w;
    for (float& value : values) value *= factor;
    return round_nearest(MatrixView<const float>(values.data(), 2, 2),
                         std::make_shared<const Codebook>(table, 2, dtype), {.threads = 1});
  };
  const std::string text = message_of<NumericError>([&] { round({-1, 0, 1}, DType::f16, 1); });
  EXPECT_NE(text.find("row 1, group 0"), std::string::npos) << text;
  EXPECT_NE(text.find("bfloat16"), std::string::npos) << text;
  EXPECT_NO_THROW(round({-1, 0, 1}, DType::bf16, 1));
  EXPECT_NO_THROW(round({-100, 0, 100}, DType::f16, 1));
  EXPECT_NO_THROW(round({-1, 0, 1}, DType::f32, 3e32F));
  message_of<NumericError>([&] { round({-0x1p-10F, 0}, DType::f32, 3e32F); });
}

// The same grid described twice: a table of integers against zero point and steps.
TEST(Codebook, ATableOfIntegersDecodesAsTheUniformGrid) {
  const auto table = std::make_shared<const Codebook>(ramp(16), 16);
  const auto uniform = std::make_shared<const Uniform>(4, 16);
  const auto w = testing::normal_values(7 * 50, 3);
  PackedTensor packed =
      round_nearest(MatrixView<const float>(w.data(), 7, 50), uniform, {.threads = 1}).tensor;
  const auto expected = testing::decoded_values(packed);
  PackedTensor other = example(table, 7, 50);
  other.planes.insert_or_assign("codes", packed.plane("codes"));
  other.planes.insert_or_assign("scales", packed.plane("scales"));
  EXPECT_EQ(testing::decoded_values(other), expected);
}

}  // namespace
}  // namespace quantloom
