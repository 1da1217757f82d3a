// Encoding of trellis-coded rings on the device, in weights a second: both passes and the ways back, for
// batches of 4224 rings and of 256 (a row of tiles of a matrix with 4096 outputs) or less. The source is
// normal, in units of the codebook times the scale that suits the bits.
//
// The yardstick is the issue limit of the search: each of the 2^16 states costs an add and a product, and
// with its neighbour half a minimum, for two float16 costs in a register of 32 lanes.
#include <algorithm>
#include <cstdio>
#include <nlohmann/json.hpp>
#include <string>
#include <vector>

#include "common/device.hpp"
#include "common/device_buffer.hpp"
#include "formats/trellis_passes.hpp"
#include "gpu/device.cuh"
#include "gpu/program.hpp"
#include "quantloom/formats/trellis_cuda.hpp"
#include "quantloom/kernels/dequantize.hpp"
#include "quantloom/random.hpp"

namespace quantloom {
namespace {

using cuda::DeviceBuffer;

constexpr int64_t kMany = 4224;
constexpr int64_t kFew = 256;

struct Case {
  const char* codebook;
  double bits;
  TrellisSearch search;
  int64_t rings;
  int64_t batch = 0;  // memory for so many rings at once; 0: what the library asks for
};

double scale_for(double bits) {
  return bits < 2 ? 1.15 : bits < 3 ? 1.0 : bits < 4 ? 0.95 : 0.9;
}

std::vector<float> normal_values(int64_t count) {
  const CounterRandom random(1);
  std::vector<float> values(static_cast<size_t>(count));
  for (size_t i = 0; i < values.size(); ++i) values[i] = static_cast<float>(random.normal(i));
  return values;
}

double best_of(const bench::Stream& stream, int repeats, const auto& body) {
  bench::Event begin;
  bench::Event end;
  body();
  double best = 1e9;
  for (int i = 0; i < repeats; ++i) {
    begin.record(stream);
    body();
    end.record(stream);
    stream.synchronize();
    best = std::min(best, end.seconds_since(begin));
  }
  return best;
}

// How a search is done: as the library plans it, with bulk copies, or so.
struct How {
  bool bulk = false;
  bool planned = true;
  bool on_chip = false;
  bool alone = false;
  int pairs = 0;
  std::string name;
};

// Seconds of the two searches and the two ways back, for rings that fit one batch.
std::vector<double> step_seconds(const CudaTrellisCodebook& codebook, const CudaRings& rings,
                                 TrellisSearch search, const How& how, void* workspace,
                                 const DeviceFacts& device, const bench::Stream& stream, int repeats) {
  const DeviceBuffer<uint16_t> edges(2 * rings.count, stream.get());
  cuda::SearchTask first = cuda::first_pass(rings.shape, search);
  cuda::SearchTask second = cuda::second_pass(rings.shape);
  for (cuda::SearchTask* task : {&first, &second}) {
    task->targets = rings.targets;
    task->table = codebook.weights();
    task->count = static_cast<int>(rings.count);
    task->history = static_cast<uint32_t*>(workspace);
    task->bulk = how.bulk;
    if (how.planned) {
      cuda::plan_search(*task, device.processors, device.shared_memory);
    } else {
      task->on_chip = how.on_chip;
      task->alone = how.alone;
      task->pairs = how.pairs;
    }
  }
  first.ends = edges.data();
  second.pins = edges.data() + rings.count;
  cuda::TracebackResult seams;
  seams.seams = edges.data() + rings.count;
  cuda::TracebackResult result;
  result.words = rings.words;
  result.errors = rings.squared_errors;
  return {best_of(stream, repeats, [&] { cuda::search_rings(first, device.processors, stream.get()); }),
          best_of(stream, repeats, [&] { cuda::trace_back(first, seams, stream.get()); }),
          best_of(stream, repeats, [&] { cuda::search_rings(second, device.processors, stream.get()); }),
          best_of(stream, repeats, [&] { cuda::trace_back(second, result, stream.get()); })};
}

nlohmann::json measure(const Case& c, const std::vector<float>& source, double issue_limit, int repeats) {
  const TrellisCodebook host = trellis_codebook(c.codebook);
  const CudaTrellisCodebook codebook(host);
  const double scale = scale_for(c.bits) * host.rms();
  const int64_t weights = c.rings * cuda::kRingPositions;
  std::vector<float> values(static_cast<size_t>(weights));
  for (size_t i = 0; i < values.size(); ++i) values[i] = static_cast<float>(scale * source[i]);

  const bench::Stream stream;
  DeviceBuffer<float> targets(weights, stream.get());
  targets.upload(values.data(), weights);
  TrellisShape shape;
  shape.half_bits = static_cast<int>(2 * c.bits);
  shape.weights_per_step = host.weights_per_step;
  const DeviceBuffer<uint32_t> words(c.rings * shape.words(), stream.get());
  const DeviceBuffer<float> errors(c.rings, stream.get());
  const DeviceBuffer<float> decoded(weights, stream.get());
  const TrellisWorkspace sizes = trellis_workspace_cuda(shape, c.search, c.rings);
  const int64_t groups = ceil_div(c.batch, cuda::second_pass(shape).group());
  const int64_t bytes = c.batch == 0 ? sizes.fast_bytes : sizes.least_bytes * groups;
  const auto workspace = bench::device_memory(bytes);
  CudaRings rings;
  rings.targets = targets.data();
  rings.count = c.rings;
  rings.shape = shape;
  rings.words = words.data();
  rings.squared_errors = errors.data();
  const double seconds = best_of(stream, repeats, [&] {
    encode_rings_cuda(codebook, rings, c.search, workspace.get(), bytes, stream.get());
  });
  std::vector<float> sums(static_cast<size_t>(c.rings));
  cuda::download(errors.data(), sums.data(), c.rings, stream.get());
  double error = 0;
  for (const float sum : sums) error += sum;
  error /= static_cast<double>(weights) * scale * scale;
  const double decoding = best_of(stream, repeats, [&] {
    decode_rings_cuda(codebook, words.data(), c.rings, shape, decoded.data(), DType::f32, stream.get());
  });

  const double rate = static_cast<double>(weights) / seconds;
  const std::string mode(name_of(c.search));
  std::printf(
      "%-6s %.1f bits, %-6s %5lld rings in %5.2f GiB: %7.1f M weights/s (%5.1f%% of the issue limit), error "
      "%.6f",
      c.codebook, c.bits, mode.c_str(), static_cast<long long>(c.rings),
      static_cast<double>(bytes) / 1073741824.0, rate * 1e-6, 100 * rate / issue_limit, error);
  nlohmann::json row = {
      {"codebook", c.codebook},  {"bits", c.bits},
      {"search", mode},          {"rings", c.rings},
      {"seconds", seconds},      {"weights_per_second", rate},
      {"error", error},          {"decoding_weights_per_second", static_cast<double>(weights) / decoding},
      {"workspace_bytes", bytes}};
  if (c.search != TrellisSearch::best) {
    const DeviceFacts device = current_device();
    rings.count = std::min<int64_t>(c.rings, int64_t{8} * device.processors);
    std::printf("\n");
    row["steps"] = nlohmann::json::array();
    std::vector<How> ways = {{}};
    if (host.weights_per_step == 2) {
      for (const int pairs : {1, 2, 4}) {
        if (512 * pairs >> shape.half_bits > 140) continue;
        ways.push_back({.planned = false, .pairs = pairs, .name = text_of(", pairs in a block ", pairs)});
      }
      if (c.bits > 1) ways.push_back({.planned = false, .on_chip = true, .name = ", on the chip"});
      ways.push_back({.planned = false, .on_chip = true, .alone = true, .name = ", on the chip, alone"});
    } else if (shape.half_bits % 2 == 0 && c.bits <= 4) {
      for (const bool bulk : {false, true}) {
        ways.push_back({.bulk = bulk, .planned = false, .name = bulk ? ", bulk copies" : ", two in a block"});
        ways.push_back({.bulk = bulk,
                        .planned = false,
                        .alone = true,
                        .name = bulk ? ", bulk copies, alone" : ", alone"});
      }
    }
    for (const How& how : ways) {
      const std::vector<double> steps =
          step_seconds(codebook, rings, c.search, how, workspace.get(), device, stream, repeats);
      cuda::download(errors.data(), sums.data(), rings.count, stream.get());
      double again = 0;
      for (int64_t i = 0; i < rings.count; ++i) again += sums[static_cast<size_t>(i)];
      again /= static_cast<double>(rings.count * cuda::kRingPositions) * scale * scale;
      std::printf("  %lld rings%s: searches %.0f and %.0f us, ways back %.0f and %.0f us; error %.6f\n",
                  static_cast<long long>(rings.count), how.name.c_str(), steps[0] * 1e6, steps[2] * 1e6,
                  steps[1] * 1e6, steps[3] * 1e6, again);
      row["steps"].push_back({{"rings", rings.count},
                              {"how", how.name},
                              {"first_search_seconds", steps[0]},
                              {"first_way_back_seconds", steps[1]},
                              {"second_search_seconds", steps[2]},
                              {"second_way_back_seconds", steps[3]},
                              {"error", again}});
    }
  } else {
    std::printf("\n");
  }
  std::fflush(stdout);
  return row;
}

nlohmann::json run(bool quick) {
  int device = 0;
  int kilohertz = 0;
  cudaDeviceProp properties{};
  check_cuda(cudaGetDevice(&device), "device");
  check_cuda(cudaGetDeviceProperties(&properties, device), "properties");
  check_cuda(cudaDeviceGetAttribute(&kilohertz, cudaDevAttrClockRate, device), "clock rate");
  // Lanes that issue in a clock, over instructions of a candidate pair, pairs of a step, and two passes.
  const double issue_limit = 128.0 * properties.multiProcessorCount * 1e3 * kilohertz / (2.5 * 65536 / 2 * 2);
  std::printf("trellis encoding on %s, CUDA %s; issue limit %.0f M weights/s\n", properties.name,
              cuda_toolkit_version().c_str(), issue_limit * 1e-6);
  nlohmann::json report = {{"device", properties.name},
                           {"cuda", cuda_toolkit_version()},
                           {"issue_limit_weights_per_second", issue_limit},
                           {"rows", nlohmann::json::array()}};
  const std::vector<float> source = normal_values(kMany * cuda::kRingPositions);
  std::vector<Case> cases;
  const auto every = {TrellisSearch::fast, TrellisSearch::normal, TrellisSearch::best};
  for (int bits = 1; bits <= 8; ++bits) {
    if (quick && (bits < 2 || bits > 4)) continue;
    const double whole = bits;
    for (const TrellisSearch search : every) {
      if (quick && search != TrellisSearch::normal) continue;
      for (const int64_t rings : {kMany, kFew}) cases.push_back({"mul1", whole, search, rings});
    }
    for (const int64_t rings : {kFew / 2, kFew / 4}) {
      cases.push_back({"mul1", whole, TrellisSearch::normal, rings});
    }
    for (const int64_t batch : {kMany / 4, kMany}) {
      cases.push_back({"mul1", whole, TrellisSearch::normal, kMany, batch});
    }
  }
  for (const double bits : {1.0, 2.0, 2.5, 3.0, 4.0}) {
    for (const TrellisSearch search : every) {
      if (quick && (search != TrellisSearch::normal || bits == 2.5)) continue;
      for (const int64_t rings : {kMany, kFew}) cases.push_back({"octagon", bits, search, rings});
      if (search != TrellisSearch::normal) continue;
      for (const int64_t rings : {kFew / 2, kFew / 4}) cases.push_back({"octagon", bits, search, rings});
    }
  }
  for (int bits = 1; bits <= 7; ++bits) {
    if (quick && bits > 4) continue;
    for (const int64_t rings : {kMany, kFew})
      cases.push_back({"mul1", bits + 0.5, TrellisSearch::normal, rings});
  }
  if (!quick) {
    for (const char* codebook : {"3inst", "mcg", "1mad", "rptc"}) {
      for (int bits = 1; bits <= 8; ++bits) {
        cases.push_back({codebook, static_cast<double>(bits), TrellisSearch::normal, kMany});
      }
    }
    for (const double bits : {2.0, 3.0, 4.0}) cases.push_back({"hyb", bits, TrellisSearch::normal, kMany});
  }
  for (const Case& c : cases) report["rows"].push_back(measure(c, source, issue_limit, quick ? 3 : 5));
  return report;
}

}  // namespace
}  // namespace quantloom

int main(int argc, char** argv) {
  return quantloom::bench::run_program("bench_trellis_encode", argc, argv, quantloom::run);
}
