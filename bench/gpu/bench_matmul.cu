// Products straight from packed codes on the device, against a copy, the streaming floor and cuBLAS.
//
//   bench_matmul [--formats LIST] [--shapes NxK,...] [--tokens LIST] [--kernels LIST] [--splits LIST]
//                [--digits on|off] [--dtype float16|bfloat16] [--overlap] [--in-turns] [--crossover]
//                [--quick] [--json FILE] [--markdown]
//
// Times are of launches in a CUDA graph of about 3 ms that rotates over copies of the weights larger than
// six L2 caches (as far as 30 ms of launches go), the median replay over its launches. In the same run: a
// device copy (bytes read and written), the floor (a kernel that reads n * k * bits / 8 bytes once, the best
// of several ways to launch it), and cuBLAS in the dtype of the activations with float32 sums. GB/s counts
// the planes in fragment order that a product reads. Everything is random; outputs are filled with NaN before
// a launch that is checked against a float64 product of the decoded weights, for some of the tokens.
//
// --kernels: names of the kernel table, "all", or "auto" (what the table picks; the default). --splits: parts
// of each tile along k or, in the streaming kernels, blocks of threads that share a block of rows; 0 for the
// choice by shape. --digits: whether the streaming kernels multiply one token on integers, where they can;
// without it, where that is faster. --overlap: also with programmatic dependent launch, beside a floor whose
// launches overlap likewise. --in-turns: every product's replays and cuBLAS's take turns, so that both meet
// the same clocks (long products bring a device to its limit of power). --crossover: all kernels over many
// numbers of tokens, and at the end the fastest for each.
#include <cstdio>
#include <cstring>
#include <ctime>
#include <iostream>
#include <optional>
#include <set>
#include <sstream>

#include "cublas_product.cuh"
#include "matmul_report.hpp"
#include "product_case.cuh"
#include "quantloom/kernels/kernel_table.hpp"
#include "streaming_floor.cuh"

