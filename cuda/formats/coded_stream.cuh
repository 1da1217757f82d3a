// One stream of a CodedMatrix (src/formats/coded_stream.hpp) decoded by a warp, block by block.
//
// Look-ups and shifts depend on nothing but the stream, which comes ahead of its use: words pass through a
// ring in shared memory, filled by asynchronous copies. Whatever the words are, everything stays within
// memory: states are below the table's size by its construction, words are fetched from within words, and at
// most as many as the ring's filling allows are taken in a block.
#pragma once

#include <cstdint>

namespace quantloom::cuda {

constexpr unsigned kWholeWarp = 0xffffffffU;
constexpr int kCodedRowsOfBlock = 16;
constexpr int kCodedColumnsOfBlock = 32;
constexpr uint32_t kRingBytes = 2048;  // of a warp
constexpr uint32_t kFetchBytes = 512;  // fetched at a time: as many as a block can take

struct CodedView {
  const uint32_t* table = nullptr;   // CodedMatrix::table()
  const uint32_t* begins = nullptr;  // CodedMatrix::begins()
  const uint32_t* words = nullptr;   // at a multiple of 16 bytes
  uint32_t last_quad = 0;            // the last four words' place, in units of four
  int table_bits = 0;
  int splits = 1;
  int column_blocks = 0;
  int row_blocks = 0;
};

// Hides from the compiler where a value comes from, which it would otherwise compute again and again.
__device__ __forceinline__ uint32_t kept(uint32_t value) {
  asm volatile("" : "+r"(value));
  return value;
}

// The table in shared memory, filled by a block of threads. A state says `control`: in its lowest 5 bits how
// many bits to read, above them up to bit 14 zeros, at bit 15 whether its pair is the escape, and from there
// on the highest bits of the next state; and a payload of its pair. States have 2^table_bits added. Memory is
// read by its 32-bit address: what the compiler knows of pointers would cost it an addition more for each
// look-up.
class CodedEntries {
 public:
  struct Loaded {
    uint32_t control;
    uint32_t payload;
  };
  static constexpr uint32_t kBytes = 8;
  static constexpr uint32_t kFlag = 1U << 15;
  static constexpr int kShift = 16;  // of the next state's highest bits

  // payload_of(first code, second code) is never kEscaped.
  template <class PayloadOf>
  __device__ CodedEntries(const CodedView& view, void* shared, const PayloadOf& payload_of)
      : added_(1U << view.table_bits),
        base_(static_cast<uint32_t>(__cvta_generic_to_shared(shared)) - kBytes * added_) {
    auto* const entries = static_cast<uint2*>(shared);
    for (uint32_t i = threadIdx.x; i < added_; i += blockDim.x) {
      const uint32_t packed = view.table[i];
      const uint32_t x = packed >> 16 & 0x7fffU;
      const bool escape = packed >> 31 != 0;
      const auto bits = static_cast<uint32_t>(view.table_bits + __clz(static_cast<int>(x)) - 31);
      entries[i] = make_uint2(bits | (escape ? kFlag : 0U) | x << kShift,
                              escape ? kEscaped : payload_of(packed & 0xffU, packed >> 8 & 0xffU));
    }
  }
  // Behind the barrier that follows on construction, before the first load().
  __device__ void settle() { base_ = kept(base_); }
  __device__ uint32_t added() const { return added_; }
  __device__ __forceinline__ Loaded load(uint32_t state) const {
    Loaded loaded;
    asm("ld.shared.v2.u32 {%0, %1}, [%2];"
        : "=r"(loaded.control), "=r"(loaded.payload)
        : "r"(base_ + kBytes * state));
    return loaded;
  }
  __device__ __forceinline__ bool escaped(uint32_t payload) const { return payload == kEscaped; }

 private:
  static constexpr uint32_t kEscaped = 0xffffffffU;

