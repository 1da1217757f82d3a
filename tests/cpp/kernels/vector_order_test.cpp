// Codes of vectors in fragment order, and their decoder compiled as host code: what the tensor core gets for
// every row and column, against the decoded matrix.
#include "formats/vector_order.hpp"

#include <gtest/gtest.h>

#include <cstring>
#include <set>
#include <type_traits>

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
  EXPECT_THROW(static_cast<void>(prepared_planes(VectorCodebook(16, 4, 8, DType::f16, 2), 8, 8, false)),
               Unsupported);
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

// Registers of all lanes for one step of a unit: a[lane][register]. Lanes exchange what they shuffle.
using Registers = std::vector<std::array<uint32_t, 4>>;

template <class Decoder, class T, int kStep>
Registers registers_of(std::vector<Decoder>& decoders, const uint32_t (*words)[Decoder::kBits]) {
  Registers registers(kLanes);
  emulated::shuffled.assign(kLanes, {});
  for (const bool replayed : {false, true}) {
    emulated::shuffles_replayed = replayed;
    for (threadIdx.x = 0; threadIdx.x < kLanes; ++threadIdx.x) {
      emulated::next_shuffle = 0;
      uint32_t a[4] = {};
      decoders[threadIdx.x].template fragment<T, kStep>(words[threadIdx.x], a);
      std::copy_n(a, 4, registers[threadIdx.x].begin());
    }
  }
  threadIdx.x = 0;
  return registers;
}

template <class T>
uint16_t rounded(float value) {
  if constexpr (std::is_same_v<T, __half>) return f16_from_float(value);
  return bf16_from_float(value);
}

template <int kDim, int kWords, bool kInShared, class T>
void check_decoder(int64_t entries) {
  using Decoder = cuda::VectorFragments<kDim, kWords, kInShared>;
  SCOPED_TRACE(text_of(entries, " vectors of ", kDim, ", ", kWords, " bits"));
  constexpr int64_t kRows = 130;
  constexpr int64_t kColumns = 128;
  const VectorCodebook format(entries, kDim, ScaledFormat::kPerTensor, DType::f32);
  PackedTensor packed = random_vectors(kRows, kColumns, format, static_cast<uint64_t>(entries));
  packed.planes.at("scales").values<float>()[0] = 1;
  const std::vector<float> expected = testing::decoded_values(packed);
  const FragmentLayout layout = fragment_layout(*packed.format, kRows, kColumns, false);
  ASSERT_EQ(layout.bits, kWords);
  const PreparedPlanes prepared = prepare_fragments(packed);
  const auto codes = prepared.plane("codes").values<uint32_t>();

  std::vector<uint32_t> shared(Decoder::kSharedBytes / 4 + 1, 0xDEADBEEFU);
  std::vector<Decoder> decoders(kLanes);
  blockDim.x = kLanes;
  for (threadIdx.x = 0; threadIdx.x < kLanes; ++threadIdx.x) {
    decoders[threadIdx.x].template prepare<T>(prepared.plane("codebook").bytes(), static_cast<int>(entries),
                                              shared.data());
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
            const uint32_t a = steps[static_cast<size_t>(pair / 4)][static_cast<size_t>(lane)][pair % 4];
            ASSERT_EQ(static_cast<uint16_t>(a >> (16 * half)),
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
    check_decoder<kDim, kWords, kInShared, __half>(count);
    check_decoder<kDim, kWords, kInShared, __nv_bfloat16>(count);
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

}  // namespace
}  // namespace quantloom
