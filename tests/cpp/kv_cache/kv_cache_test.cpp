#include "quantloom/kv_cache/kv_cache.hpp"

#include <gtest/gtest.h>

#include <algorithm>
#include <limits>

#include "kv_cache/kv_tokens.hpp"
#include "quantloom/error.hpp"
#include "quantloom/matrix_view.hpp"
#include "simd_targets.hpp"

namespace quantloom {
namespace {

using testing::make_cache;
using testing::RandomTokens;
using testing::same_sequence;

const std::vector<const char*> kSpecs = {"kivi:2:g32:r128",
                                         "kivi:4:g32:r32",
                                         "kivi:3,1:g24:r48:first3",
                                         "kivi:8:g16:r16",
                                         "kivi:1:g64:r64",
                                         "token:4",
                                         "token:3:g20:r7:first1",
                                         "token:8:r130",
                                         "sdr:4:g16",
                                         "sdr:3,6:g9:r5:hadamard",
                                         "kivi:2:g8:r8:hadamard",
                                         "kvquant:3:1%:first1",
                                         "kvquant:2,4:2.5%:r9:first0"};

TEST(KVCache, StreamingEqualsBulkAtEveryLength) {
  for (const char* spec :
       {"kivi:2:g32:r128", "kivi:4:g32:r32:first5", "token:4:r3", "sdr:4:g16", "kvquant:3:1%:first1"}) {
    const KVFormat format = kv_format_from_spec(spec);
    const KVShape shape{1, 1, 16, DType::f16};
    const RandomTokens keys(shape, 513, 1);
    const RandomTokens values(shape, 513, 2);
    KVCache streamed = make_cache(format, shape);
    KVCache chunked = make_cache(format, shape, 300);
    int64_t chunk = 0;
    for (int64_t length = 0; length <= 513; ++length) {
      if (length > 0) streamed.append(keys.view(length - 1, 1), values.view(length - 1, 1), {}, 1);
      KVCache bulk = make_cache(format, shape, length);
      bulk.append(keys.view(0, length), values.view(0, length), {}, 1);
      ASSERT_TRUE(same_sequence(streamed, 0, bulk, 0)) << spec << " at " << length;
      if (length - chunked.length(0) == 1 + chunk % 37) {
        const int64_t from = chunked.length(0);
        chunked.append(keys.view(from, length - from), values.view(from, length - from), {}, 1);
        ASSERT_TRUE(same_sequence(streamed, 0, chunked, 0)) << spec << " at " << length;
        chunk += 11;
      }
    }
  }
}

// The grid of kv_format.hpp for one group of a matrix, written again.
void expect_group(const std::vector<float>& x, const std::vector<float>& decoded,
                  const std::vector<int64_t>& group, int bits, const std::string& what) {
  float low = x[static_cast<size_t>(group[0])];
  float high = low;
  for (const int64_t i : group) {
    low = std::min(low, x[static_cast<size_t>(i)]);
    high = std::max(high, x[static_cast<size_t>(i)]);
  }
  const int levels = (1 << bits) - 1;
  const float step =
      float_from_f16(f16_from_float(std::max((high - low) / static_cast<float>(levels), 0x1p-24F)));
  const float least = float_from_f16(f16_from_float(low));
  for (const int64_t i : group) {
    const float steps = std::nearbyint((x[static_cast<size_t>(i)] - least) / step);
    const float code = std::clamp(steps, 0.0F, static_cast<float>(levels));
    ASSERT_EQ(decoded[static_cast<size_t>(i)], step * code + least) << what << ", element " << i;
  }
}

TEST(KVCache, QuantizesKeysByChannelAndValuesByTokenUnderTheRulesOfKivi) {
  for (const int bits : {1, 2, 3, 4, 8}) {
    for (const int64_t length : {0, 1, 31, 32, 63, 64, 65, 127, 128, 129, 200, 256, 300}) {
      KVFormat format;
      format.key_bits = format.value_bits = bits;
      format.group_size = 32;
      format.window = 64;
      const KVShape shape{1, 2, 80, DType::bf16};
      const RandomTokens keys(shape, length, 3);
      const RandomTokens values(shape, length, 4);
      KVCache cache = make_cache(format, shape);
      cache.append(keys.all(), values.all());
      const int64_t coded_keys = length - length % 64;
      const int64_t coded_values = length - std::min<int64_t>(length, 64);
      ASSERT_EQ(cache.coded(KVSide::keys, 0), coded_keys);
      ASSERT_EQ(cache.coded(KVSide::values, 0), coded_values);
      for (int64_t h = 0; h < 2; ++h) {
        const auto given = [&](const RandomTokens& tokens) {
          std::vector<float> x(static_cast<size_t>(length * 80));
          if (length == 0) return x;
          FloatMatrix(tokens.all().row(0, h, 0), DType::bf16, 1, length * 80, length * 80)
              .read(0, 0, length * 80, x.data());
          return x;
        };
        const std::vector<float> k = given(keys);
        const std::vector<float> v = given(values);
        std::vector<float> read_k(k.size() + 16);
        std::vector<float> read_v(v.size() + 16);
        cache.read(KVSide::keys, 0, h, 0, length, read_k.data());
        cache.read(KVSide::values, 0, h, 0, length, read_v.data());
        const std::string what = text_of(bits, " bits, length ", length, ", head ", h);
        for (int64_t t = 0; t < coded_keys; t += 32) {
          for (int64_t d = 0; d < 80; ++d) {
            std::vector<int64_t> group;
            for (int64_t j = t; j < t + 32; ++j) group.push_back(j * 80 + d);
            expect_group(k, read_k, group, bits, what + " keys");
          }
        }
        for (int64_t t = 0; t < coded_values; ++t) {
          for (const auto& [begin, end] : {std::pair{0, 32}, {32, 64}, {64, 80}}) {
            std::vector<int64_t> group;
            for (int64_t d = begin; d < end; ++d) group.push_back(t * 80 + d);
            expect_group(v, read_v, group, bits, what + " values");
          }
        }
        for (size_t i = static_cast<size_t>(coded_keys * 80); i < k.size(); ++i)
          ASSERT_EQ(k[i], read_k[i]) << what;
        for (size_t i = static_cast<size_t>(coded_values * 80); i < v.size(); ++i)
          ASSERT_EQ(v[i], read_v[i]) << what;
      }
    }
  }
}

TEST(KVCache, DecodesAsThePlainLoopsOnEveryInstructionSet) {
  for (const char* spec : kSpecs) {
    for (const int64_t dim : {8, 40, 80, 128}) {
      for (const DType dtype : {DType::f32, DType::f16, DType::bf16}) {
        const KVShape shape{1, 1, dim, dtype};
        const RandomTokens keys(shape, 300, 5);
        KVCache cache = make_cache(kv_format_from_spec(spec), shape, 100);
        cache.append(keys.all(), keys.all());
        const auto count = static_cast<size_t>(250 * dim);
        std::vector<float> expected(count);
        std::vector<float> actual(count + 16);
        for (const KVSide side : {KVSide::keys, KVSide::values}) {
          cache.read_reference(side, 0, 0, 13, 250, expected.data());
          for (const int64_t target : hwy::SupportedAndGeneratedTargets()) {
            hwy::SetSupportedTargetsForTest(target);
            hwy::GetChosenTarget().Update(hwy::SupportedTargets());
            cache.read(side, 0, 0, 13, 250, actual.data());
            hwy::SetSupportedTargetsForTest(0);
            hwy::GetChosenTarget().Update(hwy::SupportedTargets());
            ASSERT_EQ(0, std::memcmp(expected.data(), actual.data(), count * sizeof(float)))
                << spec << ", " << dim << ", " << hwy::TargetName(target);
          }
        }
      }
    }
  }
}

TEST(KVCache, SequencesDoNotDependOnTheirBatchMates) {
  for (const char* spec : kSpecs) {
    const KVFormat format = kv_format_from_spec(spec);
    const KVShape shape{3, 2, 16, DType::f32};
    const RandomTokens keys(shape, 170, 6);
    const RandomTokens values(shape, 170, 7);
    KVCache batch = make_cache(format, shape);
    // Sequences of 170, 41 and 0 tokens after the first call, padded on the left; then 5 more of each.
    const std::vector<int64_t> starts = {0, 129, 170};
    batch.append(keys.all(), values.all(), starts, 2);
    for (int64_t i = 0; i < 5; ++i) batch.append(keys.view(i, 1), values.view(i, 1), {}, 3);
    for (int64_t s = 0; s < 3; ++s) {
      KVCache alone = make_cache(format, {1, 2, 16, DType::f32});
      const int64_t from = starts[static_cast<size_t>(s)];
      alone.append(keys.view(from, 170 - from, s, 1), values.view(from, 170 - from, s, 1));
      alone.append(keys.view(0, 5, s, 1), values.view(0, 5, s, 1));
      EXPECT_TRUE(same_sequence(batch, s, alone, 0)) << spec << ", sequence " << s;
    }
  }
}

TEST(KVCache, ReorderingSharesPagesUntilTheyAreWritten) {
  for (const char* spec : kSpecs) {
    const KVFormat format = kv_format_from_spec(spec);
    const KVShape shape{2, 1, 16, DType::f16};
    const RandomTokens keys(shape, 700, 8);
    const RandomTokens values(shape, 700, 9);
    KVCache cache = make_cache(format, shape);
    cache.append(keys.view(0, 400), values.view(0, 400));
    const int64_t pages = cache.usage().page_bytes;
    cache.reorder(std::vector<int64_t>{1, 1, 0});
    EXPECT_EQ(cache.usage().page_bytes, pages) << spec;
    const KVShape wide{3, 1, 16, DType::f16};
    const RandomTokens more_keys(wide, 150, 10);
    const RandomTokens more_values(wide, 150, 11);
    for (int64_t i = 0; i < 150; ++i) cache.append(more_keys.view(i, 1), more_values.view(i, 1));
    const std::vector<int64_t> sources = {1, 1, 0};
    for (int64_t s = 0; s < 3; ++s) {
      KVCache alone = make_cache(format, {1, 1, 16, DType::f16});
      const int64_t source = sources[static_cast<size_t>(s)];
      alone.append(keys.view(0, 400, source, 1), values.view(0, 400, source, 1));
      alone.append(more_keys.view(0, 150, s, 1), more_values.view(0, 150, s, 1));
      EXPECT_TRUE(same_sequence(cache, s, alone, 0)) << spec << ", sequence " << s;
    }
    cache.reorder(std::vector<int64_t>{2});
    cache.clear();
    EXPECT_EQ(cache.usage().page_bytes, 0);
    // Used pages come back as new ones.
    cache.append(keys.view(0, 300, 0, 1), values.view(0, 300, 0, 1));
    KVCache fresh = make_cache(format, {1, 1, 16, DType::f16});
    fresh.append(keys.view(0, 300, 0, 1), values.view(0, 300, 0, 1));
    EXPECT_TRUE(same_sequence(cache, 0, fresh, 0)) << spec;
  }
}

TEST(KVCache, KeysComeBackFromBeforeTheirRotation) {
  const KVShape shape{2, 2, 40, DType::f32};
  const RandomTokens keys(shape, 200, 20);
  KVCache cache = make_cache(kv_format_from_spec("kvquant:2:r200"), shape);
  cache.append(keys.all(), keys.all(), std::vector<int64_t>{0, 50});
  std::vector<float> read(200 * 40 + 16);
  for (int64_t s = 0; s < 2; ++s) {
    cache.read(KVSide::keys, s, 1, 0, cache.length(s), read.data());
    const auto* given = reinterpret_cast<const float*>(keys.all().row(s, 1, s * 50));
    for (int64_t i = 0; i < cache.length(s) * 40; ++i) {
      ASSERT_NEAR(read[static_cast<size_t>(i)], given[i], 1e-5F * 40) << i;
    }
  }
}

// The definition of kvquant's values, written again: outliers are what errs most, and make up for it.
TEST(KVCache, KvquantKeepsTheElementsThatErrMost) {
  const KVShape shape{1, 1, 128, DType::f32};
  const KVFormat format = kv_format_from_spec("kvquant:2:1%:first0");
  RandomTokens x(shape, 300, 21);
  for (int64_t d = 0; d < 128; ++d) x.set(77 * 128 + d, d == 5 ? 100.0F : 0.5F);  // ties
  KVCache cache = make_cache(format, shape);
  cache.append(x.all(), x.all());
  const auto tables = testing::random_tables(format, shape);
  std::vector<float> read(300 * 128 + 16);
  cache.read(KVSide::values, 0, 0, 0, 300, read.data());
  int64_t corrected = 0;
  for (int64_t t = 0; t < 300; ++t) {
    const auto* given = reinterpret_cast<const float*>(x.all().row(0, 0, t));
    const int64_t slot = t % 128;
    const int64_t count = (slot + 1) * 128 / 100 - slot * 128 / 100;
    std::vector<float> sorted(given, given + 128);
    std::sort(sorted.begin(), sorted.end());
    size_t best = 0;
    const auto width = [&](size_t below) {
      return sorted[127 - static_cast<size_t>(count) + below] - sorted[below];
    };
    for (size_t below = 1; below <= static_cast<size_t>(count); ++below) {
      if (width(below) < width(best)) best = below;
    }
    const auto half = [](float value) { return float_from_f16(f16_from_float(value)); };
    const float low = sorted[best];
    const float high = sorted[127 - static_cast<size_t>(count) + best];
    const float scale = half(std::max((high - low) / 2, 0x1p-24F));
    const float middle = half((high + low) / 2);
    std::vector<std::pair<float, int64_t>> errors;
    std::vector<float> plain(128);
    for (int64_t d = 0; d < 128; ++d) {
      size_t code = 0;
      while (code < 3 && tables->values.bounds[code] < (given[d] - middle) / scale) ++code;
      plain[static_cast<size_t>(d)] = tables->values.values[code] * scale + middle;
      errors.emplace_back(-std::abs(given[d] - plain[static_cast<size_t>(d)]), d);
    }
    std::sort(errors.begin(), errors.end());
    for (int64_t i = 0; i < 128; ++i) {
      const auto d = static_cast<size_t>(errors[static_cast<size_t>(i)].second);
      const float missing = i < count ? half(given[d] - plain[d]) : 0.0F;
      corrected += i < count ? 1 : 0;
      ASSERT_EQ(read[static_cast<size_t>(t) * 128 + d], plain[d] + missing) << t << ", " << d;
    }
  }
  EXPECT_EQ(corrected, 163 + 163 + 44 * 128 / 100);
  EXPECT_EQ(cache.usage().code_bytes, 300 * 2 * 32 + 300 * 4 + 2 * corrected * 4);
}

TEST(KVCache, TablesMustFit) {
  const KVShape shape{1, 2, 16, DType::f16};
  const KVFormat format = kv_format_from_spec("kvquant:2");
  EXPECT_THROW(KVCache(format, shape), InvalidArgument);
  EXPECT_THROW(KVCache(kv_format_from_spec("kivi:2"), shape, 0, testing::random_tables(format, shape)),
               InvalidArgument);
  const auto refuse = [&](const auto& change) {
    auto tables = std::make_shared<KVTables>(*testing::random_tables(format, shape));
    change(*tables);
    EXPECT_THROW(KVCache(format, shape, 0, tables), InvalidArgument);
  };
  refuse([](KVTables& t) { t.keys.bounds.pop_back(); });
  refuse([](KVTables& t) { t.values.values[1] = 0.1F; });
  refuse([](KVTables& t) { t.values.bounds = {0.5F, 0.25F, 1.0F}; });
  refuse([](KVTables& t) { t.key_scale[3] = 0; });
  refuse([](KVTables& t) { t.key_middle.push_back(0); });
  const auto refuse_rotation = [&](const auto& change) {
    refuse([&](KVTables& t) {
      auto rotation = std::make_shared<KVRotation>(*t.rotation);
      change(*rotation);
      t.rotation = rotation;
    });
  };
  refuse_rotation([](KVRotation& r) { r.rotated = 18; });
  refuse_rotation([](KVRotation& r) { r.rotated = 0; });
  refuse_rotation([](KVRotation& r) { r.sines.pop_back(); });
  refuse_rotation([](KVRotation& r) { r.cosines[7] = std::nanf(""); });
  KVCache cache = make_cache(format, shape);
  const RandomTokens x(shape, 1201, 22);
  EXPECT_THROW(cache.append(x.all(), x.all()), InvalidArgument);  // 1200 positions
  EXPECT_EQ(cache.length(0), 0);
}

TEST(KVCache, TakesItsMemoryAtTheStart) {
  const KVShape shape{2, 2, 64, DType::f16};
  KVCache cache = make_cache(kv_format_from_spec("kivi:2"), shape, 1000);
  const int64_t reserved = cache.usage().reserved_bytes;
  // 8 pages of 128 tokens for each sequence, 3 bits for each element, and the window.
  EXPECT_EQ(reserved, 2 * (8 * 128 * 2 * 2 * 64 * 3 / 8) + 2 * 2 * 2 * 128 * 64 * 2 + 16);
  const RandomTokens x(shape, 1000, 12);
  for (int64_t t = 0; t < 1000; ++t) cache.append(x.view(t, 1), x.view(t, 1));
  EXPECT_EQ(cache.usage().reserved_bytes, reserved);
  const KVUsage usage = cache.usage();
  EXPECT_EQ(usage.tokens, 2000);
  EXPECT_EQ(usage.coded_keys, 2 * 896);
  EXPECT_EQ(usage.coded_values, 2 * 872);
  EXPECT_EQ(usage.code_bytes, (2 * 896 + 2 * 872) * 2 * 64 * 3 / 8);
  EXPECT_EQ(usage.exact_bytes, (2 * 104 + 2 * 128) * 2 * 64 * 2);
  EXPECT_EQ(usage.page_bytes, 2 * 7 * 128 * 2 * 2 * 64 * 3 / 8);
}

TEST(KVCache, TakesNoMoreThanIsReserved) {
  const KVShape shape{2, 2, 64, DType::f16};
  KVCache cache = make_cache(kv_format_from_spec("kivi:2:g32:r32:first3"), shape);
  const RandomTokens x(shape, 1000, 21);
  cache.append(x.view(0, 200), x.view(0, 200), std::vector<int64_t>{0, 150});
  cache.reserve(1000);
  int64_t reserved = cache.usage().reserved_bytes;
  cache.reserve(900);
  cache.append(x.view(200, 800), x.view(200, 800));
  EXPECT_EQ(cache.usage().reserved_bytes, reserved);
  cache.reorder(std::vector<int64_t>{0, 0, 1});
  cache.reserve(1100);  // the last page of the first two is copied when it is written to
  reserved = cache.usage().reserved_bytes;
  const RandomTokens more({3, 2, 64, DType::f16}, 100, 22);
  cache.append(more.all(), more.all());
  EXPECT_EQ(cache.usage().reserved_bytes, reserved);
  EXPECT_EQ(cache.length(1), 1100);
  EXPECT_THROW(cache.reserve(-1), InvalidArgument);
}

TEST(KVCache, ConstantGroupsAndZerosAreSafe) {
  for (const char* spec : kSpecs) {
    if (kv_format_from_spec(spec).kind == KVKind::kvquant) continue;  // random tables need not hold a middle
    const KVShape shape{1, 1, 16, DType::f32};
    RandomTokens x(shape, 400, 13);
    for (int64_t i = 0; i < 400 * 16; ++i) x.set(i, i < 200 * 16 ? 0.0F : 1.5F);
    KVCache cache = make_cache(kv_format_from_spec(spec), shape);
    cache.append(x.all(), x.all());
    std::vector<float> read(400 * 16 + 16);
    cache.read(KVSide::values, 0, 0, 0, 400, read.data());
    const bool digits = cache.format().kind == KVKind::sdr;
    for (size_t i = 0; i < 400 * 16; ++i) {
      const float expected = i < 200 * 16 ? 0.0F : 1.5F;
      ASSERT_NEAR(read[i], expected, digits ? 0.3F : 0.0F) << spec << " at " << i;
    }
    cache.read(KVSide::keys, 0, 0, 0, 400, read.data());
    for (size_t i = 0; i < 400 * 16; ++i) ASSERT_TRUE(std::isfinite(read[i])) << spec;
  }
}

TEST(KVCache, ClonesAreCachesOfTheirOwn) {
  const KVShape shape{1, 2, 16, DType::f16};
  const RandomTokens x(shape, 300, 19);
  KVCache cache = make_cache(kv_format_from_spec("kivi:2:g8:r8:first2"), shape);
  cache.append(x.view(0, 150), x.view(0, 150));
  KVCache copy = cache.clone();
  EXPECT_TRUE(same_sequence(cache, 0, copy, 0));
  copy.append(x.view(150, 150), x.view(150, 150));
  KVCache fresh = make_cache(kv_format_from_spec("kivi:2:g8:r8:first2"), shape);
  fresh.append(x.view(0, 150), x.view(0, 150));
  EXPECT_TRUE(same_sequence(cache, 0, fresh, 0));
}

TEST(KVCache, ThreadsDoNotMatter) {
  const KVShape shape{3, 3, 64, DType::f16};
  const RandomTokens keys(shape, 333, 14);
  const RandomTokens values(shape, 333, 15);
  KVCache one = make_cache(kv_format_from_spec("kivi:2"), shape);
  one.append(keys.all(), values.all(), {}, 1);
  for (const int threads : {2, 4}) {
    KVCache more = make_cache(kv_format_from_spec("kivi:2"), shape);
    more.append(keys.all(), values.all(), {}, threads);
    for (int64_t s = 0; s < 3; ++s) EXPECT_TRUE(same_sequence(one, s, more, s));
  }
}

TEST(KVCache, RefusesBadInputBeforeAnythingChanges) {
  const KVShape shape{2, 2, 16, DType::f16};
  const KVFormat format = kv_format_from_spec("kivi:2:g8:r8");
  EXPECT_THROW(KVCache(format, {2, 0, 16, DType::f16}), InvalidArgument);
  EXPECT_THROW(KVCache(format, {-1, 1, 16, DType::f16}), InvalidArgument);
  EXPECT_THROW(KVCache(format, {2, 2, 16, DType::i8}), TypeMismatch);
  EXPECT_THROW(KVCache(format, shape, -1), InvalidArgument);
  EXPECT_THROW(KVCache(format, shape, int64_t{1} << 45), InvalidArgument);
  EXPECT_THROW(KVCache(format, {int64_t{1} << 62, 2, 16, DType::f16}), InvalidArgument);
  KVCache cache = make_cache(format, shape);
  RandomTokens x(shape, 20, 16);
  cache.append(x.all(), x.all());
  KVCache before = make_cache(format, shape);
  before.append(x.all(), x.all());
  RandomTokens bad(shape, 20, 17);
  for (const float value : {std::numeric_limits<float>::infinity(), std::nanf(""), 40000.0F}) {
    bad.set(33 * 16 + 5, value);
    EXPECT_THROW(cache.append(bad.all(), x.all()), NumericError);
    EXPECT_THROW(cache.append(x.all(), bad.all()), NumericError);
  }
  EXPECT_THROW(cache.append(x.all(), x.view(0, 19)), InvalidArgument);
  EXPECT_THROW(cache.append(x.view(0, 20, 0, 1), x.view(0, 20, 0, 1)), InvalidArgument);
  EXPECT_THROW(cache.append(x.all(), x.all(), std::vector<int64_t>{0}), InvalidArgument);
  EXPECT_THROW(cache.append(x.all(), x.all(), std::vector<int64_t>{0, 21}), InvalidArgument);
  const RandomTokens wide({2, 2, 16, DType::f32}, 20, 18);
  EXPECT_THROW(cache.append(wide.all(), wide.all()), TypeMismatch);
  EXPECT_THROW(cache.reorder(std::vector<int64_t>{0, 2}), InvalidArgument);
  EXPECT_THROW(cache.reserve(INT64_MAX), InvalidArgument);
  std::vector<float> out(20 * 16 + 16);
  EXPECT_THROW(cache.read(KVSide::keys, 0, 0, 1, 20, out.data()), InvalidArgument);
  EXPECT_THROW(cache.read(KVSide::keys, 2, 0, 0, 1, out.data()), InvalidArgument);
  EXPECT_THROW(cache.read(KVSide::keys, 0, 2, 0, 1, out.data()), InvalidArgument);
  for (int64_t s = 0; s < 2; ++s) EXPECT_TRUE(same_sequence(cache, s, before, s));
}

}  // namespace
}  // namespace quantloom
