// The products of every decoder; units of their own define them (cmake/cuda.cmake).
#include <array>

#include "formats/codebook_fragments.cuh"
#include "formats/sum_fragments.cuh"
#include "formats/uniform_fragments.cuh"
#include "formats/vector_fragments.cuh"
#include "kernels/launchers.hpp"
#include "kernels/products.cuh"

namespace quantloom::cuda {
namespace {

// How many tables of a vector codebook with several the streaming loop takes: as many codes of 8 bits, or of
// 4, as a field has room for. cmake/cuda.cmake makes the same.
constexpr int stream_tables(int dim, int bits) {
  if (dim == 8) return bits;
  return dim == 4 && bits == 3 ? 0 : 2;
}

template <class Decoder>
constexpr Launchers launchers() {
  return {Decoder::kSharedBytes,
          Decoder::kQuads,
          &launch_stream<Decoder>,
          &launch_tiles<Decoder>,
          &launch_tiles_wgmma<Decoder>,
          &launch_decoded<Decoder>,
          &launch_decode_fragments<Decoder>};
}

template <template <int> class Fragments>
constexpr std::array<Launchers, 8> all_launchers() {
  return {launchers<Fragments<1>>(), launchers<Fragments<2>>(), launchers<Fragments<3>>(),
          launchers<Fragments<4>>(), launchers<Fragments<5>>(), launchers<Fragments<6>>(),
          launchers<Fragments<7>>(), launchers<Fragments<8>>()};
}

// The tile loops for vectors with codes of 8 bits, one for each table: cmake/cuda.cmake makes the same.
template <class Decoder>
constexpr Launchers with_tiles(Launchers all) {
  all.tiles = &launch_tiles<Decoder>;
  all.tiles_wgmma = &launch_tiles_wgmma<Decoder>;
  return all;
}

template <int kDim, int kWords, bool kInShared>
constexpr Launchers vector_launchers() {
  using Decoder = VectorFragments<kDim, kWords, kInShared>;
  const Launchers all{.table_bytes = Decoder::kSharedBytes,
                      .quads = Decoder::kQuads,
                      .stream = &launch_stream<Decoder>,
                      .tiles = nullptr,
                      .tiles_wgmma = nullptr,
                      .decoded = &launch_decoded<Decoder>,
                      .decode = &launch_decode_fragments<Decoder>};
  if constexpr (kDim * kWords == 8 && kDim > 2) return with_tiles<Decoder>(all);
  return all;
}

// With the streaming loop for kTables tables in shared memory; 0: without.
template <int kDim, int kWords, int kTables>
constexpr Launchers sum_launchers() {
  using Decoder = SumFragments<kDim, kWords>;
  Launchers all{.table_bytes = Decoder::kSharedBytes,
                .stream = nullptr,
                .tiles = nullptr,
                .tiles_wgmma = nullptr,
                .decoded = &launch_decoded<Decoder>,
                .decode = &launch_decode_fragments<Decoder>};
  if constexpr (kTables > 0) {
    using Streamed = FixedSumFragments<kDim, kWords, kTables>;
    all.table_bytes = Streamed::kSharedBytes;
    all.stream = &launch_stream<Streamed>;
    if constexpr (kDim * kWords == 8 * kTables && kTables != 3) return with_tiles<Streamed>(all);
  }
  return all;
}

// `bits` as fragments::sum_bits() has them.
const Launchers& sum_launchers_of(const FragmentLayout& layout) {
  static constexpr Launchers kTwo = sum_launchers<2, 4, stream_tables(2, 4)>();
  static constexpr std::array<Launchers, 3> kFour = {sum_launchers<4, 2, stream_tables(4, 2)>(),
                                                     sum_launchers<4, 3, stream_tables(4, 3)>(),
                                                     sum_launchers<4, 4, stream_tables(4, 4)>()};
  static constexpr std::array<Launchers, 3> kEight = {sum_launchers<8, 2, stream_tables(8, 2)>(),
                                                      sum_launchers<8, 3, stream_tables(8, 3)>(),
                                                      sum_launchers<8, 4, stream_tables(8, 4)>()};
  return layout.dim == 2 ? kTwo : (layout.dim == 4 ? kFour : kEight)[static_cast<size_t>(layout.bits - 2)];
}

const Launchers& vector_launchers_of(const FragmentLayout& layout) {
  static constexpr std::array<Launchers, 5> kTwo = {
      vector_launchers<2, 2, true>(), vector_launchers<2, 3, true>(), vector_launchers<2, 4, true>(),
      vector_launchers<2, 5, true>(), vector_launchers<2, 6, true>()};
  static constexpr std::array<Launchers, 4> kFour = {
      vector_launchers<4, 1, true>(), vector_launchers<4, 2, true>(), vector_launchers<4, 3, true>(),
      vector_launchers<4, 4, false>()};
  static constexpr std::array<Launchers, 3> kEight = {
      vector_launchers<8, 1, true>(), vector_launchers<8, 2, true>(), vector_launchers<8, 2, false>()};
  if (layout.dim == 2) return kTwo[static_cast<size_t>(layout.bits - 2)];
  if (layout.dim == 4) return kFour[static_cast<size_t>(layout.bits - 1)];
  return kEight[layout.bits == 1 ? 0 : layout.code_bits <= 12 ? 1 : 2];
}

}  // namespace

const Launchers& launchers_of(const FragmentLayout& layout) {
  if (layout.tables > 1) return sum_launchers_of(layout);
  if (layout.dim > 1) return vector_launchers_of(layout);
  static constexpr auto kUniform = all_launchers<UniformFragments>();
  static constexpr auto kCodebook = all_launchers<CodebookFragments>();
  return (layout.table_entries > 0 ? kCodebook : kUniform)[static_cast<size_t>(layout.bits - 1)];
}

bool is_streamed(const FragmentLayout& layout) {
  if (layout.tables == 1) return true;
  return layout.tables == stream_tables(layout.dim, layout.bits);
}

bool is_tiled(const FragmentLayout& layout) {
  return !layout.outliers && is_streamed(layout) && launchers_of(layout).tiles != nullptr;
}

// Measured on an H200.
int repeated_tokens(const FragmentLayout& layout) {
  const bool outside = layout.dim > 1 && layout.tables == 1 && layout.code_bits > 12;
  if (outside) return kMaxStreamTokens;  // the table is not in shared memory
  return layout.tables > 2 ? 32 : kMostRepeatedTokens;
}

}  // namespace quantloom::cuda
