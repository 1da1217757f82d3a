// Decoders of the format "vector_codebook" with several tables, in fragment order
// (src/formats/sum_order.hpp): a field is the codes of a vector, one after the other, its value the sum of
// their entries. uniform_fragments.cuh says what a decoder offers.
//
// How long codes and tables are is known at run time. Where all tables fit kSharedBytes they lie in shared
// memory, in as many copies as fit: lanes of a warp then meet in fewer banks.
#pragma once

#include <type_traits>

#include "common/half_pairs.cuh"
#include "formats/sum_order.hpp"

namespace quantloom::cuda {

constexpr int kMostSumBytes = 64 << 10;

// Copies of a table, 2 to this power, that keep all lanes apart which read at the same time.
__host__ __device__ constexpr int sum_copy_bits(int dim) {
  return dim == 2 ? 5 : dim == 4 ? 4 : 3;
}

// What both decoders have in common. kDim: weights of a vector, 2, 4 or 8. kWords: bits of a weight.
// kMostShared: bytes of shared memory for tables.
template <int kDim, int kWords, int kMostShared>
class SumTables {
 public:
  static constexpr int kBits = kWords;
  static constexpr float kUnit = 1.0F;
  static constexpr float kCenter = 0.0F;
  static constexpr bool kHasZeros = false;
  static constexpr bool kQuads = false;
  static constexpr int kFieldBits = kDim * kWords;
  static constexpr int kEntryBytes = 2 * kDim;
  static constexpr int kSharedBytes = kMostShared;

  // table: float16 [tables][entries][kDim], aligned to 16 bytes. description: of the tables, as
  // fragments::TableSizes packs them; codes past a table decode to 0 or to its last vector. shared:
  // kSharedBytes, aligned to 16.
  template <class T>
  __device__ __forceinline__ void prepare(const void* table, int description, void* shared) {
    const auto sizes = fragments::TableSizes::from(description);
    const auto lane = static_cast<int>(threadIdx.x % 32);
    const int slots = 1 << sizes.code_bits;
    const bool in_shared = sizes.tables * slots * kEntryBytes <= kSharedBytes;
    int shift = sum_copy_bits(kDim);
    while (shift > 0 && (!in_shared || (sizes.tables * slots * kEntryBytes << shift) > kSharedBytes)) --shift;
    tables_ = sizes.tables;
    code_bits_ = sizes.code_bits;
    mask_ = static_cast<uint32_t>(slots - 1);
    last_ = in_shared ? mask_ : static_cast<uint32_t>(sizes.entries - 1);
    entry_bytes_ = static_cast<uint32_t>(kEntryBytes << shift);
    table_bytes_ = entry_bytes_ * static_cast<uint32_t>(in_shared ? slots : sizes.entries);
    if (in_shared) {
      // A thread has an entry for all its copies, and begins with another than its neighbours: they meet in
      // no bank. Several loads are on their way at once.
      constexpr int kBatch = 4;
      const int all = sizes.tables * slots;
      const int copies = 1 << shift;
      const auto stride = static_cast<int>(blockDim.x);
      for (auto first = static_cast<int>(threadIdx.x); first < all; first += kBatch * stride) {
        Entry batch[kBatch];
#pragma unroll
        for (int b = 0; b < kBatch; ++b) {
          const int slot = first + b * stride;
          const int entry = slot & (slots - 1);
          const int from = (slot >> sizes.code_bits) * sizes.entries + entry;
          batch[b] = Entry{};
          if (slot < all && entry < sizes.entries) batch[b] = __ldg(static_cast<const Entry*>(table) + from);
        }
#pragma unroll
        for (int b = 0; b < kBatch; ++b) {
          const int slot = first + b * stride;
          if (slot >= all) break;
          for (int c = 0; c < copies; ++c) {
            static_cast<Entry*>(shared)[(slot << shift) + ((c + lane) & (copies - 1))] = batch[b];
          }
        }
      }
    }
    odd_ = kDim == 8 && lane % 2 == 1;
    const int copy = (kDim == 8 ? lane / 2 : lane) & ((1 << shift) - 1);
    const int offset = copy * kEntryBytes + (odd_ ? 8 : 0);
    shared_ = static_cast<const unsigned char*>(shared) + offset;
    place_ = in_shared ? shared_ : static_cast<const unsigned char*>(table) + offset;
  }