namespace quantloom::bench {
namespace {

struct Settings {
  std::vector<std::string> formats = {"uniform:4:g128", "uniform:3:g128",    "uniform:2:g128",
                                      "uniform:8:g128", "uniform:4:channel", "uniform:4:g128:asym",
                                      "uniform:4:g64",  "uniform:4:g32",     "codebook:nf4:g64"};
  std::vector<Shape> shapes = {{4096, 4096}, {14336, 4096}, {4096, 14336}, {28672, 8192}, {12288, 49152}};
  std::vector<int64_t> tokens = {1, 2, 4, 8, 16, 32, 64, 128, 256, 1024, 4096};
  std::vector<std::string> kernels = {"auto"};
  std::vector<int64_t> splits = {0};
  std::optional<bool> digits = std::nullopt;
  DType dtype = DType::f16;
  bool overlap = false;
  bool in_turns = false;
  bool crossover = false;
  bool markdown = false;
  int replays = 15;
  int64_t copy_bytes = int64_t{8} << 30;
  std::string json_path;
};

std::vector<std::string> split(const std::string& text, char separator) {
  std::vector<std::string> items;
  std::stringstream in(text);
  for (std::string item; std::getline(in, item, separator);) items.push_back(item);
  return items;
}

int64_t number(const std::string& option, const std::string& text) {
  size_t used = 0;
  int64_t value = -1;
  try {
    value = std::stoll(text, &used);
  } catch (const std::exception&) {
    used = 0;
  }
  if (used == 0 || used != text.size() || value < 0) {
    throw InvalidArgument(option, text, "numbers of 0 or more");
  }
  return value;
}

Settings parse(int argc, char** argv) {
  Settings settings;
  bool own_formats = false;
  bool own_shapes = false;
  bool own_tokens = false;
  bool own_kernels = false;
  bool quick = false;
  for (int i = 1; i < argc; ++i) {
    const std::string option = argv[i];
    const auto value = [&] {
      if (i + 1 >= argc) throw InvalidArgument(option, "nothing", "a value");
      return std::string(argv[++i]);
    };
    if (option == "--formats") {
      settings.formats = split(value(), ',');
      own_formats = true;
    } else if (option == "--shapes") {
      settings.shapes.clear();
      for (const std::string& item : split(value(), ',')) {
        const std::vector<std::string> sizes = split(item, 'x');
        if (sizes.size() != 2) throw InvalidArgument(option, item, "NxK, such as 4096x4096");
        settings.shapes.push_back({number(option, sizes[0]), number(option, sizes[1])});
        const Shape& shape = settings.shapes.back();
        if (shape.n == 0 || shape.k == 0 || shape.n * shape.k % 128 != 0) {
          throw InvalidArgument(option, item, "sizes whose product is a multiple of 128");
        }
      }
      own_shapes = true;
    } else if (option == "--tokens" || option == "--splits") {
      auto& list = option == "--tokens" ? settings.tokens : settings.splits;
      list.clear();
      for (const std::string& item : split(value(), ',')) list.push_back(number(option, item));
      own_tokens = own_tokens || option == "--tokens";
    } else if (option == "--kernels") {
      settings.kernels = split(value(), ',');
      own_kernels = true;
    } else if (option == "--digits") {
      const std::string text = value();
      if (text != "on" && text != "off") throw InvalidArgument(option, text, "on or off");
      settings.digits = text == "on";
    } else if (option == "--dtype") {
      settings.dtype = dtype_from_name(value());
    } else if (option == "--json") {
      settings.json_path = value();
    } else if (option == "--overlap") {
      settings.overlap = true;
    } else if (option == "--in-turns") {
      settings.in_turns = true;
    } else if (option == "--crossover") {
      settings.crossover = true;
    } else if (option == "--markdown") {
      settings.markdown = true;
    } else if (option == "--quick") {
      quick = true;
    } else {
      throw InvalidArgument(option, "an unknown option",
                            "--formats --shapes --tokens --kernels --splits --digits --dtype --overlap "
                            "--in-turns --crossover --quick --json --markdown");
    }
  }
  if (settings.dtype != DType::f16 && settings.dtype != DType::bf16) {
    throw InvalidArgument("--dtype", name_of(settings.dtype), "float16 or bfloat16");
  }
  if (settings.crossover) {
    if (!own_formats) settings.formats = {"uniform:4:g128", "uniform:2:g128"};
    if (!own_shapes) settings.shapes = {{4096, 4096}, {14336, 4096}, {4096, 14336}, {28672, 8192}};
    if (!own_tokens) {
      settings.tokens = {1, 4, 8, 12, 16, 24, 32, 48, 64, 96, 128, 192, 256, 384, 512, 768, 1024, 2048, 4096};
    }
    if (!own_kernels) settings.kernels = {"all"};
  }
  if (quick) {
    if (!own_formats) settings.formats = {"uniform:4:g128", "uniform:2:g128"};
    if (!own_shapes) settings.shapes = {{4096, 4096}, {12288, 49152}};
    if (!own_tokens && !settings.crossover) settings.tokens = {1, 16, 64};
    settings.replays = 7;
    settings.copy_bytes = int64_t{2} << 30;
  }
  if (settings.tokens.empty() || *std::ranges::min_element(settings.tokens) == 0) {
    throw InvalidArgument("--tokens", "none or 0", "numbers of 1 or more");
  }
  std::ranges::sort(settings.tokens);
  return settings;
}

std::vector<std::string> kernel_names(const std::vector<std::string>& wanted) {
  std::vector<std::string> names;
  const auto add = [&](const std::string& name) {
    if (std::ranges::find(names, name) == names.end()) names.push_back(name);
  };
  for (const std::string& item : wanted) {
    if (item == "auto") {
      add("");
    } else if (item == "all") {
      for (const KernelEntry& entry : kernel_table()) {
        if (entry.operation == "matmul" && entry.device == "cuda" && entry.activations != "integers") {
          add(entry.kernel);
        }
      }
    } else {
      add(item);
    }
  }
  return names;
}

class Benchmark {
 public:
  Benchmark(const Settings& settings, Report& report)
      : settings_(settings),
        report_(report),
        kernels_(kernel_names(settings.kernels)),
        checked_(checked_tokens(settings.tokens)),
        most_tokens_(settings.tokens.back()) {
    int64_t widest = 0;
    int64_t tallest = 0;
    for (const Shape& shape : settings.shapes) {
      widest = std::max(widest, shape.k);
      tallest = std::max(tallest, shape.n);
    }
    x_ = device_memory(checked_mul(most_tokens_ * widest, 2));
    y_ = device_memory(checked_mul(most_tokens_ * tallest, 2));
    fill_values(x_.get(), settings.dtype, most_tokens_ * widest, -1, 1, 0, 3, stream_.get());
    report_.copy_rate = copy_rate(stream_, settings.copy_bytes);
    std::printf("copy of %.0f GiB: %.0f GB/s read and written\n",
                static_cast<double>(settings.copy_bytes) / (1 << 30), report_.copy_rate * 1e-9);
  }

