// A step of the search for codebooks of two weights a state. Such a codebook fills the registers of a whole
// processor, so weights come from memory (the level-2 cache): four neighbouring states in a load, each used
// for all rings of the block, and all four came in by the same edge.
//
// Costs of two rings share a word; those of kWords words of an edge lie next to each other.
#pragma once

#include "formats/trellis_passes.hpp"
#include "formats/trellis_step.cuh"

namespace quantloom::cuda {

constexpr int kQuad = 4;             // edges of a thread
constexpr int kInputsOfThread = 16;  // most states that a thread tries for an edge

// How 1024 threads share a step of `bits` fresh bits, 2 to 8: each takes quads of edges, and of the states
// that lead there a slice.
struct QuadPlan {
  int bits;
  QUANTLOOM_TRELLIS explicit QuadPlan(int fresh_bits) : bits(fresh_bits) {}
  QUANTLOOM_TRELLIS int edges() const { return kStates >> bits; }
  QUANTLOOM_TRELLIS int quad_bits() const { return 14 - bits; }
  QUANTLOOM_TRELLIS int quads() const { return 1 << quad_bits(); }
  QUANTLOOM_TRELLIS int inputs() const { return 1 << bits < kInputsOfThread ? 1 << bits : kInputsOfThread; }
  QUANTLOOM_TRELLIS int slices() const { return (1 << bits) / inputs(); }
};

// Where the costs of an edge are, in runs of kWords words: two bits are turned, so that neighbouring lanes,
// which hold quads of edges, write to different banks.
template <int kWords>
QUANTLOOM_TRELLIS int cost_place(int edge) {
  constexpr int kShift = kWords == 4 ? 3 : 4;
  return kWords == 1 ? edge : edge ^ (edge >> kShift & 3);
}

// Targets of the rings of a block, float16 in both weights' words: up to 4 bits a weight that is exact
// enough.
template <int kWords>
struct StepTargets {
  uint32_t first[kWords];
  uint32_t second[kWords];
};

// The least costs of edges 4 quad ... 4 quad + 3 after a step, over the states of a slice that lead there.
template <int kWords>
struct QuadCosts {
  uint32_t least[kWords][kQuad];

  __device__ __forceinline__ void find(const uint16_t* table, const QuadPlan& plan, int quad, int slice,
                                       const uint32_t* costs, const StepTargets<kWords>& targets) {
#pragma unroll
    for (int w = 0; w < kWords; ++w) {
#pragma unroll
      for (int e = 0; e < kQuad; ++e) least[w][e] = 0x7C007C00U;
    }
    const int inputs = plan.inputs();
    const int stride = plan.edges();
    int state = slice * inputs * stride + kQuad * quad;
#pragma unroll 2
    for (int i = 0; i < inputs; i += 2, state += 2 * stride) {
      const Candidates one(table, state, costs, plan.bits);
      const Candidates other(table, state + stride, costs, plan.bits);
#pragma unroll
      for (int e = 0; e < kQuad; ++e) {
#pragma unroll
        for (int w = 0; w < kWords; ++w) {
          least[w][e] = pair_min(least[w][e], one.cost(targets, w, e), other.cost(targets, w, e));
        }
      }
    }
  }

  // To where the next step looks for them.
  __device__ __forceinline__ void store(int quad, uint32_t* costs) const {
    if constexpr (kWords == 1) {
      reinterpret_cast<uint4*>(costs)[quad] = make_uint4(least[0][0], least[0][1], least[0][2], least[0][3]);
    } else {
#pragma unroll
      for (int e = 0; e < kQuad; ++e) {
        const int place = cost_place<kWords>(kQuad * quad + e);
        if constexpr (kWords == 2) {
          reinterpret_cast<uint2*>(costs)[place] = make_uint2(least[0][e], least[1][e]);
        } else {
          reinterpret_cast<uint4*>(costs)[place] =
              make_uint4(least[0][e], least[1][e], least[2][e], least[3][e]);
        }
      }
    }
  }

 private:
  // Four neighbouring states.
  struct Candidates {
    uint32_t weights[kQuad];  // float16, the first of a state in the low half
    uint32_t before[kWords];

    __device__ __forceinline__ Candidates(const uint16_t* table, int state, const uint32_t* costs, int bits) {
      const uint4 pairs = reinterpret_cast<const uint4*>(table)[state / kQuad];
      weights[0] = pairs.x;
      weights[1] = pairs.y;
      weights[2] = pairs.z;
      weights[3] = pairs.w;
#pragma unroll
      for (int w = 0; w < kWords; ++w) before[w] = costs[cost_place<kWords>(state >> bits) * kWords + w];
    }
    __device__ __forceinline__ uint32_t cost(const StepTargets<kWords>& targets, int w, int e) const {
      const uint32_t first = pair_subtract(targets.first[w], low_halves(weights[e], weights[e]));
      const uint32_t second = pair_subtract(targets.second[w], high_halves(weights[e], weights[e]));
      return pair_square_add(second, pair_square_add(first, before[w]));
    }
  };
};

}  // namespace quantloom::cuda
