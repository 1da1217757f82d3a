// Additive codes in the orders of the CUDA kernels, and back.
#include "kernels/additive_layout.hpp"

#include <gtest/gtest.h>

#include <algorithm>
#include <array>
#include <cstring>
#include <set>

#include "kernels/fragment_layout.hpp"
#include "quantloom/formats/bit_packing.hpp"
#include "quantloom/formats/vector_codebook.hpp"
#include "quantloom/random.hpp"

namespace quantloom {
namespace {

PackedTensor random_packed(const std::shared_ptr<const Format>& format, int64_t n, int64_t k, uint64_t seed) {
  const auto& additive = dynamic_cast<const Additive&>(*format);
  const CounterRandom random(seed);
  uint64_t next = 0;
  PackedTensor packed{format, n, k, {}};
  for (const PlaneSpec& spec : format->planes(n, k)) {
    Tensor plane(spec.dtype, spec.shape);
    if (spec.dtype == DType::i32) {
      const auto words = plane.values<uint32_t>();
      const size_t row_words = plane.element_count() > 0 ? static_cast<size_t>(spec.shape[1]) : 1;
      const auto [count, bits] =
          spec.name == "scale_codes" ? std::pair(additive.scale_count(k), additive.levels.scale_bits)
          : spec.name == "codebook_codes"
              ? std::pair(additive.entries() * additive.dim(), additive.levels.table_bits)
              : std::pair(additive.code_count(k), additive.bits);
      std::vector<uint16_t> codes(static_cast<size_t>(count));
      for (size_t at = 0; at < words.size(); at += row_words) {
        for (uint16_t& code : codes) {
          code = static_cast<uint16_t>(random.bits(next++) & ((uint64_t{1} << bits) - 1));
        }
        pack_wide_bits(codes, bits, words.subspan(at, row_words));
      }
    } else {
      for (int64_t i = 0; i < plane.element_count(); ++i) {
        const float value = 0.25F * static_cast<float>(static_cast<int>(random.bits(next++) % 64) - 31);
        if (spec.dtype == DType::f32) {
          plane.values<float>()[static_cast<size_t>(i)] = value;
        } else {
          plane.values<uint16_t>()[static_cast<size_t>(i)] =
              spec.dtype == DType::f16 ? f16_from_float(value) : bf16_from_float(value);
        }
      }
    }
    packed.planes.emplace(spec.name, std::move(plane));
  }
  return packed;
}

void expect_same(const PackedTensor& a, const PackedTensor& b) {
  ASSERT_EQ(a.planes.size(), b.planes.size());
  for (const auto& [name, plane] : a.planes) {
    const Tensor& other = b.plane(name);
    ASSERT_EQ(plane.shape(), other.shape()) << name;
    EXPECT_TRUE(std::equal(plane.bytes(), plane.bytes() + plane.byte_count(), other.bytes())) << name;
  }
}

TEST(AdditiveLayout, RoundTrips) {
  uint64_t seed = 0;
  for (const char* const spec :
       {"additive:2x8:g8", "additive:1x8:g4:scale24", "additive:1x16:g8", "additive:1x14:g8:f32",
        "additive:1x13:g16", "additive:1x16:g16:bf16", "additive:8x8:g8", "additive:2x6:g2x4:scale64",
        "additive:3x4:g5", "additive:1x16:g8:scale64", "additive:1x12:g2"}) {
    const auto format = format_from_spec(spec);
    for (const auto& [n, k] : std::vector<std::pair<int64_t, int64_t>>{
             {0, 0}, {0, 9}, {3, 0}, {1, 1}, {5, 64}, {67, 133}, {2, 20'000}, {3, 70'001}}) {
      SCOPED_TRACE(text_of(spec, " ", n, " x ", k));
      const PackedTensor packed = random_packed(format, n, k, ++seed);
      const PreparedPlanes prepared = prepare_fragments(packed);
      validate(prepared);
      expect_same(packed, unprepare_fragments(prepared));
    }
  }
}

// Numbers that are codes into levels are expanded; codes and levels are there beside them.
TEST(AdditiveLayout, LevelsAreExpanded) {
  uint64_t seed = 100;
  for (const char* const spec :
       {"additive:2x8:g8:scale8:s2:t4", "additive:1x16:g8:t2x7", "additive:3x4:g2x5:scale10:s3:f32",
        "additive:1x8:g4:scale24:s3:bf16", "additive:1x8:g4:t4x5"}) {
    const auto format = format_from_spec(spec);
    for (const auto& [n, k] :
         std::vector<std::pair<int64_t, int64_t>>{{0, 0}, {0, 9}, {3, 0}, {1, 1}, {5, 64}, {67, 333}}) {
      SCOPED_TRACE(text_of(spec, " ", n, " x ", k));
      const PackedTensor packed = random_packed(format, n, k, ++seed);
      const PreparedPlanes prepared = prepare_fragments(packed);
      validate(prepared);
      expect_same(packed, unprepare_fragments(prepared));
      const PreparedPlanes plain = prepare_fragments(with_levels(packed, {}));
      for (const auto& [name, plane] : plain.planes) {
        ASSERT_EQ(plane.shape(), prepared.plane(name).shape()) << name;
        EXPECT_TRUE(
            std::equal(plane.bytes(), plane.bytes() + plane.byte_count(), prepared.plane(name).bytes()))
            << name;
      }
      const PreparedPlanes without = without_levels(prepared);
      validate(without);
      EXPECT_EQ(without.planes.size(), plain.planes.size());
    }
  }
  EXPECT_THROW(static_cast<void>(
                   fragment_layout(*format_from_spec("outliers:1%:additive:2x8:g8:scale8:s2"), 9, 90, false)),
               Unsupported);
}

// Blocks of a row lie as the vectors of a codebook with as many tables.
TEST(AdditiveLayout, FragmentOrderIsThatOfVectors) {
  const auto format = std::make_shared<const Additive>(2, 8);
  const PackedTensor packed = random_packed(format, 70, 200, 1);
  PackedTensor vectors{
      std::make_shared<const VectorCodebook>(256, 8, VectorCodebook::kPerChannel, DType::f16, 2),
      70,
      200,
      {}};
  for (const PlaneSpec& spec : vectors.format->planes(70, 200)) {
    if (spec.optional) continue;
    Tensor plane(spec.dtype, spec.shape);
    ASSERT_EQ(plane.byte_count(), packed.plane(spec.name).byte_count()) << spec.name;
    std::memcpy(plane.bytes(), packed.plane(spec.name).bytes(), static_cast<size_t>(plane.byte_count()));
    vectors.planes.emplace(spec.name, std::move(plane));
  }
  const PreparedPlanes a = prepare_fragments(packed);
  const PreparedPlanes b = prepare_fragments(vectors);
  for (const auto& [name, plane] : b.planes) {
    const Tensor& other = a.plane(name);
    ASSERT_EQ(plane.shape(), other.shape()) << name;
    EXPECT_TRUE(std::equal(plane.bytes(), plane.bytes() + plane.byte_count(), other.bytes())) << name;
  }
}

// A list has its part's codes; lists begin at whole pieces; octets of entries meet in few banks.
TEST(AdditiveLayout, ListsHoldTheCodesOfTheirPart) {
  const auto format = format_from_spec("additive:1x15:g8");
  const int64_t n = 3;
  const int64_t k = 20'000;
  const PackedTensor packed = random_packed(format, n, k, 5);
  const PreparedPlanes prepared = prepare_fragments(packed);
  const AdditiveLayout layout = additive_layout(dynamic_cast<const Additive&>(*format), n, k);
  ASSERT_EQ(layout.parts, 4);
  ASSERT_EQ(layout.slices, 2);
  const auto* const low = reinterpret_cast<const uint16_t*>(prepared.plane("codes").bytes());
  const auto high = prepared.plane("places").values<uint8_t>();
  const auto lists = prepared.plane("lists").values<uint32_t>();
  std::vector<uint16_t> codes(static_cast<size_t>(layout.blocks));
  std::set<std::pair<size_t, int64_t>> met;
  int64_t octets = 0;
  int64_t turns = 0;
  for (int64_t of_row = 0; of_row < layout.slices * n; ++of_row) {
    const int64_t slice = of_row / n;
    const auto row = static_cast<size_t>(of_row % n);
    unpack_wide_bits(packed.plane("codes").values<uint32_t>().subspan(
                         row * static_cast<size_t>(layout.row_words), static_cast<size_t>(layout.row_words)),
                     15, 0, codes);
    for (int part = 0; part < 4; ++part) {
      const auto list = additive::PartList::from(lists[static_cast<size_t>(of_row * 4 + part)]);
      EXPECT_EQ(list.first % additive::kPieceEntries, 0);
      std::array<int, 16> in_banks{};
      for (int i = 0; i < list.count; ++i) {
        const int64_t at = of_row * layout.capacity + list.first + i;
        const auto entry = additive::PartEntry::from(13, low[at], high[static_cast<size_t>(at)]);
        const int64_t block = slice * additive::kSliceBlocks + entry.place;
        EXPECT_TRUE(met.emplace(row, block).second);
        EXPECT_EQ(codes[static_cast<size_t>(block)], entry.code | static_cast<uint32_t>(part) << 13);
      }
      for (int octet = 0; octet < additive::octets_of(list.count); ++octet) {
        in_banks.fill(0);
        for (int j = 0; j < 8 && additive::octet_entry(octet, j) < list.count; ++j) {
          const int64_t at = of_row * layout.capacity + list.first + additive::octet_entry(octet, j);
          const auto entry = additive::PartEntry::from(13, low[at], high[static_cast<size_t>(at)]);
          ++in_banks[entry.code % 8];
          ++in_banks[8 + entry.place % 8];
        }
        octets += in_banks != std::array<int, 16>{} ? 1 : 0;
        turns += *std::max_element(in_banks.begin(), in_banks.begin() + 8) +
                 *std::max_element(in_banks.begin() + 8, in_banks.end());
      }
    }
  }
  EXPECT_EQ(std::ssize(met), n * layout.blocks);
  // As they come there are 5.2 for an octet.
  EXPECT_LT(static_cast<double>(turns), 3.2 * static_cast<double>(octets));
}

TEST(AdditiveLayout, OrdersByFormat) {
  const auto own = [](const char* spec) { return as_additive(*format_from_spec(spec)) != nullptr; };
  for (const char* const spec : {"additive:2x8:g8", "additive:1x8:g4", "additive:1x13:g8", "additive:2x4:g2",
                                 "additive:1x16:g8:scale64", "additive:4x8:g8"}) {
    EXPECT_FALSE(own(spec)) << spec;
  }
  for (const char* const spec :
       {"additive:1x16:g8", "additive:1x14:g8", "additive:1x13:g16", "additive:2x8:g16", "additive:8x8:g8",
        "additive:1x8:g2x4", "additive:1x8:g1", "additive:1x16:g2"}) {
    EXPECT_TRUE(own(spec)) << spec;
    EXPECT_THROW(static_cast<void>(fragment_layout(*format_from_spec(spec), 9, 9, false)), Unsupported)
        << spec;
  }
}

}  // namespace
}  // namespace quantloom
