// Trellis codes on the device: ring words in the order of the kernels, and decoded rows.
#include <algorithm>

#include "common/check.cuh"
#include "kernels/trellis_choice.hpp"
#include "kernels/trellis_dense_launch.hpp"
#include "kernels/trellis_product.hpp"

namespace quantloom::cuda {
namespace {

constexpr int kThreads = 256;

struct Words {
  bool fragments;
  int ring_words;
  int64_t column_blocks;
  int64_t row_tiles;
  int64_t column_tiles;
};

Words words_of(const TrellisLayout& layout) {
  return {layout.fragments, layout.ring.words(), layout.column_blocks, layout.row_tiles, layout.column_tiles};
}

__global__ void __launch_bounds__(kThreads)
    prepare_words(const Words words, int64_t count, const uint32_t* packed, uint32_t* prepared) {
  const int64_t i = static_cast<int64_t>(blockIdx.x) * kThreads + threadIdx.x;
  if (i >= count) return;
  const TrellisWord word = trellis_word(words.fragments, words.ring_words, words.column_blocks, i);
  const bool inside = word.row_tile < words.row_tiles && word.column_tile < words.column_tiles;
  const int64_t at = (word.column_tile * words.row_tiles + word.row_tile) * words.ring_words + word.word;
  prepared[i] = inside ? packed[at] : 0U;
}

__global__ void __launch_bounds__(kThreads)
    unprepare_words(const Words words, int64_t count, const uint32_t* prepared, uint32_t* packed) {
  const int64_t i = static_cast<int64_t>(blockIdx.x) * kThreads + threadIdx.x;
  if (i >= count) return;
  const int64_t tile = i / words.ring_words;
  packed[i] =
      prepared[trellis_place(words.fragments, words.ring_words, words.column_blocks, tile % words.row_tiles,
                             tile / words.row_tiles, static_cast<int>(i - tile * words.ring_words))];
}

dim3 grid_for(int64_t threads) {
  const int64_t blocks = ceil_div(threads, kThreads);
  if (blocks > 2147483647) throw Unsupported(text_of("no CUDA kernel for ", threads, " words of a trellis"));
  return dim3(static_cast<unsigned>(blocks));
}

// Rows [first_row, first_row + rows).
TrellisDense dense_of(const TrellisLayout& layout, const PreparedPlanes& w, int64_t first_row, int64_t rows,
                      void* out, DType dtype, int64_t stride) {
  TrellisDense dense;
  dense.codes = reinterpret_cast<const uint4*>(w.plane("codes").bytes()) +
                first_row / 64 * layout.column_blocks * layout.ring.words() * 4;
  if (w.has("table")) dense.table = reinterpret_cast<const uint16_t*>(w.plane("table").bytes());
  dense.input_scales = reinterpret_cast<const __half*>(w.plane("input_scales").bytes());
  dense.output_scales = reinterpret_cast<const __half*>(w.plane("output_scales").bytes()) + first_row;
  dense.map = trellis_map(layout, true);
  dense.ring = layout.ring;
  dense.code = layout.code;
  dense.fragments = layout.fragments;
  dense.rotated = layout.rotated;
  dense.n = static_cast<int>(std::min(rows, layout.n - first_row));
  dense.k = static_cast<int>(layout.k);
  dense.bands = static_cast<int>(ceil_div(dense.n, kTrellisBand));
  dense.column_blocks = static_cast<int>(layout.column_blocks);
  dense.dtype = dtype;
  dense.out = out;
  dense.stride = stride;
  return dense;
}

}  // namespace

void prepare_trellis_words(const TrellisLayout& layout, const uint32_t* packed, uint32_t* prepared,
                           cudaStream_t stream) {
  const int64_t count = layout.words();
  if (count == 0) return;
  prepare_words<<<grid_for(count), kThreads, 0, stream>>>(words_of(layout), count, packed, prepared);
  check_cuda(cudaGetLastError(), "prepare_cuda: launch of prepare_words");
}

void unprepare_trellis_words(const TrellisLayout& layout, const uint32_t* prepared, uint32_t* packed,
                             cudaStream_t stream) {
  const int64_t count = layout.row_tiles * layout.column_tiles * layout.ring.words();
  if (count == 0) return;
  unprepare_words<<<grid_for(count), kThreads, 0, stream>>>(words_of(layout), count, prepared, packed);
  check_cuda(cudaGetLastError(), "unprepare_cuda: launch of unprepare_words");
}

void decode_trellis(const TrellisLayout& layout, const PreparedPlanes& w, int64_t first_row, int64_t rows,
                    void* out, DType dtype, int64_t stride, cudaStream_t stream) {
  if (rows <= 0 || layout.k == 0) return;
  const TrellisDense dense = dense_of(layout, w, first_row, rows, out, dtype, stride);
  if (!has_exact_words(layout)) return launch_trellis_decode_any(dense, stream);
  with_trellis_code<1, 8>(
      layout, [&]<int kBits, TrellisHash kHash>() { launch_trellis_decode<kBits, kHash>(dense, stream); });
}

void decode_trellis_rounded(const TrellisLayout& layout, const PreparedPlanes& w, int64_t first_row,
                            int64_t rows, void* out, DType dtype, int64_t stride, cudaStream_t stream) {
  if (rows <= 0 || layout.k == 0) return;
  const TrellisDense dense = dense_of(layout, w, first_row, rows, out, dtype, stride);
  if (!has_exact_words(layout)) return launch_trellis_dense_any(dense, stream);
  with_trellis_code<1, 8>(
      layout, [&]<int kBits, TrellisHash kHash>() { launch_trellis_dense<kBits, kHash>(dense, stream); });
}

}  // namespace quantloom::cuda
