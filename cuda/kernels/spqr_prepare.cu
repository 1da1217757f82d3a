// Scales and zero points of the format "spqr" into fragment order, and back.
#include <algorithm>

#include "common/check.cuh"
#include "formats/bilevel_order.hpp"
#include "kernels/packed_codes.cuh"
#include "kernels/spqr_fragments.hpp"
#include "kernels/spqr_product.hpp"
#include "quantloom/formats/bit_packing.hpp"

namespace quantloom::cuda {
namespace {

constexpr int kThreads = 256;

// Codes and grids as both orders have them.
struct Parameters {
  uint32_t* codes[2];   // of scales and of zero points: rows of `words` words
  uint16_t* grids[2];   // [groups, grid_count, 2]
  uint8_t* fields;      // [row blocks, groups, 8, bytes]
  uint16_t* own_grids;  // [grid_count, groups, 4]
  int bits[2];
  int64_t words[2];
  int bytes;
  int64_t n;
  int64_t groups;
  int64_t grid_count;
  int64_t lanes;  // row blocks * groups * 8
};

// A thread: the eight rows of a lane in a group.
template <bool kBack>
__global__ void __launch_bounds__(kThreads) move_fields(const __grid_constant__ Parameters p) {
  const int64_t at = static_cast<int64_t>(blockIdx.x) * kThreads + threadIdx.x;
  if (at >= p.lanes) return;
  const int64_t group = at / 8 % p.groups;
  const int64_t first_row = at / 8 / p.groups * 64 + at % 8;
  uint8_t fields[16] = {};
  uint8_t* const own = p.fields + at * p.bytes;
  for (int i = 0; kBack && i < p.bytes; ++i) fields[i] = own[i];
  for (int plane = 0; plane < 2; ++plane) {
    uint32_t* const row_codes = p.codes[plane] + group * p.words[plane];
    for (int i = 0; i < 8; ++i) {
      const int64_t row = first_row + 8 * i;
      if (row >= p.n) break;
      const fragments::BilevelField field = fragments::bilevel_field(p.bytes, plane == 1, i);
      if constexpr (kBack) {
        put_code(row_codes, p.bits[plane], row,
                 fields[field.byte] >> field.bit & (~0U >> (32 - p.bits[plane])));
      } else {
        const uint32_t code = read_code(row_codes, p.bits[plane], row);
        fields[field.byte] = static_cast<uint8_t>(fields[field.byte] | code << field.bit);
      }
    }
  }
  for (int i = 0; !kBack && i < p.bytes; ++i) own[i] = fields[i];
}

// A thread: the four numbers of a block of rows in a group.
template <bool kBack>
__global__ void __launch_bounds__(kThreads) move_grids(const __grid_constant__ Parameters p) {
  const int64_t at = static_cast<int64_t>(blockIdx.x) * kThreads + threadIdx.x;
  if (at >= p.grid_count * p.groups) return;
  const int64_t block = at / p.groups;
  const int64_t group = at % p.groups;
  for (int i = 0; i < 4; ++i) {
    uint16_t& canonical = p.grids[i / 2][(group * p.grid_count + block) * 2 + i % 2];
    uint16_t& own = p.own_grids[at * 4 + i];
    if constexpr (kBack) {
      canonical = own;
    } else {
      own = canonical;
    }
  }
}

template <class T>
T* data(const std::map<std::string, Tensor>& planes, const char* name) {
  return reinterpret_cast<T*>(const_cast<std::byte*>(planes.at(name).bytes()));
}

Parameters parameters_of(const FragmentLayout& layout, const Spqr& format,
                         const std::map<std::string, Tensor>& packed,
                         const std::map<std::string, Tensor>& prepared) {
  return {.codes = {data<uint32_t>(packed, "scales"), data<uint32_t>(packed, "zeros")},
          .grids = {data<uint16_t>(packed, "scale_grids"), data<uint16_t>(packed, "zero_grids")},
          .fields = data<uint8_t>(prepared, "parameters"),
          .own_grids = data<uint16_t>(prepared, "grids"),
          .bits = {format.scale_bits, format.zero_bits},
          .words = {packed_words(layout.n, format.scale_bits), packed_words(layout.n, format.zero_bits)},
          .bytes = layout.parameter_bytes,
          .n = layout.n,
          .groups = layout.group_count,
          .grid_count = layout.grid_count,
          .lanes = layout.row_blocks * layout.group_count * 8};
}

unsigned grid_for(int64_t threads) {
  const int64_t blocks = ceil_div(threads, kThreads);
  if (blocks > 2147483647)
    throw Unsupported(text_of("prepare_cuda: no kernel for ", threads, " pieces of work"));
  return static_cast<unsigned>(blocks);
}

void zero(const Tensor& plane, cudaStream_t stream) {
  if (plane.byte_count() == 0) return;
  check_cuda(cudaMemsetAsync(const_cast<std::byte*>(plane.bytes()), 0,
                             static_cast<size_t>(plane.byte_count()), stream),
             "prepare_cuda: zeroing a plane");
}

template <bool kBack>
void launch(const Parameters& p, cudaStream_t stream) {
  if (p.n == 0) return;
  move_fields<kBack><<<grid_for(p.lanes), kThreads, 0, stream>>>(p);
  check_cuda(cudaGetLastError(), "prepare_cuda: launch of move_fields");
  move_grids<kBack><<<grid_for(p.grid_count * p.groups), kThreads, 0, stream>>>(p);
  check_cuda(cudaGetLastError(), "prepare_cuda: launch of move_grids");
}

}  // namespace

void prepare_spqr_parameters(const FragmentLayout& layout, const PackedTensor& packed,
                             PreparedPlanes& prepared, cudaStream_t stream) {
  if (layout.n == 0 || layout.k == 0) {
    zero(prepared.plane("parameters"), stream);
    zero(prepared.plane("grids"), stream);
    return;
  }
  launch<false>(parameters_of(layout, *as_spqr(*packed.format), packed.planes, prepared.planes), stream);
}

void unprepare_spqr_parameters(const FragmentLayout& layout, const PreparedPlanes& prepared,
                               PackedTensor& packed, cudaStream_t stream) {
  if (layout.n == 0 || layout.k == 0) return;
  zero(packed.plane("scales"), stream);
  zero(packed.plane("zeros"), stream);
  launch<true>(parameters_of(layout, *as_spqr(*packed.format), packed.planes, prepared.planes), stream);
}

}  // namespace quantloom::cuda
