// Attention of one token over a quantized cache on the CPU, against the streaming read of the bytes that it
// reads, and against the same loops over exact float16 keys and values, all measured in the same rounds.
//
//   bench_kv_attention [--benchmark_format=json] [--benchmark_filter=...]
//
// One sequence, 32 heads on 8 KV heads of 128 channels. Counters, from the best round: us, GB_per_s of stored
// bytes, of_streaming = time of reading them / time of the work, over_float16 = time of float16 / time of the
// work.
#include <benchmark/benchmark.h>

#include <algorithm>
#include <limits>
#include <string>
#include <vector>

#include "cpu/bandwidth.hpp"
#include "quantloom/kv_cache/kv_attention.hpp"
#include "quantloom/random.hpp"

namespace quantloom {
namespace {

constexpr int64_t kHeads = 32;
constexpr int64_t kKvHeads = 8;
constexpr int64_t kDim = 128;

Tensor tokens_of(int64_t heads, int64_t tokens, uint64_t seed) {
  const CounterRandom random(seed);
  Tensor result(DType::f16, {1, heads, tokens, kDim});
  const auto values = result.values<uint16_t>();
  for (size_t i = 0; i < values.size(); ++i) values[i] = f16_from_float(static_cast<float>(random.normal(i)));
  return result;
}

KVTokens view_of(const Tensor& x) {
  const auto& shape = x.shape();
  return {
      x.bytes(), x.dtype(), 1, shape[1], shape[2], kDim, {shape[1] * shape[2] * kDim, shape[2] * kDim, kDim}};
}

KVCache filled(const std::string& spec, int64_t tokens) {
  KVCache cache(kv_format_from_spec(spec), {1, kKvHeads, kDim, DType::f16}, tokens);
  const Tensor keys = tokens_of(kKvHeads, tokens, 1);
  const Tensor values = tokens_of(kKvHeads, tokens, 2);
  cache.append(view_of(keys), view_of(values));
  return cache;
}

void attend_once(benchmark::State& state, const std::string& spec, int64_t tokens, int threads) {
  const KVCache cache = filled(spec, tokens);
  const KVCache exact = filled("token:8:r" + std::to_string(tokens), tokens);
  const Tensor queries = tokens_of(kHeads, 1, 3);
  std::vector<float> out(kHeads * kDim);
  const KVUsage usage = cache.usage();
  const int64_t bytes = usage.code_bytes + usage.exact_bytes;
  bench::ReadProbe probe(std::max<int64_t>(bytes, int64_t{256} << 20), bytes, threads);
  double best = std::numeric_limits<double>::infinity();
  double best_exact = best;
  double bandwidth = 0;
  for (auto _ : state) {
    bandwidth = std::max(bandwidth, probe.read());
    const double begin = bench::seconds_now();
    attend(cache, view_of(queries), 0.088F, out.data(), threads);
    const double middle = bench::seconds_now();
    attend(exact, view_of(queries), 0.088F, out.data(), threads);
    best_exact = std::min(best_exact, bench::seconds_now() - middle);
    best = std::min(best, middle - begin);
  }
  state.counters["us"] = 1e6 * best;
  state.counters["GB_per_s"] = 1e-9 * static_cast<double>(bytes) / best;
  state.counters["of_streaming"] = static_cast<double>(bytes) / bandwidth / best;
  state.counters["over_float16"] = best_exact / best;
}

}  // namespace
}  // namespace quantloom

int main(int argc, char** argv) {
  for (const char* spec : {"kivi:4", "kivi:3", "kivi:2", "kivi:8", "token:4", "sdr:4"}) {
    for (const int64_t tokens : {4096, 32768}) {
      for (const int threads : {1, 2}) {
        const std::string name =
            std::string(spec) + "/tokens:" + std::to_string(tokens) + "/threads:" + std::to_string(threads);
        benchmark::RegisterBenchmark(name.c_str(), quantloom::attend_once, std::string(spec), tokens, threads)
            ->Unit(benchmark::kMillisecond);
      }
    }
  }
  benchmark::Initialize(&argc, argv);
  if (benchmark::ReportUnrecognizedArguments(argc, argv)) return 1;
  benchmark::RunSpecifiedBenchmarks();
  benchmark::Shutdown();
  return 0;
}
