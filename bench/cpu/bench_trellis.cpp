// Encoding and decoding of trellis rings, against the plain loop over states and predecessors.
//
//   bench_trellis [--benchmark_format=json] [--benchmark_filter=...]
//
// Counters, from the best iteration: weights_per_s, and times_plain = rate / that of the plain loop on one
// thread. One thread is timed by the processor's clock; "threads:0", OpenMP's default, and the plain loop
// that it is compared with by the wall clock.
#include <benchmark/benchmark.h>

#include <algorithm>
#include <ctime>
#include <limits>
#include <string>
#include <vector>

#include "formats/trellis_search.hpp"
#include "quantloom/random.hpp"

namespace quantloom {
namespace {

constexpr int64_t kRings = 32;
constexpr int64_t kPlainRings = 1;

template <class Work>
double seconds_of(clockid_t clock, const Work& work) {
  timespec begin{};
  timespec end{};
  clock_gettime(clock, &begin);
  work();
  clock_gettime(clock, &end);
  return static_cast<double>(end.tv_sec - begin.tv_sec) +
         1e-9 * static_cast<double>(end.tv_nsec - begin.tv_nsec);
}

std::vector<float> targets_of(const TrellisCodebook& codebook, int64_t rings) {
  const CounterRandom random(1);
  std::vector<float> targets(static_cast<size_t>(rings * 256));
  for (size_t i = 0; i < targets.size(); ++i) {
    targets[i] = static_cast<float>(codebook.rms() * random.normal(i));
  }
  return targets;
}

void encode(benchmark::State& state, const std::string& name, int half_bits, TrellisSearch search,
            int threads) {
  const TrellisCodebook codebook = trellis_codebook(name);
  const TrellisShape shape{16, half_bits, codebook.weights_per_step, 256};
  const std::vector<float> targets = targets_of(codebook, kRings);
  std::vector<uint32_t> states(static_cast<size_t>(kRings * shape.steps()));
  const trellis::SearchTable table(codebook, shape);
  const clockid_t clock = threads == 1 ? CLOCK_THREAD_CPUTIME_ID : CLOCK_MONOTONIC;
  double best = std::numeric_limits<double>::infinity();
  double best_plain = best;
  for (auto _ : state) {
    for (int64_t r = 0; r < kPlainRings; ++r) {
      best_plain = std::min(best_plain, seconds_of(clock, [&] {
                              trellis::search_reference(
                                  table, std::span(targets).subspan(static_cast<size_t>(r * 256), 256),
                                  std::span(states).first(static_cast<size_t>(shape.steps())));
                            }));
    }
    best = std::min(best, seconds_of(clock, [&] {
                      encode_rings(codebook, shape, {targets.data(), kRings, 256},
                                   {states.data(), kRings, shape.steps()}, {search, threads});
                    }));
    benchmark::DoNotOptimize(states.data());
  }
  state.counters["weights_per_s"] = kRings * 256 / best;
  state.counters["times_plain"] = best_plain * kRings / best;
}

void decode(benchmark::State& state, const std::string& name, int half_bits) {
  const TrellisCodebook codebook = trellis_codebook(name);
  const TrellisShape shape{16, half_bits, codebook.weights_per_step, 256};
  constexpr int64_t kDecoded = 4096;
  std::vector<uint32_t> words(static_cast<size_t>(kDecoded * shape.words()));
  const CounterRandom random(2);
  for (size_t i = 0; i < words.size(); ++i) words[i] = static_cast<uint32_t>(random.bits(i));
  std::vector<uint32_t> states(static_cast<size_t>(kDecoded * shape.steps()));
  std::vector<float> weights(static_cast<size_t>(kDecoded * 256));
  double best = std::numeric_limits<double>::infinity();
  for (auto _ : state) {
    best = std::min(best, seconds_of(CLOCK_THREAD_CPUTIME_ID, [&] {
                      const MatrixView<uint32_t> view(states.data(), kDecoded, shape.steps());
                      unpack_rings(shape, {words.data(), kDecoded, shape.words()}, view);
                      decode_rings(codebook, shape, view, {weights.data(), kDecoded, 256}, 1);
                    }));
    benchmark::DoNotOptimize(weights.data());
  }
  state.counters["weights_per_s"] = kDecoded * 256 / best;
}

}  // namespace
}  // namespace quantloom

int main(int argc, char** argv) {
  using quantloom::TrellisSearch;
  const auto add_encode = [](const std::string& name, int half_bits, TrellisSearch search, int threads) {
    const std::string bits = std::to_string(half_bits / 2) + (half_bits % 2 == 1 ? ".5" : "");
    const std::string title = "encode/" + name + "/" + bits + "_bits/" +
                              std::string(quantloom::name_of(search)) + "/threads:" + std::to_string(threads);
    benchmark::RegisterBenchmark(title.c_str(), quantloom::encode, name, half_bits, search, threads)
        ->Unit(benchmark::kMillisecond)
        ->Iterations(5);
  };
  for (const int threads : {1, 0}) {
    for (int half_bits = 2; half_bits <= 16; half_bits += 2) {
      add_encode("mul1", half_bits, TrellisSearch::normal, threads);
    }
  }
  add_encode("mul1", 5, TrellisSearch::normal, 1);
  add_encode("hyb", 4, TrellisSearch::normal, 1);
  for (int half_bits = 2; half_bits <= 8; half_bits += 2) {
    add_encode("octagon", half_bits, TrellisSearch::normal, 1);
  }
  add_encode("mul1", 4, TrellisSearch::fast, 1);
  add_encode("mul1", 4, TrellisSearch::best, 1);
  for (const int half_bits : {4, 8}) {
    const std::string title = "decode/mul1/" + std::to_string(half_bits / 2) + "_bits";
    benchmark::RegisterBenchmark(title.c_str(), quantloom::decode, "mul1", half_bits)
        ->Unit(benchmark::kMillisecond);
  }
  benchmark::Initialize(&argc, argv);
  if (benchmark::ReportUnrecognizedArguments(argc, argv)) return 1;
  benchmark::RunSpecifiedBenchmarks();
  benchmark::Shutdown();
  return 0;
}
