// Rings on the device, for its tests.
#pragma once

#include <gtest/gtest.h>

#include <cmath>
#include <cstring>

#include "cuda_streams.hpp"
#include "device_memory.hpp"
#include "quantloom/formats/trellis_cuda.hpp"

namespace quantloom {

constexpr int kPositions = 256;

template <class T>
class DeviceArray {
 public:
  // Filled with a byte that no result is made of.
  explicit DeviceArray(int64_t count) : count_(count), memory_(device_bytes(bytes())) {
    if (count > 0) check_cuda(cudaMemset(memory_.get(), 0x77, static_cast<size_t>(bytes())), "poison");
  }
  explicit DeviceArray(const std::vector<T>& values) : DeviceArray(static_cast<int64_t>(values.size())) {
    if (!values.empty()) upload(values.data(), memory_.get(), bytes());
  }
  int64_t bytes() const { return count_ * static_cast<int64_t>(sizeof(T)); }
  T* data() const { return reinterpret_cast<T*>(memory_.get()); }
  std::vector<T> host() const {
    const std::vector<std::byte> raw = download(memory_.get(), bytes());
    std::vector<T> values(static_cast<size_t>(count_));
    if (!raw.empty()) std::memcpy(values.data(), raw.data(), raw.size());
    return values;
  }

 private:
  int64_t count_;
  std::shared_ptr<std::byte> memory_;
};

inline TrellisShape shape_of(double bits, int weights_per_step = 1) {
  TrellisShape shape;
  shape.half_bits = static_cast<int>(2 * bits);
  shape.weights_per_step = weights_per_step;
  return shape;
}

struct Rings {
  std::vector<uint32_t> words;
  std::vector<float> errors;
  std::vector<uint16_t> states;
  bool operator==(const Rings&) const = default;
};

// A codebook in both memories.
struct Twin {
  explicit Twin(std::string_view name) : host(trellis_codebook(name)), values(host.values()), device(host) {}
  TrellisCodebook host;
  std::vector<float> values;
  CudaTrellisCodebook device;
};

constexpr int64_t kFast = -1;
constexpr int64_t kLeast = -2;

inline Rings encode(const Twin& codebook, const std::vector<float>& targets, double bits,
                    TrellisSearch search, int64_t workspace_bytes = kFast) {
  const TrellisShape shape = shape_of(bits, codebook.host.weights_per_step);
  const auto count = static_cast<int64_t>(targets.size()) / kPositions;
  const TrellisWorkspace sizes = trellis_workspace_cuda(shape, search, count);
  if (workspace_bytes == kFast) workspace_bytes = sizes.fast_bytes;
  if (workspace_bytes == kLeast) workspace_bytes = sizes.least_bytes;
  const DeviceArray<float> wanted(targets);
  const DeviceArray<uint32_t> words(count * shape.words());
  const DeviceArray<float> errors(count);
  const DeviceArray<uint16_t> states(count * shape.steps());
  const DeviceArray<std::byte> workspace(workspace_bytes);
  CudaRings rings;
  rings.targets = wanted.data();
  rings.count = count;
  rings.shape = shape;
  rings.words = words.data();
  rings.squared_errors = errors.data();
  rings.states = states.data();
  settle();
  encode_rings_cuda(codebook.device, rings, search, workspace.data(), workspace_bytes, nullptr);
  return {words.host(), errors.host(), states.host()};
}

inline std::vector<float> normal_targets(int64_t rings, double scale, uint64_t seed) {
  const CounterRandom random(seed);
  std::vector<float> targets(static_cast<size_t>(rings * kPositions));
  for (size_t i = 0; i < targets.size(); ++i) targets[i] = static_cast<float>(scale * random.normal(i));
  return targets;
}

// The state of a step by its definition.
inline uint32_t state_of(const uint32_t* words, const TrellisShape& shape, int step) {
  uint32_t state = 0;
  const int ring_bits = shape.ring_bits();
  for (int i = 0; i < 16; ++i) {
    const int bit = (shape.first_bit(step + 1) - 16 + i + ring_bits) % ring_bits;
    state = state << 1 | (words[bit / 32] >> (31 - bit % 32) & 1U);
  }
  return state;
}

// The weight at a position of a ring of states.
inline float weight_of(const Twin& codebook, const uint16_t* states, int position) {
  const int per_step = codebook.host.weights_per_step;
  return codebook.values[static_cast<size_t>(states[position / per_step] * per_step + position % per_step)];
}

inline double error_of_states(const Twin& codebook, const float* targets, const uint16_t* states) {
  double sum = 0;
  for (int position = 0; position < kPositions; ++position) {
    const double d = static_cast<double>(targets[position]) - weight_of(codebook, states, position);
    sum += d * d;
  }
  return sum;
}

// The words are rings of the states, and the errors are those of their weights.
inline void expect_rings(const Twin& codebook, const std::vector<float>& targets, double bits,
                         const Rings& rings) {
  const TrellisShape shape = shape_of(bits, codebook.host.weights_per_step);
  const DeviceArray<uint32_t> words(rings.words);
  const auto count = static_cast<int64_t>(rings.errors.size());
  const DeviceArray<float> weights(count * kPositions);
  decode_rings_cuda(codebook.device, words.data(), count, shape, weights.data(), DType::f32, nullptr);
  const std::vector<float> decoded = weights.host();
  for (int64_t ring = 0; ring < count; ++ring) {
    const uint32_t* ring_words = rings.words.data() + ring * shape.words();
    const uint16_t* states = rings.states.data() + ring * shape.steps();
    for (int step = 0; step < shape.steps(); ++step) {
      ASSERT_EQ(state_of(ring_words, shape, step), states[step])
          << bits << " bits, ring " << ring << ", step " << step;
    }
    for (int position = 0; position < kPositions; ++position) {
      ASSERT_EQ(decoded[static_cast<size_t>(ring * kPositions + position)],
                weight_of(codebook, states, position))
          << bits << " bits, ring " << ring << ", position " << position;
    }
    const double sum = error_of_states(codebook, targets.data() + ring * kPositions, states);
    ASSERT_NEAR(rings.errors[static_cast<size_t>(ring)], sum, 1e-5 * sum + 1e-12)
        << bits << " bits, ring " << ring;
  }
}

inline double mean_error(const Rings& rings) {
  double sum = 0;
  for (const float error : rings.errors) sum += error;
  return sum / (static_cast<double>(rings.errors.size()) * kPositions);
}

class TrellisCuda : public ::testing::Test {
 protected:
  void SetUp() override {
    if (!has_cuda_device()) GTEST_SKIP() << "no CUDA device in this machine";
  }
};

class TrellisCudaSmall : public TrellisCuda {};

}  // namespace quantloom
