// Products with packed codes against decoding them first and multiplying with float32 weights: trellises,
// binary coding, tables of vectors, and symmetric grids with scales in float16.
//
//   bench_product [--n N] [--k K] [--formats LIST] [--tokens LIST] [--threads T] [--rounds R]
//                         [--json FILE]
//
// Each round visits every combination, and the plain product (OpenBLAS where it was found, else the library's
// own) beside it. One thread is timed by its processor time, more by the wall clock; best of all rounds. The
// plain product takes at least the time in the column of that name, however weights are decoded before.
#include <algorithm>
#include <cmath>
#include <cstdio>
#include <ctime>
#include <fstream>
#include <functional>
#include <iostream>
#include <limits>
#include <map>
#include <nlohmann/json.hpp>
#include <sstream>
#include <string>

#include "algebra/dense_tiles.hpp"
#include "quantloom/formats/trellis.hpp"
#include "quantloom/formats/uniform.hpp"
#include "quantloom/kernels/kernel_table.hpp"
#include "quantloom/kernels/matmul.hpp"
#include "quantloom/random.hpp"

#ifdef QUANTLOOM_BENCH_OPENBLAS
extern "C" {
void openblas_set_num_threads(int threads);
void sgemm_(const char* transa, const char* transb, const int* m, const int* n, const int* k,
            const float* alpha, const float* a, const int* lda, const float* b, const int* ldb,
            const float* beta, float* c, const int* ldc);
void sgemv_(const char* trans, const int* m, const int* n, const float* alpha, const float* a, const int* lda,
            const float* x, const int* incx, const float* beta, float* y, const int* incy);
}
#endif

namespace {

using namespace quantloom;  // NOLINT(google-build-using-namespace)

struct Settings {
  int64_t n = 4096;
  int64_t k = 4096;
  int threads = 1;
  int rounds = 7;
  std::vector<std::string> formats = {"trellis:2",       "trellis:3",      "trellis:4",
                                      "trellis:8",       "trellis:2.5",    "trellis:3:mcg",
                                      "trellis:3:3inst", "trellis:3:1mad", "trellis:3:octagon",
                                      "trellis:3:hyb",   "trellis:3:rptc"};
  std::vector<int> tokens = {1, 4, 16, 64, 512};
  std::string json_path;
};

std::vector<std::string> list_of(const std::string& text) {
  std::vector<std::string> out;
  std::stringstream in(text);
  for (std::string item; std::getline(in, item, ',');) out.push_back(item);
  return out;
}

bool parse(int argc, char** argv, Settings& s) {
  const std::map<std::string, std::function<void(const std::string&)>> options = {
      {"--n", [&](const std::string& v) { s.n = std::stoll(v); }},
      {"--k", [&](const std::string& v) { s.k = std::stoll(v); }},
      {"--threads", [&](const std::string& v) { s.threads = std::stoi(v); }},
      {"--rounds", [&](const std::string& v) { s.rounds = std::stoi(v); }},
      {"--formats", [&](const std::string& v) { s.formats = list_of(v); }},
      {"--tokens",
       [&](const std::string& v) {
         s.tokens.clear();
         for (const std::string& item : list_of(v)) s.tokens.push_back(std::stoi(item));
       }},
      {"--json", [&](const std::string& v) { s.json_path = v; }},
  };
  for (int i = 1; i < argc; i += 2) {
    const auto option = options.find(argv[i]);
    if (option == options.end() || i + 1 >= argc) {
      std::cerr << "unknown or incomplete option " << argv[i] << "\n";
      return false;
    }
    option->second(argv[i + 1]);
  }
  return true;
}

// Any bits are a trellis, signs or codes of tables of 2^b entries, and of whole words per row codes of a
// grid.
PackedTensor random_weights(const std::string& spec, int64_t n, int64_t k) {
  const auto format = format_from_spec(spec);
  const auto* const trellis = dynamic_cast<const Trellis*>(format.get());
  PackedTensor packed{format, n, k, {}};
  const CounterRandom random(1);
  for (const PlaneSpec& plane_spec : format->planes(n, k)) {
    if (plane_spec.optional) continue;
    Tensor plane(plane_spec.dtype, plane_spec.shape);
    if (plane_spec.dtype == DType::i32) {
      const auto words = plane.values<uint32_t>();
      for (size_t i = 0; i < words.size(); ++i) words[i] = static_cast<uint32_t>(random.bits(i));
    } else if (trellis != nullptr && plane_spec.name == "table") {
      std::ranges::copy(trellis->codebook.table, plane.values<uint16_t>().begin());
    } else if (plane_spec.name == "codebook") {
      const auto values = plane.values<uint16_t>();
      for (size_t i = 0; i < values.size(); ++i)
        values[i] = f16_from_float(static_cast<float>(random.normal(i)));
    } else {
      std::ranges::fill(plane.values<uint16_t>(), f16_from_float(0.125F));
    }
    packed.planes.emplace(plane_spec.name, std::move(plane));
  }
  return packed;
}

double seconds_of(int threads, const std::function<void()>& work) {
  const clockid_t clock = threads == 1 ? CLOCK_THREAD_CPUTIME_ID : CLOCK_MONOTONIC;
  timespec begin{};
  timespec end{};
  clock_gettime(clock, &begin);
  work();
  clock_gettime(clock, &end);
  return static_cast<double>(end.tv_sec - begin.tv_sec) +
         1e-9 * static_cast<double>(end.tv_nsec - begin.tv_nsec);
}

// y [m, n] = x [m, k] w [n, k]^T
void plain_product(const std::vector<float>& x, const std::vector<float>& w, std::vector<float>& y, int m,
                   const Settings& s) {
#ifdef QUANTLOOM_BENCH_OPENBLAS
  openblas_set_num_threads(s.threads);
  const int n = static_cast<int>(s.n);
  const int k = static_cast<int>(s.k);
  const int one_step = 1;
  const float one = 1;
  const float zero = 0;
  if (m == 1) {
    sgemv_("T", &k, &n, &one, w.data(), &k, x.data(), &one_step, &zero, y.data(), &one_step);
  } else {
    sgemm_("T", "N", &n, &m, &k, &one, w.data(), &k, x.data(), &k, &zero, y.data(), &n);
  }
#else
  std::fill(y.begin(), y.end(), 0.0F);
  algebra::tiles().gemm_nt_f32(m, s.n, s.k, 1.0F, x.data(), s.k, w.data(), s.k, y.data(), s.n);
#endif
}

struct Cell {
  double seconds = std::numeric_limits<double>::infinity();
  double plain_seconds = std::numeric_limits<double>::infinity();
};

}  // namespace

