// What the GPU benchmarks share: device memory with random contents, and times of CUDA graphs.
#pragma once

#include <cuda_bf16.h>
#include <cuda_fp16.h>
#include <cuda_runtime.h>

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <deque>
#include <memory>
#include <optional>
#include <utility>
#include <vector>

#include "common/check.cuh"
#include "quantloom/checked_math.hpp"
#include "quantloom/dtype.hpp"

namespace quantloom::bench {

inline std::shared_ptr<std::byte> device_memory(int64_t bytes) {
  void* memory = nullptr;
  check_cuda(cudaMalloc(&memory, static_cast<size_t>(std::max<int64_t>(bytes, 1))), "cudaMalloc");
  return {static_cast<std::byte*>(memory), [](std::byte* p) { static_cast<void>(cudaFree(p)); }};
}

// A stream and two events per replay, released together.
class Stream {
 public:
  Stream() { check_cuda(cudaStreamCreateWithFlags(&stream_, cudaStreamNonBlocking), "stream"); }
  ~Stream() { static_cast<void>(cudaStreamDestroy(stream_)); }
  Stream(const Stream&) = delete;
  Stream& operator=(const Stream&) = delete;
  cudaStream_t get() const { return stream_; }
  void synchronize() const { check_cuda(cudaStreamSynchronize(stream_), "synchronize"); }

 private:
  cudaStream_t stream_ = nullptr;
};

class Event {
 public:
  Event() { check_cuda(cudaEventCreate(&event_), "event"); }
  ~Event() { static_cast<void>(cudaEventDestroy(event_)); }
  Event(const Event&) = delete;
  Event& operator=(const Event&) = delete;
  void record(const Stream& stream) { check_cuda(cudaEventRecord(event_, stream.get()), "record"); }
  double seconds_since(const Event& begin) const {
    float milliseconds = 0;
    check_cuda(cudaEventElapsedTime(&milliseconds, begin.event_, event_), "elapsed");
    return milliseconds * 1e-3;
  }

 private:
  cudaEvent_t event_ = nullptr;
};

// A captured graph, ready to be launched.
class Graph {
 public:
  template <class Body>
  Graph(const Stream& stream, const Body& body) {
    check_cuda(cudaStreamBeginCapture(stream.get(), cudaStreamCaptureModeThreadLocal), "begin capture");
    cudaGraph_t graph = nullptr;
    try {
      body();
    } catch (...) {
      static_cast<void>(cudaStreamEndCapture(stream.get(), &graph));
      if (graph != nullptr) static_cast<void>(cudaGraphDestroy(graph));
      throw;
    }
    check_cuda(cudaStreamEndCapture(stream.get(), &graph), "end capture");
    const cudaError_t status = cudaGraphInstantiate(&executable_, graph, 0);
    static_cast<void>(cudaGraphDestroy(graph));
    check_cuda(status, "instantiate");
    check_cuda(cudaGraphUpload(executable_, stream.get()), "upload");
  }
  ~Graph() { static_cast<void>(cudaGraphExecDestroy(executable_)); }
  Graph(const Graph&) = delete;
  Graph& operator=(const Graph&) = delete;
  void launch(const Stream& stream) { check_cuda(cudaGraphLaunch(executable_, stream.get()), "launch"); }

 private:
  cudaGraphExec_t executable_ = nullptr;
};

struct Timing {
  double seconds = 0;  // of one launch: the median replay
  int launches = 0;    // in a graph
  double spread = 0;   // slowest replay over fastest
};

constexpr double kGraphSeconds = 3e-3;  // aimed at
constexpr double kLongestGraph = 30e-3;
constexpr double kLongestSeries = 60e-3;

// Launches of launch(i) on `stream` in a graph of many, with i counting launches; `copies`: launches after
// which everything that is read has left the caches. A graph holds as many launches as that takes, unless it
// would be longer than kLongestGraph.
class Series {
 public:
  template <class Launch>
  Series(const Stream& stream, int copies, const Launch& launch) : stream_(stream) {
    Event probe_begin;
    Event probe_end;
    const int probes = std::clamp(copies, 2, 8);
    launch(0);
    probe_begin.record(stream);
    for (int i = 0; i < probes; ++i) launch(i);
    probe_end.record(stream);
    stream.synchronize();
    const double estimate = probe_end.seconds_since(probe_begin) / probes;
    launches_ = static_cast<int>(std::clamp(std::ceil(kGraphSeconds / estimate), 2.0, 512.0));
    const int longest = static_cast<int>(std::max(2.0, kLongestGraph / estimate));
    launches_ = std::max(launches_, std::min(copies, longest));
    graph_seconds_ = estimate * launches_;
    graph_.emplace(stream, [&] {
      for (int i = 0; i < launches_; ++i) launch(i);
    });
  }

  int replays(int wanted) const {
    return std::min(wanted, std::max(5, static_cast<int>(kLongestSeries / graph_seconds_)));
  }
  void warm_up() { graph_->launch(stream_); }
  void replay() {
    events_.emplace_back();
    events_.back().record(stream_);
    graph_->launch(stream_);
    events_.emplace_back();
    events_.back().record(stream_);
  }
  Timing timing() const {
    stream_.synchronize();
    std::vector<double> seconds;
    for (size_t i = 1; i < events_.size(); i += 2) {
      seconds.push_back(events_[i].seconds_since(events_[i - 1]));
    }
    std::ranges::sort(seconds);
    return {.seconds = seconds[seconds.size() / 2] / launches_,
            .launches = launches_,
            .spread = seconds.back() / seconds.front()};
  }

