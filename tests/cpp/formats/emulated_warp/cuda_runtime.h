// Stands in for the header of the CUDA toolkit: a warp is 32 threads of the host, which meet in every
// function that takes a mask of lanes.
#pragma once

#include <algorithm>
#include <array>
#include <barrier>
#include <bit>
#include <cstdint>
#include <thread>
#include <vector>

#define __device__

struct uint4 {
  uint32_t x, y, z, w;
};

namespace emulated {

struct Warp {
  std::barrier<> meeting{32};
  std::array<uint32_t, 32> values{};
};

inline thread_local Warp* warp = nullptr;
inline thread_local int lane = 0;

// The values of all lanes.
inline std::array<uint32_t, 32> exchange(uint32_t value) {
  warp->values[static_cast<size_t>(lane)] = value;
  warp->meeting.arrive_and_wait();
  const auto all = warp->values;
  warp->meeting.arrive_and_wait();
  return all;
}

// Runs body(lane) on the lanes of a warp.
template <class Body>
void run_warp(const Body& body) {
  Warp shared;
  std::vector<std::jthread> threads;
  for (int i = 0; i < 32; ++i) {
    threads.emplace_back([&shared, &body, i] {
      warp = &shared;
      lane = i;
      body(i);
    });
  }
}

}  // namespace emulated

inline void __syncwarp() {
  emulated::warp->meeting.arrive_and_wait();
}
inline unsigned __ballot_sync(unsigned /*mask*/, bool vote) {
  unsigned result = 0;
  const auto all = emulated::exchange(vote ? 1U : 0U);
  for (size_t i = 0; i < all.size(); ++i) result |= all[i] << i;
  return result;
}
inline bool __any_sync(unsigned mask, bool vote) {
  return __ballot_sync(mask, vote) != 0;
}
inline uint32_t __shfl_sync(unsigned /*mask*/, uint32_t value, int from) {
  return emulated::exchange(value)[static_cast<size_t>(from)];
}
inline uint32_t __shfl_up_sync(unsigned /*mask*/, uint32_t value, int by) {
  const auto all = emulated::exchange(value);
  return all[static_cast<size_t>(std::max(emulated::lane - by, emulated::lane >= by ? 0 : emulated::lane))];
}
template <class T>
T __ldg(const T* from) {
  return *from;
}
inline int __popc(unsigned value) {
  return std::popcount(value);
}
inline int atomicMin(int* at, int value) {
  const int before = *at;
  *at = std::min(before, value);
  return before;
}
using std::min;
