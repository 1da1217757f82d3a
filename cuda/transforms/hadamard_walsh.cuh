// The Hadamard transform of blocks of 2^kLog elements: read once, written once.
//
// A team of 2^(kLog - 5) threads holds a block, 32 elements in each thread. The bits of an element's index
// are worked off in passes: in registers, between lanes by shuffles (blocks up to 512), or, for longer
// blocks, in registers again after an exchange through shared memory that gives each thread other bits.
//
//   index of an element:  [ tops: 5 - w bits | new: kLog - 10 bits | middle: 5 bits | low: w bits ]
//   pass 1: a thread holds low and tops (vectors of 2^w elements), lanes are middle
//   pass 2: a thread holds middle, lanes are low and tops: an exchange within the warp
//   pass 3: a thread holds new, and as many of low (for long stores) and tops as make 5 bits; lanes follow
//   low
#pragma once

#include <type_traits>

#include "common/shared_memory.cuh"
#include "transforms/hadamard_values.cuh"

namespace quantloom::cuda {

template <class T, int kLog>
struct WalshShape {
  static constexpr int kLow = HadamardValues<T>::kLogVector;  // w
  static constexpr int kLogHeld = kLog < 5 ? kLog : 5;
  static constexpr int kHeld = 1 << kLogHeld;
  static constexpr int kLogTeam = kLog - kLogHeld;
  static constexpr int kTeam = 1 << kLogTeam;
  static constexpr int kThreads = kTeam < 128 ? 128 : kTeam;
  static constexpr int kTeams = kThreads / kTeam;
  static constexpr int kBlocks = 1024 / kThreads;  // on a processor: bounds the registers
  static constexpr bool kExchanges = kLogTeam > 4;
  static constexpr int kTops = kLogHeld - kLow;
  static constexpr int kNew = kExchanges ? kLog - 10 : 0;
  static constexpr int kKeep = kLow < 5 - kNew ? kLow : 5 - kNew;  // bits of low in pass 3
  static constexpr int kFill = 5 - kKeep - kNew;                   // bits of tops in pass 3
  // Rows of 32 floats in shared memory: 33 apart, or, where the lanes of pass 3 are not the middle bits
  // alone, with their banks exchanged by a pattern of the row.
  static constexpr bool kSwizzled = kExchanges && kKeep < kLow;
  static constexpr int kWarpFloats = kSwizzled ? 1024 : 1056;
  static constexpr int kFloats = kExchanges ? (kThreads / 32) * kWarpFloats : 0;
  // Bits that a thread holds in pass 3.
  static constexpr int kHeldMask =
      ((1 << kKeep) - 1) | (((1 << kNew) - 1) << (kLow + 5)) | (((1 << kFill) - 1) << (kLog - kFill));

