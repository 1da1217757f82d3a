// How a warp decodes a chunk of an entropy coded stream; the order of codes and words is that of
// src/formats/entropy_coding.hpp. All lanes call every function together.
#pragma once

#include <cuda_runtime.h>

#include <cstdint>

#include "formats/entropy_coding.hpp"

namespace quantloom::cuda {

inline constexpr unsigned kAllLanes = 0xffffffffU;
inline constexpr int kRingWords = 256;
inline constexpr int kLastBadChunk = 0x7ffffffe;  // stands for all above

// What kernels know of a stream. Chunk c has the words [ends[c - 1], ends[c]); the host has checked that
// these rise and that the pairs of words hold them.
struct EntropyView {
  const uint32_t* pairs = nullptr;
  int64_t last_pair = 0;
  const uint32_t* ends = nullptr;
  int64_t count = 0;
  int64_t chunk = 0;
  const uint4* tables = nullptr;
  int table_quads = 0;   // of 16 bytes
  int slots_offset = 0;  // where the parameters of a table in two parts begin, in bytes
  int bits = 0;
  uint32_t escape = ~uint32_t{0};
  int escape_bits = 0;
  uint32_t alphabet = 0;
  int* bad_chunk = nullptr;  // the least number of a chunk that does not decode
};

// The words of a chunk, in the order in which they are taken. A ring in shared memory holds those to come; a
// load from global memory is always under way, of 64 words.
class WordRing {
 public:
  __device__ WordRing(const EntropyView& view, int64_t chunk, uint16_t* ring, int lane)
      : view_(view), ring_(ring), lane_(lane) {
    const uint32_t begin = chunk == 0 ? 0 : view.ends[chunk - 1];
    const uint32_t end = view.ends[chunk];
    first_pair_ = begin / 2;
    next_ = begin % 2;
    end_ = next_ + (end - begin);
    ahead_ = load(0);
    for (int i = 0; i < 3; ++i) store();
  }

  // Makes at least 64 words ready: a step takes up to two per lane.
  __device__ void refill() {
    if (filled_ - next_ < 64) {
      __syncwarp();
      store();
    }
  }
  // The word for each lane that needs one, in the order of the lanes.
  __device__ uint32_t take(bool need) {
    const unsigned mask = __ballot_sync(kAllLanes, need);
    const uint32_t at = next_ + __popc(mask & ((1U << lane_) - 1));
    next_ += __popc(mask);
    return need ? ring_[at % kRingWords] : 0U;
  }
  // Word `i` from here, for each lane another, without taking it; i < 128 at the start of a chunk.
  __device__ uint32_t peek(uint32_t i) const { return ring_[(next_ + i) % kRingWords]; }
  __device__ void skip(uint32_t count) { next_ += count; }
  __device__ uint32_t left() const { return end_ - next_; }
  __device__ bool at_end() const { return next_ == end_; }

 private:
  // Words behind the chunk, even behind the stream's last, may be loaded and taken: at_end() notices.
  __device__ uint32_t load(uint32_t from) const {
    return __ldg(view_.pairs + min(first_pair_ + from / 2 + lane_, view_.last_pair));
  }
  __device__ void store() {
    reinterpret_cast<uint32_t*>(ring_)[(filled_ % kRingWords) / 2 + lane_] = ahead_;
    filled_ += 64;
    ahead_ = load(filled_);
    __syncwarp();
  }

  const EntropyView& view_;
  uint16_t* ring_;
  int lane_;
  int64_t first_pair_ = 0;
  uint32_t next_ = 0;  // words, counted from the first pair
  uint32_t end_ = 0;
  uint32_t filled_ = 0;
  uint32_t ahead_ = 0;
};

// A table with all that a slot says in one word, in shared memory.
struct FusedTable {
  const uint32_t* fused;
  uint32_t mask;
  int bits;

  __device__ FusedTable(const EntropyView& view, const unsigned char* shared)
      : fused(reinterpret_cast<const uint32_t*>(shared)), mask((1U << view.bits) - 1), bits(view.bits) {}
  __device__ uint32_t pop(uint32_t& state) const {
    const uint32_t entry = fused[state & mask];
    state = (entry >> 8 & 0xfffU) * (state >> bits) + (entry >> 20);
    return entry & 0xffU;
  }
};

// A table of codes by slot, and one of frequency and first slot by code.
struct SlotTable {
  const uint8_t* slots;
  const uint32_t* parameters;
  uint32_t mask;
  int bits;

