// The order in which CUDA kernels read trellis codes, and how their work is dealt.
#include "kernels/trellis_layout.hpp"

#include <gtest/gtest.h>

#include <set>

#include "formats/trellis_codes.hpp"
#include "kernels/trellis_deal.hpp"
#include "quantloom/random.hpp"

namespace quantloom {
namespace {

PackedTensor random_trellis(std::shared_ptr<const Trellis> format, int64_t n, int64_t k, uint64_t seed) {
  PackedTensor packed{format, n, k, {}};
  const CounterRandom random(seed);
  uint64_t draw = 0;
  for (const PlaneSpec& spec : format->planes(n, k)) {
    Tensor plane(spec.dtype, spec.shape);
    for (int64_t i = 0; i < plane.byte_count(); ++i) {
      // Not the bits of an exponent of float16, so that scales are finite.
      const auto mask = spec.name == "codes" || i % 2 == 0 ? 0xFFU : 0x3FU;
      plane.bytes()[i] = static_cast<std::byte>(random.bits(draw++) & mask);
    }
    packed.planes.emplace(spec.name, std::move(plane));
  }
  return packed;
}

TEST(TrellisLayout, PreparedPlanesLeadBackToThePackedTensor) {
  uint64_t seed = 0;
  for (const double bits : {1.0, 1.5, 2.0, 3.0, 3.5, 4.0}) {
    for (const char* name : {"mul1", "hyb"}) {
      for (const auto& [n, k] :
           std::vector<std::pair<int64_t, int64_t>>{{1, 1}, {0, 40}, {40, 0}, {130, 270}}) {
        const auto format = std::make_shared<const Trellis>(bits, name, ++seed % 2 == 0 ? 0 : 128);
        const PackedTensor packed = random_trellis(format, n, k, seed);
        const PreparedPlanes prepared = prepare_fragments(packed);
        EXPECT_NO_THROW(validate(prepared));
        const PackedTensor back = unprepare_fragments(prepared);
        for (const auto& [plane, tensor] : packed.planes) {
          EXPECT_TRUE(
              std::equal(tensor.bytes(), tensor.bytes() + tensor.byte_count(), back.plane(plane).bytes()))
              << format->spec() << " " << n << " x " << k << " " << plane;
        }
      }
    }
  }
}

// A lane's words are those of 32 consecutive positions.
TEST(TrellisLayout, LanesHoldConsecutivePositions) {
  for (int bits = 1; bits <= 8; ++bits) {
    const int64_t column_blocks = 6;
    for (const int lane : {0, 1, 13, 31}) {
      for (int unit = 0; unit < 4; ++unit) {
        for (int word = 0; word < bits; ++word) {
          const int place = unit * bits + word;
          const int64_t at = ((2 * column_blocks + 3) * bits + place / 4) * 128 + lane * 4 + place % 4;
          const TrellisWord from = trellis_word(true, 8 * bits, column_blocks, at);
          EXPECT_EQ(from.row_tile, 4 * 2 + unit);
          EXPECT_EQ(from.column_tile, 4 * 3 + lane % 4);
          EXPECT_EQ(from.word, lane / 4 * bits + word);
          EXPECT_EQ(trellis_place(true, 8 * bits, column_blocks, from.row_tile, from.column_tile, from.word),
                    at);
        }
      }
    }
  }
}

TEST(TrellisDeal, RunsCoverAllPiecesOnce) {
  for (const int count : {0, 1, 15, 16, 17, 100, 1152}) {
    const cuda::TrellisRuns runs{count, 16};
    EXPECT_EQ(runs.begin(0), 0);
    EXPECT_EQ(runs.begin(16), count);
    for (int warp = 0; warp < 16; ++warp) {
      for (int piece = runs.begin(warp); piece < runs.begin(warp + 1); ++piece) {
        EXPECT_EQ(runs.warp_of(piece), warp);
      }
    }
  }
  for (const auto& [rows, columns] :
       std::vector<std::pair<int, int>>{{2, 16}, {6, 192}, {1, 1}, {30, 2}, {3, 7}}) {
    const cuda::TrellisRuns runs{rows * columns, 16};
    int most = 0;
    for (int row = 0; row < rows; ++row) {
      std::set<int> met;
      for (int c = 0; c < columns; ++c) met.insert(runs.warp_of(row * columns + c));
      most = std::max(most, static_cast<int>(met.size()));
    }
    EXPECT_EQ(cuda::most_parts(rows, columns, 16), most);
  }
}

TEST(TrellisDeal, BandsAndSpansAreDealtWhole) {
  for (const int spans : {1, 3, 8, 100}) {
    for (const int blocks : {1, 2, 4, 7, 8}) {
      for (const int teams : {1, 5, 9}) {
        const cuda::TrellisDeal deal(9, spans, teams, blocks, 4);
        int next = 0;
        for (int rank = 0; rank < blocks; ++rank) {
          EXPECT_EQ(deal.first_span(rank), next);
          EXPECT_LE(deal.spans_of(rank), deal.most_spans());
          if (deal.spans_of(rank) > 0) {
            EXPECT_EQ(deal.columns_of(rank).divide(100),
                      100U / static_cast<unsigned>(2 * deal.spans_of(rank)));
          }
          next += deal.spans_of(rank);
        }
        EXPECT_EQ(next, spans);
        next = 0;
        for (int team = 0; team < teams; ++team) {
          EXPECT_EQ(deal.first_band(team), next);
          EXPECT_LE(deal.bands_of(team), deal.most_bands());
          next += deal.bands_of(team);
        }
        EXPECT_EQ(next, 9);
      }
    }
  }
}

}  // namespace
}  // namespace quantloom