  // Spreads the bits of `value` to the set bits of `mask`, the lowest first.
  static constexpr __host__ __device__ int deposit(int value, int mask) {
    int result = 0;
    for (int bit = 0; bit < kLog; ++bit) {
      if ((mask >> bit & 1) != 0) {
        result |= (value & 1) << bit;
        value >>= 1;
      }
    }
    return result;
  }
  // Where element x lies in the shared memory of its team. Places of elements with no common bits combine.
  static constexpr __host__ __device__ int place(int x) {
    const int low = x & ((1 << kLow) - 1);
    const int middle = (x >> kLow) & 31;
    const int row = (x >> (kLow + 5)) & ((1 << kNew) - 1);
    const int five = low | (x >> (kLog - kTops)) << kLow;
    if (!kSwizzled) return row * kWarpFloats + middle * 33 + five;
    return row * kWarpFloats + middle * 32 + (five ^ (((middle << kLow) | (middle >> (5 - kLow))) & 31));
  }
  static constexpr __host__ __device__ int combine(int a, int b) { return kSwizzled ? a ^ b : a + b; }
};

template <int kTeam>
__device__ __forceinline__ void wait_for_team() {
  if constexpr (kTeam == 32) {
    __syncwarp();
  } else {
    __syncthreads();
  }
}

// Stores kRun of the values, from `first` on, next to each other.
template <int kRun, class T, int kSize>
__device__ __forceinline__ void store_run(T* to, const float (&values)[kSize], int first, bool vectors) {
  float run[kRun];
#pragma unroll
  for (int i = 0; i < kRun; ++i) run[i] = values[first + i];
  store_values(to, run, vectors);
}

// From the values of pass 1 to the result of a whole block.
template <class T, int kLog, class S = WalshShape<T, kLog>>
__device__ __forceinline__ void transform_block(const HadamardArguments& a, float (&values)[S::kHeld],
                                                int thread, float* shared, T* to, int64_t column,
                                                bool exists) {
  butterflies<0, S::kLogHeld>(values);
  if constexpr (!S::kExchanges) {
#pragma unroll
    for (int bit = 0; bit < S::kLogTeam; ++bit) lane_butterflies(values, thread, bit);
    if (!exists) return;
    constexpr int kVector = 1 << S::kLow;
    const auto element = [&](int i) {
      return (thread << S::kLow) + (i & (kVector - 1)) + ((i >> S::kLow) << (S::kLow + S::kLogTeam));
    };
    finish(a, values, column, element);
#pragma unroll
    for (int j = 0; j < S::kHeld; j += kVector) store_run<kVector>(to + element(j), values, j, a.vectors);
  } else {
    const int lane = thread & 31;
    const int low_and_tops = (lane & ((1 << S::kLow) - 1)) | (lane >> S::kLow) << (kLog - S::kTops);
    const int of_warp = S::place((thread >> 5) << (S::kLow + 5));
    const int first = S::combine(of_warp, S::place(lane << S::kLow));
#pragma unroll
    for (int e = 0; e < 32; ++e) {
      shared[S::combine(first, S::place((e & ((1 << S::kLow) - 1)) | (e >> S::kLow) << (kLog - S::kTops)))] =
          values[e];
    }
    __syncwarp();
    const int second = S::combine(of_warp, S::place(low_and_tops));
#pragma unroll
    for (int e = 0; e < 32; ++e) values[e] = shared[S::combine(second, S::place(e << S::kLow))];
    butterflies<0, 5>(values);
#pragma unroll
    for (int e = 0; e < 32; ++e) shared[S::combine(second, S::place(e << S::kLow))] = values[e];
    wait_for_team<S::kTeam>();
    const int base = S::deposit(thread, ((1 << kLog) - 1) & ~S::kHeldMask);
    const int third = S::place(base);
#pragma unroll
    for (int e = 0; e < 32; ++e) values[e] = shared[S::combine(third, S::place(S::deposit(e, S::kHeldMask)))];
    butterflies<S::kKeep, S::kNew>(values);
    if (!exists) return;
    constexpr int kRun = 1 << S::kKeep;
    const auto element = [&](int i) { return base + S::deposit(i, S::kHeldMask); };
    finish(a, values, column, element);
#pragma unroll
    for (int j = 0; j < 32; j += kRun) store_run<kRun>(to + element(j), values, j, a.vectors);
  }
}

// The float32 values of pass 1, with the signs of a forward transform.
template <class T, int kLog, class S = WalshShape<T, kLog>>
__device__ __forceinline__ void unpack_block(const HadamardArguments& a,
                                             const uint4 (&words)[S::kHeld >> S::kLow], int thread,
                                             int64_t column, float (&values)[S::kHeld]) {
  constexpr int kVector = 1 << S::kLow;
#pragma unroll
  for (int j = 0; j < S::kHeld / kVector; ++j) {
    float vector[kVector];
    HadamardValues<T>::unpack(words[j], vector);
    if (a.signs != nullptr && !a.inverse) {
      negate(vector, sign_bits(a.signs, column + (thread << S::kLow) + (j << (S::kLow + S::kLogTeam))));
    }
#pragma unroll
    for (int i = 0; i < kVector; ++i) values[j * kVector + i] = vector[i];
  }
}

template <class T, int kLog>
__global__ void __launch_bounds__((WalshShape<T, kLog>::kThreads), (WalshShape<T, kLog>::kBlocks))
    walsh_kernel(const HadamardArguments a) {
  using S = WalshShape<T, kLog>;
  auto* memory = dynamic_shared_memory<float>();
  const int thread = static_cast<int>(threadIdx.x) & (S::kTeam - 1);
  const int team = static_cast<int>(threadIdx.x) >> S::kLogTeam;
  const int64_t unit = static_cast<int64_t>(blockIdx.x) * S::kTeams + team;
  const bool exists = unit < a.units;
  const HadamardPlace at = place_of(a, exists ? unit : 0, 1 << kLog);
  const T* from = static_cast<const T*>(a.x) + at.row * a.x_stride + at.column;
  uint4 words[S::kHeld >> S::kLow];
#pragma unroll
  for (int j = 0; j < (S::kHeld >> S::kLow); ++j) {
    words[j] = exists ? load_vector(from + (thread << S::kLow) + (j << (S::kLow + S::kLogTeam)), a.vectors)
                      : make_uint4(0, 0, 0, 0);
  }
  float values[S::kHeld];
  unpack_block<T, kLog>(a, words, thread, at.column, values);
  float* shared = memory + team * (S::kTeam / 32) * S::kWarpFloats;
  T* to = static_cast<T*>(a.out) + at.row * a.out_stride + at.column;
  transform_block<T, kLog>(a, values, thread, shared, to, at.column, exists);
}

// For blocks so long that few fit on a processor: each thread block works through many, and copies the next
// one while it works. Every thread reads only what it copied itself. Needs a.vectors.
template <class T, int kLog>
__global__ void __launch_bounds__((WalshShape<T, kLog>::kThreads), (WalshShape<T, kLog>::kBlocks))
    walsh_ahead_kernel(const HadamardArguments a) {
  using S = WalshShape<T, kLog>;
  static_assert(S::kExchanges && S::kTeams == 1);
  auto* memory = dynamic_shared_memory<float>();
  const int thread = static_cast<int>(threadIdx.x);
  auto* ahead = reinterpret_cast<uint4*>(memory + S::kFloats);
  const auto request = [&](int64_t unit) {
    if (unit >= a.units) return;
    const HadamardPlace at = place_of(a, unit, 1 << kLog);
    const T* from = static_cast<const T*>(a.x) + at.row * a.x_stride + at.column;
#pragma unroll
    for (int j = 0; j < (S::kHeld >> S::kLow); ++j) {
      copy_async(ahead + j * S::kThreads + thread,
                 from + (thread << S::kLow) + (j << (S::kLow + S::kLogTeam)));
    }
  };
  request(blockIdx.x);
  for (int64_t unit = blockIdx.x; unit < a.units; unit += gridDim.x) {
    wait_for_copies();
    uint4 words[S::kHeld >> S::kLow];
#pragma unroll
    for (int j = 0; j < (S::kHeld >> S::kLow); ++j) words[j] = ahead[j * S::kThreads + thread];
    const HadamardPlace at = place_of(a, unit, 1 << kLog);
    float values[S::kHeld];
    unpack_block<T, kLog>(a, words, thread, at.column, values);
    request(unit + gridDim.x);
    __syncthreads();  // the block before has been read from shared memory
    T* to = static_cast<T*>(a.out) + at.row * a.out_stride + at.column;
    transform_block<T, kLog>(a, values, thread, memory, to, at.column, true);
  }
}

}  // namespace quantloom::cuda
