// Caches of keys and values on the device against those of the CPU: the same bytes, whatever the calls.
#include <gtest/gtest.h>

#include <cmath>
#include <limits>

#include "cuda_streams.hpp"
#include "kv_case.hpp"
#include "quantloom/error.hpp"
#include "quantloom/kv_cache/cuda_kv_cache.hpp"

namespace quantloom {
namespace {

using testing::make_cache;

class KVCacheCuda : public ::testing::Test {
 protected:
  void SetUp() override {
    if (!has_cuda_device()) GTEST_SKIP() << "no CUDA device in this machine";
  }
};

class KVCacheCudaSmall : public KVCacheCuda {};

const std::vector<const char*> kSpecs = {"kivi:2:g32:r128",
                                         "kivi:4:g32:r32:first5",
                                         "kivi:3,1:g24:r48:first3",
                                         "kivi:8:g16:r16",
                                         "kivi:1:g64:r64",
                                         "token:4",
                                         "token:3:g20:r7:first1",
                                         "token:8:r130",
                                         "token:1:g5",
                                         "sdr:4:g16",
                                         "sdr:3,6:g9:r5:hadamard",
                                         "kivi:2:g8:r8:hadamard",
                                         "token:4:hadamard:first2",
                                         "kvquant:3:1%:first1",
                                         "kvquant:2,4:2.5%:r9:first0",
                                         "kvquant:1,1:0%"};

// Both caches get the same tokens.
struct Twins {
  Twins(const KVFormat& format, const KVShape& shape, int64_t capacity = 0)
      : cpu(make_cache(format, shape)), gpu(make_cuda_cache(format, shape, capacity)) {}

  void append(const TwinTokens& keys, const TwinTokens& values, int64_t first, int64_t count,
              const std::vector<int64_t>& starts = {}, bool check = false) {
    cpu.append(keys.on_host(first, count), values.on_host(first, count), starts);
    gpu.append(keys.on_device(first, count), values.on_device(first, count), starts, {.check = check});
  }

