// The streaming floor: how long a kernel takes that reads some bytes once, in pieces of 16, and does nothing
// with them but what keeps the compiler from dropping the loads. The best of several ways to launch it.
#pragma once

#include <string>

#include "device.cuh"

namespace quantloom::bench {

enum class Hint { evict_first, no_allocate };

template <Hint kHint>
__device__ __forceinline__ uint4 load_piece(const uint4* from) {
  uint4 v;
  if constexpr (kHint == Hint::evict_first) {
    asm volatile("ld.global.cs.v4.u32 {%0, %1, %2, %3}, [%4];"
                 : "=r"(v.x), "=r"(v.y), "=r"(v.z), "=r"(v.w)
                 : "l"(from));
  } else {
    asm volatile("ld.global.nc.L1::no_allocate.v4.u32 {%0, %1, %2, %3}, [%4];"
                 : "=r"(v.x), "=r"(v.y), "=r"(v.z), "=r"(v.w)
                 : "l"(from));
  }
  return v;
}

// Each thread has kLoads pieces in flight. The grid covers the pieces once or, if smaller, in turns.
template <int kLoads, Hint kHint>
__global__ void stream_pieces(const uint4* pieces, int64_t count, uint32_t* sink) {
#if __CUDA_ARCH__ >= 900
  asm volatile("griddepcontrol.launch_dependents;");
#endif
  uint32_t sum = 0;
  const int64_t turn = static_cast<int64_t>(gridDim.x) * blockDim.x * kLoads;
  int64_t base = static_cast<int64_t>(blockIdx.x) * blockDim.x * kLoads + threadIdx.x;
  for (; base < count; base += turn) {
    uint4 v[kLoads];
#pragma unroll
    for (int i = 0; i < kLoads; ++i) {
      const int64_t at = base + static_cast<int64_t>(i) * blockDim.x;
      v[i] = at < count ? load_piece<kHint>(pieces + at) : make_uint4(0, 0, 0, 0);
    }
#pragma unroll
    for (int i = 0; i < kLoads; ++i) sum += (v[i].x ^ v[i].y) + (v[i].z ^ v[i].w);
  }
#if __CUDA_ARCH__ >= 900
  asm volatile("griddepcontrol.wait;" ::: "memory");
#endif
  if (sum == 0x5EEDF00DU) *sink = sum;  // hardly ever, but the compiler cannot know
}

struct FloorLaunch {
  void (*kernel)(const uint4*, int64_t, uint32_t*);
  int threads;
  int loads;
  bool persistent;  // as many blocks as fit at once, taking turns
  const char* hint;

  std::string text() const {
    return std::to_string(threads) + " threads, " + std::to_string(loads) + " loads, " + hint +
           (persistent ? ", persistent" : ", one pass");
  }
};

inline const std::vector<FloorLaunch>& floor_launches() {
  static constexpr auto kEvict = Hint::evict_first;
  static constexpr auto kPast = Hint::no_allocate;
  static const std::vector<FloorLaunch> launches = {{stream_pieces<2, kPast>, 256, 2, false, "no_allocate"},
                                                    {stream_pieces<4, kPast>, 128, 4, false, "no_allocate"},
                                                    {stream_pieces<4, kPast>, 256, 4, false, "no_allocate"},
                                                    {stream_pieces<4, kPast>, 512, 4, false, "no_allocate"},
                                                    {stream_pieces<8, kPast>, 128, 8, false, "no_allocate"},
                                                    {stream_pieces<8, kPast>, 256, 8, false, "no_allocate"},
                                                    {stream_pieces<8, kPast>, 512, 8, false, "no_allocate"},
                                                    {stream_pieces<4, kEvict>, 256, 4, false, "evict_first"},
                                                    {stream_pieces<8, kEvict>, 256, 8, false, "evict_first"},
                                                    {stream_pieces<4, kPast>, 512, 4, true, "no_allocate"},
                                                    {stream_pieces<8, kPast>, 256, 8, true, "no_allocate"},
                                                    {stream_pieces<8, kPast>, 1024, 8, true, "no_allocate"},
                                                    {stream_pieces<16, kPast>, 256, 16, true, "no_allocate"}};
  return launches;
}

struct Floor {
  double seconds = 0;
  std::string launch;
};

// `bytes`: a multiple of 16. `overlap`: consecutive launches overlap by programmatic dependent launch.
inline Floor streaming_floor(const Stream& stream, int64_t bytes, bool overlap, int replays) {
  const int copies = copies_past_cache(bytes);
  const auto memory = device_memory(bytes * copies);
  const auto sink = device_memory(16);
  fill_words(memory.get(), bytes * copies, 77, stream.get());
  int device = 0;
  int processors = 0;
  check_cuda(cudaGetDevice(&device), "device");
  check_cuda(cudaDeviceGetAttribute(&processors, cudaDevAttrMultiProcessorCount, device), "processors");
  const int64_t pieces = bytes / 16;

  Floor best;
  for (const FloorLaunch& way : floor_launches()) {
    int resident = 0;
    check_cuda(cudaOccupancyMaxActiveBlocksPerMultiprocessor(&resident, way.kernel, way.threads, 0),
               "occupancy");
    const int64_t blocks = ceil_div(pieces, int64_t{way.threads} * way.loads);
    const int64_t grid = way.persistent ? std::min<int64_t>(blocks, int64_t{resident} * processors) : blocks;
    const Timing timing = time_launches(stream, copies, replays, [&](int i) {
      cudaLaunchAttribute attribute{};
      attribute.id = cudaLaunchAttributeProgrammaticStreamSerialization;
      attribute.val.programmaticStreamSerializationAllowed = 1;
      cudaLaunchConfig_t config{};
      config.gridDim = dim3(static_cast<unsigned>(grid));
      config.blockDim = dim3(static_cast<unsigned>(way.threads));
      config.stream = stream.get();
      config.attrs = &attribute;
      config.numAttrs = overlap ? 1 : 0;
      const auto* from = reinterpret_cast<const uint4*>(memory.get() + bytes * (i % copies));
      check_cuda(
          cudaLaunchKernelEx(&config, way.kernel, from, pieces, reinterpret_cast<uint32_t*>(sink.get())),
          "stream_pieces");
    });
    if (best.launch.empty() || timing.seconds < best.seconds) best = {timing.seconds, way.text()};
  }
  return best;
}

// Bytes read and written per second by a device-to-device copy of `bytes`: the median of five.
inline double copy_rate(const Stream& stream, int64_t bytes) {
  const auto from = device_memory(bytes);
  const auto to = device_memory(bytes);
  fill_words(from.get(), bytes, 5, stream.get());
  std::vector<double> seconds;
  for (int i = 0; i < 6; ++i) {
    Event begin;
    Event end;
    begin.record(stream);
    check_cuda(cudaMemcpyAsync(to.get(), from.get(), static_cast<size_t>(bytes), cudaMemcpyDeviceToDevice,
                               stream.get()),
               "copy");
    end.record(stream);
    stream.synchronize();
    if (i > 0) seconds.push_back(end.seconds_since(begin));
  }
  std::ranges::sort(seconds);
  return 2.0 * static_cast<double>(bytes) / seconds[seconds.size() / 2];
}

}  // namespace quantloom::bench
