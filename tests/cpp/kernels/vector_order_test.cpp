// Codes of vectors in fragment order, and their decoder compiled as host code: what the tensor core gets for
// every row and column, against the decoded matrix.
#include <gtest/gtest.h>

#include <bit>
#include <cstring>
#include <set>
#include <type_traits>

#include "formats/sum_fragments.cuh"
#include "formats/sum_order.hpp"
#include "formats/vector_fragments.cuh"
#include "kernels/fragment_layout.hpp"
#include "kernels/random_vectors.hpp"
#include "quantloom/formats/format.hpp"
#include "quantloom/rounding/nearest.hpp"
#include "test_matrices.hpp"

namespace quantloom {
namespace {

using fragments::kLanes;
using testing::random_vectors;

// Every vector of a block has one place, and every place a vector.
TEST(VectorOrder, PlacesEachVectorOnce) {
  for (const int dim : {2, 4, 8}) {
    std::set<std::pair<int, int>> met;
    for (int lane = 0; lane < kLanes; ++lane) {
      for (int field = 0; field < 32 / dim; ++field) {
        const int row = fragments::vector_row(dim, lane, field);
        const int column = fragments::vector_column(dim, lane, field);
        EXPECT_EQ(column % dim, 0);
        EXPECT_TRUE(row >= 0 && row < 16 && column >= 0 && column < 64);
        EXPECT_TRUE(met.emplace(row, column).second) << dim << " " << lane << " " << field;
      }
    }
    EXPECT_EQ(met.size(), static_cast<size_t>(16 * 64 / dim));
  }
}

TEST(VectorOrder, FieldsAreADenseStream) {
  for (int width = 1; width <= 16; ++width) {
    const CounterRandom random(static_cast<uint64_t>(width));
    std::vector<uint16_t> codes(32);
    for (size_t i = 0; i < codes.size(); ++i) {
      codes[i] = static_cast<uint16_t>(random.bits(i) & ((1U << width) - 1U));
    }
    std::vector<uint32_t> expected(static_cast<size_t>(packed_words(32, width)));
    pack_wide_bits(codes, width, expected);
    std::vector<uint32_t> words(expected.size() + 1);
    for (int i = 0; i < 32; ++i) fragments::put_field(words.data(), width, i, codes[static_cast<size_t>(i)]);
    EXPECT_EQ(words.back(), 0U);
    words.pop_back();
    EXPECT_EQ(words, expected);
    words.push_back(~0U);
    for (int i = 0; i < 32; ++i) {
      EXPECT_EQ(fragments::field_of(words.data(), width, i), codes[static_cast<size_t>(i)]);
    }
  }
}

TEST(VectorOrder, RoundTripsAndRefuses) {
  for (const auto& [entries, dim, group] :
       std::vector<std::tuple<int64_t, int64_t, int64_t>>{{16, 2, 16},
                                                          {2, 2, 8},
                                                          {1000, 2, 24},
                                                          {4096, 2, 64},
                                                          {256, 4, ScaledFormat::kPerChannel},
                                                          {2, 4, 100},
                                                          {65536, 4, 32},
                                                          {5000, 8, 8},
                                                          {256, 8, 16},
                                                          {65536, 8, ScaledFormat::kPerTensor}}) {
    for (const auto& [n, k] :
         std::vector<std::pair<int64_t, int64_t>>{{1, 1}, {65, 33}, {97, 300}, {0, 8}, {8, 0}}) {
      SCOPED_TRACE(text_of(entries, "x", dim, " g", group, " [", n, ", ", k, "]"));
      const PackedTensor packed = random_vectors(n, k, VectorCodebook(entries, dim, group), 3);
      const PreparedPlanes prepared = prepare_fragments(packed);
      const auto specs = prepared_planes(*packed.format, n, k, false);
      EXPECT_EQ(prepared.planes.size(), specs.size());
      EXPECT_TRUE(testing::same_planes(unprepare_fragments(prepared), packed));
    }
  }
  EXPECT_THROW(static_cast<void>(prepared_planes(VectorCodebook(16, 3, 6), 8, 8, false)), Unsupported);
  EXPECT_THROW(static_cast<void>(prepared_planes(VectorCodebook(4097, 2), 8, 8, false)), Unsupported);
}

TEST(VectorOrder, CodesOfSeveralTablesRoundTrip) {
  for (const auto& [tables, entries, dim, group] :
       std::vector<std::tuple<int64_t, int64_t, int64_t, int64_t>>{{2, 16, 2, 16},
                                                                   {3, 2, 2, 8},
                                                                   {8, 2, 2, 64},
                                                                   {2, 256, 4, 32},
                                                                   {5, 5, 4, 100},
                                                                   {2, 256, 8, 16},
                                                                   {3, 256, 8, 24},
                                                                   {4, 256, 8, ScaledFormat::kPerChannel},
                                                                   {2, 65536, 8, 64},
                                                                   {8, 16, 8, ScaledFormat::kPerTensor}}) {
    const VectorCodebook format(entries, dim, group, DType::f16, tables);
    for (const auto& [n, k] :
         std::vector<std::pair<int64_t, int64_t>>{{1, 1}, {65, 33}, {97, 300}, {0, 8}, {8, 0}}) {
      SCOPED_TRACE(text_of(format.spec(), " [", n, ", ", k, "]"));
      const PackedTensor packed = random_vectors(n, k, format, 5);
      const PreparedPlanes prepared = prepare_fragments(packed);
      validate(prepared);
      EXPECT_EQ(prepared.plane("codebook").shape(), (std::vector<int64_t>{tables, entries, dim}));
      EXPECT_TRUE(testing::same_planes(unprepare_fragments(prepared), packed));
    }
  }
  for (const auto& [tables, entries, dim] : std::vector<std::tuple<int64_t, int64_t, int64_t>>{
           {2, 17, 2}, {3, 64, 4}, {5, 256, 8}, {3, 4096, 8}, {2, 16, 3}, {8, 65536, 8}}) {
    const VectorCodebook format(entries, dim, ScaledFormat::kPerTensor, DType::f16, tables);
    EXPECT_THROW(static_cast<void>(prepared_planes(format, 8, 8, false)), Unsupported) << format.spec();
  }
}

TEST(VectorOrder, TellsDecodersTheSizesOfTables) {
  for (const int entries : {2, 256, 65536}) {
    for (const int tables : {2, 8}) {
      const fragments::TableSizes sizes{tables, entries, 16};
      const auto again = fragments::TableSizes::from(sizes.packed());
      EXPECT_EQ(std::tuple(again.tables, again.entries, again.code_bits), std::tuple(tables, entries, 16));
    }
  }
}

TEST(VectorOrder, KeepsOutliers) {
  auto w = testing::normal_values(97 * 130, 3);
  for (const char* spec : {"outliers:2%:uniform:3:g32:asym", "outliers:1%:vector_codebook:64x4:g24",
                           "outliers:0.001%:codebook:nf4:g64"}) {
    SCOPED_TRACE(spec);
    const PackedTensor packed =
        round_nearest(MatrixView<const float>(w.data(), 97, 130), format_from_spec(spec)).tensor;
    const PreparedPlanes prepared = prepare_fragments(packed);
    validate(prepared);
    EXPECT_TRUE(prepared.has("outlier_columns"));
    EXPECT_TRUE(testing::same_planes(unprepare_fragments(prepared), packed));
    PreparedPlanes lacking = prepared;
    lacking.planes.erase("outlier_values");
    EXPECT_THROW(validate(lacking), InvalidArgument);
  }
}

// Registers of all lanes for one step of a unit: a[lane][register], the bits of a pair of values. Lanes
// exchange what they shuffle. T float: the sums before they are rounded.
using Registers = std::vector<std::array<std::array<uint32_t, 2>, 4>>;

template <class Decoder, class T, int kStep>
Registers registers_of(std::vector<Decoder>& decoders, const uint32_t (*words)[Decoder::kBits]) {
  Registers registers(kLanes);
  emulated::shuffled.assign(kLanes, {});
  for (const bool replayed : {false, true}) {
    emulated::shuffles_replayed = replayed;
    for (threadIdx.x = 0; threadIdx.x < kLanes; ++threadIdx.x) {
      emulated::next_shuffle = 0;
      auto& pairs = registers[threadIdx.x];
      if constexpr (std::is_same_v<T, float>) {
        float2 values[4] = {};
        decoders[threadIdx.x].template sums<kStep>(words[threadIdx.x], values);
        for (size_t i = 0; i < 4; ++i) {
          pairs[i] = {std::bit_cast<uint32_t>(values[i].x), std::bit_cast<uint32_t>(values[i].y)};
        }
      } else {
        uint32_t a[4] = {};
        decoders[threadIdx.x].template fragment<T, kStep>(words[threadIdx.x], a);
        for (size_t i = 0; i < 4; ++i) pairs[i] = {a[i] & 0xFFFFU, a[i] >> 16};
      }
    }
  }
  threadIdx.x = 0;
  return registers;
}

template <class T>
uint32_t rounded(float value) {
  if constexpr (std::is_same_v<T, float>) return std::bit_cast<uint32_t>(value);
  if constexpr (std::is_same_v<T, __half>) return f16_from_float(value);
  return bf16_from_float(value);
}

template <class Decoder, class T>
void check_decoder(const VectorCodebook& format) {
  constexpr int kWords = Decoder::kBits;
  SCOPED_TRACE(text_of(format.spec(), ", ", kWords, " bits"));
  constexpr int64_t kRows = 130;
  constexpr int64_t kColumns = 128;
  const int64_t entries = format.entries;
  PackedTensor packed = random_vectors(kRows, kColumns, format, static_cast<uint64_t>(entries));
  packed.planes.at("scales").values<float>()[0] = 1;
  const std::vector<float> expected = testing::decoded_values(packed);
  const FragmentLayout layout = fragment_layout(*packed.format, kRows, kColumns, false);
  ASSERT_EQ(layout.bits, kWords);
  const PreparedPlanes prepared = prepare_fragments(packed);
  const auto codes = prepared.plane("codes").values<uint32_t>();

  int described = static_cast<int>(entries);
  if (format.codebooks > 1) {
    described = fragments::TableSizes{static_cast<int>(format.codebooks), described, format.bits}.packed();
  }
  std::vector<uint32_t> shared(Decoder::kSharedBytes / 4 + 1, 0xDEADBEEFU);
  std::vector<Decoder> decoders(kLanes);
  blockDim.x = kLanes;
  for (threadIdx.x = 0; threadIdx.x < kLanes; ++threadIdx.x) {
    decoders[threadIdx.x].template prepare<T>(prepared.plane("codebook").bytes(), described, shared.data());
  }
  threadIdx.x = 0;
  EXPECT_EQ(shared.back(), 0xDEADBEEFU);
  for (int64_t block = 0; block < layout.row_blocks * layout.column_blocks; ++block) {
    for (int unit = 0; unit < 4; ++unit) {
      uint32_t words[kLanes][kWords];
      for (int lane = 0; lane < kLanes; ++lane) {
        for (int w = 0; w < kWords; ++w) {
          words[lane][w] = codes[static_cast<size_t>(block * kWords * 128 +
                                                     fragments::word_in_block(kWords, unit, w, lane))];
        }
      }
      const std::array<Registers, 4> steps = {
          registers_of<Decoder, T, 0>(decoders, words), registers_of<Decoder, T, 1>(decoders, words),
          registers_of<Decoder, T, 2>(decoders, words), registers_of<Decoder, T, 3>(decoders, words)};
      for (int lane = 0; lane < kLanes; ++lane) {
        for (int pair = 0; pair < 16; ++pair) {
          for (int half = 0; half < 2; ++half) {
            const int64_t row = block / layout.column_blocks * 64 + unit * 16 + fragments::row_of(lane, pair);
            const int64_t column = block % layout.column_blocks * 64 + fragments::column_of(lane, pair, half);
            if (row >= kRows) continue;
            const auto& values = steps[static_cast<size_t>(pair / 4)][static_cast<size_t>(lane)][pair % 4];
            ASSERT_EQ(values[static_cast<size_t>(half)],
                      rounded<T>(expected[static_cast<size_t>(row * kColumns + column)]))
                << "row " << row << ", column " << column;
          }
        }
      }
    }
  }
}

template <int kDim, int kWords, bool kInShared>
void check_types(std::initializer_list<int64_t> entries) {
  for (const int64_t count : entries) {
    const VectorCodebook format(count, kDim, ScaledFormat::kPerTensor, DType::f32);
    check_decoder<cuda::VectorFragments<kDim, kWords, kInShared>, __half>(format);
    check_decoder<cuda::VectorFragments<kDim, kWords, kInShared>, __nv_bfloat16>(format);
  }
}

template <int kDim, int kWords, int kTables>
void check_fixed_sums(std::initializer_list<int64_t> entries) {
  for (const int64_t count : entries) {
    const VectorCodebook format(count, kDim, ScaledFormat::kPerTensor, DType::f32, kTables);
    check_decoder<cuda::FixedSumFragments<kDim, kWords, kTables>, __half>(format);
    check_decoder<cuda::FixedSumFragments<kDim, kWords, kTables>, __nv_bfloat16>(format);
  }
}

// Tables and their entries.
template <int kDim, int kWords>
void check_sums(std::initializer_list<std::pair<int64_t, int64_t>> all) {
  for (const auto& [tables, entries] : all) {
    const VectorCodebook format(entries, kDim, ScaledFormat::kPerTensor, DType::f32, tables);
    check_decoder<cuda::SumFragments<kDim, kWords>, float>(format);
  }
}

TEST(VectorFragments, GiveTheDecodedMatrix) {
  check_types<2, 2, true>({2, 7, 16});
  check_types<2, 3, true>({17, 64});
  check_types<2, 4, true>({256, 100});
  check_types<2, 5, true>({1024, 600});
  check_types<2, 6, true>({4096, 3000});
  check_types<4, 1, true>({16, 9, 2});
  check_types<4, 2, true>({256, 20});
  check_types<4, 3, true>({4096, 1000});
  check_types<4, 4, false>({65536, 5000});
  check_types<8, 1, true>({256, 3});
  check_types<8, 2, true>({4096, 300});
  check_types<8, 2, false>({65536, 5000});
}

TEST(SumFragments, GiveTheDecodedMatrix) {
  check_sums<2, 4>({{2, 16}, {2, 9}, {8, 2}, {4, 4}, {3, 3}});
  check_sums<4, 2>({{2, 16}, {8, 2}, {3, 4}});
  check_sums<4, 3>({{2, 64}, {3, 16}, {2, 40}});
  check_sums<4, 4>({{2, 256}, {4, 16}, {5, 8}});
  check_sums<8, 2>({{2, 256}, {4, 16}, {2, 3}});
  check_sums<8, 3>({{3, 256}, {2, 4096}, {2, 3000}});
  check_sums<8, 4>({{4, 256}, {2, 65536}, {8, 16}, {3, 1000}});
}

TEST(FixedSumFragments, GiveTheDecodedMatrix) {
  check_fixed_sums<2, 4, 2>({16, 9, 2});
  check_fixed_sums<4, 2, 2>({16, 3});
  check_fixed_sums<4, 4, 2>({256, 100});
  check_fixed_sums<8, 2, 2>({256, 3, 200});
  check_fixed_sums<8, 3, 3>({256, 130});
  check_fixed_sums<8, 4, 4>({256, 129});
}

}  // namespace
}  // namespace quantloom
