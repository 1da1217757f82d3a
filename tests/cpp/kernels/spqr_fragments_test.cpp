// Scales and zero points of the format "spqr" in fragment order, against a definition of its own.
#include "kernels/spqr_fragments.hpp"

#include <gtest/gtest.h>

#include <cstring>

#include "quantloom/formats/bit_packing.hpp"
#include "quantloom/random.hpp"

namespace quantloom {
namespace {

uint32_t code_at(const Tensor& plane, int64_t row, int bits, int64_t i) {
  const auto words = static_cast<size_t>(plane.shape()[1]);
  uint8_t code = 0;
  unpack_bits(plane.values<uint32_t>().subspan(static_cast<size_t>(row) * words, words), bits, i, {&code, 1});
  return code;
}

PackedTensor random_spqr(const Spqr& format, int64_t n, int64_t k, uint64_t seed, bool indexed) {
  const CounterRandom random(seed);
  uint64_t draw = 0;
  PackedTensor packed{std::make_shared<const Spqr>(format), n, k, {}};
  for (const PlaneSpec& spec : format.planes(n, k)) {
    if (spec.optional && !indexed) continue;
    Tensor plane(spec.dtype, spec.shape);
    if (spec.name == "group_index") {
      // Columns far apart share a group.
      const int64_t groups = format.group_count(k);
      for (int64_t c = 0; c < k; ++c) {
        plane.values<int32_t>()[static_cast<size_t>(c)] = static_cast<int32_t>(c % groups);
      }
    } else if (spec.dtype == DType::f16) {
      for (uint16_t& number : plane.values<uint16_t>()) {
        number = f16_from_float(static_cast<float>(random.uniform(draw++)) - 0.5F);
      }
    } else {
      const int bits = spec.name == "codes"    ? format.bits
                       : spec.name == "scales" ? format.scale_bits
                                               : format.zero_bits;
      const int64_t count = spec.name == "codes" ? k : n;
      std::vector<uint8_t> codes(static_cast<size_t>(count));
      const auto words = static_cast<size_t>(spec.shape[1]);
      for (int64_t row = 0; row < spec.shape[0]; ++row) {
        for (uint8_t& code : codes) {
          code = static_cast<uint8_t>(random.bits(draw++) % (uint64_t{1} << bits));
        }
        pack_bits(codes, bits, plane.values<uint32_t>().subspan(static_cast<size_t>(row) * words, words));
      }
    }
    packed.planes.emplace(spec.name, std::move(plane));
  }
  return packed;
}

void expect_same(const PackedTensor& got, const PackedTensor& wanted) {
  ASSERT_EQ(got.planes.size(), wanted.planes.size());
  for (const auto& [name, plane] : wanted.planes) {
    const Tensor& other = got.plane(name);
    ASSERT_EQ(other.shape(), plane.shape()) << name;
    ASSERT_EQ(std::memcmp(other.bytes(), plane.bytes(), static_cast<size_t>(plane.byte_count())), 0) << name;
  }
}

// Bit `bit` of the codes of pair `pair`, in the lower halves of a unit's words: whole codes first, then the
// strings of bits that are left over.
std::pair<int, int> bit_place(int bits, int pair, int bit) {
  const int whole = 16 / bits;
  if (pair < whole * bits) return {pair / whole, pair % whole * bits + bit};
  const int left = 16 - whole * bits;
  const int at = (pair - whole * bits) * bits + bit;
  return {at / left, whole * bits + at % left};
}

void check_codes(const PackedTensor& packed, const PreparedPlanes& prepared) {
  const int bits = as_spqr(*packed.format)->bits;
  const Tensor& plane = prepared.plane("codes");
  const int64_t column_blocks = plane.shape()[1];
  const auto words = plane.values<uint32_t>();
  for (int64_t row = 0; row < packed.n; ++row) {
    for (int64_t place = 0; place < 64 * column_blocks; ++place) {
      const int64_t column = prepared.has("source")
                                 ? prepared.plane("source").values<int32_t>()[static_cast<size_t>(place)]
                                 : place;
      const uint32_t code =
          column >= 0 && column < packed.k ? code_at(packed.plane("codes"), row, bits, column) : 0;
      // Lane 4 g + t multiplies columns 4 t ... 4 t + 3 of a step, for rows g and g + 8 of its unit.
      const auto lane = static_cast<int>(row % 8 * 4 + place % 16 / 4);
      const auto pair = static_cast<int>(place % 64 / 16 * 4 + place % 4 / 2 * 2 + row % 16 / 8);
      const int64_t block = row / 64 * column_blocks + place / 64;
      for (int bit = 0; bit < bits; ++bit) {
        const auto [word, position] = bit_place(bits, pair, bit);
        const int64_t at = row % 64 / 16 * bits + word;
        const uint32_t value = words[static_cast<size_t>(((block * bits + at / 4) * 32 + lane) * 4 + at % 4)];
        ASSERT_EQ(value >> (position + place % 2 * 16) & 1U, code >> bit & 1U)
            << "row " << row << ", place " << place << ", bit " << bit;
      }
    }
  }
}

void check(const PackedTensor& packed) {
  const Spqr& format = *as_spqr(*packed.format);
  const PreparedPlanes prepared = prepare_fragments(packed);
  expect_same(unprepare_fragments(prepared), packed);
  if (packed.n == 0 || packed.k == 0) return;
  const bool narrow = format.scale_bits <= 4 && format.zero_bits <= 4;
  const int64_t bytes = narrow ? 8 : 16;
  const int64_t groups = format.group_count(packed.k);
  const Tensor& fields = prepared.plane("parameters");
  ASSERT_EQ(fields.shape(), (std::vector<int64_t>{(packed.n + 63) / 64, groups, 8, bytes}));
  ASSERT_EQ(prepared.plane("codes").shape()[1] % 2, 0);
  check_codes(packed, prepared);
  for (int64_t g = 0; g < groups; ++g) {
    for (int64_t row = 0; row < (packed.n + 63) / 64 * 64; ++row) {
      const auto lane = static_cast<size_t>(((row / 64 * groups + g) * 8 + row % 8) * bytes);
      for (const bool zero : {false, true}) {
        const auto i = static_cast<size_t>(row % 64 / 8);
        const size_t first = lane + (zero ? static_cast<size_t>(bytes) / 2 : 0);
        const auto all = fields.values<uint8_t>();
        const uint32_t got = narrow ? all[first + i / 2] >> (i % 2 * 4) & 15U : all[first + i];
        const uint32_t wanted = row >= packed.n ? 0
                                : zero          ? code_at(packed.plane("zeros"), g, format.zero_bits, row)
                                                : code_at(packed.plane("scales"), g, format.scale_bits, row);
        ASSERT_EQ(got, wanted) << "group " << g << ", row " << row << (zero ? ", zero" : ", scale");
      }
    }
    for (int64_t block = 0; block < format.block_count(packed.n); ++block) {
      for (size_t i = 0; i < 4; ++i) {
        const Tensor& grids = packed.plane(i < 2 ? "scale_grids" : "zero_grids");
        const auto from = static_cast<size_t>(g * format.block_count(packed.n) + block) * 2 + i % 2;
        const auto to = static_cast<size_t>(block * groups + g) * 4 + i;
        ASSERT_EQ(prepared.plane("grids").values<uint16_t>()[to], grids.values<uint16_t>()[from]);
      }
    }
  }
}

TEST(SpqrFragments, LieAsTheyShouldAndComeBack) {
  uint64_t seed = 1;
  for (const auto& [n, k] : std::vector<std::pair<int64_t, int64_t>>{
           {1, 1}, {3, 70}, {64, 128}, {65, 200}, {130, 333}, {0, 5}, {5, 0}, {0, 0}}) {
    for (const int64_t group : {1, 16, 24, 128}) {
      for (const auto& [scale_bits, zero_bits] : {std::pair(3, 3), {4, 1}, {5, 2}, {3, 8}}) {
        for (const int64_t block : {1, 16, 24, 100}) {
          const Spqr format(static_cast<int>(1 + seed % 8), group, scale_bits, zero_bits, block);
          SCOPED_TRACE(text_of(format.spec(), " n=", n, " k=", k));
          ++seed;
          check(random_spqr(format, n, k, seed, seed % 3 == 0));
          if (HasFatalFailure()) return;
        }
      }
    }
  }
}

// Outliers know their inputs: the plane "place" says where these lie.
TEST(SpqrFragments, OutliersFindColumnsThatChangePlaces) {
  const Spqr format(3, 16, 3, 3, 16);
  const PackedTensor dense = random_spqr(format, 20, 100, 3, true);
  const std::vector<int64_t> positions = {0, 99, 100, 555, 1999};
  const std::vector<uint16_t> values(positions.size(), f16_from_float(1.5F));
  const PackedTensor packed = with_outliers(dense, positions, values);
  const PreparedPlanes prepared = prepare_fragments(packed);
  expect_same(unprepare_fragments(prepared), packed);
  const auto source = prepared.plane("source").values<int32_t>();
  const auto places = prepared.plane("place").values<int32_t>();
  ASSERT_EQ(std::ssize(places), 100);
  for (int32_t column = 0; column < 100; ++column) {
    EXPECT_EQ(source[static_cast<size_t>(places[static_cast<size_t>(column)])], column);
  }
  EXPECT_FALSE(prepare_fragments(with_outliers(random_spqr(format, 20, 100, 4, false), positions, values))
                   .has("place"));
}

}  // namespace
}  // namespace quantloom