  KVCache cpu;
  CudaKVCache gpu;
};

TEST_F(KVCacheCudaSmall, HoldsTheBytesOfTheCpu) {
  uint64_t seed = 100;
  for (const char* spec : kSpecs) {
    const std::vector<std::pair<int64_t, DType>> shapes = {
        {8, DType::f32}, {40, DType::f16}, {80, DType::bf16}, {128, DType::f16}};
    for (const auto& [dim, dtype] : shapes) {
      const KVShape shape{2, 2, dim, dtype};
      const TwinTokens keys(shape, 190, seed++);
      const TwinTokens values(shape, 190, seed++);
      Twins twins(kv_format_from_spec(spec), shape);
      twins.append(keys, values, 0, 150, {0, 55}, true);
      ASSERT_TRUE(same_caches(twins.cpu, twins.gpu)) << spec << ", " << dim;
      for (int64_t t = 150; t < 153; ++t) twins.append(keys, values, t, 1);
      twins.append(keys, values, 153, 37);
      ASSERT_TRUE(same_caches(twins.cpu, twins.gpu)) << spec << ", " << dim;
    }
  }
}

TEST_F(KVCacheCuda, StreamingEqualsTheCpuAtEveryLength) {
  for (const char* spec : kSpecs) {
    const KVShape shape{1, 1, 16, DType::f16};
    const TwinTokens keys(shape, 300, 1);
    const TwinTokens values(shape, 300, 2);
    Twins twins(kv_format_from_spec(spec), shape);
    ASSERT_TRUE(same_caches(twins.cpu, twins.gpu)) << spec << " without tokens";
    for (int64_t t = 0; t < 300; ++t) {
      twins.append(keys, values, t, 1);
      ASSERT_TRUE(same_caches(twins.cpu, twins.gpu)) << spec << " at " << t + 1;
    }
  }
}

TEST_F(KVCacheCuda, SplitsOfACallDoNotMatter) {
  const CounterRandom random(3);
  uint64_t draw = 0;
  for (const char* spec : kSpecs) {
    for (int round = 0; round < 4; ++round) {
      const KVShape shape{3, 2, round % 2 == 0 ? 64 : 96, round % 2 == 0 ? DType::bf16 : DType::f32};
      const TwinTokens keys(shape, 700, 4);
      const TwinTokens values(shape, 700, 5);
      Twins twins(kv_format_from_spec(spec), shape, round < 2 ? 0 : 700);
      const std::array<uint64_t, 4> largest = {700, 20, 300, 140};
      for (int64_t t = 0; t < 700;) {
        const auto count = std::min<int64_t>(
            static_cast<int64_t>(random.below(draw++, largest[static_cast<size_t>(round)])), 700 - t);
        std::vector<int64_t> starts;
        for (int64_t s = 0; s < 3 && round % 2 == 1; ++s) {
          starts.push_back(static_cast<int64_t>(random.below(draw++, static_cast<uint64_t>(count) + 1)));
        }
        twins.append(keys, values, t, count, starts, random.below(draw++, 2) == 0);
        t += std::max<int64_t>(count, 1);
      }
      ASSERT_TRUE(same_caches(twins.cpu, twins.gpu)) << spec << ", round " << round;
    }
  }
}

TEST_F(KVCacheCuda, AllBitsAndShapes) {
  std::vector<KVFormat> formats;
  for (const int bits : {1, 2, 3, 4, 8}) {
    for (const int64_t group : {16, 40}) {
      formats.push_back({KVKind::kivi, bits, bits, group, 2 * group, 0, 0, false});
      formats.push_back({KVKind::token, bits, bits, group, 0, 3, 0, false});
    }
  }
  for (int bits = 2; bits <= 7; ++bits) formats.push_back({KVKind::sdr, bits, bits, 12, 0, 0, 0, false});
  for (int bits = 1; bits <= 4; ++bits) {
    formats.push_back({KVKind::kvquant, bits, bits, 0, 0, 1, bits * 100, false});
  }
  uint64_t seed = 500;
  for (const KVFormat& format : formats) {
    for (const int64_t dim : {24, 64, 96, 256}) {
      for (const DType dtype : {DType::f32, DType::f16, DType::bf16}) {
        const KVShape shape{2, 1, dim, dtype};
        const TwinTokens keys(shape, 260, seed++);
        const TwinTokens values(shape, 260, seed++);
        Twins twins(format, shape);
        twins.append(keys, values, 0, 260, {7, 0});
        ASSERT_TRUE(same_caches(twins.cpu, twins.gpu))
            << format.spec() << ", " << dim << ", " << name_of(dtype);
      }
    }
  }
  const KVShape wide{1, 1, 1024, DType::f16};
  const TwinTokens keys(wide, 140, 6);
  for (const char* spec : {"kivi:3:g32:r32", "token:4:g8", "sdr:5:g7:hadamard", "kvquant:4:0%"}) {
    Twins twins(kv_format_from_spec(spec), wide);
    twins.append(keys, keys, 0, 140);
    ASSERT_TRUE(same_caches(twins.cpu, twins.gpu)) << spec;
  }
}

TEST_F(KVCacheCuda, LongPromptsAndWideBatches) {
  for (const char* spec : {"kivi:2", "token:4:r3", "kvquant:3:1%:first1", "kivi:4:g16:r1024"}) {
    const bool tables = kv_format_from_spec(spec).kind == KVKind::kvquant;
    const int64_t tokens = tables ? 1200 : 5000;
    const KVShape shape{1, 4, 128, DType::f16};
    const TwinTokens keys(shape, tokens, 7);
    const TwinTokens values(shape, tokens, 8);
    Twins twins(kv_format_from_spec(spec), shape);
    twins.append(keys, values, 0, tokens - 3);
    for (int64_t t = tokens - 3; t < tokens; ++t) twins.append(keys, values, t, 1);
    ASSERT_TRUE(same_caches(twins.cpu, twins.gpu)) << spec;
  }
  // More sequences than one launch has starts for.
  const KVShape wide{150, 1, 16, DType::f32};
  const TwinTokens keys(wide, 70, 9);
  std::vector<int64_t> starts;
  for (int64_t s = 0; s < 150; ++s) starts.push_back(s % 71);
  Twins twins(kv_format_from_spec("sdr:4:r5:hadamard"), wide);
  twins.append(keys, keys, 0, 70, starts, true);
  twins.append(keys, keys, 3, 1);
  ASSERT_TRUE(same_caches(twins.cpu, twins.gpu));
}

TEST_F(KVCacheCudaSmall, ExtremesBecomeTheSameCodes) {
  for (const char* spec : kSpecs) {
    const KVShape shape{1, 1, 16, DType::f32};
    TwinTokens x(shape, 256, 10);
    for (int64_t i = 0; i < 256 * 16; ++i) {
      const int64_t t = i / 16;
      const float sign = i % 3 == 0 ? -1.0F : 1.0F;
      if (t < 64) x.host.set(i, t % 2 == 0 ? 0.0F : sign * 0.0F);
      if (t >= 64 && t < 100) x.host.set(i, 1.5F);
      if (t >= 100 && t < 130) x.host.set(i, sign * (i % 5 == 0 ? 32752.0F : 1e-3F));
      if (t >= 130 && t < 200) x.host.set(i, sign * 1e-9F * static_cast<float>(i % 7));
      if (t >= 200 && t < 220) x.host.set(i, sign * 1e-42F);
    }
    // Rotated keys have to fit too.
    const KVFormat format = kv_format_from_spec(spec);
    if (format.hadamard || format.kind == KVKind::kvquant) {
      for (int64_t i = 100 * 16; i < 130 * 16; ++i) x.host.set(i, i % 16 == 3 ? 30000.0F : 0.0F);
    }
    x.copy();
    Twins twins(format, shape);
    twins.append(x, x, 0, 256, {}, true);
    ASSERT_TRUE(same_records(twins.cpu, twins.gpu, 0)) << spec;
  }
}

TEST_F(KVCacheCudaSmall, ReadsOfAnyRunAndType) {
  for (const char* spec : kSpecs) {
    const KVShape shape{2, 3, 40, DType::f16};
    const TwinTokens keys(shape, 290, 11);
    const TwinTokens values(shape, 290, 12);
    Twins twins(kv_format_from_spec(spec), shape);
    twins.append(keys, values, 0, 290, {0, 17});
    for (const DType dtype : {DType::f32, DType::f16, DType::bf16}) {
      for (const KVSide side : {KVSide::keys, KVSide::values}) {
        for (const auto& [first, count] : {std::pair<int64_t, int64_t>{0, 1}, {3, 130}, {127, 2}, {272, 1}}) {
          ASSERT_TRUE(same_reads(twins.cpu, twins.gpu, 1, side, first, count, dtype)) << spec;
        }
        twins.gpu.read(side, 0, 290, 0, nullptr, dtype);
      }
    }
  }
}

TEST_F(KVCacheCudaSmall, ReorderingSharesPagesUntilTheyAreWritten) {
  for (const char* spec : kSpecs) {
    const KVShape shape{2, 1, 16, DType::f16};
    const TwinTokens keys(shape, 400, 13);
    const TwinTokens values(shape, 400, 14);
    Twins twins(kv_format_from_spec(spec), shape, 200);
    twins.append(keys, values, 0, 400, {0, 9});
    const auto reorder = [&](const std::vector<int64_t>& sources) {
      const int64_t pages = twins.gpu.usage().page_bytes;
      twins.cpu.reorder(sources);
      twins.gpu.reorder(sources);
      EXPECT_LE(twins.gpu.usage().page_bytes, pages) << spec;
      ASSERT_TRUE(same_caches(twins.cpu, twins.gpu)) << spec;
    };
    reorder({1, 1, 0});
    const KVShape wide{3, 1, 16, DType::f16};
    const TwinTokens more(wide, 150, 15);
    for (int64_t t = 0; t < 150; ++t) twins.append(more, more, t, 1);
    ASSERT_TRUE(same_caches(twins.cpu, twins.gpu)) << spec;
    EXPECT_EQ(twins.cpu.usage().page_bytes, twins.gpu.usage().page_bytes);
    reorder({2, 0, 0});
    twins.append(more, more, 0, 150, {3, 140, 0});
    ASSERT_TRUE(same_caches(twins.cpu, twins.gpu)) << spec;
    reorder({1});
    const KVShape one{1, 1, 16, DType::f16};
    const TwinTokens last(one, 40, 16);
    twins.append(last, last, 0, 40);
    ASSERT_TRUE(same_caches(twins.cpu, twins.gpu)) << spec;
    twins.cpu.clear();
    twins.gpu.clear();
    EXPECT_EQ(twins.gpu.usage().page_bytes, 0);
    // Used pages come back as new ones.
    twins.append(last, last, 0, 33);
    ASSERT_TRUE(same_caches(twins.cpu, twins.gpu)) << spec;
  }
}

TEST_F(KVCacheCudaSmall, ClonesAreCachesOfTheirOwn) {
  for (const char* spec : {"kivi:2:g8:r8:first2", "kvquant:3:1%:first1"}) {
    const KVShape shape{2, 2, 16, DType::f16};
    const TwinTokens x(shape, 300, 17);
    Twins twins(kv_format_from_spec(spec), shape, 20);
    twins.append(x, x, 0, 150, {0, 100});
    CudaKVCache copy = twins.gpu.clone();
    ASSERT_TRUE(same_caches(twins.cpu, copy)) << spec;
    copy.append(x.on_device(0, 150), x.on_device(0, 150));
    ASSERT_TRUE(same_caches(twins.cpu, twins.gpu)) << spec;
    twins.append(x, x, 150, 150);
    ASSERT_TRUE(same_caches(twins.cpu, twins.gpu)) << spec;
    EXPECT_EQ(copy.length(1), 200);
  }
}

TEST_F(KVCacheCudaSmall, TakesItsMemoryAtTheStart) {
  const KVShape shape{2, 2, 64, DType::f16};
  Twins twins(kv_format_from_spec("kivi:2"), shape, 1000);
  const int64_t reserved = twins.gpu.usage().reserved_bytes;
  const TwinTokens x(shape, 1000, 18);
  twins.append(x, x, 0, 600);
  for (int64_t t = 600; t < 1000; ++t) twins.append(x, x, t, 1);
  const KVUsage usage = twins.gpu.usage();
  const KVUsage expected = twins.cpu.usage();
  EXPECT_EQ(usage.reserved_bytes, reserved);
  EXPECT_EQ(usage.tokens, expected.tokens);
  EXPECT_EQ(usage.code_bytes, expected.code_bytes);
  EXPECT_EQ(usage.exact_bytes, expected.exact_bytes);
  EXPECT_EQ(usage.page_bytes, expected.page_bytes);
}

// One token of each sequence from a buffer, in a graph.
struct Step {
  Step(CudaKVCache& cache, const KVShape& shape, const Stream& stream)
      : keys(shape, 1, 30), values(shape, 1, 31), graph(stream, [&] {
          cache.append(keys.on_device(0, 1), values.on_device(0, 1), {}, {stream, false});
        }) {}
  void run(const TwinTokens& more_keys, const TwinTokens& more_values, int64_t t, const Stream& stream) {
    const auto move = [&](const TwinTokens& from, TwinTokens& to) {
      const KVShape& shape = from.host.shape;
      const auto row = static_cast<size_t>(shape.head_dim * size_of(shape.dtype));
      check_cuda(cudaMemcpy2DAsync(to.memory.get(), row, from.on_device(t, 1).data,
                                   row * static_cast<size_t>(from.host.tokens), row,
                                   static_cast<size_t>(shape.sequences * shape.kv_heads),
                                   cudaMemcpyDeviceToDevice, stream),
                 "token");
    };
    move(more_keys, keys);
    move(more_values, values);
    graph.launch(stream);
  }
  TwinTokens keys;
  TwinTokens values;
  Graph graph;
};

TEST_F(KVCacheCudaSmall, ReplaysOfGraphsAddTheirTokens) {
  for (const char* spec : kSpecs) {
    const KVShape shape{2, 2, 16, DType::f16};
    const TwinTokens keys(shape, 330, 19);
    const TwinTokens values(shape, 330, 20);
    Twins twins(kv_format_from_spec(spec), shape);
    twins.append(keys, values, 0, 40, {0, 31});
    settle();
    const Stream stream;
    twins.gpu.reserve(330, stream);
    Step step(twins.gpu, shape, stream);
    ASSERT_TRUE(same_caches(twins.cpu, twins.gpu)) << spec << ": a capture adds nothing";
    for (int64_t t = 40; t < 300; ++t) {
      step.run(keys, values, t, stream);
      twins.cpu.append(keys.on_host(t, 1), values.on_host(t, 1));
    }
    ASSERT_TRUE(same_caches(twins.cpu, twins.gpu)) << spec;
    // Calls that are not captured, in between.
    twins.cpu.append(keys.on_host(300, 5), values.on_host(300, 5), std::vector<int64_t>{5, 0});
    twins.gpu.append(keys.on_device(300, 5), values.on_device(300, 5), std::vector<int64_t>{5, 0}, {stream});
    const std::vector<int64_t> swapped = {1, 0};
    twins.cpu.reorder(swapped);
    twins.gpu.reorder(swapped, stream);
    twins.gpu.reserve(330, stream);
    for (int64_t t = 305; t < 330; ++t) {
      step.run(keys, values, t, stream);
      twins.cpu.append(keys.on_host(t, 1), values.on_host(t, 1));
    }
    ASSERT_TRUE(same_caches(twins.cpu, twins.gpu)) << spec;
  }
}

TEST_F(KVCacheCudaSmall, ReplaysWithoutRoomChangeNothing) {
  for (const char* spec : {"kivi:2:g8:r8", "token:4", "sdr:4:g16:r3:hadamard"}) {
    const KVShape shape{1, 1, 16, DType::f16};
    const TwinTokens x(shape, 400, 21);
    Twins twins(kv_format_from_spec(spec), shape);
    const Stream stream;
    twins.gpu.reserve(128, stream);
    Step step(twins.gpu, shape, stream);
    for (int64_t t = 0; t < 400; ++t) step.run(x, x, t, stream);
    stream.synchronize();
    EXPECT_THROW(static_cast<void>(twins.gpu.length(0)), InvalidArgument);
    const int64_t length = twins.gpu.length(0);
    EXPECT_GE(length, 128);
    EXPECT_LT(length, 128 + 16);
    twins.cpu.append(x.on_host(0, length), x.on_host(0, length));
    ASSERT_TRUE(same_caches(twins.cpu, twins.gpu)) << spec;
    // Growth moves what the graph knows of: it finds no room, and the cache goes on.
    twins.append(x, x, 0, 100);
    settle();
    twins.gpu.reserve(128 * 40, stream);
    step.run(x, x, 0, stream);
    stream.synchronize();
    EXPECT_THROW(static_cast<void>(twins.gpu.usage()), InvalidArgument);
    ASSERT_TRUE(same_caches(twins.cpu, twins.gpu)) << spec;
    twins.gpu.clear();
    EXPECT_EQ(twins.gpu.length(0), 0);
  }
}

TEST_F(KVCacheCudaSmall, CapturesNeedRoomAndNoChecks) {
  const KVShape shape{1, 1, 16, DType::f16};
  const TwinTokens x(shape, 4, 22);
  CudaKVCache cache = make_cuda_cache(kv_format_from_spec("token:4"), shape);
  const Stream stream;
  const auto capture = [&](bool check) {
    const Graph graph(stream, [&] {
      cache.append(x.on_device(0, 1), x.on_device(0, 1), {}, {stream, check});
    });
  };
  EXPECT_THROW(capture(false), InvalidArgument);
  cache.reserve(1);
  EXPECT_THROW(capture(true), InvalidArgument);
  const auto refused = [&](const auto& work) { EXPECT_THROW(Graph(stream, work), InvalidArgument); };
  refused([&] { cache.reserve(10, stream); });
  refused([&] { cache.clear(stream); });
  refused([&] { cache.reorder(std::vector<int64_t>{0}, stream); });
  refused([&] { static_cast<void>(cache.clone(stream)); });
  capture(false);
  EXPECT_EQ(cache.length(0), 0);
}

TEST_F(KVCacheCudaSmall, ValuesThatCannotBeStored) {
  for (const char* spec : {"kivi:2:g8:r8", "token:4", "sdr:4:g16:hadamard", "kvquant:2:1%:first0"}) {
    const KVShape shape{2, 2, 16, DType::f16};
    TwinTokens x(shape, 20, 23);
    TwinTokens bad(shape, 20, 23);
    Twins twins(kv_format_from_spec(spec), shape);
    twins.append(x, x, 0, 20, {}, true);
    for (const float value : {std::numeric_limits<float>::infinity(), std::nanf(""), -40000.0F}) {
      // Sequence 1, head 0, token 13.
      bad.host.set((2 * 20 + 13) * 16 + 5, value);
      bad.copy();
      const auto message = [](const auto& call) {
        try {
          call();
        } catch (const NumericError& error) {
          return std::string(error.what());
        }
        return std::string("no error");
      };
      for (const bool keys : {true, false}) {
        const KVTokens k = keys ? bad.on_device(0, 20) : x.on_device(0, 20);
        const KVTokens v = keys ? x.on_device(0, 20) : bad.on_device(0, 20);
        const KVTokens k_host = keys ? bad.on_host(0, 20) : x.on_host(0, 20);
        const KVTokens v_host = keys ? x.on_host(0, 20) : bad.on_host(0, 20);
        EXPECT_EQ(message([&] { twins.gpu.append(k, v); }),
                  message([&] { twins.cpu.append(k_host, v_host); }))
            << spec;
        ASSERT_TRUE(same_caches(twins.cpu, twins.gpu)) << spec;
        // Tokens before the start are not looked at.
        const std::vector<int64_t> starts = {0, 14};
        CudaKVCache copy = twins.gpu.clone();
        copy.append(k, v, starts);
        EXPECT_EQ(copy.length(1), 26);
        copy.append(k, v, {}, {.check = false});
        settle();
        const std::string found = message([&] { static_cast<void>(copy.length(1)); });
        EXPECT_NE(found.find(keys ? "keys" : "values"), std::string::npos) << found;
        EXPECT_NE(found.find("sequence 1, head 0, token 39"), std::string::npos) << found;
        EXPECT_EQ(copy.length(1), 46);
      }
    }
  }
}

TEST_F(KVCacheCudaSmall, RefusesBadInputBeforeAnythingChanges) {
  const KVShape shape{2, 2, 16, DType::f16};
  const KVFormat format = kv_format_from_spec("kivi:2:g8:r8");
  EXPECT_THROW(CudaKVCache(format, {2, 0, 16, DType::f16}), InvalidArgument);
  EXPECT_THROW(CudaKVCache(format, {-1, 1, 16, DType::f16}), InvalidArgument);
  EXPECT_THROW(CudaKVCache(format, {2, 2, 16, DType::i8}), TypeMismatch);
  EXPECT_THROW(CudaKVCache(format, shape, -1), InvalidArgument);
  EXPECT_THROW(CudaKVCache(kv_format_from_spec("kvquant:2"), shape), InvalidArgument);
  const TwinTokens x(shape, 20, 24);
  Twins twins(format, shape);
  twins.append(x, x, 0, 20);
  CudaKVCache& cache = twins.gpu;
  const KVTokens good = x.on_device(0, 20);
  EXPECT_THROW(cache.append(x.on_host(0, 20), good), TypeMismatch);
  EXPECT_THROW(cache.append(good, x.on_host(0, 20)), TypeMismatch);
  EXPECT_THROW(cache.append(good, x.on_device(0, 19)), InvalidArgument);
  EXPECT_THROW(cache.append(good, good, std::vector<int64_t>{0}), InvalidArgument);
  EXPECT_THROW(cache.append(good, good, std::vector<int64_t>{0, 21}), InvalidArgument);
  KVTokens odd = good;
  odd.data = static_cast<const std::byte*>(odd.data) + 1;
  EXPECT_THROW(cache.append(odd, good), InvalidArgument);
  KVTokens wide = good;
  wide.dtype = DType::f32;
  EXPECT_THROW(cache.append(wide, good), TypeMismatch);
  KVTokens none = good;
  none.data = nullptr;
  EXPECT_THROW(cache.append(none, good), InvalidArgument);
  EXPECT_THROW(cache.reorder(std::vector<int64_t>{0, 2}), InvalidArgument);
  EXPECT_THROW(cache.reserve(-1), InvalidArgument);
  EXPECT_THROW(static_cast<void>(cache.length(2)), InvalidArgument);
  EXPECT_THROW(static_cast<void>(cache.record(0, 1, 0)), InvalidArgument);
  EXPECT_THROW(static_cast<void>(cache.record(0, 0, 2)), InvalidArgument);
  const auto out = device_bytes(20 * 2 * 16 * 4);
  std::vector<float> host(20 * 2 * 16);
  EXPECT_THROW(cache.read(KVSide::keys, 0, 1, 20, out.get(), DType::f32), InvalidArgument);
  EXPECT_THROW(cache.read(KVSide::keys, 2, 0, 1, out.get(), DType::f32), InvalidArgument);
  EXPECT_THROW(cache.read(KVSide::keys, 0, 0, 20, host.data(), DType::f32), TypeMismatch);
  EXPECT_THROW(cache.read(KVSide::keys, 0, 0, 20, out.get(), DType::i8), TypeMismatch);
  const KVFormat tables = kv_format_from_spec("kvquant:2");
  CudaKVCache positions = make_cuda_cache(tables, shape, 10);
  const TwinTokens many(shape, 1201, 25);
  EXPECT_THROW(positions.append(many.on_device(0, 1201), many.on_device(0, 1201)), InvalidArgument);
  EXPECT_EQ(positions.length(0), 0);
  EXPECT_TRUE(same_caches(twins.cpu, twins.gpu));
}

}  // namespace
}  // namespace quantloom
