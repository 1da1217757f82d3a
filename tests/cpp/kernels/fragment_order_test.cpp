// Fragment order against a definition of its own, one bit at a time.
#include "formats/fragment_order.hpp"

#include <gtest/gtest.h>

#include <array>
#include <cstring>
#include <map>
#include <set>

#include "kernels/fragment_layout.hpp"
#include "kernels/random_packed.hpp"
#include "quantloom/formats/format.hpp"

namespace quantloom {
namespace {

using fragments::CodeOrder;
using testing::random_packed;

// Where bit `bit` of a code lies: in word `word` of its lane and unit.
struct BitPlace {
  int lane = 0;
  int unit = 0;
  int word = 0;
  int bit = 0;
};

// The bits of the tensor core's A fragment (m16n8k16) in a lane: its register and half for a row and column
// of the 16 x 16 matrix.
struct Element {
  int lane;
  int reg;
  int half;
};
Element element_of(int row, int column) {
  return {row % 8 * 4 + column % 8 / 2, row / 8 + column / 8 * 2, column % 2};
}

// The place among the 16 columns of a step at which column `column` of a block is multiplied: four lanes own
// four consecutive columns each, for which the tensor core has columns 2t, 2t + 1, 2t + 8 and 2t + 9.
int step_column_of(int column) {
  const int owner = column % 16 / 4;
  const int columns[] = {2 * owner, 2 * owner + 1, 2 * owner + 8, 2 * owner + 9};
  return columns[column % 4];
}

// Order `bytes`: the bits of a byte of a unit's words as the quads take them: all whole codes first, then
// the strings of bits that are left over at the top of the bytes.
std::vector<std::pair<int, int>> bits_of_bytes(int bits) {
  std::vector<std::pair<int, int>> order;
  const int whole = 8 / bits * bits;
  for (int word = 0; word < bits; ++word) {
    for (int bit = 0; bit < whole; ++bit) order.emplace_back(word, bit);
  }
  for (int word = 0; word < bits; ++word) {
    for (int bit = whole; bit < 8; ++bit) order.emplace_back(word, bit);
  }
  return order;
}

// Where a bit of the code at `row`, `column` of a block of 64 x 64 lies.
class Places {
 public:
  Places(int bits, CodeOrder order) : bits_(bits), order_(order), bytes_(bits_of_bytes(bits)) {}

  BitPlace operator()(int row, int column, int bit) const {
    const Element element = element_of(row % 16, step_column_of(column));
    if (order_ == CodeOrder::dense) {
      const int pair = column / 16 * 4 + element.reg;
      const int at = (2 * pair + element.half) * bits_ + bit;
      return {element.lane, row / 16, at / 32, at % 32};
    }
    // The four columns of a lane in a step lie in these bytes; a quad is a step of one row.
    const int bytes[] = {0, 2, 1, 3};
    const int quad = column / 16 * 2 + row % 16 / 8;
    const auto [word, position] = bytes_[static_cast<size_t>(quad * bits_ + bit)];
    return {element.lane, row / 16, word, position + 8 * bytes[column % 4]};
  }