 protected:
  using Entry = std::conditional_t<kDim == 2, uint32_t, std::conditional_t<kDim == 4, uint2, uint4>>;
  // What a lane takes of an entry: a pair of values, or two.
  using Piece = std::conditional_t<kDim == 2, uint32_t, uint2>;
  // Vectors that a lane has values of in a step.
  static constexpr int kVectors = kDim == 2 ? 4 : 2;
  static constexpr int kPairs = 4 / kVectors;

  static __device__ __forceinline__ uint32_t pair_of(uint32_t piece, int /*i*/) {
    return piece;
  }
  static __device__ __forceinline__ uint32_t pair_of(uint2 piece, int i) {
    return i == 0 ? piece.x : piece.y;
  }
  static __device__ __forceinline__ float2 floats(uint32_t pair) {
    return {HalfPair<__half>::low(pair), HalfPair<__half>::high(pair)};
  }
  static __device__ __forceinline__ float2 plus(float2 a, float2 b) {
    return {a.x + b.x, a.y + b.y};
  }

  // The codes of a step's vectors: of the pairs of registers a[0..3] with two weights a vector, else of the
  // lane's row and of that eight rows below.
  template <int kStep>
  __device__ __forceinline__ void codes_of_step(const uint32_t (&words)[kBits],
                                                uint32_t (&codes)[kVectors]) const {
    if constexpr (kDim == 2) {
      codes[0] = field<4 * kStep>(words);
      codes[1] = field<4 * kStep + 1>(words);
      codes[2] = field<4 * kStep + 2>(words);
      codes[3] = field<4 * kStep + 3>(words);
    } else if constexpr (kDim == 4) {
      codes[0] = field<2 * kStep>(words);
      codes[1] = field<2 * kStep + 1>(words);
    } else {
      const uint32_t own = field<kStep>(words);
      const uint32_t other = __shfl_xor_sync(~0U, own, 1);
      codes[0] = odd_ ? other : own;
      codes[1] = odd_ ? own : other;
    }
  }

  // The register that holds pair `i` of vector `v`.
  static __host__ __device__ constexpr int register_of(int v, int i) {
    return kDim == 2 ? v : v + 2 * i;
  }

  const unsigned char* shared_ = nullptr;  // the lane's copy of the first table in shared memory
  const unsigned char* place_ = nullptr;   // of the first table, wherever it is
  int tables_ = 0;
  int code_bits_ = 0;
  uint32_t mask_ = 0;
  uint32_t last_ = 0;
  uint32_t entry_bytes_ = 0;
  uint32_t table_bytes_ = 0;
  bool odd_ = false;

 private:
  template <int kField>
  static __device__ __forceinline__ uint32_t field(const uint32_t (&words)[kBits]) {
    constexpr int kWord = kField * kFieldBits / 32;
    constexpr int kShift = kField * kFieldBits % 32;
    constexpr uint32_t kMask = ~0U >> (32 - kFieldBits);
    if constexpr (kShift + kFieldBits <= 32) {
      return (words[kWord] >> kShift) & kMask;
    } else {
      return __funnelshift_r(words[kWord], words[kWord + 1], kShift) & kMask;
    }
  }
};

// Any number of tables, for the decode loop alone: float32 sums, table by table.
template <int kDim, int kWords>
class SumFragments : public SumTables<kDim, kWords, kMostSumBytes> {
  using Base = SumTables<kDim, kWords, kMostSumBytes>;

 public:
  static constexpr bool kSums = true;