  uint32_t added_;
  uint32_t base_;
};

// Rings lie at multiples of their size.
__device__ __forceinline__ uint32_t first_ring(const void* behind_tables) {
  const auto address = static_cast<uint32_t>(__cvta_generic_to_shared(behind_tables));
  return (address + kRingBytes - 1) / kRingBytes * kRingBytes;
}

class CodedWarp {
 public:
  // `ring`: the shared address of kRingBytes of this warp.
  __device__ CodedWarp(const CodedView& view, const CodedEntries& entries, uint32_t ring, int64_t stream,
                       int lane)
      : words_(view.words),
        entries_(entries),
        ring_(kept(ring)),
        last_quad_(view.last_quad),
        lane_(kept(static_cast<uint32_t>(lane))),
        lower_(kept((1U << lane) - 1)) {
    entries_.settle();
    const uint32_t begin = view.begins[stream];
    end_ = view.begins[stream + 1];
    const uint32_t first = word(begin);
    const uint32_t width = first >> 27;
    const uint32_t length = (first & 0x7ffffffU) + bits_at(begin + 1, width * lane_, width);
    const auto bits = static_cast<uint32_t>(view.table_bits);
    const uint32_t states = begin + 1 + width;
    for (uint32_t s = 0; s < 2; ++s) {
      state_[s] = entries.added() + bits_at(states, (2 * lane_ + s) * bits, bits);
    }
    // Bits that fill no word.
    const uint32_t left = length % 32;
    uint32_t place = left;
#pragma unroll
    for (int step = 1; step < 32; step *= 2) {
      const uint32_t before = __shfl_up_sync(kWholeWarp, place, step);
      if (lane_ >= static_cast<uint32_t>(step)) place += before;
    }
    const uint32_t total = __shfl_sync(kWholeWarp, place, 31);
    place_ = (32 - left) % 32;
    held_[0] = bits_at(states + 2 * bits, place - left, left);
    left_ = (place_ + length) / 32 - (left != 0 ? 1 : 0);

    const uint32_t whole = states + 2 * bits + (total + 31) / 32;
    next_ = 4 * whole;
    fetched_ = 4 * (whole & ~3U);
#pragma unroll
    for (uint32_t i = 0; i < kRingBytes / kFetchBytes; ++i) fetch();
    wait<0>();
    take(place_ == 0, held_[0]);
    held_[1] = 0;
    take(true, held_[1]);
    held_[2] = 0;
    take(true, held_[2]);
    escapes_ = next_escapes(0);
    later_escapes_ = next_escapes(32);
  }

  // The next block: payload[2 q + s] of pair q of state s.
  template <class Spell>
  __device__ __forceinline__ void decode(uint32_t (&payload)[8], const Spell& spell) {
    // Of the words there and on their way, at least three fetches, the first one has to be there.
    if (fetched_ - next_ <= kRingBytes - kFetchBytes) {
      __syncwarp();  // all lanes have read what is overwritten now
      fetch();
    }
    wait<2>();
    uint32_t flags = 0;
#pragma unroll
    for (int pair = 0; pair < 4; ++pair) {
      uint32_t window = __funnelshift_l(held_[1], held_[0], place_);
      const CodedEntries::Loaded first = entries_.load(state_[0]);
      const CodedEntries::Loaded second = entries_.load(state_[1]);
      payload[2 * pair] = first.payload;
      payload[2 * pair + 1] = second.payload;
      flags |= first.control | second.control;
      state_[0] = __funnelshift_l(window, first.control >> CodedEntries::kShift, first.control);
      window = __funnelshift_l(0, window, first.control);
      state_[1] = __funnelshift_l(window, second.control >> CodedEntries::kShift, second.control);
      // At most 31 + 2 * 14, in the lowest 6 bits.
      advance(place_ + first.control + second.control);
    }
    if (__any_sync(kWholeWarp, (flags & CodedEntries::kFlag) != 0)) spell_out(payload, spell);
  }

  // Nothing is on its way to the ring any more.
  __device__ void finish() {
    wait<0>();
  }

 private:
  __device__ uint32_t word(uint32_t i) const {
    return __ldg(words_ + min(i, 4 * last_quad_ + 3));
  }
  // `count` <= 32 bits from bit `at` on, of numbers packed from word `base` on.
  __device__ uint32_t bits_at(uint32_t base, uint32_t at, uint32_t count) const {
    const uint32_t i = base + at / 32;
    const uint32_t both = __funnelshift_r(word(i), word(i + 1), at);
    return count == 0 ? 0 : both & (0xffffffffU >> (32 - count));
  }

  __device__ __forceinline__ void fetch() {
    const uint32_t at = fetched_ + 16 * lane_;
    const uint4* from = reinterpret_cast<const uint4*>(words_) + min(at / 16, last_quad_);
    asm volatile("cp.async.cg.shared.global [%0], [%1], 16;" ::"r"(ring_ | at % kRingBytes), "l"(from)
                 : "memory");
    asm volatile("cp.async.commit_group;" ::: "memory");
    fetched_ += kFetchBytes;
  }
  // Until all fetches but the latest kLeft have come, those of the other lanes too.
  template <int kLeft>
  static __device__ __forceinline__ void wait() {
    asm volatile("cp.async.wait_group %0;" ::"n"(kLeft) : "memory");
    __syncwarp();
  }

