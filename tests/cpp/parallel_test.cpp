#include "quantloom/parallel.hpp"

#include <gtest/gtest.h>

#include <atomic>
#include <stdexcept>
#include <vector>

#include "quantloom/error.hpp"

namespace quantloom {
namespace {

TEST(Parallel, VisitsEachIndexOnce) {
  for (const int threads : {0, 1, 2, 4, 16}) {
    for (const int64_t count : {0, 1, 2, 15, 1000}) {
      std::vector<std::atomic<int>> visits(static_cast<size_t>(count));
      parallel_for(count, threads, [&](int64_t i) { ++visits[static_cast<size_t>(i)]; });
      for (const auto& visit : visits) ASSERT_EQ(visit, 1);
    }
  }
}

TEST(Parallel, RethrowsTheErrorOfTheLowestIndexThatRan) {
  for (const int threads : {1, 2, 4}) {
    std::atomic<int> ran = 0;
    try {
      parallel_for(100, threads, [&](int64_t i) {
        ++ran;
        if (i % 10 == 3) throw std::runtime_error(std::to_string(i));
      });
      FAIL();
    } catch (const std::runtime_error& error) {
      EXPECT_STREQ(error.what(), "3");
    }
    EXPECT_GE(ran, 4);
  }
}

TEST(Parallel, RefusesNegativeThreads) {
  EXPECT_THROW(resolve_threads(-1), InvalidArgument);
  EXPECT_THROW(parallel_for(10, -1, [](int64_t) {}), InvalidArgument);
  EXPECT_THROW(parallel_for(0, -1, [](int64_t) {}), InvalidArgument);
  EXPECT_EQ(resolve_threads(3), 3);
  EXPECT_GE(resolve_threads(0), 1);
}

}  // namespace
}  // namespace quantloom
