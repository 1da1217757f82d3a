// Products from packed codes against the streaming read floor.
//
//   bench_matmul [--n N] [--k K] [--group G] [--asymmetric] [--bits LIST] [--tokens LIST] [--threads LIST]
//                [--cache-bytes B] [--rounds R] [--json FILE]
//
// Each round visits every combination in a short burst, with the read probe before and after it, so that
// whatever else the machine does hits all alike. Weights rotate over copies of `cache-bytes` in all: more
// than the last-level cache holds. "% of floor" compares bytes of prepared weights per second with the
// probe's of the same run: best with best, median with median.
#include <algorithm>
#include <cmath>
#include <cstdio>
#include <fstream>
#include <functional>
#include <iostream>
#include <map>
#include <nlohmann/json.hpp>
#include <sstream>
#include <string>

#include "bandwidth.hpp"
#include "quantloom/formats/bit_packing.hpp"
#include "quantloom/formats/uniform.hpp"
#include "quantloom/kernels/kernel_table.hpp"
#include "quantloom/kernels/matmul.hpp"
#include "quantloom/random.hpp"

namespace {

using namespace quantloom;  // NOLINT(google-build-using-namespace)

struct Settings {
  int64_t n = 4096;
  int64_t k = 4096;
  int64_t group = 128;
  int64_t cache_bytes = int64_t{256} << 20;
  int rounds = 15;
  bool symmetric = true;
  std::vector<int> widths = {8, 4, 3, 2};
  std::vector<int> threads = {1};
  std::vector<int> tokens = {1};
  std::string json_path;
};

struct Series {
  int bits = 0;
  Activations activations = Activations::exact;
  int tokens = 1;
  int threads = 1;
  double relative_error = 0.0;
  std::vector<double> seconds;
};

std::vector<int> list_of(const std::string& text) {
  std::vector<int> out;
  std::stringstream in(text);
  for (std::string item; std::getline(in, item, ',');) out.push_back(std::stoi(item));
  return out;
}

bool parse(int argc, char** argv, Settings& s) {
  const std::map<std::string, std::function<void(const std::string&)>> options = {
      {"--n", [&](const std::string& v) { s.n = std::stoll(v); }},
      {"--k", [&](const std::string& v) { s.k = std::stoll(v); }},
      {"--group", [&](const std::string& v) { s.group = std::stoll(v); }},
      {"--cache-bytes", [&](const std::string& v) { s.cache_bytes = std::stoll(v); }},
      {"--rounds", [&](const std::string& v) { s.rounds = std::stoi(v); }},
      {"--bits", [&](const std::string& v) { s.widths = list_of(v); }},
      {"--threads", [&](const std::string& v) { s.threads = list_of(v); }},
      {"--tokens", [&](const std::string& v) { s.tokens = list_of(v); }},
      {"--json", [&](const std::string& v) { s.json_path = v; }},
  };
  for (int i = 1; i < argc; ++i) {
    const std::string argument = argv[i];
    if (argument == "--asymmetric") {
      s.symmetric = false;
      continue;
    }
    const auto option = options.find(argument);
    if (option == options.end() || i + 1 >= argc) {
      std::cerr << "unknown or incomplete option " << argument << "\n";
      return false;
    }
    option->second(argv[++i]);
  }
  return true;
}

PackedTensor random_weights(const Settings& s, int bits) {
  const Uniform format(bits, s.group, s.symmetric);
  PackedTensor packed;
  packed.format = std::make_shared<Uniform>(format);
  packed.n = s.n;
  packed.k = s.k;
  const CounterRandom random(1);
  for (const PlaneSpec& spec : format.planes(s.n, s.k)) {
    if (spec.optional) continue;
    Tensor plane(spec.dtype, spec.shape);
    if (spec.name == "scales") {
      for (uint16_t& scale : plane.values<uint16_t>()) scale = f16_from_float(0.01F);
    } else {
      const int64_t count = spec.name == "codes" ? s.k : s.n;
      const int64_t words = packed_words(count, bits);
      std::vector<uint8_t> codes(static_cast<size_t>(count));
      for (int64_t row = 0; row < spec.shape[0]; ++row) {
        for (int64_t c = 0; c < count; ++c) {
          codes[static_cast<size_t>(c)] =
              static_cast<uint8_t>(random.bits(static_cast<uint64_t>(row * count + c)));
        }
        pack_bits(
            codes, bits,
            plane.values<uint32_t>().subspan(static_cast<size_t>(row * words), static_cast<size_t>(words)));
      }
    }
    packed.planes.emplace(spec.name, std::move(plane));
  }
  return packed;
}

double best(const std::vector<double>& v) {
  return *std::min_element(v.begin(), v.end());
}

double median(std::vector<double> v) {
  const auto middle = v.begin() + static_cast<int64_t>(v.size() / 2);
  std::nth_element(v.begin(), middle, v.end());
  return *middle;
}

// |y - reference| / |reference| of one token, in the 2-norm.
double relative_error(const PackedTensor& packed, const PreparedTensor& w, const std::vector<float>& x,
                      Activations activations) {
  std::vector<float> y(static_cast<size_t>(packed.n));
  std::vector<float> reference(static_cast<size_t>(packed.n));
  const MatrixView<const float> token(x.data(), 1, packed.k);
  matmul_reference(token, packed, {reference.data(), 1, packed.n});
  matmul(token, w, {y.data(), 1, packed.n}, {.activations = activations, .threads = 1});
  double error = 0.0;
  double norm = 0.0;
  for (size_t i = 0; i < y.size(); ++i) {
    error += std::pow(static_cast<double>(y[i]) - static_cast<double>(reference[i]), 2);
    norm += std::pow(static_cast<double>(reference[i]), 2);
  }
  return std::sqrt(error / norm);
}

}  // namespace