  void run() {
    for (const Shape& shape : settings_.shapes) {
      floors_.clear();
      cublas_seconds_.clear();
      measure_cublas(shape);
      for (const std::string& spec : settings_.formats) {
        try {
          measure_format(shape, spec);
        } catch (const quantloom::Error& error) {
          require_working_device(spec, error);
          report_.add({.what = spec, .shape = shape, .failure = error.what()});
        }
        report_.write(settings_.json_path);  // a run that is cut off leaves what it had
      }
    }
  }

 private:
  struct FloorTimes {
    double plain = 0;
    double overlapped = 0;
  };

  // A kernel that failed on the device leaves no context to go on with.
  static void require_working_device(const std::string& what, const quantloom::Error& error) {
    check_cuda(cudaDeviceSynchronize(), text_of(what, ": ", error.what()));
  }

  void poison(const Shape& shape, int64_t m) {
    check_cuda(cudaMemsetAsync(y_.get(), 0xFF, static_cast<size_t>(m * shape.n * 2), stream_.get()),
               "poison");
  }

  void measure_cublas(const Shape& shape) {
    const int64_t bytes = shape.n * shape.k * 2;
    const int copies = copies_past_cache(bytes);
    cublas_weights_ = nullptr;
    const auto weights = device_memory(bytes * copies);
    fill_values(weights.get(), settings_.dtype, shape.n * shape.k * copies, -0.125F, 0.125F, 0, 4,
                stream_.get());
    const Expected expected = [&] {
      if (settings_.dtype == DType::f16) {
        return reference_product(stream_, reinterpret_cast<const __half*>(weights.get()), x_.get(),
                                 settings_.dtype, checked_, shape.n, shape.k);
      }
      return reference_product(stream_, reinterpret_cast<const __nv_bfloat16*>(weights.get()), x_.get(),
                               settings_.dtype, checked_, shape.n, shape.k);
    }();
    for (const int64_t m : settings_.tokens) {
      Row row{
          .what = "cuBLAS " + std::string(name_of(settings_.dtype)), .shape = shape, .m = m, .bytes = bytes};
      poison(shape, m);
      cublas_(weights.get(), x_.get(), y_.get(), settings_.dtype, shape, m);
      finish(row, expected, copies, [&](int i) {
        cublas_(weights.get() + bytes * (i % copies), x_.get(), y_.get(), settings_.dtype, shape, m);
      });
      if (row.failure.empty()) cublas_seconds_[m] = row.seconds;
      report_.add(std::move(row));
    }
    if (settings_.in_turns) {
      cublas_weights_ = weights;
      cublas_copies_ = copies;
    }
  }

  // Of the codes alone, `bits` for each weight; measured once for a shape.
  const FloorTimes& floor_of(const Shape& shape, int64_t bits) {
    const auto found = floors_.find(bits);
    if (found != floors_.end()) return found->second;
    FloorTimes times;
    for (const bool overlap : {false, true}) {
      if (overlap && !settings_.overlap) continue;
      const int64_t bytes = shape.n * shape.k * bits / 8;
      const Floor floor = streaming_floor(stream_, bytes, overlap, std::min(settings_.replays, 9));
      (overlap ? times.overlapped : times.plain) = floor.seconds;
      report_.add({.what = "floor " + std::to_string(bits) + " bit",
                   .picked = floor.launch,
                   .shape = shape,
                   .overlap = overlap,
                   .seconds = floor.seconds,
                   .bytes = bytes});
    }
    return floors_.emplace(bits, times).first->second;
  }