  __device__ SlotTable(const EntropyView& view, const unsigned char* shared)
      : slots(shared),
        parameters(reinterpret_cast<const uint32_t*>(shared + view.slots_offset)),
        mask((1U << view.bits) - 1),
        bits(view.bits) {}
  __device__ uint32_t pop(uint32_t& state) const {
    const uint32_t slot = state & mask;
    const uint32_t code = slots[slot];
    const uint32_t parameter = parameters[code];
    state = (parameter & 0xffffU) * (state >> bits) + slot - (parameter >> 16);
    return code;
  }
};

template <class Table>
class RansLanes {
 public:
  __device__ RansLanes(const EntropyView& view, const unsigned char* shared, uint16_t* tail, int lane)
      : view_(view), table_(view, shared), tail_(tail), lane_(lane) {}

  // Reads the states; returns how many of `size` codes the lanes decode, the others being the tail.
  __device__ int begin(WordRing& words, int size) {
    bad_ = words.left() < entropy::kHeadWords;
    const int tail = static_cast<int>(words.peek(0));
    bad_ = bad_ || tail > entropy::kLongestTail || tail % entropy::kTailLanes != 0 || tail > size;
    const uint32_t length = words.peek(1 + lane_ / 4) >> (4 * (lane_ % 4)) & 15U;
    uint32_t bit = length;  // where the bits of this lane end, then begin
#pragma unroll
    for (int step = 1; step < 32; step *= 2) {
      const uint32_t before = __shfl_up_sync(kAllLanes, bit, step);
      if (lane_ >= step) bit += before;
    }
    const uint32_t total = __shfl_sync(kAllLanes, bit, 31);
    bit -= length;
    const uint32_t at = static_cast<uint32_t>(entropy::kHeadWords) + bit / 16;
    const uint32_t window = words.peek(at) | words.peek(at + 1) << 16;
    const uint32_t mantissa = window >> (bit % 16) & ((1U << length) - 1);
    state_ = ((1U << length) | mantissa) << 16 | words.peek(9 + lane_);
    const uint32_t head = static_cast<uint32_t>(entropy::kHeadWords) + (total + 15) / 16;
    bad_ = bad_ || head > words.left();
    __syncwarp();
    words.skip(head);
    return bad_ ? 0 : size - tail;
  }

  __device__ uint32_t step(WordRing& words, bool active) {
    words.refill();
    return step_with(state_, active, [&](bool need) { return words.take(need); });
  }

  // Decodes the tail: store(i, code) takes code i of it.
  template <class Store>
  __device__ void finish(const WordRing& words, int count, const Store& store) {
    bad_ = bad_ || !words.at_end() || __any_sync(kAllLanes, state_ >> 16 != 1);
    if (bad_) return;
    __syncwarp();
    tail_[lane_] = static_cast<uint16_t>(state_);
    __syncwarp();
    const bool in_tail = lane_ < entropy::kTailLanes;
    uint32_t state = in_tail ? tail_[2 * lane_] | static_cast<uint32_t>(tail_[2 * lane_ + 1]) << 16 : 0U;
    uint32_t next = 2 * entropy::kTailLanes;
    const auto take = [&](bool need) {
      const unsigned mask = __ballot_sync(kAllLanes, need);
      const uint32_t at = next + __popc(mask & ((1U << lane_) - 1));
      next += __popc(mask);
      return need ? static_cast<uint32_t>(tail_[at % entropy::kTailWords]) : 0U;
    };
    for (int i = 0; i < count; i += entropy::kTailLanes) {
      const uint32_t code = step_with(state, in_tail, take);
      if (in_tail) store(i + lane_, code);
    }
    const bool used = static_cast<uint32_t>(lane_) < next;
    bad_ = bad_ || next > entropy::kTailWords ||
           __any_sync(kAllLanes, (in_tail && state != entropy::kLowestState) || (!used && tail_[lane_] != 0));
  }
  // The same for all lanes once `spelled` errors are put together.
  __device__ bool bad() const {
    return bad_ || __any_sync(kAllLanes, beyond_);
  }