int main(int argc, char** argv) {
  Settings s;
  if (!parse(argc, argv, s)) return 2;

  const int most_tokens = *std::max_element(s.tokens.begin(), s.tokens.end());
  const CounterRandom random(2);
  std::vector<float> x(static_cast<size_t>(most_tokens * s.k));
  for (size_t i = 0; i < x.size(); ++i) x[i] = static_cast<float>(random.normal(i));
  std::vector<float> y(static_cast<size_t>(most_tokens * s.n));

  std::map<int, std::vector<std::shared_ptr<const PreparedTensor>>> weights;
  std::vector<Series> all;
  for (const int bits : s.widths) {
    const PackedTensor packed = random_weights(s, bits);
    auto& copies = weights[bits];
    copies.push_back(prepare(packed));
    const int64_t count = std::max<int64_t>(2, s.cache_bytes / copies[0]->byte_count());
    while (static_cast<int64_t>(copies.size()) < count) copies.push_back(prepare(packed));
    for (const auto activations : {Activations::exact, Activations::int8}) {
      const double error = relative_error(packed, *copies[0], x, activations);
      for (const int tokens : s.tokens) {
        for (const int threads : s.threads) all.push_back({bits, activations, tokens, threads, error, {}});
      }
    }
  }

  std::map<int, std::unique_ptr<bench::ReadProbe>> probes;
  std::map<int, std::vector<double>> floor;  // seconds per byte
  for (const int threads : s.threads) {
    probes[threads] = std::make_unique<bench::ReadProbe>(s.cache_bytes, int64_t{8} << 20, threads);
  }
  std::map<int, size_t> next;
  for (int round = 0; round < s.rounds; ++round) {
    for (Series& series : all) {
      const auto probe = [&] {
        for (int i = 0; i < 4; ++i) floor[series.threads].push_back(1.0 / probes[series.threads]->read());
      };
      probe();
      const auto& copies = weights[series.bits];
      for (int i = 0; i < (series.tokens <= 2 ? 4 : 1); ++i) {
        const auto& w = copies[next[series.bits]++ % copies.size()];
        const double start = bench::seconds_now();
        matmul(MatrixView<const float>(x.data(), series.tokens, s.k), *w, {y.data(), series.tokens, s.n},
               {.activations = series.activations, .threads = series.threads});
        series.seconds.push_back(bench::seconds_now() - start);
      }
      probe();
    }
  }

  nlohmann::json json = {
      {"n", s.n}, {"k", s.k}, {"group", s.group}, {"symmetric", s.symmetric}, {"target", cpu_target()}};
  std::printf("uniform %lld x %lld, group %lld, %s, target %s\n", static_cast<long long>(s.n),
              static_cast<long long>(s.k), static_cast<long long>(s.group),
              s.symmetric ? "symmetric" : "asymmetric", cpu_target().c_str());
  for (const int threads : s.threads) {
    const double best_rate = 1e-9 / best(floor[threads]);
    const double median_rate = 1e-9 / median(floor[threads]);
    std::printf("read floor, %d thread(s): best %.1f GB/s, median %.1f GB/s\n", threads, best_rate,
                median_rate);
    json["floor"].push_back({{"threads", threads}, {"best_gbs", best_rate}, {"median_gbs", median_rate}});
  }
  std::printf("%4s %-6s %4s %8s %10s %10s %8s %7s %8s %9s %9s\n", "bits", "path", "m", "threads", "best us",
              "median us", "GB/s", "% best", "% median", "GMAC/s", "rel.err");
  for (const Series& series : all) {
    const auto bytes = static_cast<double>(weights[series.bits][0]->byte_count());
    const double fast = best(series.seconds);
    const double middle = median(series.seconds);
    const double best_share = 100.0 * bytes / fast * best(floor[series.threads]);
    const double median_share = 100.0 * bytes / middle * median(floor[series.threads]);
    const double gmacs = static_cast<double>(s.n * s.k) * series.tokens / fast * 1e-9;
    const char* path = series.activations == Activations::int8 ? "int8" : "exact";
    std::printf("%4d %-6s %4d %8d %10.1f %10.1f %8.1f %6.1f%% %7.1f%% %9.1f %9.2e\n", series.bits, path,
                series.tokens, series.threads, fast * 1e6, middle * 1e6, bytes / fast * 1e-9, best_share,
                median_share, gmacs, series.relative_error);
    json["results"].push_back({{"bits", series.bits},
                               {"activations", path},
                               {"tokens", series.tokens},
                               {"threads", series.threads},
                               {"bytes", bytes},
                               {"best_us", fast * 1e6},
                               {"median_us", middle * 1e6},
                               {"percent_of_floor_best", best_share},
                               {"percent_of_floor_median", median_share},
                               {"gmacs_best", gmacs},
                               {"relative_error", series.relative_error}});
  }
  if (!s.json_path.empty()) {
    std::ofstream out(s.json_path);
    out << json.dump(2) << "\n";
    out.close();
    if (!out) {
      std::cerr << "cannot write " << s.json_path << "\n";
      return 1;
    }
  }
  return 0;
}
