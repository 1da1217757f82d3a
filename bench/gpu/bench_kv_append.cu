// Tokens into a cache of keys and values on the device: a token of each sequence behind contexts of several
// lengths, beside a copy of all codes of the cache, which is what appending by concatenation costs; and whole
// prompts, beside a copy of their keys and values. Times of tokens are means over a window of the format, in
// which all of its keys become codes once.
#include <chrono>
#include <cstdio>
#include <functional>
#include <nlohmann/json.hpp>
#include <string>
#include <vector>

#include "gpu/device.cuh"
#include "gpu/program.hpp"
#include "quantloom/kernels/dequantize.hpp"
#include "quantloom/kv_cache/cuda_kv_cache.hpp"

namespace quantloom {
namespace {

constexpr int kReplays = 9;
constexpr int64_t kHeads = 8;
constexpr int64_t kHeadDim = 128;
constexpr int64_t kChunk = 1024;  // tokens of a prompt at once
constexpr int kWindow = 128;

// Random keys or values of `tokens` tokens.
struct Source {
  Source(int64_t sequences, int64_t tokens, uint64_t seed, const bench::Stream& stream)
      : memory(bench::device_memory(sequences * kHeads * tokens * kHeadDim * 2)) {
    bench::fill_values(memory.get(), DType::f16, sequences * kHeads * tokens * kHeadDim, -1, 1, 0, seed,
                       stream.get());
    view = {memory.get(),
            DType::f16,
            sequences,
            kHeads,
            tokens,
            kHeadDim,
            {kHeads * tokens * kHeadDim, tokens * kHeadDim, kHeadDim}};
  }
  KVTokens first(int64_t tokens) const {
    KVTokens some = view;
    some.tokens = tokens;
    return some;
  }
  std::shared_ptr<std::byte> memory;
  KVTokens view;
};

// Even steps, where a calibration is needed.
std::shared_ptr<const KVTables> even_tables(const KVFormat& format) {
  if (format.kind != KVKind::kvquant) return nullptr;
  const auto table = [](int bits) {
    KVTable result;
    const int last = (1 << bits) - 1;
    for (int i = 0; i <= last; ++i) {
      result.values.push_back(
          float_from_f16(f16_from_float(2.0F * static_cast<float>(i) / static_cast<float>(last) - 1)));
      if (i > 0)
        result.bounds.push_back((result.values[static_cast<size_t>(i) - 1] + result.values.back()) / 2);
    }
    return result;
  };
  auto tables = std::make_shared<KVTables>();
  tables->keys = table(format.key_bits);
  tables->values = table(format.value_bits);
  tables->key_scale.assign(kHeads * kHeadDim, 1.0F);
  tables->key_middle.assign(kHeads * kHeadDim, 0.0F);
  return tables;
}

double median_seconds(const bench::Stream& stream, const std::function<void()>& work) {
  std::vector<double> seconds;
  for (int i = 0; i < kReplays; ++i) {
    bench::Event begin;
    bench::Event end;
    begin.record(stream);
    work();
    end.record(stream);
    stream.synchronize();
    seconds.push_back(end.seconds_since(begin));
  }
  std::ranges::sort(seconds);
  return seconds[seconds.size() / 2];
}

double copy_seconds(const bench::Stream& stream, int64_t bytes) {
  const auto from = bench::device_memory(bytes);
  const auto to = bench::device_memory(bytes);
  bench::fill_words(from.get(), bytes, 1, stream.get());
  return median_seconds(stream, [&] {
    check_cuda(cudaMemcpyAsync(to.get(), from.get(), static_cast<size_t>(bytes), cudaMemcpyDeviceToDevice,
                               stream.get()),
               "copy");
  });
}

nlohmann::json measure_tokens(const bench::Stream& stream, const char* spec, int64_t sequences,
                              int64_t context) {
  const KVFormat format = kv_format_from_spec(spec);
  const int64_t most = context + (kReplays + 4) * kWindow;
  CudaKVCache cache(format, {sequences, kHeads, kHeadDim, DType::f16}, most, even_tables(format),
                    stream.get());
  const Source keys(sequences, kChunk, 1, stream);
  const Source values(sequences, kChunk, 2, stream);
  const CudaKVAppend options{stream.get(), false};
  for (int64_t t = 0; t < context; t += kChunk) {
    const int64_t count = std::min(kChunk, context - t);
    cache.append(keys.first(count), values.first(count), {}, options);
  }
  const KVUsage usage = cache.usage();
  // As it is called: the host's part too, if it is the longer one.
  stream.synchronize();
  const auto begin = std::chrono::steady_clock::now();
  for (int i = 0; i < kWindow; ++i) cache.append(keys.first(1), values.first(1), {}, options);
  stream.synchronize();
  const double call =
      std::chrono::duration<double>(std::chrono::steady_clock::now() - begin).count() / kWindow;
  cache.reserve(most, stream.get());
  bench::Graph graph(stream, [&] {
    for (int i = 0; i < kWindow; ++i) cache.append(keys.first(1), values.first(1), {}, options);
  });
  graph.launch(stream);
  const double token = median_seconds(stream, [&] { graph.launch(stream); }) / kWindow;
  const int64_t length = cache.length(0);
  if (length != context + (kReplays + 2) * kWindow) throw Error(text_of("a cache of ", length, " tokens"));
  const double copy = copy_seconds(stream, usage.code_bytes);
  std::printf(
      "%-8s %3lld sequences, %7lld tokens: %6.2f us a token, %6.2f us by calls, copy of %8.2f MB %9.2f us\n",
      spec, static_cast<long long>(sequences), static_cast<long long>(context), token * 1e6, call * 1e6,
      1e-6 * static_cast<double>(usage.code_bytes), copy * 1e6);
  std::fflush(stdout);
  return {{"format", spec},
          {"sequences", sequences},
          {"context", context},
          {"seconds", token},
          {"call_seconds", call},
          {"copy_seconds", copy},
          {"code_bytes", usage.code_bytes}};
}

nlohmann::json measure_prompt(const bench::Stream& stream, const char* spec, int64_t tokens) {
  const KVFormat format = kv_format_from_spec(spec);
  const int64_t most = (kReplays + 1) * tokens;
  CudaKVCache cache(format, {1, kHeads, kHeadDim, DType::f16}, most, even_tables(format), stream.get());
  cache.reserve(most, stream.get());
  const Source keys(1, tokens, 3, stream);
  const Source values(1, tokens, 4, stream);
  const auto append = [&] { cache.append(keys.view, values.view, {}, {stream.get(), false}); };
  append();
  const double seconds = median_seconds(stream, append);
  const int64_t bytes = 2 * tokens * kHeads * kHeadDim * 2;
  const double copy = copy_seconds(stream, bytes);
  std::printf("%-8s prompt of %6lld tokens: %8.2f us, copy of its keys and values %8.2f us\n", spec,
              static_cast<long long>(tokens), seconds * 1e6, copy * 1e6);
  std::fflush(stdout);
  return {{"format", spec}, {"prompt", tokens}, {"seconds", seconds}, {"copy_seconds", copy}};
}

nlohmann::json run(bool quick) {
  int device = 0;
  cudaDeviceProp properties{};
  check_cuda(cudaGetDevice(&device), "device");
  check_cuda(cudaGetDeviceProperties(&properties, device), "properties");
  std::printf("kv_append on %s, CUDA %s: %lld KV heads of %lld channels, float16\n", properties.name,
              cuda_toolkit_version().c_str(), static_cast<long long>(kHeads),
              static_cast<long long>(kHeadDim));
  nlohmann::json report = {
      {"device", properties.name}, {"cuda", cuda_toolkit_version()}, {"rows", nlohmann::json::array()}};
  const bench::Stream stream;
  auto& rows = report["rows"];
  for (const char* spec :
       {"kivi:2", "kivi:4", "token:4:g32:r128", "sdr:4:r128", "kivi:4:hadamard", "kvquant:3:1%:first1"}) {
    const bool main = std::string(spec) == "kivi:2" || std::string(spec) == "kivi:4";
    if (quick && !main) continue;
    for (const int64_t sequences : {1, 16}) {
      for (const int64_t context : {1024, 32768, 131072}) {
        if (main || context == 32768) rows.push_back(measure_tokens(stream, spec, sequences, context));
      }
    }
  }
  for (const char* spec :
       {"kivi:2", "kivi:4", "token:4:g32:r128", "sdr:4:r128", "kivi:4:hadamard", "kvquant:3:1%:first1"}) {
    for (const int64_t tokens : {512, 4096, 32768}) {
      if (!quick || tokens == 4096) rows.push_back(measure_prompt(stream, spec, tokens));
    }
  }
  return report;
}

}  // namespace
}  // namespace quantloom

int main(int argc, char** argv) {
  return quantloom::bench::run_program("bench_kv_append", argc, argv, quantloom::run);
}