  void measure_format(const Shape& shape, const std::string& spec) {
    const ProductCase product(stream_, format_from_spec(spec), shape.n, shape.k);
    const int64_t bits = product.bits();
    const FloorTimes floor = floor_of(shape, bits);
    const Expected expected = product.expected(stream_, x_.get(), settings_.dtype, checked_);
    for (const int64_t m : settings_.tokens) {
      bool any = false;
      std::string reason;
      for (const std::string& kernel : kernels_) {
        for (const int64_t splits : settings_.splits) {
          for (const bool overlap : {false, true}) {
            if (overlap && !settings_.overlap) continue;
            const CudaMatmulOptions options{.overlap = overlap,
                                            .kernel = kernel,
                                            .splits = static_cast<int>(splits),
                                            .digits = settings_.digits};
            const auto why_not = why_not_matmul_cuda(*product.format(), m, settings_.dtype, options);
            if (why_not.has_value()) {
              reason = *why_not;
              continue;
            }
            any = true;
            measure_kernel(product, expected, m, options, overlap ? floor.overlapped : floor.plain);
          }
        }
      }
      if (!any) {
        report_.add({.what = spec, .shape = shape, .m = m, .failure = "no kernel: " + reason});
      }
    }
  }

  void measure_kernel(const ProductCase& product, const Expected& expected, int64_t m,
                      const CudaMatmulOptions& options, double floor_seconds) {
    const Shape shape{product.n(), product.k()};
    Row row{.what = product.format()->spec(),
            .kernel = options.kernel,
            .shape = shape,
            .m = m,
            .splits = options.splits,
            .overlap = options.overlap,
            .bytes = product.bytes(),
            .floor_seconds = floor_seconds};
    const auto cublas = cublas_seconds_.find(m);
    if (cublas != cublas_seconds_.end()) row.cublas_seconds = cublas->second;
    try {
      if (options.kernel.empty()) {
        row.picked = matmul_cuda_kernel(product.copy(0), m, settings_.dtype, options);
      }
      const int64_t workspace_bytes = matmul_cuda_workspace(product.copy(0), m, settings_.dtype, options);
      if (workspace_bytes > workspace_bytes_) {
        workspace_ = nullptr;
        workspace_ = device_memory(workspace_bytes);
        workspace_bytes_ = workspace_bytes;
      }
      const CudaMatmulArguments arguments{.x = x_.get(),
                                          .x_stride = shape.k,
                                          .y = y_.get(),
                                          .y_stride = shape.n,
                                          .m = m,
                                          .dtype = settings_.dtype,
                                          .workspace = workspace_.get(),
                                          .workspace_bytes = workspace_bytes_,
                                          .stream = stream_.get()};
      if (workspace_bytes > 0) {
        check_cuda(
            cudaMemsetAsync(workspace_.get(), 0xFF, static_cast<size_t>(workspace_bytes), stream_.get()),
            "poison");
      }
      poison(shape, m);
      matmul_cuda(product.copy(0), arguments, options);
      finish(row, expected, product.copies(),
             [&](int i) { matmul_cuda(product.copy(i), arguments, options); });
    } catch (const quantloom::Error& error) {
      require_working_device(row.name(), error);
      row.failure = error.what();
    }
    report_.add(std::move(row));
  }

  // Checks y, which a first launch has written, then times launch(i).
  template <class Launch>
  void finish(Row& row, const Expected& expected, int copies, const Launch& launch) {
    stream_.synchronize();
    const auto error = error_of(stream_, y_.get(), settings_.dtype, row.m, expected);
    row.error = error.relative;
    if (!error.within(settings_.dtype)) {
      row.failure = text_of("wrong result, relative error ", error.relative, ", worst ", error.worst);
      return;
    }
    const Timing timing = time(row, copies, launch);
    row.seconds = timing.seconds;
    row.launches = timing.launches;
    row.spread = timing.spread;
  }