 private:
  template <class Take>
  __device__ uint32_t step_with(uint32_t& state, bool active, const Take& take) {
    uint32_t code = 0;
    if (active) code = table_.pop(state);
    const bool low = active && state < entropy::kLowestState;
    const uint32_t word = take(low);
    if (low) state = state << 16 | word;
    const bool spelled = active && code == view_.escape;
    if (view_.escape != ~uint32_t{0} && __any_sync(kAllLanes, spelled)) {
      if (spelled) {
        code = state & ((1U << view_.escape_bits) - 1);
        state >>= view_.escape_bits;
        beyond_ = beyond_ || code >= view_.alphabet;
        code = min(code, view_.alphabet - 1);
      }
      const bool again = spelled && state < entropy::kLowestState;
      const uint32_t next = take(again);
      if (again) state = state << 16 | next;
    }
    return code;
  }

  const EntropyView& view_;
  Table table_;
  uint16_t* tail_;
  int lane_;
  uint32_t state_ = 0;
  bool bad_ = false;
  bool beyond_ = false;  // of this lane
};

class HuffmanLanes {
 public:
  __device__ HuffmanLanes(const EntropyView& view, const unsigned char* shared, uint16_t* /*tail*/,
                          int /*lane*/)
      : prefixes_(reinterpret_cast<const uint16_t*>(shared)),
        mask_((1U << view.bits) - 1),
        least_(static_cast<uint32_t>(view.bits)) {}

  __device__ int begin(WordRing& /*words*/, int size) {
    window_ = 0;
    held_ = 0;
    return size;
  }
  __device__ uint32_t step(WordRing& words, bool active) {
    words.refill();
    const bool low = active && held_ < least_;
    const uint32_t word = words.take(low);
    if (low) {
      window_ = window_ << 16 | word;
      held_ += 16;
    }
    if (!active) return 0;
    const uint32_t entry = prefixes_[window_ >> (held_ - least_) & mask_];
    held_ -= entry & 0xffU;
    return entry >> 8;
  }
  template <class Store>
  __device__ void finish(const WordRing& words, int /*count*/, const Store& /*store*/) {
    bad_ = !words.at_end() || __any_sync(kAllLanes, (window_ & ((1U << held_) - 1)) != 0);
  }
  __device__ bool bad() const { return bad_; }

 private:
  const uint16_t* prefixes_;
  uint32_t mask_;
  uint32_t least_;
  uint32_t window_ = 0;
  uint32_t held_ = 0;
  bool bad_ = false;
};

// Decodes one chunk into a sink (entropy_sinks.cuh). `shared` holds the tables, `ring` the words of this
// warp: kRingWords, and behind them those of the tail.
template <class Lanes, class Sink>
__device__ void decode_chunk(const EntropyView& view, const Sink& sink, int64_t chunk,
                             const unsigned char* shared, uint16_t* ring, int lane) {
  const int64_t begin = chunk * view.chunk;
  const int size = static_cast<int>(min(view.chunk, view.count - begin));
  WordRing words(view, chunk, ring, lane);
  Lanes lanes(view, shared, ring + kRingWords, lane);
  const int main = lanes.begin(words, size);
  typename Sink::Cursor cursor(sink, begin + 4 * lane);
  int row = 0;
  for (; row + 128 <= main; row += 128) {
    uint32_t codes = 0;
#pragma unroll
    for (int step = 0; step < 4; ++step) codes |= lanes.step(words, true) << (8 * step);
    sink.store_run(cursor, codes);
    cursor.advance();
  }
  if (row < main) {
    for (int step = 0; step < 4; ++step) {
      const int at = row + 4 * lane + step;
      const uint32_t code = lanes.step(words, at < main);
      if (at < main) sink.store(begin + at, code);
    }
  }
  lanes.finish(words, size - main, [&](int i, uint32_t code) { sink.store(begin + main + i, code); });
  if (lanes.bad() && lane == 0) {
    atomicMin(view.bad_chunk, static_cast<int>(min(chunk, int64_t{kLastBadChunk})));
  }
}

}  // namespace quantloom::cuda
