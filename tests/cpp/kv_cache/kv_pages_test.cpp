#include "quantloom/kv_cache/kv_pages.hpp"

#include <gtest/gtest.h>

#include "quantloom/error.hpp"
#include "quantloom/random.hpp"

namespace quantloom {
namespace {

// Grows a sequence by pages that are its own; returns how many changed.
size_t grow(KVPages& pages, int64_t sequence, int64_t length) {
  std::vector<int64_t> lengths;
  for (int64_t s = 0; s < pages.sequences(); ++s) lengths.push_back(pages.length(s));
  lengths[static_cast<size_t>(sequence)] = length;
  if (const int64_t missing = pages.missing_pages(lengths); missing > 0) pages.add_slab(missing);
  const size_t changes = pages.own(lengths).size();
  EXPECT_EQ(pages.missing_pages(lengths), 0);
  pages.set_length(sequence, length);
  return changes;
}

TEST(KVPages, RoomIsTheLargestLengthWithoutAnotherPage) {
  for (const char* spec : {"kivi:2", "kivi:4:g32:r32:first5", "kivi:2:g24:r48", "kivi:2:g8:r1024", "token:4",
                           "token:4:r7:first3", "kivi:4:g256:r256"}) {
    const KVFormat format = kv_format_from_spec(spec);
    KVPages pages(format, kv_layout(format, 16), 3);
    const CounterRandom random(77);
    uint64_t draw = 0;
    for (int step = 0; step < 300; ++step) {
      const auto s = static_cast<int64_t>(random.below(draw++, 3));
      if (random.below(draw++, 9) == 0) pages.reorder(std::vector<int64_t>{s, (s + 1) % 3, s});
      if (random.below(draw++, 40) == 0) pages.clear();
      const int64_t room = pages.room(s);
      ASSERT_GE(room, pages.length(s)) << spec;
      KVPages within = pages;
      ASSERT_EQ(grow(within, s, room), 0U) << spec << ", length " << pages.length(s);
      KVPages beyond = pages;
      ASSERT_GT(grow(beyond, s, room + 1), 0U) << spec << ", length " << pages.length(s);
      grow(pages, s, pages.length(s) + static_cast<int64_t>(random.below(draw++, 90)));
    }
  }
}

TEST(KVPages, ASharedPageIsCopiedForAllButTheLastThatWritesIt) {
  const KVFormat format = kv_format_from_spec("token:4");
  KVPages pages(format, kv_layout(format, 16), 1);
  EXPECT_EQ(grow(pages, 0, 200), 2U);
  pages.reorder(std::vector<int64_t>{0, 0, 0});
  EXPECT_EQ(pages.usage(1, DType::f16).page_bytes, 2 * kv_layout(format, 16).record_bytes);
  pages.add_slab(pages.missing_pages(std::vector<int64_t>{201, 201, 201}));
  const std::vector<KVPages::Change> changes = pages.own(std::vector<int64_t>{201, 201, 201});
  ASSERT_EQ(changes.size(), 2U);
  for (size_t i = 0; i < 2; ++i) {
    EXPECT_EQ(changes[i].sequence, static_cast<int64_t>(i));
    EXPECT_EQ(changes[i].page, 1);
    EXPECT_EQ(changes[i].from, pages.page(2, 1));
    EXPECT_EQ(changes[i].to, pages.page(static_cast<int64_t>(i), 1));
  }
  EXPECT_EQ(pages.usage(1, DType::f16).page_bytes, 4 * kv_layout(format, 16).record_bytes);
  pages.clear();
  EXPECT_EQ(pages.usage(1, DType::f16).page_bytes, 0);
}

}  // namespace
}  // namespace quantloom
