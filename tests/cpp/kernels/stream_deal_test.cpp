#include "kernels/stream_deal.hpp"

#include <gtest/gtest.h>

#include <map>
#include <set>
#include <vector>

namespace quantloom::cuda {
namespace {

TEST(Divider, DividesExactly) {
  const std::vector<uint32_t> divisors = {1,   2,       3,          5,           7,          64,
                                          768, 1000003, 0x7FFFFFFF, 0x80000000U, 0xFFFFFFFFU};
  const std::vector<uint32_t> values = {0,   1,   2,          63,         64,         767,
                                        768, 769, 0x7FFFFFFE, 0x7FFFFFFF, 0xFFFFFFFE, 0xFFFFFFFFU};
  for (const uint32_t divisor : divisors) {
    const Divider divider(divisor);
    for (const uint32_t value : values)
      EXPECT_EQ(divider.divide(value), value / divisor) << value << " / " << divisor;
    for (uint32_t i = 0; i < 1000; ++i) {
      const uint32_t value = i * 2654435761U;
      EXPECT_EQ(divider.divide(value), value / divisor) << value << " / " << divisor;
    }
  }
}

// Walks every warp's run and checks who meets which row block.
void check_deal(int row_blocks, int column_blocks, int teams, int blocks, int warps) {
  SCOPED_TRACE(testing::Message() << row_blocks << " x " << column_blocks << ", " << teams << " teams of "
                                  << blocks << " blocks, " << warps << " warps");
  const StreamDeal deal = stream_deal(row_blocks, column_blocks, 8, teams, blocks, warps);
  EXPECT_LE(deal.teams, std::max(teams, 1));
  EXPECT_EQ(deal.parts & (deal.parts - 1), 0);
  int rows = 0;
  for (int team = 0; team < deal.teams; ++team) {
    EXPECT_EQ(deal.first_row(team), rows);
    EXPECT_GE(deal.rows_of(team), 1);
    EXPECT_LE(deal.rows_of(team), deal.most_rows());
    const StreamRuns& runs = deal.runs_of(team);
    std::map<int, std::vector<int>> met;  // row -> warps
    int at = 0;
    for (int warp = 0; warp < deal.warps; ++warp) {
      EXPECT_EQ(runs.begin(warp), at);
      for (; at < runs.begin(warp + 1); ++at) {
        EXPECT_EQ(runs.warp_of(at), warp);
        auto& warps_of_row = met[at / column_blocks];
        if (warps_of_row.empty() || warps_of_row.back() != warp) warps_of_row.push_back(warp);
      }
    }
    EXPECT_EQ(at, deal.rows_of(team) * column_blocks);
    for (int row = 0; row < deal.rows_of(team); ++row) {
      const StreamParts parts = parts_of(runs, row, column_blocks);
      ASSERT_EQ(parts.count, static_cast<int>(met[row].size()));
      EXPECT_LE(parts.count, deal.parts);
      std::set<int> places;
      for (int i = 0; i < parts.count; ++i) {
        EXPECT_EQ(met[row][static_cast<size_t>(i)], parts.first + i);
        places.insert((parts.first + i) & (deal.parts - 1));
      }
      EXPECT_EQ(static_cast<int>(places.size()), parts.count);
    }
    rows += deal.rows_of(team);
  }
  EXPECT_EQ(rows, row_blocks);
}

TEST(StreamDeal, GivesEachBlockToOneWarp) {
  check_deal(192, 768, 66, 2, 32);
  check_deal(448, 128, 66, 2, 32);
  check_deal(64, 64, 66, 2, 32);
  check_deal(1, 1, 132, 1, 16);
  check_deal(3, 1, 2, 8, 128);
  check_deal(5, 7, 1, 132, 2112);
  check_deal(1, 300, 16, 8, 64);
  uint32_t state = 12345;
  const auto below = [&](uint32_t bound) {
    state = state * 1664525U + 1013904223U;
    return static_cast<int>((state >> 8) % bound);
  };
  for (int i = 0; i < 300; ++i) {
    const int blocks = 1 << below(4);
    check_deal(1 + below(60), 1 + below(90), 1 + below(70), blocks,
               1 + below(static_cast<uint32_t>(16 * blocks)));
  }
}

TEST(StreamDeal, CountsTheStretchesThatBlocksMeet) {
  for (int columns = 1; columns <= 9; ++columns) {
    for (int first = 0; first < columns; ++first) {
      for (int count = 0; count <= 2 * columns + 1; ++count) {
        std::set<int> met;
        for (int i = 0; i < count; ++i) met.insert((first + i) % columns / 2);
        // A window that goes on past the end of a row: what lies between its stretches is met as well.
        const int got = stretches_met(first, count, columns);
        EXPECT_EQ(got, static_cast<int>(met.size())) << columns << " columns, " << count << " from " << first;
        StreamDeal deal;
        deal.warps = 4;
        deal.runs[0] = {count / 4, count % 4};
        EXPECT_GE(most_stretches(deal, 16, columns), got);
      }
    }
  }
}

TEST(StreamDeal, TakesMatricesWithoutColumns) {
  const StreamDeal deal = stream_deal(3, 0, 8, 2, 1, 16);
  EXPECT_EQ(deal.runs_of(0).begin(16), 0);
  EXPECT_EQ(parts_of(deal.runs_of(0), 0, 0).count, 0);
}

}  // namespace
}  // namespace quantloom::cuda