 private:
  const Stream& stream_;
  int launches_ = 0;
  double graph_seconds_ = 0;
  std::optional<Graph> graph_;
  std::deque<Event> events_;
};

template <class Launch>
Timing time_launches(const Stream& stream, int copies, int replays, const Launch& launch) {
  Series series(stream, copies, launch);
  series.warm_up();
  for (int i = series.replays(replays); i > 0; --i) series.replay();
  return series.timing();
}

// Of two kinds of launches whose replays take turns, so that both meet the device in the same state.
inline std::pair<Timing, Timing> time_in_turns(Series& first, Series& second, int replays) {
  first.warm_up();
  second.warm_up();
  for (int i = std::min(first.replays(replays), second.replays(replays)); i > 0; --i) {
    first.replay();
    second.replay();
  }
  return {first.timing(), second.timing()};
}

// Weight copies whose bytes exceed six times the L2 cache; at least two.
inline int copies_past_cache(int64_t bytes) {
  int device = 0;
  int l2_bytes = 0;
  check_cuda(cudaGetDevice(&device), "device");
  check_cuda(cudaDeviceGetAttribute(&l2_bytes, cudaDevAttrL2CacheSize, device), "L2 size");
  return static_cast<int>(std::max<int64_t>(2, int64_t{6} * l2_bytes / std::max<int64_t>(bytes, 1) + 1));
}

// Thirty-two random bits of (seed, index).
__host__ __device__ inline uint32_t hash_bits(uint64_t seed, uint64_t index) {
  uint64_t z = (seed + 1) * 0x9E3779B97F4A7C15ULL + index * 0xD1342543DE82EF95ULL;
  z = (z ^ (z >> 30)) * 0xBF58476D1CE4E5B9ULL;
  z = (z ^ (z >> 27)) * 0x94D049BB133111EBULL;
  return static_cast<uint32_t>((z ^ (z >> 31)) >> 16);
}

__device__ inline void store(float value, __half* to) {
  *to = __float2half_rn(value);
}
__device__ inline void store(float value, __nv_bfloat16* to) {
  *to = __float2bfloat16_rn(value);
}
__device__ inline void store(float value, float* to) {
  *to = value;
}

__global__ void fill_words_kernel(uint32_t* to, int64_t count, uint64_t seed) {
  const int64_t stride = static_cast<int64_t>(gridDim.x) * blockDim.x;
  for (int64_t i = static_cast<int64_t>(blockIdx.x) * blockDim.x + threadIdx.x; i < count; i += stride) {
    to[i] = hash_bits(seed, static_cast<uint64_t>(i));
  }
}

// low + (high - low) * u, u even in [0, 1); with `steps` > 0 the i-th of that many ascending steps.
template <class T>
__global__ void fill_values_kernel(T* to, int64_t count, float low, float high, int64_t steps,
                                   uint64_t seed) {
  const int64_t stride = static_cast<int64_t>(gridDim.x) * blockDim.x;
  for (int64_t i = static_cast<int64_t>(blockIdx.x) * blockDim.x + threadIdx.x; i < count; i += stride) {
    float u = static_cast<float>(hash_bits(seed, static_cast<uint64_t>(i)) >> 8) * 0x1p-24F;
    if (steps > 0) u = (static_cast<float>(i % steps) + u) / static_cast<float>(steps);
    store(low + (high - low) * u, to + i);
  }
}

constexpr unsigned kFillBlocks = 2048;
constexpr unsigned kFillThreads = 256;

inline void fill_words(void* to, int64_t bytes, uint64_t seed, cudaStream_t stream) {
  fill_words_kernel<<<kFillBlocks, kFillThreads, 0, stream>>>(static_cast<uint32_t*>(to), bytes / 4, seed);
  check_cuda(cudaGetLastError(), "fill_words");
}

inline void fill_values(void* to, DType dtype, int64_t count, float low, float high, int64_t steps,
                        uint64_t seed, cudaStream_t stream) {
  switch (dtype) {
    case DType::f16:
      fill_values_kernel<<<kFillBlocks, kFillThreads, 0, stream>>>(static_cast<__half*>(to), count, low, high,
                                                                   steps, seed);
      break;
    case DType::bf16:
      fill_values_kernel<<<kFillBlocks, kFillThreads, 0, stream>>>(static_cast<__nv_bfloat16*>(to), count,
                                                                   low, high, steps, seed);
      break;
    case DType::f32:
      fill_values_kernel<<<kFillBlocks, kFillThreads, 0, stream>>>(static_cast<float*>(to), count, low, high,
                                                                   steps, seed);
      break;
    default:
      throw TypeMismatch("dtype", name_of(dtype), "float16, bfloat16 or float32");
  }
  check_cuda(cudaGetLastError(), "fill_values");
}

}  // namespace quantloom::bench
