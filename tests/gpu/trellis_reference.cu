#include <algorithm>

#include "common/device_buffer.hpp"
#include "trellis_reference.hpp"

namespace quantloom::testing {
namespace {

using cuda::DeviceBuffer;

constexpr int kPositions = 256;
constexpr int kAllStates = 65536;
constexpr int kThreads = 1024;
constexpr int kAtOnce = 264;

struct Pass {
  const float* table;
  const float* targets;  // [rings, 256]
  float* costs;          // [rings, 2, edges]
  uint8_t* choices;      // [rings, 256, edges]
  const uint16_t* pins;  // or null
  uint16_t* seams;       // or null
  uint16_t* states;      // or null
  int bits;
  int first;
  int steps;
  int stop;
};

// A block for each ring.
__global__ void __launch_bounds__(kThreads) run_pass(const Pass pass) {
  const int edges = kAllStates >> pass.bits;
  const int inputs = 1 << pass.bits;
  const int64_t ring = blockIdx.x;
  const float* targets = pass.targets + ring * kPositions;
  float* costs = pass.costs + ring * 2 * edges;
  uint8_t* choices = pass.choices + ring * kPositions * edges;
  for (int edge = static_cast<int>(threadIdx.x); edge < edges; edge += kThreads) {
    costs[edge] = pass.pins == nullptr || pass.pins[ring] == edge ? 0.0F : INFINITY;
  }
  __syncthreads();
  for (int step = 0; step < pass.steps; ++step) {
    const float target = targets[(pass.first + step) % kPositions];
    const float* before = costs + step % 2 * edges;
    float* after = costs + (step + 1) % 2 * edges;
    for (int edge = static_cast<int>(threadIdx.x); edge < edges; edge += kThreads) {
      float least = INFINITY;
      int choice = 0;
      for (int input = 0; input < inputs; ++input) {
        const int state = input * edges + edge;
        const float d = target - pass.table[state];
        const float cost = before[state >> pass.bits] + d * d;
        if (cost < least) {
          least = cost;
          choice = input;
        }
      }
      after[edge] = least;
      choices[static_cast<int64_t>(step) * edges + edge] = static_cast<uint8_t>(choice);
    }
    __syncthreads();
  }
  if (threadIdx.x != 0) return;
  const float* last = costs + pass.steps % 2 * edges;
  int edge = 0;
  if (pass.pins != nullptr) {
    edge = pass.pins[ring];
  } else {
    for (int other = 1; other < edges; ++other) {
      if (last[other] < last[edge]) edge = other;
    }
  }
  for (int step = pass.steps - 1; step >= pass.stop; --step) {
    const int state = choices[static_cast<int64_t>(step) * edges + edge] * edges + edge;
    if (pass.states != nullptr) pass.states[ring * kPositions + step] = static_cast<uint16_t>(state);
    edge = state >> pass.bits;
  }
  if (pass.seams != nullptr) pass.seams[ring] = static_cast<uint16_t>(edge);
}

}  // namespace

std::vector<uint16_t> reference_rings(const std::vector<float>& table, const std::vector<float>& targets,
                                      int bits, int side) {
  const auto rings = static_cast<int>(targets.size()) / kPositions;
  const int64_t edges = kAllStates >> bits;
  DeviceBuffer<float> weights(kAllStates, nullptr);
  weights.upload(table.data(), kAllStates);
  DeviceBuffer<float> wanted(static_cast<int64_t>(targets.size()), nullptr);
  wanted.upload(targets.data(), wanted.count());
  const DeviceBuffer<float> costs(kAtOnce * 2 * edges, nullptr);
  const DeviceBuffer<uint8_t> choices(kAtOnce * kPositions * edges, nullptr);
  const DeviceBuffer<uint16_t> seams(kAtOnce, nullptr);
  const DeviceBuffer<uint16_t> states(static_cast<int64_t>(targets.size()), nullptr);
  for (int begin = 0; begin < rings; begin += kAtOnce) {
    const int count = std::min(kAtOnce, rings - begin);
    Pass pass{};
    pass.table = weights.data();
    pass.targets = wanted.data() + static_cast<int64_t>(begin) * kPositions;
    pass.costs = costs.data();
    pass.choices = choices.data();
    pass.bits = bits;
    pass.first = kPositions - side;
    pass.steps = 2 * side;
    pass.stop = side;
    pass.seams = seams.data();
    run_pass<<<static_cast<unsigned>(count), kThreads>>>(pass);
    check_cuda(cudaGetLastError(), "first pass");
    pass.first = 0;
    pass.steps = kPositions;
    pass.stop = 0;
    pass.pins = seams.data();
    pass.seams = nullptr;
    pass.states = states.data() + static_cast<int64_t>(begin) * kPositions;
    run_pass<<<static_cast<unsigned>(count), kThreads>>>(pass);
    check_cuda(cudaGetLastError(), "second pass");
  }
  std::vector<uint16_t> result(targets.size());
  cuda::download(states.data(), result.data(), states.count(), nullptr);
  return result;
}

}  // namespace quantloom::testing