  // The values behind registers a[0..3] of step kStep.
  template <int kStep>
  __device__ __forceinline__ void sums(const uint32_t (&words)[kWords], float2 (&values)[4]) const {
    uint32_t codes[Base::kVectors];
    this->template codes_of_step<kStep>(words, codes);
    const unsigned char* table = this->place_;
    int shift = 0;
    // Not unrolled: the loop is written out for every fragment of a block.
#pragma unroll 1
    for (int t = 0; t < this->tables_; ++t) {
#pragma unroll
      for (int v = 0; v < Base::kVectors; ++v) {
        const uint32_t code = (codes[v] >> shift) & this->mask_;
        const auto piece = *reinterpret_cast<const typename Base::Piece*>(
            table + (code < this->last_ ? code : this->last_) * this->entry_bytes_);
#pragma unroll
        for (int i = 0; i < Base::kPairs; ++i) {
          float2& total = values[Base::register_of(v, i)];
          const float2 more = Base::floats(Base::pair_of(piece, i));
          total = t == 0 ? more : Base::plus(total, more);
        }
      }
      table += this->table_bytes_;
      shift += this->code_bits_;
    }
  }
};

// Shared memory for as many tables as a field has room for codes of, in as many copies as are of use. More
// than kMostSumBytes gained nothing.
__host__ __device__ constexpr int fixed_sum_bytes(int dim, int words, int tables) {
  const int bytes = tables * 2 * dim << (dim * words / tables + sum_copy_bits(dim));
  return bytes < kMostSumBytes ? bytes : kMostSumBytes;
}

// kTables of them in shared memory, for the streaming loop: sums rounded once.
template <int kDim, int kWords, int kTables>
class FixedSumFragments : public SumTables<kDim, kWords, fixed_sum_bytes(kDim, kWords, kTables)> {
  using Base = SumTables<kDim, kWords, fixed_sum_bytes(kDim, kWords, kTables)>;

 public:
  // Registers a[0..3] of step kStep, rounded to T.
  template <class T, int kStep>
  __device__ __forceinline__ void fragment(const uint32_t (&words)[kWords], uint32_t (&a)[4]) const {
    uint32_t codes[Base::kVectors];
    this->template codes_of_step<kStep>(words, codes);
#pragma unroll
    for (int v = 0; v < Base::kVectors; ++v) {
      typename Base::Piece pieces[kTables];
#pragma unroll
      for (int t = 0; t < kTables; ++t) {
        const uint32_t code = (codes[v] >> (t * this->code_bits_)) & this->mask_;
        pieces[t] = *reinterpret_cast<const typename Base::Piece*>(
            this->shared_ + static_cast<uint32_t>(t) * this->table_bytes_ + code * this->entry_bytes_);
      }
#pragma unroll
      for (int i = 0; i < Base::kPairs; ++i) {
        uint32_t pairs[kTables];
#pragma unroll
        for (int t = 0; t < kTables; ++t) pairs[t] = Base::pair_of(pieces[t], i);
        a[Base::register_of(v, i)] = sum<T>(pairs);
      }
    }
  }

  template <class T>
  static constexpr bool kHasOffset = false;

  template <class T, int kStep>
  __device__ __forceinline__ void raw_fragment(const uint32_t (&words)[kWords], uint32_t (&a)[4]) const {
    fragment<T, kStep>(words, a);
  }

 private:
  template <class T>
  static __device__ __forceinline__ uint32_t sum(const uint32_t (&pairs)[kTables]) {
    if constexpr (std::is_same_v<T, __half> && kTables == 2) {
      // Rounded once, as a float32 sum of two float16 is.
      return HalfPair<__half>::add(pairs[0], pairs[1]);
    } else {
      float2 total = Base::floats(pairs[0]);
#pragma unroll
      for (int t = 1; t < kTables; ++t) total = Base::plus(total, Base::floats(pairs[t]));
      if constexpr (std::is_same_v<T, __half>) {
        const __half2 pair = __floats2half2_rn(total.x, total.y);
        return *reinterpret_cast<const uint32_t*>(&pair);
      } else {
        const __nv_bfloat162 pair = __floats2bfloat162_rn(total.x, total.y);
        return *reinterpret_cast<const uint32_t*>(&pair);
      }
    }
  }
};

}  // namespace quantloom::cuda
