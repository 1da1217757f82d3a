// Entropy coding of codes on the CPU, against the time of copying the codes once in memory, both measured in
// the same rounds.
//
//   bench_entropy [--benchmark_format=json] [--benchmark_filter=...]
//
// Normal values on a grid whose codes have about 3 bits of entropy. Counters, from the best iteration:
// codes_GB_per_s (a code is a byte), copy_fraction = time of the copy / time of the work, bits_per_code, and
// bits_over_entropy.
#include <benchmark/benchmark.h>

#include <algorithm>
#include <cmath>
#include <cstring>
#include <limits>
#include <string>
#include <vector>

#include "cpu/bandwidth.hpp"
#include "quantloom/formats/entropy.hpp"
#include "quantloom/random.hpp"

namespace quantloom {
namespace {

constexpr int64_t kCodes = 1 << 24;

const std::vector<uint8_t>& codes() {
  static const std::vector<uint8_t> values = [] {
    const CounterRandom random(1);
    std::vector<uint8_t> all(static_cast<size_t>(kCodes));
    for (size_t i = 0; i < all.size(); ++i) {
      all[i] = static_cast<uint8_t>(std::clamp(20 + std::nearbyint(1.93 * random.normal(i)), 0.0, 40.0));
    }
    return all;
  }();
  return values;
}

template <class Work>
void report(benchmark::State& state, const std::vector<std::byte>& bytes, const Work& work) {
  std::vector<uint8_t> copy(codes().size());
  double best = std::numeric_limits<double>::infinity();
  double best_copy = best;
  for (auto _ : state) {
    const double begin = bench::seconds_now();
    std::memcpy(copy.data(), codes().data(), copy.size());
    benchmark::DoNotOptimize(copy.data());
    const double middle = bench::seconds_now();
    work();
    best_copy = std::min(best_copy, middle - begin);
    best = std::min(best, bench::seconds_now() - middle);
  }
  const double bits = 8.0 * static_cast<double>(bytes.size()) / kCodes;
  state.counters["codes_GB_per_s"] = 1e-9 * kCodes / best;
  state.counters["copy_fraction"] = best_copy / best;
  state.counters["bits_per_code"] = bits;
  state.counters["bits_over_entropy"] = bits - entropy_of(count_codes(codes(), 256));
}

void encode(benchmark::State& state, EntropyCoder coder, int threads) {
  const EntropyOptions options{.coder = coder, .threads = threads};
  const auto bytes = entropy_encode(codes(), options);
  report(state, bytes, [&] { benchmark::DoNotOptimize(entropy_encode(codes(), options)); });
}

void decode(benchmark::State& state, EntropyCoder coder, int threads) {
  const auto bytes = entropy_encode(codes(), {.coder = coder});
  const EntropyStream stream(bytes);
  std::vector<uint8_t> out(codes().size());
  report(state, bytes, [&] {
    stream.decode(0, out, threads);
    benchmark::DoNotOptimize(out.data());
  });
}

}  // namespace
}  // namespace quantloom

int main(int argc, char** argv) {
  for (const auto coder : {quantloom::EntropyCoder::rans, quantloom::EntropyCoder::huffman}) {
    const std::string name = coder == quantloom::EntropyCoder::rans ? "rans" : "huffman";
    for (const int threads : {1, 2}) {
      const std::string suffix = name + "/threads:" + std::to_string(threads);
      benchmark::RegisterBenchmark(("decode/" + suffix).c_str(), quantloom::decode, coder, threads)
          ->Unit(benchmark::kMillisecond);
      benchmark::RegisterBenchmark(("encode/" + suffix).c_str(), quantloom::encode, coder, threads)
          ->Unit(benchmark::kMillisecond);
    }
  }
  benchmark::Initialize(&argc, argv);
  if (benchmark::ReportUnrecognizedArguments(argc, argv)) return 1;
  benchmark::RunSpecifiedBenchmarks();
  benchmark::Shutdown();
  return 0;
}
