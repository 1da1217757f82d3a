// Fits on a sample of 2^22 normal values: sorting, Lloyd-Max, the errors of 17 scales, and the search for the
// nearest of 4096 centroids of 4 dimensions.
//
//   bench_fit [--benchmark_format=json] [--benchmark_filter=...]
//
// Counters: values_per_s; copy_fraction = time of a copy of the sample / time of the work, for the sort;
// distances_per_s for the search, in which one is d + 1 multiply-adds or minima.
#include <benchmark/benchmark.h>

#include <algorithm>
#include <chrono>
#include <cmath>
#include <cstring>
#include <limits>
#include <vector>

#include "quantloom/fit/kmeans.hpp"
#include "quantloom/fit/lloyd_max.hpp"
#include "quantloom/fit/scale_search.hpp"
#include "quantloom/random.hpp"

namespace quantloom {
namespace {

constexpr int64_t kSamples = int64_t{1} << 22;

const std::vector<float>& sample() {
  static const std::vector<float> values = [] {
    const CounterRandom random(1);
    std::vector<float> normal(static_cast<size_t>(kSamples));
    for (size_t i = 0; i < normal.size(); ++i) normal[i] = static_cast<float>(random.normal(i));
    return normal;
  }();
  return values;
}

template <class Work>
double seconds_of(const Work& work) {
  const auto begin = std::chrono::steady_clock::now();
  work();
  return std::chrono::duration<double>(std::chrono::steady_clock::now() - begin).count();
}

void sort_sample(benchmark::State& state) {
  std::vector<float> copy(sample().size());
  double best = std::numeric_limits<double>::infinity();
  double best_copy = best;
  for (auto _ : state) {
    best_copy = std::min(best_copy, seconds_of([&] {
                           std::memcpy(copy.data(), sample().data(), copy.size() * sizeof(float));
                           benchmark::DoNotOptimize(copy.data());
                         }));
    best = std::min(best, seconds_of([&] {
                      benchmark::DoNotOptimize(SortedValues(sample(), {}, static_cast<int>(state.range(0))));
                    }));
  }
  state.counters["values_per_s"] = static_cast<double>(kSamples) / best;
  state.counters["copy_fraction"] = best_copy / best;
}

void fit_table(benchmark::State& state) {
  double best = std::numeric_limits<double>::infinity();
  int64_t sweeps = 0;
  for (auto _ : state) {
    best = std::min(best, seconds_of([&] {
                      const SortedValues sorted(sample());
                      sweeps = lloyd_max(sorted, int64_t{1} << state.range(0), {}).sweeps;
                    }));
  }
  state.counters["values_per_s"] = static_cast<double>(kSamples) / best;
  state.counters["sweeps"] = static_cast<double>(sweeps);
}

void search_scales(benchmark::State& state) {
  const SortedValues sorted(sample());
  LloydMaxOptions options;
  const std::vector<std::vector<float>> tables = {lloyd_max(sorted, 16, options).centroids};
  std::vector<float> scales;
  for (int i = 0; i < 17; ++i) scales.push_back(std::exp2(static_cast<float>(i) / 4 - 2));
  double best = std::numeric_limits<double>::infinity();
  for (auto _ : state) {
    best = std::min(best, seconds_of([&] {
                      benchmark::DoNotOptimize(table_errors(SortedValues(sample()), tables, scales));
                    }));
  }
  state.counters["values_per_s"] = static_cast<double>(kSamples) / best;
}

void search_centroids(benchmark::State& state) {
  const int64_t d = state.range(0);
  const int64_t entries = state.range(1);
  const int threads = static_cast<int>(state.range(2));
  const int64_t rows = (int64_t{1} << 17) / d;
  const MatrixView<const float> x(sample().data(), rows, d);
  const MatrixView<const float> centroids(sample().data() + rows * d, entries, d);
  std::vector<int32_t> codes(static_cast<size_t>(rows));
  double best = std::numeric_limits<double>::infinity();
  for (auto _ : state) {
    best = std::min(best, seconds_of([&] { nearest_neighbour(x, centroids, codes, threads); }));
  }
  state.counters["distances_per_s"] = static_cast<double>(rows) * static_cast<double>(entries) / best;
}

BENCHMARK(sort_sample)->Arg(1)->Arg(2)->Unit(benchmark::kMillisecond);
BENCHMARK(fit_table)->Arg(3)->Arg(4)->Arg(8)->Unit(benchmark::kMillisecond);
BENCHMARK(search_scales)->Unit(benchmark::kMillisecond);
BENCHMARK(search_centroids)
    ->Args({2, 64, 1})
    ->Args({4, 4096, 1})
    ->Args({4, 4096, 2})
    ->Args({8, 4096, 1})
    ->Unit(benchmark::kMillisecond);

}  // namespace
}  // namespace quantloom

BENCHMARK_MAIN();
