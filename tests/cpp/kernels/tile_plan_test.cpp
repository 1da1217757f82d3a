// The order of activations and the division of work of the CUDA tile loop.
#include "kernels/tile_plan.hpp"

#include <gtest/gtest.h>

#include <set>
#include <vector>

#include "kernels/token_order.hpp"

namespace quantloom::fragments {
namespace {

// The tensor core (m16n8k16) multiplies element i of a row of the second operand with element i of a row
// of the first; lane % 4 = i % 8 / 2 holds it in half i % 2 of register i / 8 * 2 (+ 1 for the lower rows).
TEST(TokenOrder, HasTheColumnsOfFragmentOrder) {
  std::set<int> columns;
  for (int lane = 0; lane < kLanes; ++lane) {
    for (int pair = 0; pair < 16; ++pair) {
      for (int half = 0; half < 2; ++half) {
        const int i = pair % 4 / 2 * 8 + lane % 4 * 2 + half;
        const int position = pair / 4 * kStepColumns + i;
        EXPECT_EQ(column_at(position), column_of(lane, pair, half));
        columns.insert(column_at(position));
      }
    }
  }
  EXPECT_EQ(columns.size(), 64U);
  EXPECT_EQ(*columns.rbegin(), 63);
}

// What the kernel that arranges activations relies on: words of two columns stay together, in their half of
// the block, and change places alike in both halves.
TEST(TokenOrder, MovesWordsWithinHalves) {
  for (int position = 0; position < 32; ++position) {
    EXPECT_LT(column_at(position), 32);
    EXPECT_EQ(column_at(position + 32), column_at(position) + 32);
    EXPECT_EQ(column_at(position) % 2, position % 2);
    EXPECT_EQ(column_at(position) / 2, column_at(position / 2 * 2) / 2);
  }
}

TEST(TokenOrder, SpreadsEightTokensOverAllBanks) {
  for (int piece = 0; piece < kTokenPieces; ++piece) {
    std::set<int> places;
    for (int token = 8; token < 16; ++token) places.insert(place_of_piece(token, piece));
    EXPECT_EQ(places.size(), 8U);
  }
}

TEST(TilePlan, CoversEveryUnitOnceAndNoSlotTwice) {
  for (const int row_blocks : {1, 3, 4, 5, 16, 45}) {
    for (const int column_blocks : {1, 2, 7, 64, 129}) {
      for (const int m : {1, 32, 33, 64, 65, 300}) {
        for (const int processors : {1, 2, 7, 132}) {
          for (const int splits : {0, 1, 3}) {
            const TilePlan plan = tile_plan(row_blocks, column_blocks, m, processors, splits);
            SCOPED_TRACE(testing::Message() << row_blocks << " x " << column_blocks << ", m = " << m << ", "
                                            << processors << " processors, " << splits << " splits");
            ASSERT_GE(plan.padded_tokens(), m);
            ASSERT_EQ(plan.begin(0), 0);
            ASSERT_EQ(plan.begin(plan.grid), plan.units());
            std::set<int64_t> slots;
            bool partials = false;
            std::vector<int> first(static_cast<size_t>(plan.tiles()), -1);
            std::vector<int> last(first);
            for (int part = 0; part < plan.grid; ++part) {
              ASSERT_LT(plan.begin(part), plan.begin(part + 1));
              std::set<int64_t> tiles;
              for (int64_t unit = plan.begin(part); unit < plan.begin(part + 1); ++unit) {
                ASSERT_EQ(plan.owner(unit), part);
                tiles.insert(unit / column_blocks);
              }
              for (const int64_t tile : tiles) {
                if (first[static_cast<size_t>(tile)] < 0) first[static_cast<size_t>(tile)] = part;
                last[static_cast<size_t>(tile)] = part;
                if (plan.first_part(tile) == plan.last_part(tile)) continue;
                partials = true;
                ASSERT_LT(plan.slot(part, tile), plan.slots());
                ASSERT_TRUE(slots.insert(plan.slot(part, tile)).second);
              }
            }
            for (int64_t tile = 0; tile < plan.tiles(); ++tile) {
              ASSERT_EQ(plan.first_part(tile), first[static_cast<size_t>(tile)]);
              ASSERT_EQ(plan.last_part(tile), last[static_cast<size_t>(tile)]);
            }
            ASSERT_TRUE(plan.has_partials() || !partials);
            if (splits == 1) {
              ASSERT_FALSE(partials);
            }
          }
        }
      }
    }
  }
}

}  // namespace
}  // namespace quantloom::fragments