int main(int argc, char** argv) {
  Settings s;
  if (!parse(argc, argv, s)) return 2;
  const int most = *std::max_element(s.tokens.begin(), s.tokens.end());
  const CounterRandom random(2);
  std::vector<float> x(static_cast<size_t>(most * s.k));
  for (size_t i = 0; i < x.size(); ++i) x[i] = static_cast<float>(random.normal(i));
  std::vector<float> y(static_cast<size_t>(most * s.n));
  std::vector<float> plain(y.size());
  std::vector<float> w(static_cast<size_t>(s.n * s.k));
#ifdef QUANTLOOM_BENCH_OPENBLAS
  const char* library = "OpenBLAS";
#else
  const char* library = "quantloom's own tiles (Eigen), one thread";
#endif
  std::printf("[%lld, %lld], %d thread(s), %s, plain product: %s\n", static_cast<long long>(s.n),
              static_cast<long long>(s.k), s.threads, cpu_target().c_str(), library);
  std::printf("%-18s %-5s %6s %11s %11s %8s %12s %9s %9s\n", "format", "path", "tokens", "product us",
              "plain us", "times", "weights/s", "decode us", "rel.err");
  nlohmann::json json = {{"n", s.n},
                         {"k", s.k},
                         {"threads", s.threads},
                         {"target", cpu_target()},
                         {"plain", library},
                         {"results", nlohmann::json::array()}};
  for (const std::string& spec : s.formats) {
    const PackedTensor packed = random_weights(spec, s.n, s.k);
    const auto prepared = prepare(packed);
    const double decode = seconds_of(s.threads, [&] { dequantize(packed, {w.data(), s.n, s.k}, s.threads); });
    const auto* const trellis = dynamic_cast<const Trellis*>(packed.format.get());
    const bool sums_bytes = trellis != nullptr ? trellis->codebook.code == TrellisCode::mul1 ||
                                                     trellis->codebook.code == TrellisCode::one_mad
                                               : dynamic_cast<const Uniform*>(packed.format.get()) != nullptr;
    for (const Activations activations : {Activations::exact, Activations::int8}) {
      if (activations == Activations::int8 && !sums_bytes) continue;
      const char* path = activations == Activations::int8 ? "int8" : "exact";
      std::vector<Cell> cells(s.tokens.size());
      double error = 0;
      for (int round = 0; round < s.rounds; ++round) {
        for (size_t i = 0; i < cells.size(); ++i) {
          const int m = s.tokens[i];
          const MatrixView<const float> tokens(x.data(), m, s.k);
          const MatrixView<float> out(y.data(), m, s.n);
          const auto multiply = [&] {
            matmul(tokens, *prepared, out, {.activations = activations, .threads = s.threads});
          };
          cells[i].seconds = std::min(cells[i].seconds, seconds_of(s.threads, multiply));
          cells[i].plain_seconds = std::min(cells[i].plain_seconds,
                                            seconds_of(s.threads, [&] { plain_product(x, w, plain, m, s); }));
          double squares = 0;
          double norm = 0;
          for (size_t j = 0; j < static_cast<size_t>(m * s.n); ++j) {
            squares += std::pow(double{y[j]} - double{plain[j]}, 2);
            norm += std::pow(double{plain[j]}, 2);
          }
          error = std::max(error, std::sqrt(squares / norm));
        }
      }
      for (size_t i = 0; i < cells.size(); ++i) {
        const Cell& cell = cells[i];
        const double rate = static_cast<double>(s.n * s.k) / cell.seconds;
        std::printf("%-18s %-5s %6d %11.0f %11.0f %7.2fx %12.3g %9.0f %9.1e\n", spec.c_str(), path,
                    s.tokens[i], cell.seconds * 1e6, cell.plain_seconds * 1e6,
                    cell.plain_seconds / cell.seconds, rate, decode * 1e6, error);
        json["results"].push_back({{"format", spec},
                                   {"activations", path},
                                   {"tokens", s.tokens[i]},
                                   {"product_us", cell.seconds * 1e6},
                                   {"plain_us", cell.plain_seconds * 1e6},
                                   {"decode_us", decode * 1e6},
                                   {"relative_difference", error}});
      }
      std::fflush(stdout);
    }
  }
  if (!s.json_path.empty()) {
    std::ofstream out(s.json_path);
    out << json.dump(2) << "\n";
    if (!out) {
      std::cerr << "cannot write " << s.json_path << "\n";
      return 1;
    }
  }
  return 0;
}