 private:
  int bits_;
  CodeOrder order_;
  std::vector<std::pair<int, int>> bytes_;
};

std::vector<int32_t> groups_of(const PackedTensor& packed, int64_t width) {
  std::vector<int32_t> groups;
  for (int64_t c = 0; c < packed.k; ++c) {
    groups.push_back(packed.planes.contains("group_index")
                         ? packed.plane("group_index").values<int32_t>()[static_cast<size_t>(c)]
                         : static_cast<int32_t>(c / width));
  }
  return groups;
}

// Column of the fragments that each input goes to.
std::vector<int64_t> columns_of(const std::vector<int32_t>& groups, int64_t group_columns) {
  std::vector<int64_t> places;
  std::map<int32_t, int64_t> taken;
  for (size_t c = 0; c < groups.size(); ++c) {
    places.push_back(group_columns == 0 ? static_cast<int64_t>(c)
                                        : groups[c] * group_columns + taken[groups[c]]++);
  }
  return places;
}

uint8_t code_at(const Tensor& plane, int64_t row, int bits, int64_t i) {
  const auto words = static_cast<size_t>(plane.shape()[1]);
  uint8_t code = 0;
  unpack_bits(plane.values<uint32_t>().subspan(static_cast<size_t>(row) * words, words), bits, i, {&code, 1});
  return code;
}

struct Expected {
  std::vector<uint32_t> codes;
  std::vector<float> scales;
  std::vector<uint8_t> zeros;
  std::vector<int32_t> source;
};

Expected slow_prepare(const PackedTensor& packed) {
  const auto& format = dynamic_cast<const GroupedFormat&>(*packed.format);
  const int bits = format.bits;
  const bool per_tensor = format.group_size == GroupedFormat::kPerTensor;
  const int64_t format_groups = format.group_count(packed.k);
  const int64_t groups = std::max<int64_t>(format_groups, 1);
  const int64_t width = format.columns_per_group(packed.k);
  const bool moved = groups > 1 && (packed.planes.contains("group_index") || width % 16 != 0);
  const int64_t group_columns = moved ? (width + 15) / 16 * 16 : 0;
  const int64_t columns = moved ? groups * group_columns : packed.k;
  const int64_t row_blocks = std::max<int64_t>((packed.n + 63) / 64, 1);
  const int64_t column_blocks = (columns + 63) / 64;
  const auto places = columns_of(groups_of(packed, width), group_columns);
  const Places place_of(bits, packed.format->name() == "codebook" ? CodeOrder::dense : CodeOrder::bytes);

  Expected expected;
  expected.codes.assign(static_cast<size_t>(row_blocks * column_blocks * bits * 128), 0);
  expected.scales.assign(static_cast<size_t>(row_blocks * groups * 64), 0.0F);
  expected.zeros.assign(expected.scales.size(), 0);
  if (moved) expected.source.assign(static_cast<size_t>(column_blocks * 64), -1);
  for (int64_t c = 0; c < packed.k; ++c) {
    const int64_t place = places[static_cast<size_t>(c)];
    if (moved) expected.source[static_cast<size_t>(place)] = static_cast<int32_t>(c);
    for (int64_t r = 0; r < packed.n; ++r) {
      const uint32_t code = code_at(packed.plane("codes"), r, bits, c);
      for (int b = 0; b < bits; ++b) {
        const BitPlace at = place_of(static_cast<int>(r % 64), static_cast<int>(place % 64), b);
        const int word = at.unit * bits + at.word;
        // [row block][column block][piece of 16 bytes][lane][word of the piece]
        const int64_t index =
            (((r / 64 * column_blocks + place / 64) * bits + word / 4) * 32 + at.lane) * 4 + word % 4;
        expected.codes[static_cast<size_t>(index)] |= ((code >> b) & 1U) << at.bit;
      }
    }
  }
  // A value of the whole tensor is kept even where there are no rows or columns.
  const int64_t rows = per_tensor ? std::max<int64_t>(packed.n, 1) : packed.n;
  for (int64_t r = 0; r < rows; ++r) {
    for (int64_t g = 0; g < (per_tensor ? 1 : format_groups); ++g) {
      // [row block][group][row mod 8][row / 8 in the block]
      const auto index = static_cast<size_t>(((r / 64 * groups + g) * 8 + r % 8) * 8 + r % 64 / 8);
      expected.scales[index] =
          testing::scale_at(packed.plane("scales"), per_tensor ? 0 : r * format_groups + g);
      if (packed.planes.contains("zeros")) {
        expected.zeros[index] = code_at(packed.plane("zeros"), g, bits, per_tensor ? 0 : r);
      }
    }
  }
  return expected;
}

bool same_bytes(const Tensor& a, const Tensor& b) {
  return a.dtype() == b.dtype() && a.shape() == b.shape() &&
         (a.byte_count() == 0 || std::memcmp(a.bytes(), b.bytes(), static_cast<size_t>(a.byte_count())) == 0);
}

void check(const PackedTensor& packed) {
  const PreparedPlanes prepared = prepare_fragments(packed);
  EXPECT_NO_THROW(validate(prepared));
  const Expected expected = slow_prepare(packed);
  const auto codes = prepared.plane("codes").values<uint32_t>();
  ASSERT_EQ(std::vector<uint32_t>(codes.begin(), codes.end()), expected.codes);
  const Tensor& scales = prepared.plane("scales");
  ASSERT_EQ(scales.element_count(), static_cast<int64_t>(expected.scales.size()));
  for (int64_t i = 0; i < scales.element_count(); ++i) {
    ASSERT_EQ(testing::scale_at(scales, i), expected.scales[static_cast<size_t>(i)]) << i;
  }
  ASSERT_EQ(prepared.has("zeros"), packed.planes.contains("zeros"));
  if (prepared.has("zeros")) {
    const auto zeros = prepared.plane("zeros").values<uint8_t>();
    ASSERT_EQ(std::vector<uint8_t>(zeros.begin(), zeros.end()), expected.zeros);
  }
  ASSERT_EQ(prepared.has("source"), !expected.source.empty());
  if (prepared.has("source")) {
    const auto source = prepared.plane("source").values<int32_t>();
    ASSERT_EQ(std::vector<int32_t>(source.begin(), source.end()), expected.source);
  }
  for (const char* name : {"group_index", "codebook"}) {
    ASSERT_EQ(prepared.has(name), packed.planes.contains(name));
    if (prepared.has(name)) {
      ASSERT_TRUE(same_bytes(prepared.plane(name), packed.plane(name))) << name;
    }
  }

  const PackedTensor back = unprepare_fragments(prepared);
  EXPECT_NO_THROW(validate(back));
  ASSERT_EQ(back.planes.size(), packed.planes.size());
  ASSERT_EQ(back.n, packed.n);
  ASSERT_EQ(back.k, packed.k);
  for (const auto& [name, plane] : packed.planes) {
    ASSERT_TRUE(same_bytes(back.plane(name), plane)) << "plane " << name << " did not come back";
  }
}

class FragmentOrderWidths : public ::testing::TestWithParam<int> {};

TEST_P(FragmentOrderWidths, EachBitOfAUnitIsUsedOnce) {
  const int bits = GetParam();
  for (const CodeOrder order : {CodeOrder::bytes, CodeOrder::dense}) {
    std::set<std::pair<int, int>> used;
    for (int code = 0; code < fragments::kUnitCodes; ++code) {
      int next = 0;
      for (int index = 0;; ++index) {
        const fragments::BitRun run = fragments::bit_run(order, bits, code / 2, code % 2, index);
        if (run.count == 0) break;
        EXPECT_EQ(run.from, next);
        next += run.count;
        EXPECT_GE(run.word, 0);
        EXPECT_LT(run.word, bits);
        EXPECT_GE(run.position, 0);
        EXPECT_LE(run.position + run.count, 32);
        for (int i = 0; i < run.count; ++i) {
          EXPECT_TRUE(used.emplace(run.word, run.position + i).second) << code << " " << index;
        }
      }
      EXPECT_EQ(next, bits) << code;
    }
    EXPECT_EQ(used.size(), static_cast<size_t>(32 * bits));
  }
}

TEST_P(FragmentOrderWidths, UnitsRoundTrip) {
  const int bits = GetParam();
  const CounterRandom random(static_cast<uint64_t>(bits));
  for (const CodeOrder order : {CodeOrder::bytes, CodeOrder::dense}) {
    for (uint64_t trial = 0; trial < 50; ++trial) {
      uint8_t codes[fragments::kUnitCodes];
      for (size_t i = 0; i < std::size(codes); ++i) {
        codes[i] = static_cast<uint8_t>(random.below(trial * 32 + i, uint64_t{1} << bits));
      }
      // A word past those of the unit must stay as it is.
      uint32_t words[9];
      std::fill(std::begin(words), std::end(words), 0xDEADBEEFU);
      fragments::pack_unit(order, bits, codes, words);
      for (int i = bits; i < 9; ++i) EXPECT_EQ(words[i], 0xDEADBEEFU);
      uint8_t back[fragments::kUnitCodes];
      fragments::unpack_unit(order, bits, words, back);
      EXPECT_TRUE(std::equal(std::begin(codes), std::end(codes), std::begin(back)));
    }
  }
}

// A table of `entries` random values that rise strictly.
std::vector<float> random_table(int64_t entries, uint64_t seed) {
  const CounterRandom random(seed);
  std::vector<float> table;
  for (int64_t i = 0; i < entries; ++i) {
    table.push_back(static_cast<float>(i - entries / 2) +
                    0.5F * static_cast<float>(random.uniform(static_cast<uint64_t>(i))));
  }
  return table;
}

TEST_P(FragmentOrderWidths, RandomMatricesAreInTheOrderOfTheDefinition) {
  const int bits = GetParam();
  static constexpr int64_t kSizes[] = {0, 1, 2, 5, 8, 16, 17, 31, 63, 64, 65, 97, 128, 131, 200};
  static constexpr int64_t kGroups[] = {
      Uniform::kPerChannel, Uniform::kPerTensor, 1, 3, 16, 24, 32, 48, 64, 100, 128, 200};
  static constexpr DType kScales[] = {DType::f16, DType::bf16, DType::f32};
  for (uint64_t seed = 0; seed < 120; ++seed) {
    const CounterRandom random(seed * 8 + static_cast<uint64_t>(bits));
    const auto pick = [&](uint64_t draw, const auto& from) {
      return from[random.below(draw, std::size(from))];
    };
    const int64_t n = pick(0, kSizes);
    const int64_t k = pick(1, kSizes);
    const int64_t group = pick(2, kGroups);
    const DType scales = pick(3, kScales);
    const bool indexed = group > 0 && seed % 3 == 0;
    std::shared_ptr<const GroupedFormat> format =
        std::make_shared<const Uniform>(bits, group, seed % 2 == 0, scales);
    if (seed % 4 == 3) {
      // Full tables, and tables with fewer entries than there are codes.
      const int64_t entries = seed % 8 == 3 ? int64_t{1} << bits : 2 + (int64_t{1} << bits) / 3;
      const auto table = random_table(std::min(entries, int64_t{1} << bits), seed);
      format = std::make_shared<const Codebook>(std::span<const float>(table), group, scales, bits);
    }
    SCOPED_TRACE(text_of(format->spec(), " n=", n, " k=", k, " group_index=", indexed, " seed=", seed));
    check(random_packed(n, k, format, seed, indexed));
    if (HasFatalFailure()) return;
  }
}

INSTANTIATE_TEST_SUITE_P(Bits, FragmentOrderWidths, ::testing::Range(1, 9));

TEST(FragmentOrder, TakesEmptyMatricesAndValuesOfTheWholeTensor) {
  for (const int64_t group : {Uniform::kPerChannel, Uniform::kPerTensor, int64_t{16}, int64_t{3}}) {
    for (const bool symmetric : {true, false}) {
      for (const auto& [n, k] :
           {std::array<int64_t, 2>{0, 0}, {0, 1}, {1, 0}, {0, 70}, {70, 0}, {1, 1}, {64, 64}, {65, 1}}) {
        const Uniform format(5, group, symmetric, DType::f32);
        SCOPED_TRACE(text_of(format.spec(), " n=", n, " k=", k));
        check(random_packed(n, k, format, 3, false));
        if (group > 0) check(random_packed(n, k, format, 4, true));
        if (HasFatalFailure()) return;
      }
    }
  }
}

// As act-order makes them: groups of consecutive columns of an order that is none of the matrix's, or every
// group's columns far apart, or groups that are not full.
TEST(FragmentOrder, TakesAnyGroupIndex) {
  const Uniform format(4, 32, false);
  constexpr int64_t kN = 70;
  constexpr int64_t kK = 200;  // seven groups, the last of 8 columns if full
  const int64_t groups = format.group_count(kK);
  const auto with = [&](auto group_of) {
    PackedTensor packed = random_packed(kN, kK, format, 5, true);
    const auto index = packed.planes.at("group_index").values<int32_t>();
    for (int64_t c = 0; c < kK; ++c) index[static_cast<size_t>(c)] = static_cast<int32_t>(group_of(c));
    return packed;
  };
  check(with([](int64_t c) { return c / 32; }));
  check(with([&](int64_t c) { return c % groups; }));
  check(with([&](int64_t c) { return (kK - 1 - c) / 32; }));
  check(with([&](int64_t c) { return groups - 1 - c / 32; }));  // the last group full, the first not
  check(with([&](int64_t c) { return (c * 37 % kK) / 32; }));
}

TEST(FragmentOrder, FormatsOfTheTableRoundTrip) {
  for (const FormatEntry& entry : format_table()) {
    for (const std::string& spec : entry.examples) {
      SCOPED_TRACE(spec);
      // vector_order_test.cpp, trellis_layout_test.cpp
      if (entry.name == "vector_codebook" || entry.name == "outliers" || entry.name == "trellis") continue;
      if (entry.name == "spqr") continue;      // spqr_fragments_test.cpp
      if (entry.name == "additive") continue;  // additive_layout_test.cpp
      if (entry.name == "bcq" || entry.name == "sdr") {
        EXPECT_THROW(static_cast<void>(fragment_layout(*format_from_spec(spec), 97, 300, false)),
                     Unsupported);
        continue;
      }
      const auto format = std::dynamic_pointer_cast<const GroupedFormat>(format_from_spec(spec));
      ASSERT_NE(format, nullptr);
      check(random_packed(97, 300, format, 7, false));
    }
  }
}

TEST(FragmentOrder, RefusesWhatIsNotThePlanesOfAMatrix) {
  const PackedTensor packed = random_packed(10, 64, Uniform(4, 32, false), 1, true);
  const PreparedPlanes prepared = prepare_fragments(packed);
  const auto expect_error = [](const auto& call, const std::string& name) {
    try {
      call();
      ADD_FAILURE() << "no error about " << name;
    } catch (const Error& error) {
      EXPECT_NE(std::string(error.what()).find(name), std::string::npos) << error.what();
    }
  };
  for (const auto& [name, plane] : packed.planes) {
    if (name != "group_index") {
      PackedTensor lacking = packed;
      lacking.planes.erase(name);
      expect_error([&] { static_cast<void>(prepare_fragments(lacking)); }, name);
    }
    PackedTensor misshaped = packed;
    misshaped.planes.at(name) = Tensor(plane.dtype(), {1, 2, 3});
    expect_error([&] { static_cast<void>(prepare_fragments(misshaped)); }, name);
  }
  for (const auto& [name, plane] : prepared.planes) {
    if (name != "group_index") {
      PreparedPlanes lacking = prepared;
      lacking.planes.erase(name);
      expect_error([&] { static_cast<void>(unprepare_fragments(lacking)); }, name);
    }
    PreparedPlanes misshaped = prepared;
    misshaped.planes.at(name) = Tensor(plane.dtype(), {1, 2, 3});
    expect_error([&] { static_cast<void>(unprepare_fragments(misshaped)); }, name);
    PreparedPlanes mistyped = prepared;
    mistyped.planes.at(name) = Tensor(DType::f64, plane.shape());
    expect_error([&] { static_cast<void>(unprepare_fragments(mistyped)); }, name);
  }
  PreparedPlanes unknown = prepared;
  unknown.planes.emplace("extra", Tensor(DType::u8, {1}));
  EXPECT_THROW(validate(unknown), InvalidArgument);
  PreparedPlanes formless = prepared;
  formless.format = nullptr;
  EXPECT_THROW(validate(formless), InvalidArgument);
}

TEST(FragmentOrder, RefusesGroupIndicesOutOfRange) {
  const Uniform format(4, 32);
  for (const int32_t bad : {-1, 2, 1'000'000}) {
    std::vector<int32_t> index(64, 0);
    for (size_t i = 32; i < 64; ++i) index[i] = 1;
    index[40] = bad;
    EXPECT_THROW(static_cast<void>(fragment_source(format, 64, index)), InvalidArgument) << bad;
  }
  const std::vector<int32_t> crowded(64, 1);
  EXPECT_THROW(static_cast<void>(fragment_source(format, 64, crowded)), InvalidArgument);
  EXPECT_TRUE(fragment_source(format, 64, {}).empty());
}

TEST(FragmentOrder, RefusesSizesThatNoKernelTakes) {
  const Uniform format(4, 128);
  EXPECT_THROW(static_cast<void>(prepared_planes(format, -1, 64, false)), InvalidArgument);
  EXPECT_THROW(static_cast<void>(prepared_planes(format, 64, -1, false)), InvalidArgument);
  EXPECT_THROW(static_cast<void>(prepared_planes(format, int64_t{1} << 40, 64, false)), Error);
  EXPECT_THROW(static_cast<void>(prepared_planes(format, 64, int64_t{1} << 40, false)), Error);
}

}  // namespace
}  // namespace quantloom