  template <class Launch>
  Timing time(Row& row, int copies, const Launch& launch) const {
    if (cublas_weights_ == nullptr) return time_launches(stream_, copies, settings_.replays, launch);
    const Shape shape = row.shape;
    Series own(stream_, copies, launch);
    Series cublas(stream_, cublas_copies_, [&](int i) {
      cublas_(cublas_weights_.get() + shape.n * shape.k * 2 * (i % cublas_copies_), x_.get(), y_.get(),
              settings_.dtype, shape, row.m);
    });
    const auto [timing, beside] = time_in_turns(own, cublas, settings_.replays);
    row.cublas_seconds = beside.seconds;
    return timing;
  }

  const Settings& settings_;
  Report& report_;
  std::vector<std::string> kernels_;
  std::vector<int> checked_;
  int64_t most_tokens_;
  Stream stream_;
  CublasProduct cublas_{stream_};
  std::shared_ptr<std::byte> cublas_weights_;  // of the current shape, if products and cuBLAS take turns
  int cublas_copies_ = 0;
  std::shared_ptr<std::byte> x_;
  std::shared_ptr<std::byte> y_;
  std::shared_ptr<std::byte> workspace_;
  int64_t workspace_bytes_ = 0;
  std::map<int64_t, FloorTimes> floors_;      // of the current shape, by bits
  std::map<int64_t, double> cublas_seconds_;  // of the current shape, by m
};

void describe(Report& report) {
  int device = 0;
  int driver = 0;
  cudaDeviceProp properties{};
  check_cuda(cudaGetDevice(&device), "device");
  check_cuda(cudaGetDeviceProperties(&properties, device), "properties");
  check_cuda(cudaDriverGetVersion(&driver), "driver");
  char date[32] = "";
  const std::time_t now = std::time(nullptr);
  std::tm utc{};
  std::strftime(date, sizeof date, "%Y-%m-%d %H:%M UTC", gmtime_r(&now, &utc));
  const std::string supported = std::to_string(driver / 1000) + "." + std::to_string(driver % 1000 / 10);
  report.facts = {
      {"program", "bench_matmul"},
      {"device", properties.name},
      {"compute_capability", std::to_string(properties.major) + "." + std::to_string(properties.minor)},
      {"processors", properties.multiProcessorCount},
      {"l2_bytes", properties.l2CacheSize},
      {"cuda", cuda_toolkit_version()},
      {"driver_supports_cuda", supported},
      {"date", date}};
  std::printf("%s, %d multiprocessors, L2 %.0f MB, CUDA %s (driver for %s), %s\n", properties.name,
              properties.multiProcessorCount, properties.l2CacheSize * 1e-6, cuda_toolkit_version().c_str(),
              supported.c_str(), date);
}

int run(const Settings& settings) {
  Report report;
  describe(report);
  std::exception_ptr failure;
  try {
    Benchmark(settings, report).run();
  } catch (...) {
    failure = std::current_exception();  // what was measured until then is still worth writing
  }
  if (settings.crossover) std::fputs(report.crossover().c_str(), stdout);
  if (settings.markdown) std::printf("\n%s", report.markdown().c_str());
  std::fflush(stdout);
  report.write(settings.json_path);
  if (failure) std::rethrow_exception(failure);
  if (report.failures() > 0) {
    std::cerr << "bench_matmul: " << report.failures() << " rows failed\n";
    return 1;
  }
  return 0;
}

}  // namespace
}  // namespace quantloom::bench

int main(int argc, char** argv) {
  try {
    return quantloom::bench::run(quantloom::bench::parse(argc, argv));
  } catch (const quantloom::InvalidArgument& error) {
    std::cerr << "bench_matmul: " << error.what() << '\n';
    return 2;
  } catch (const std::exception& error) {
    std::cerr << "bench_matmul: " << error.what() << '\n';
    return 1;
  }
}
