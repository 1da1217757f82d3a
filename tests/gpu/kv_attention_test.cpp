// Attention over a cache on the device against the reference in float64, on the CPU's cache of the same
// tokens.
#include "quantloom/kv_cache/kv_attention.hpp"

#include <gtest/gtest.h>

#include <cmath>

#include "cuda_streams.hpp"
#include "kv_case.hpp"
#include "quantloom/error.hpp"

namespace quantloom {
namespace {

using testing::make_cache;

class KVAttentionCuda : public ::testing::Test {
 protected:
  void SetUp() override {
    if (!has_cuda_device()) GTEST_SKIP() << "no CUDA device in this machine";
  }
};

class KVAttentionCudaSmall : public KVAttentionCuda {};

// Queries whose scores stay small, so that float16 keeps the softmax.
TwinTokens make_queries(const KVShape& shape, int64_t tokens, uint64_t seed) {
  TwinTokens queries(shape, tokens, seed);
  const std::vector<float> values = testing::normal_values(queries.host.memory.element_count(), seed);
  for (size_t i = 0; i < values.size(); ++i) queries.host.set(static_cast<int64_t>(i), 0.5F * values[i]);
  queries.copy();
  return queries;
}

double largest_value(const KVCache& cache) {
  double largest = 0;
  for (int64_t s = 0; s < cache.shape().sequences; ++s) {
    const int64_t count = cache.length(s) * cache.shape().head_dim;
    std::vector<float> values(static_cast<size_t>(count + 16));
    for (int64_t h = 0; h < cache.shape().kv_heads; ++h) {
      cache.read(KVSide::values, s, h, 0, cache.length(s), values.data());
      for (int64_t i = 0; i < count; ++i) {
        largest = std::max(largest, std::abs(static_cast<double>(values[static_cast<size_t>(i)])));
      }
    }
  }
  return largest;
}

// Everything that launch gives, as bytes.
std::vector<std::byte> attend_on_device(const CudaKVCache& cache, const TwinTokens& queries, float scale) {
  const auto out = device_bytes(queries.host.memory.byte_count());
  check_cuda(cudaMemset(out.get(), 0x77, static_cast<size_t>(queries.host.memory.byte_count())), "fill");
  cache.attend(queries.on_device(0, queries.host.tokens), scale, out.get());
  return download(out.get(), queries.host.memory.byte_count());
}

void expect_attention(const KVCache& cpu, const CudaKVCache& gpu, int64_t heads, int64_t tokens, DType dtype,
                      uint64_t seed, const std::string& what) {
  const KVShape shape{cpu.shape().sequences, heads, cpu.shape().head_dim, dtype};
  const TwinTokens queries = make_queries(shape, tokens, seed);
  const float scale = 1 / std::sqrt(static_cast<float>(shape.head_dim));
  const auto count = static_cast<size_t>(queries.host.memory.element_count());
  std::vector<double> expected(count);
  attend_reference(cpu, queries.on_host(0, tokens), scale, expected.data());
  const std::vector<std::byte> actual = attend_on_device(gpu, queries, scale);
  ASSERT_EQ(actual, attend_on_device(gpu, queries, scale)) << what << ": another run, other bytes";
  const double tolerance = 2e-3 * std::max(largest_value(cpu), 1e-3);
  // The result is rounded to its dtype.
  const double rounding = dtype == DType::bf16 ? 0x1p-8 : 0x1p-11;
  for (size_t i = 0; i < count; ++i) {
    const auto got = static_cast<double>(element(actual.data(), dtype, i));
    ASSERT_NEAR(got, expected[i], tolerance + rounding * std::abs(expected[i]))
        << what << ", element " << i << " of [" << shape.sequences << ", " << tokens << ", " << heads << ", "
        << shape.head_dim << "]";
  }
}

struct Twins {
  Twins(const char* spec, const KVShape& shape, int64_t tokens, const std::vector<int64_t>& starts,
        uint64_t seed)
      : cpu(make_cache(kv_format_from_spec(spec), shape)),
        gpu(make_cuda_cache(kv_format_from_spec(spec), shape)) {
    append(shape, tokens, starts, seed);
  }
  // Of the kind kvquant.
  Twins(const char* spec, const KVShape& shape, int64_t tokens, const std::vector<int64_t>& starts,
        uint64_t seed, const std::shared_ptr<const KVTables>& tables)
      : cpu(kv_format_from_spec(spec), shape, 0, tables), gpu(kv_format_from_spec(spec), shape, 0, tables) {
    append(shape, tokens, starts, seed);
  }
  void append(const KVShape& shape, int64_t tokens, const std::vector<int64_t>& starts, uint64_t seed) {
    const TwinTokens keys(shape, tokens, seed);
    const TwinTokens values(shape, tokens, seed + 1);
    cpu.append(keys.on_host(0, tokens), values.on_host(0, tokens), starts);
    gpu.append(keys.on_device(0, tokens), values.on_device(0, tokens), starts);
  }
  KVCache cpu;
  CudaKVCache gpu;
};

const std::vector<const char*> kSpecs = {"kivi:2",
                                         "kivi:4:g32:r32:first5",
                                         "kivi:3,1:g24:r48:first3",
                                         "kivi:8:g16:r16",
                                         "kivi:2:hadamard",
                                         "kivi:1:g64:r64",
                                         "token:4",
                                         "token:3:g20:r7:first1",
                                         "token:8:r130",
                                         "token:2:g32",
                                         "sdr:4:g16",
                                         "sdr:2:g8:r3",
                                         "sdr:5:g32:first3",
                                         "sdr:7:r50",
                                         "sdr:3,6:g9:r5:hadamard",
                                         "sdr:6,5:g64",
                                         "kivi:4,2:g32:r64",
                                         "kivi:8,2:g64:r64",
                                         "kivi:8,4",
                                         "kvquant:3:1%:first1",
                                         "kvquant:2,4:2.5%:r9:first0"};

TEST_F(KVAttentionCuda, IsThatOfFloat64) {
  uint64_t seed = 1000;
  for (const char* spec : kSpecs) {
    for (const int64_t dim : {64, 80, 96, 128, 256}) {
      const DType dtype = dim == 80 ? DType::f32 : dim == 96 ? DType::bf16 : DType::f16;
      // 600, 371, 130, 1 and no tokens.
      const Twins twins(spec, {5, 2, dim, dtype}, 600, {0, 229, 470, 599, 600}, seed);
      seed += 2;
      for (const int64_t group : {1, 4, 8}) {
        for (const int64_t tokens : {1, 2, 5}) {
          if (group == 1 && tokens == 2) continue;
          expect_attention(twins.cpu, twins.gpu, 2 * group, tokens, dtype, seed++,
                           text_of(spec, ", ", dim, ", ", group, " heads, ", tokens, " queries"));
          if (HasFatalFailure()) return;
        }
      }
    }
  }
}

TEST_F(KVAttentionCudaSmall, AtLengthsAroundPagesAndWindows) {
  uint64_t seed = 2000;
  for (const char* spec : kSpecs) {
    for (const int64_t length : {1, 3, 5, 6, 16, 31, 32, 47, 48, 127, 128, 129, 133, 255, 256, 257, 300}) {
      const Twins twins(spec, {2, 1, 64, DType::f16}, length, {0, length / 2}, seed);
      seed += 2;
      for (const int64_t tokens : {1, 3}) {
        expect_attention(twins.cpu, twins.gpu, 4, tokens, DType::f16, seed++,
                         text_of(spec, ", ", length, " tokens, ", tokens, " queries"));
        if (HasFatalFailure()) return;
      }
    }
  }
}

// Rotary embeddings of all channels, whose angles are products of positions and frequencies; of none; and of
// angles that are not.
TEST_F(KVAttentionCuda, OfKeysThatTurn) {
  uint64_t seed = 8000;
  for (const char* spec : {"kvquant:1:10%:r40", "kvquant:2:1%:first37", "kvquant:3:0.5%:first1",
                           "kvquant:4:1%:first0", "kvquant:4,2:0%"}) {
    for (const int64_t dim : {64, 80, 96, 128, 256}) {
      const DType dtype = dim == 80 ? DType::bf16 : dim == 96 ? DType::f32 : DType::f16;
      const KVShape shape{4, 2, dim, dtype};
      const KVFormat format = kv_format_from_spec(spec);
      const auto turned = testing::random_tables(format, shape, dim);
      KVTables shuffled = *turned;
      KVRotation rotation = *turned->rotation;
      for (const size_t at : {size_t{5}, rotation.cosines.size() / 3}) {
        std::swap(rotation.cosines[at], rotation.sines[at]);
      }
      shuffled.rotation = std::make_shared<const KVRotation>(rotation);
      for (const auto& tables : {turned, testing::random_tables(format, shape, 0),
                                 std::shared_ptr<const KVTables>(std::make_shared<KVTables>(shuffled))}) {
        const Twins twins(spec, shape, 700, {0, 313, 573, 699}, seed, tables);
        seed += 2;
        expect_attention(twins.cpu, twins.gpu, 8, 2, dtype, seed++, text_of(spec, ", ", dim));
        if (HasFatalFailure()) return;
      }
    }
  }
}

TEST_F(KVAttentionCuda, OfLongSequencesAndManyHeads) {
  for (const char* spec : {"kivi:2", "kivi:4", "token:4", "sdr:4"}) {
    const Twins twins(spec, {3, 8, 128, DType::f16}, 9000, {0, 5000, 8900}, 3000);
    expect_attention(twins.cpu, twins.gpu, 32, 1, DType::f16, 3001, spec);
    expect_attention(twins.cpu, twins.gpu, 64, 4, DType::f16, 3002, spec);
    if (HasFatalFailure()) return;
  }
}

TEST_F(KVAttentionCudaSmall, QueriesOfOtherTypes) {
  for (const char* spec : {"kivi:2", "token:4:hadamard", "kvquant:3:1%:first1"}) {
    for (const DType stored : {DType::f32, DType::f16, DType::bf16}) {
      const Twins twins(spec, {2, 2, 64, stored}, 200, {0, 77}, 4000);
      for (const DType dtype : {DType::f32, DType::f16, DType::bf16}) {
        expect_attention(twins.cpu, twins.gpu, 6, 2, dtype, 4001,
                         text_of(spec, ", ", name_of(stored), " met by ", name_of(dtype)));
        if (HasFatalFailure()) return;
      }
    }
  }
}

TEST_F(KVAttentionCudaSmall, ASequenceDoesNotDependOnItsBatchMates) {
  const KVShape shape{3, 2, 128, DType::f16};
  const Twins batch("kivi:2", shape, 1500, {0, 1100, 300}, 5000);
  const TwinTokens queries = make_queries({3, 8, 128, DType::f16}, 1, 5001);
  const std::vector<std::byte> all = attend_on_device(batch.gpu, queries, 0.1F);
  CudaKVCache one = batch.gpu.clone();
  one.reorder(std::vector<int64_t>{1});
  TwinTokens alone = make_queries({1, 8, 128, DType::f16}, 1, 5002);
  const size_t bytes = 8 * 128 * 2;
  std::memcpy(alone.host.memory.bytes(), queries.host.memory.bytes() + bytes, bytes);
  alone.copy();
  const std::vector<std::byte> part = attend_on_device(one, alone, 0.1F);
  EXPECT_TRUE(std::equal(part.begin(), part.end(), all.begin() + bytes));
}

TEST_F(KVAttentionCudaSmall, InGraphs) {
  const KVShape shape{2, 2, 64, DType::bf16};
  for (const char* spec : {"kivi:2:g8:r8", "token:4:hadamard", "sdr:4:r5"}) {
    const TwinTokens keys(shape, 200, 6000);
    const TwinTokens values(shape, 200, 6001);
    KVCache cpu = make_cache(kv_format_from_spec(spec), shape);
    CudaKVCache gpu = make_cuda_cache(kv_format_from_spec(spec), shape);
    const TwinTokens queries = make_queries({2, 4, 64, DType::bf16}, 1, 6002);
    const auto out = device_bytes(queries.host.memory.byte_count());
    settle();
    const Stream stream;
    gpu.reserve(200, stream);
    gpu.attend(queries.on_device(0, 1), 0.125F, out.get(), stream);
    const Graph graph(stream, [&] {
      for (int64_t t = 0; t < 10; ++t) {
        gpu.append(keys.on_device(t, 1), values.on_device(t, 1), {}, {stream, false});
      }
      gpu.attend(queries.on_device(0, 1), 0.125F, out.get(), stream);
    });
    for (int replay = 0; replay < 20; ++replay) {
      graph.launch(stream);
      stream.synchronize();
      cpu.append(keys.on_host(0, 10), values.on_host(0, 10));
      const std::vector<std::byte> replayed = download(out.get(), queries.host.memory.byte_count());
      ASSERT_EQ(replayed, attend_on_device(gpu, queries, 0.125F)) << spec << ", replay " << replay;
      expect_attention(cpu, gpu, 4, 1, DType::bf16, 6003, spec);
      if (HasFatalFailure()) return;
    }
  }
}

TEST_F(KVAttentionCudaSmall, RefusesBadQueries) {
  const KVShape shape{2, 2, 16, DType::f32};
  const TwinTokens x(shape, 4, 7000);
  CudaKVCache cache = make_cuda_cache(kv_format_from_spec("kivi:2"), shape);
  cache.append(x.on_device(0, 4), x.on_device(0, 4));
  const auto out = device_bytes(4096);
  std::vector<float> host(1024);
  const auto refuse = [&](const KVShape& other) {
    const TwinTokens queries(other, 1, 7001);
    EXPECT_THROW(cache.attend(queries.on_device(0, 1), 1.0F, out.get()), InvalidArgument);
  };
  refuse({2, 3, 16, DType::f32});
  refuse({1, 2, 16, DType::f32});
  refuse({2, 2, 24, DType::f32});
  EXPECT_THROW(cache.attend(x.on_device(0, 1), std::nanf(""), out.get()), InvalidArgument);
  EXPECT_THROW(cache.attend(x.on_device(0, 1), 1.0F, nullptr), InvalidArgument);
  EXPECT_THROW(cache.attend(x.on_device(0, 1), 1.0F, host.data()), TypeMismatch);
  EXPECT_THROW(cache.attend(x.on_host(0, 1), 1.0F, out.get()), TypeMismatch);
  const Stream stream;
  EXPECT_THROW(Graph(stream, [&] { cache.attend(x.on_device(0, 4), 1.0F, out.get(), stream); }),
               InvalidArgument);
}

}  // namespace
}  // namespace quantloom
