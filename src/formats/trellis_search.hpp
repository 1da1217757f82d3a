// The Viterbi search behind encode_rings(): what its passes, and the loops of each instruction set, work on.
//
// An edge is what two neighbouring states share: the window - b low bits of the first, where b counts the
// fresh bits of the second. The forward pass keeps one cost for each edge and nothing else; the way back
// computes a few steps anew from stored costs. All costs are float32, each step in one order of operations
// (difference, square, sum), so that every instruction set and the reference choose the same rings.
#pragma once

#include <cstdint>
#include <memory>
#include <mutex>
#include <span>
#include <vector>

#include "quantloom/formats/trellis.hpp"
#include "quantloom/matrix_view.hpp"

namespace quantloom::trellis {

constexpr int kRingsAtOnce = 4;  // rings that share each load of the codebook
constexpr int kNoEdge = -1;

// The weights of all states, and their order in the forward pass.
class SearchTable {
 public:
  SearchTable(const TrellisCodebook& codebook, const TrellisShape& shape);

  const TrellisShape& shape() const { return shape_; }
  // Weight `which` of a state.
  float weight(int which, uint32_t state) const {
    return weights_[static_cast<size_t>(which) << shape_.window | state];
  }
  // What a state's weights differ from `targets` by, squared and summed.
  float error(uint32_t state, const float* targets) const {
    const float difference = weight(0, state) - targets[0];
    const float error = difference * difference;
    if (shape_.weights_per_step == 1) return error;
    const float other = weight(1, state) - targets[1];
    return error + other * other;
  }
  // Steps count on around the ring.
  int step_bits(int64_t step) const { return shape_.step_bits(static_cast<int>(step % shape_.steps())); }
  // Edges that lead into a step.
  int64_t edges(int64_t step) const { return int64_t{1} << (shape_.window - step_bits(step)); }

  // Rows of kLanes states that leave by kLanes neighbouring edges into a step of `bits` bits: for each block
  // of edges 2^bits rows, one for each value of the bits that the next state forgets; of weight 0, then
  // weight 1.
  static constexpr int kLanes = 16;
  const float* rows(int bits) const { return rows_[static_cast<size_t>(bits)].data(); }

 private:
  TrellisShape shape_;
  std::vector<float> weights_;
  std::vector<std::vector<float>> rows_;
};

// One step of the forward pass for `count` <= kRingsAtOnce rings.
struct ForwardStep {
  const SearchTable* table = nullptr;
  int bits = 0;       // fresh bits of this step's states
  int next_bits = 0;  // and of the next step's
  int count = 0;
  const float* targets[kRingsAtOnce] = {};  // the step's targets, weights_per_step of each ring
  const float* costs[kRingsAtOnce] = {};    // by incoming edge
  float* next[kRingsAtOnce] = {};           // by outgoing edge; each array has room for kLanes more
};

// next[e'] = min over the states s that end in e' of costs[s >> bits] + |weight(s) - target|^2.
void forward(const ForwardStep& step);
// The same, by the definition.
void forward_reference(const ForwardStep& step);

// Memory of one search, used again by the next.
struct SearchMemory {
  std::vector<float> costs;      // by edge: those kept for the way back, and two that change places
  std::vector<float> ancestors;  // of a few steps on the way back
  std::vector<uint8_t> choices;
  std::vector<uint32_t> states;  // of one ring's run
  std::vector<int64_t> edges;
};

// Finds the states [targets.rows() <= kRingsAtOnce][steps] of rings near `targets` [.., length].
void search_rings(const SearchTable& table, TrellisSearch search, MatrixView<const float> targets,
                  MatrixView<uint32_t> states, SearchMemory& memory);

// Searches of any number of rings, by any number of threads, with the memory of the searches before.
class RingEncoder {
 public:
  // Throws as encode_rings() does for a shape that the codebook does not fit.
  RingEncoder(const TrellisCodebook& codebook, const TrellisShape& shape);
  const TrellisShape& shape() const { return table_.shape(); }
  // targets [rings, length], states [rings, steps]. May be called concurrently.
  void encode(MatrixView<const float> targets, MatrixView<uint32_t> states, TrellisSearch search,
              int threads);

 private:
  SearchTable table_;
  std::mutex mutex_;
  std::vector<std::unique_ptr<SearchMemory>> free_;
};

// The states [steps] of a ring's words, which must be within the ring.
void unpack_ring(const TrellisShape& shape, const uint32_t* words, uint32_t* states);
void pack_ring(const TrellisShape& shape, const uint32_t* states, uint32_t* words);

// The best ring whose states before and after step 0 share `edge`; returns its cost.
float search_pinned(const SearchTable& table, int64_t edge, std::span<const float> targets,
                    std::span<uint32_t> states, SearchMemory& memory);

// Two passes in the plainest way: a loop over the edges, in it one over the states that lead there and one
// over the states that it leads to, with a predecessor stored for each edge and step. The same rings as
// TrellisSearch::normal; many times slower.
void search_reference(const SearchTable& table, std::span<const float> targets, std::span<uint32_t> states);

}  // namespace quantloom::trellis