  // `place`: bits read of held_[0], below 64, in its lowest 6 bits. Lanes that have read that word to its end
  // let go of it, and take the next one of the stream if one is left to them. (As written here the compiler
  // spends half as many instructions as on the same in C++, and no branch.)
  __device__ __forceinline__ void advance(uint32_t place) {
    asm volatile(
        "{\n"
        ".reg .pred passed, takes;\n"
        ".reg .u32 bit, mask, before, at;\n"
        "and.b32 bit, %6, 32;\n"
        "setp.ne.u32 passed, bit, 0;\n"
        "and.b32 %3, %6, 31;\n"
        "setp.ne.and.u32 takes, %4, 0, passed;\n"
        "selp.b32 %0, %1, %0, passed;\n"
        "selp.b32 %1, %2, %1, passed;\n"
        "vote.sync.ballot.b32 mask, takes, 0xffffffff;\n"
        "and.b32 before, mask, %7;\n"
        "popc.b32 before, before;\n"
        "mad.lo.u32 at, before, 4, %5;\n"
        "and.b32 at, at, %9;\n"
        "or.b32 at, at, %8;\n"
        "@takes ld.shared.u32 %2, [at];\n"
        "@takes sub.u32 %4, %4, 1;\n"
        "popc.b32 mask, mask;\n"
        "mad.lo.u32 %5, mask, 4, %5;\n"
        "}"
        : "+r"(held_[0]), "+r"(held_[1]), "+r"(held_[2]), "=&r"(place_), "+r"(left_), "+r"(next_)
        : "r"(place), "r"(lower_), "r"(ring_), "n"(kRingBytes - 1)
        : "memory");
  }
  // The next words to the lanes that want one and have one left.
  __device__ __forceinline__ void take(bool wanted, uint32_t& word) {
    const bool takes = wanted && left_ != 0;
    const uint32_t mask = __ballot_sync(kWholeWarp, takes);
    const uint32_t at = ring_ | ((next_ + 4 * __popc(mask & lower_)) % kRingBytes);
    if (takes) asm volatile("ld.shared.u32 %0, [%1];" : "=r"(word) : "r"(at) : "memory");
    left_ -= takes ? 1 : 0;
    next_ += 4 * __popc(mask);
    __syncwarp();
  }

  // Escaped pair `from` + lane, counted from the end of the stream backwards.
  __device__ uint32_t next_escapes(uint32_t from) const {
    const uint32_t i = from + lane_;
    const uint32_t pair = word(end_ - min(end_, 1 + i / 2));
    return i % 2 == 0 ? pair >> 16 : pair & 0xffffU;
  }
  template <class Spell>
  __device__ __forceinline__ void spell_out(uint32_t (&payload)[8], const Spell& spell) {
#pragma unroll
    for (int i = 0; i < 8; ++i) {
      const bool escaped = entries_.escaped(payload[i]);
      const uint32_t mask = __ballot_sync(kWholeWarp, escaped);
      if (mask == 0) continue;
      const uint32_t at = spelled_ % 32 + __popc(mask & lower_);
      const uint32_t now = __shfl_sync(kWholeWarp, escapes_, static_cast<int>(at % 32));
      const uint32_t later = __shfl_sync(kWholeWarp, later_escapes_, static_cast<int>(at % 32));
      if (escaped) payload[i] = spell(at < 32 ? now : later);
      const uint32_t before = spelled_ / 32;
      spelled_ += __popc(mask);
      if (spelled_ / 32 != before) {
        escapes_ = later_escapes_;
        later_escapes_ = next_escapes((spelled_ / 32 + 1) * 32);
      }
    }
  }

  const uint32_t* words_;
  CodedEntries entries_;
  uint32_t ring_;  // shared address
  uint32_t last_quad_;
  uint32_t lane_;
  uint32_t lower_;    // lanes below this one
  uint32_t end_;      // of the stream, in words
  uint32_t next_;     // word to be taken, in bytes
  uint32_t fetched_;  // end of the words that are there or on their way, in bytes
  uint32_t held_[3];
  uint32_t place_;  // bits read of held_[0]
  uint32_t left_;   // words that this lane has still to take
  uint32_t state_[2];
  uint32_t escapes_;  // pair of this lane among the 32 of which the next escaped one is
  uint32_t later_escapes_;
  uint32_t spelled_ = 0;
};

}  // namespace quantloom::cuda
